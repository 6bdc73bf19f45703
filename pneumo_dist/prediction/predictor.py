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

from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.unet import normalise

log = logging.getLogger(__name__)

Pass = tuple[nn.Module, bool]  # a model, and whether it sees the mirrored films


class Forward(NamedTuple):
    """What the network says of N films, means over flips and models, on the CPU."""

    maps: Tensor  # float32 (N, S, S), probability of each pixel
    scores: Tensor | None  # float32 (N,), probability of a pneumothorax; None: a model has no image-level head

    def films(self) -> Iterator[tuple[NDArray[np.float32], float | None]]:
        """Yield map (S, S) and score of each film."""
        scores = [None] * len(self.maps) if self.scores is None else self.scores.tolist()
        return zip(self.maps.numpy(), scores, strict=True)

    def each(self, function: Callable[[Tensor], Tensor]) -> Forward:
        """Apply a function to both tensors."""
        return Forward(function(self.maps), None if self.scores is None else function(self.scores))


TTA = {"none": (False,), "hflip": (False, True)}


class Predictor:
    """Mean probabilities of one or more models over flips, at the models' own size(s).

    On the CPU each film is a batch of its own on one core, with as many films at once as torch has threads. A film's
    bits then depend neither on its batch nor on the number of threads, and cores do not wait for each other inside a
    layer (at 256 px and above: as fast on an idle machine, several times faster on a busy one). On CUDA a batch is
    forwarded as a whole.
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
        models = self.groups[images.shape[-1] if size is None else size]
        passes = [(model, flip) for model in models for flip in TTA[self.tta]]
        return self._on_cpu(images, passes) if self.device.type == "cpu" else self._on_gpu(images, passes)

    def _on_cpu(self, images: Tensor, passes: Sequence[Pass]) -> Callable[[], Forward]:
        pool = _one_core_threads(torch.get_num_threads())
        films = [
            [pool.submit(self._forward, images[i : i + 1], *one_pass) for one_pass in passes]
            for i in range(len(images))
        ]

        def wait() -> Forward:
            return _joined([_mean([future.result() for future in film]) for film in films], images.shape[-1])

        return wait

    def _on_gpu(self, images: Tensor, passes: Sequence[Pass]) -> Callable[[], Forward]:
        moved = images.to(self.device, non_blocking=True)
        mean = _mean([self._forward(moved, *one_pass) for one_pass in passes])
        # Only float16 can overflow. The check runs on the device, so that the host does not wait for it here.
        finite = None
        if self.dtype is torch.float16:
            finite = torch.isfinite(mean.maps).all()
            if mean.scores is not None:
                finite &= torch.isfinite(mean.scores).all()
        host = mean.each(_pinned_copy)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))

        def wait() -> Forward:
            ready.synchronize()
            if finite is None or bool(finite):
                return host
            log.warning("a batch of %d films overflowed %s: repeating it in float32", len(images), self.dtype)
            moved = images.to(self.device)
            return _mean([self._forward(moved, *one_pass, exact=True) for one_pass in passes]).each(Tensor.cpu)

        return wait

    @torch.inference_mode()
    def _forward(self, images: Tensor, model: nn.Module, flip: bool, exact: bool = False) -> Forward:
        """Return what one model says of uint8 films (N, 1, S, S), mirrored first if `flip`, on its device."""
        if self._closed:
            raise CancelledError
        inputs = normalise(images)
        with autocast(None if exact else self.dtype, self.device):
            logits, film_logits = model(inputs.flip(-1) if flip else inputs)
        maps = torch.sigmoid(logits.float()).squeeze(1)
        scores = None if film_logits is None or not self.scored else torch.sigmoid(film_logits.float())
        return Forward(maps.flip(-1) if flip else maps, scores)


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
        return Forward(torch.empty((0, size, size)), None)
    scores = [film.scores for film in films if film.scores is not None]
    return Forward(torch.cat([film.maps for film in films]), torch.cat(scores) if scores else None)


def _pinned_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True).copy_(tensor, non_blocking=True)


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
