"""A training step as one CUDA graph: the host starts one graph instead of hundreds of kernels.

A graph repeats the kernels of one step at the same addresses. What differs between steps (films, number of positives,
learning rate, a skipped update) therefore lies in tensors on the device. Written as PyTorch's documentation shows it,
and not yet run on a GPU: off by default.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pneumo_dist.config import ConfigError
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.training.step import StepResult, TrainBatch

# Steps in which libraries choose kernels, and optimizer and scaler make their state, as in the documentation.
_WARM_UP = 3


class StepGraph:
    """Replaces `Stepper.step`: the first steps run as usual, the following ones as a graph.

    The tensors of a result are overwritten by the next step.
    """

    def __init__(self, step: Callable[[TrainBatch], StepResult], ranks: Ranks) -> None:
        """Use a step function whose optimizer is capturable; no state may be loaded after the first steps.

        Raises:
            ConfigError: there is no GPU, or there are several ranks.
        """
        if ranks.device.type != "cuda" or ranks.world_size > 1:
            raise ConfigError("train.cuda_graph=true needs one rank with a GPU: set train.cuda_graph=false")
        self._step, self._device = step, ranks.device
        self._steps = 0
        self._stream, self._graph = torch.cuda.Stream(self._device), torch.cuda.CUDAGraph()

    def __call__(self, batch: TrainBatch) -> StepResult:
        self._steps += 1
        if self._steps <= _WARM_UP:
            return self._warm_up(batch)
        if self._steps == _WARM_UP + 1:
            self._capture(batch)
        for kept, new in zip(self._films[:3], batch[:3], strict=True):
            kept.copy_(new, non_blocking=True)
        self._positives.fill_(batch.positives)
        self._graph.replay()
        return self._result

    def _warm_up(self, batch: TrainBatch) -> StepResult:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._step(batch)
        current.wait_stream(self._stream)
        return result

    def _capture(self, batch: TrainBatch) -> None:
        self._positives = torch.tensor(batch.positives, device=self._device)
        images, masks, labels = (new.to(self._device, copy=True) for new in batch[:3])
        self._films = TrainBatch(images, masks, labels, batch.films, self._positives)
        try:
            with torch.cuda.graph(self._graph):
                self._result = self._step(self._films)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"train.cuda_graph=true: {reason}: set train.cuda_graph=false") from error
