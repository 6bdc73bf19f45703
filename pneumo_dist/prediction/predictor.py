"""The forward pass without gradients: uint8 films -> mean probabilities over flips and models.

Trainer, evaluation, inference and `predict` all use it. No files, collectives or thresholds in here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pneumo_dist.data.loaders import to_device
from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.unet import normalise

log = logging.getLogger(__name__)


class Forward(NamedTuple):
    """What the network says of N films, means over flips and models."""

    maps: Tensor  # float32 (N, S, S), probability of each pixel
    scores: Tensor | None = None  # float32 (N,), probability of a pneumothorax; None: a model has no image-level head

    def films(self) -> Iterator[tuple[NDArray[np.float32], float | None]]:
        """Yield map (S, S) and score of each film."""
        scores = [None] * len(self.maps) if self.scores is None else self.scores.tolist()
        return zip(self.maps.numpy(), scores, strict=True)


TTA = {"none": (False,), "hflip": (False, True)}


class Predictor:
    """Mean probabilities of one or more models over flips, at the models' own size(s).

    On the CPU each film is a batch of its own on one core, with as many films at once as torch has threads. A film's
    bits then depend neither on its batch nor on the number of threads, and cores do not wait for each other inside a
    layer (at 256 px and above: as fast on an idle machine, several times faster on a busy one). On CUDA a batch is
    forwarded as a whole, together with its mirror image.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        sizes: Sequence[int] | int,
        device: torch.device | str = "cpu",
        tta: str = "hflip",
        amp: str = "auto",
    ) -> None:
        """Use `models` as they are (evaluation mode, on `device`, not wrapped in DDP), one size or one per model.

        Raises:
            ValueError: no model, a model in training mode, or an unknown `tta`.
        """
        self.device = torch.device(device)
        self.tta = tta
        self.dtype = amp_dtype(amp, self.device)
        self._closed = False
        if not models or any(model.training for model in models):
            raise ValueError("Predictor needs at least one model, each in evaluation mode")
        if tta not in TTA:
            raise ValueError(f"tta={tta!r} is unknown: choose one of {', '.join(TTA)}")
        model_sizes = [sizes] * len(models) if isinstance(sizes, int) else list(sizes)
        self.groups: dict[int, list[nn.Module]] = {size: [] for size in sorted(set(model_sizes))}
        for model, size in zip(models, model_sizes, strict=True):
            self.groups[size].append(model)
        # Films are ranked by the image-level heads only if every model has one.
        self.scored = all(model.film_head is not None for model in models)

    @property
    def sizes(self) -> list[int]:
        """The input sizes of the models in pixels, ascending, each once."""
        return list(self.groups)

    def weight(self, size: int) -> float:
        """Return the share of the models whose input size is `size`."""
        return len(self.groups[size]) / sum(map(len, self.groups.values()))

    def close(self) -> None:
        """Cancel forward passes that were launched and have not begun."""
        self._closed = True

    def probabilities(self, images: Tensor, size: int | None = None) -> Forward:
        """Return the mean over flips and the models of one size.

        Args:
            images: uint8 (N, 1, S, S) on the CPU.
            size: S; defaults to the size of `images`.
        """
        return self.launch(images, size)()

    def launch(self, images: Tensor, size: int | None = None) -> Callable[[], Forward]:
        """Start `probabilities` and return a function that waits for the result; the caller can work meanwhile."""
        if self.device.type == "cpu":
            return self._on_cpu(images, self._models(images, size))
        wait = self.reduce(images, lambda forward: [part for part in forward if part is not None], size)
        return lambda: Forward(*wait())

    def _models(self, images: Tensor, size: int | None) -> list[nn.Module]:
        return self.groups[images.shape[-1] if size is None else size]

    def _on_cpu(self, images: Tensor, models: Sequence[nn.Module]) -> Callable[[], Forward]:
        pool = _one_core_threads(torch.get_num_threads())
        films = [
            [
                pool.submit(self._forward, images[i : i + 1], model, (flip,))
                for model in models
                for flip in TTA[self.tta]
            ]
            for i in range(len(images))
        ]

        def wait() -> Forward:
            means = [_mean([part for future in film for part in future.result()]) for film in films]
            return _joined(means, images.shape[-1])

        return wait

    def reduce(
        self, images: Tensor, function: Callable[[Forward], list[Tensor]], size: int | None = None
    ) -> Callable[[], list[Tensor]]:
        """Start `function(probabilities)` on the GPU; return a function that waits for its tensors, on the CPU.

        It waits for nothing that was started later: a flag read from the device would wait for the next batch too.
        """
        models = self._models(images, size)
        moved = to_device(images, self.device)
        mean = self._mean_on_gpu(moved, models)
        parts = function(mean)
        if self.dtype is torch.float16:  # only float16 can overflow
            finite = torch.isfinite(mean.maps).all()
            parts = [*parts, finite if mean.scores is None else finite & torch.isfinite(mean.scores).all()]
        host = [_pinned_copy(part) for part in parts]
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))

        def wait() -> list[Tensor]:
            ready.synchronize()
            if self.dtype is not torch.float16:
                return host
            *answers, finite = host
            if bool(finite):
                return answers
            log.warning("a batch of %d films overflowed %s: repeating it in float32", len(images), self.dtype)
            return [part.cpu() for part in function(self._mean_on_gpu(moved, models, exact=True))]

        return wait

    def _mean_on_gpu(self, images: Tensor, models: Sequence[nn.Module], exact: bool = False) -> Forward:
        """Return the mean over flips and models of films on the GPU; a film and its mirror image are in one batch."""
        return _mean([part for model in models for part in self._forward(images, model, TTA[self.tta], exact)])

    @torch.inference_mode()
    def _forward(self, images: Tensor, model: nn.Module, flips: Sequence[bool], exact: bool = False) -> list[Forward]:
        """Return what one model says of uint8 films (N, 1, S, S) on its device: for each of `flips`, mirrored if true.

        All in one batch. The maps are mirrored back.
        """
        if self._closed:
            raise CancelledError
        inputs = normalise(images)
        inputs = torch.cat([inputs.flip(-1) if flip else inputs for flip in flips])
        with autocast(None if exact else self.dtype, self.device):
            logits, film_logits = model(inputs)
        maps = torch.sigmoid(logits.float()).squeeze(1).chunk(len(flips))
        scores: Sequence[Tensor | None] = [None] * len(flips)
        if film_logits is not None and self.scored:
            scores = torch.sigmoid(film_logits.float()).chunk(len(flips))
        mirrored = [part.flip(-1) if flip else part for part, flip in zip(maps, flips, strict=True)]
        return [Forward(part, score) for part, score in zip(mirrored, scores, strict=True)]


def _mean(passes: Sequence[Forward]) -> Forward:
    """Sum in the order given and divide once: the bits do not depend on which pass was ready first."""

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        total = tensors[0].clone()
        for tensor in tensors[1:]:
            total += tensor
        return total / len(tensors)

    scores = [one.scores for one in passes if one.scores is not None]
    return Forward(mean([one.maps for one in passes]), mean(scores) if scores else None)


def _joined(films: Sequence[Forward], size: int) -> Forward:
    """Join results of one film each."""
    if not films:
        return Forward(torch.empty((0, size, size)))
    scores = [film.scores for film in films if film.scores is not None]
    return Forward(torch.cat([film.maps for film in films]), torch.cat(scores) if scores else None)


def _pinned_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@cache
def _one_core_threads(count: int) -> ThreadPoolExecutor:
    """Return a pool of `count` threads in which torch uses one core each; the caller keeps its number of threads."""
    started = threading.Barrier(count + 1)

    def limit() -> None:
        torch.get_num_threads()  # the first call in a thread resets its number: it has to come before ours
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "forward", initializer=limit)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()  # every thread has run `limit`
    torch.set_num_threads(count)  # `limit` also changed the setting of the whole process
    return pool
