"""From uint8 films to probabilities: normalise, flips, models, mean. The one forward pass without gradients.

Trainer, evaluation, inference and `predict` all come through here. No files, collectives or thresholds in here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.unet import normalise

log = logging.getLogger(__name__)

TTA = {"none": (False,), "hflip": (False, True)}


class Predictor:
    """Mean probabilities of one or more models over flips, at the models' own size(s).

    On the CPU films are forwarded one at a time: at 256 px and above this is the faster way (caches), and a film's
    bits then depend neither on its neighbours nor on the batch size. On CUDA whole batches are forwarded.
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

    def probabilities(self, images: Tensor, size: int | None = None) -> Tensor:
        """Return the mean probability over flips and the models of one size.

        Args:
            images: uint8 (N, 1, S, S) on the CPU.
            size: S; may be left out where all models share one size.

        Returns:
            float32 (N, S, S) on the CPU.
        """
        return self.launch(images, size)()

    @torch.inference_mode()
    def launch(self, images: Tensor, size: int | None = None) -> Callable[[], Tensor]:
        """Start `probabilities` and return a function that waits for the result: the host may work meanwhile."""
        models = self.groups[images.shape[-1] if size is None else size]
        if self.device.type == "cpu":
            alone = [self._mean(models, images[i : i + 1]) for i in range(len(images))]
            result = torch.cat(alone) if alone else torch.empty((0, *images.shape[-2:]))
            return lambda: result
        moved = images.to(self.device, non_blocking=True)
        mean = self._mean(models, moved)
        host = torch.empty(mean.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(mean, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))

        def wait() -> Tensor:
            ready.synchronize()
            if self.dtype is None or bool(torch.isfinite(host).all()):
                return host
            log.warning("a batch of %d films overflowed %s; done again in float32", len(images), self.dtype)
            with torch.inference_mode():
                return self._mean(models, images.to(self.device), exact=True).cpu()

        return wait

    def _mean(self, models: list[nn.Module], images: Tensor, exact: bool = False) -> Tensor:
        """Sum the probabilities in float32 in a fixed order (models, then flips) and divide once."""
        inputs = normalise(images)
        if self.device.type == "cuda":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        total = torch.zeros((len(images), *images.shape[-2:]), dtype=torch.float32, device=self.device)
        flips = TTA[self.tta]
        for model in models:
            for flip in flips:
                with autocast(None if exact else self.dtype, self.device):
                    logits = model(inputs.flip(-1) if flip else inputs)
                chance = torch.sigmoid(logits.float()).squeeze(1)
                total += chance.flip(-1) if flip else chance
        return total / (len(models) * len(flips))
