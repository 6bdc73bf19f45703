"""From uint8 films to probabilities: normalise, flips, models, mean. The one forward pass without gradients.

Trainer, evaluation, inference and `predict` all come through here. No files, collectives or thresholds in here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor, nn

from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.unet import normalise

log = logging.getLogger(__name__)

Pass = tuple[nn.Module, bool]  # a model, and whether its films are mirrored

TTA = {"none": (False,), "hflip": (False, True)}


class Predictor:
    """Mean probabilities of one or more models over flips, at the models' own size(s).

    On the CPU each film is forwarded alone, on one core, as many at once as torch has threads: then a film's bits
    depend neither on its batch nor on the number of threads, and cores never wait for each other inside a layer
    (256 px and above: no slower on an idle machine, several times faster on a busy one). On CUDA whole batches are.
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
        every = [sizes] * len(models) if isinstance(sizes, int) else list(sizes)
        self.groups: dict[int, list[nn.Module]] = {size: [] for size in sorted(set(every))}
        for model, size in zip(models, every, strict=True):
            self.groups[size].append(model)

    @property
    def sizes(self) -> list[int]:
        """The input sizes of the models in pixels, ascending, each once."""
        return list(self.groups)

    def weight(self, size: int) -> float:
        """The share of the models that work at `size`."""
        return len(self.groups[size]) / sum(map(len, self.groups.values()))

    def close(self) -> None:
        """Drop what was launched and has not begun: nobody waits for it any more."""
        self._closed = True

    def probabilities(self, images: Tensor, size: int | None = None) -> Tensor:
        """Return the mean probability over flips and the models of one size.

        Args:
            images: uint8 (N, 1, S, S) on the CPU.
            size: S; may be left out where all models share one size.

        Returns:
            float32 (N, S, S) on the CPU.
        """
        return self.launch(images, size)()

    def launch(self, images: Tensor, size: int | None = None) -> Callable[[], Tensor]:
        """Start `probabilities` and return a function that waits for the result: the host may work meanwhile."""
        models = self.groups[images.shape[-1] if size is None else size]
        passes = [(model, flip) for model in models for flip in TTA[self.tta]]
        return self._on_cpu(images, passes) if self.device.type == "cpu" else self._on_gpu(images, passes)

    def _on_cpu(self, images: Tensor, passes: Sequence[Pass]) -> Callable[[], Tensor]:
        pool = _one_core_threads(torch.get_num_threads())
        films = [[pool.submit(self._chance, images[i : i + 1], *one) for one in passes] for i in range(len(images))]

        def wait() -> Tensor:
            means = [_mean([future.result() for future in film]) for film in films]
            return torch.cat(means) if means else torch.empty((0, *images.shape[-2:]))

        return wait

    def _on_gpu(self, images: Tensor, passes: Sequence[Pass]) -> Callable[[], Tensor]:
        moved = images.to(self.device, non_blocking=True)
        mean = _mean([self._chance(moved, *one) for one in passes])
        # Only float16 can overflow; its answers are looked over on the device, where that costs nothing.
        finite = torch.isfinite(mean).all() if self.dtype is torch.float16 else None
        host = torch.empty(mean.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(mean, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))

        def wait() -> Tensor:
            ready.synchronize()
            if finite is None or bool(finite):
                return host
            log.warning("a batch of %d films overflowed %s; done again in float32", len(images), self.dtype)
            return _mean([self._chance(images.to(self.device), *one, exact=True) for one in passes]).cpu()

        return wait

    @torch.inference_mode()
    def _chance(self, images: Tensor, model: nn.Module, flip: bool, exact: bool = False) -> Tensor:
        """Return one model's probability, float32 (N, S, S), of uint8 (N, 1, S, S) films or of their mirror images."""
        if self._closed:
            raise CancelledError
        inputs = normalise(images)
        with autocast(None if exact else self.dtype, self.device):
            logits = model(inputs.flip(-1) if flip else inputs)
        chance = torch.sigmoid(logits.float()).squeeze(1)
        return chance.flip(-1) if flip else chance


def _mean(maps: Sequence[Tensor]) -> Tensor:
    """Sum in the order given and divide once: the same bits whoever computed which map first."""
    total = maps[0].clone()
    for one in maps[1:]:
        total += one
    return total / len(maps)


@cache
def _one_core_threads(count: int) -> ThreadPoolExecutor:
    """Return `count` threads in which torch uses one core each; the caller's own number of threads stays."""
    started = threading.Barrier(count + 1)

    def limit() -> None:
        torch.get_num_threads()  # torch sets a new thread's number at its first use, over anything set before
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "forward", initializer=limit)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(count)  # part of the setting is the process's
    return pool
