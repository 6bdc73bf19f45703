"""One optimizer step: forward, loss, backward, unscale, clip, update. No epochs, files or schedules in here.

The gradient is that of the global batch for any number of ranks and micro-batches: every rank sums the losses of its
images, divides by the global batch, and multiplies by the number of ranks, because DDP averages over the ranks.

A step never waits for the device: the device decides whether the gradient is finite, counts the steps, and picks the
learning rate by that count. The host runs ahead and reads a value only when it needs one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pneumo_dist.config import Config, ConfigError, TrainStage
from pneumo_dist.data.loaders import split_batch
from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.resnet import BatchNorm
from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.training.losses import BatchLoss

# Training never reads batch-norm buffers, and only those of rank 0 are saved (see `Trainer`): sending them at every
# step would be wasted. torch 2.13 renamed the option.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_LEAVE_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class TrainBatch(NamedTuple):
    """This rank's n films of one global batch, on the CPU or the device, and what all ranks know of the whole batch."""

    images: Tensor  # uint8 (n, 1, S, S)
    masks: Tensor  # uint8 (n, 1, S, S), 0 and 1
    labels: Tensor  # float32 (n,), 1 for a film with a pneumothorax
    films: int  # of the global batch
    positives: int | Tensor  # its films with a pneumothorax; int64 scalar on the device in a CUDA graph


@dataclass(frozen=True)
class StepResult:
    """The results of one step; tensors stay on the device until they are read."""

    loss: Tensor  # this rank's share of the global batch's loss, float32 scalar
    bce: Tensor  # its mask cross-entropy, Dice term and film cross-entropy, before weighting
    dice: Tensor
    image: Tensor
    grad_norm: Tensor  # of the whole gradient, the same on every rank
    finite: Tensor  # bool scalar: whether the weights were updated; the same on every rank
    rate: Tensor  # learning rate, float32 (1,)


def wants_sync_bn(config: Config, stage: TrainStage, ranks: Ranks) -> bool:
    """Return whether to use SyncBN: it needs GPUs; `auto` uses it below 4 images of a (micro-)batch a rank.

    Raises:
        ConfigError: it is on, and there are several ranks without GPUs.
    """
    if config.model.sync_bn == "on":
        if ranks.device.type != "cuda" and ranks.world_size > 1:
            raise ConfigError("model.sync_bn=on works on GPUs only: set model.sync_bn=auto")
        return ranks.world_size > 1
    share = stage.batch_size // stage.accumulate // ranks.world_size
    return config.model.sync_bn == "auto" and ranks.device.type == "cuda" and ranks.world_size > 1 and share < 4


class Stepper:
    """The network with its optimizer on this rank's device."""

    def __init__(self, model: ResNet34UNet, config: Config, stage: TrainStage, ranks: Ranks) -> None:
        """Move `model` to the device, wrap it for `ranks`, and run a warm-up step that changes no state."""
        self.ranks, self.stage = ranks, stage
        self.device = ranks.device
        self.clip_norm = config.train.clip_norm
        self.loss = BatchLoss(config.loss)
        self.dtype = amp_dtype(config.train.amp, self.device)
        if wants_sync_bn(config, stage, ranks):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(self.device)
        # Before DDP, whose buckets keep this layout. A compiled network works in channels_last in any case.
        self.model.lay_out(stage.size if self.device.type == "cpu" and not config.train.compile else None)
        if config.train.compile:
            # In place: torch.compile(model) would change the state-dict keys. Batches of a stage have few sizes.
            self.model.compile(dynamic=False)
        self.ddp: nn.Module = self.model
        if ranks.world_size > 1:
            self.ddp = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_LEAVE_BUFFERS,
            )
        self._capturable = config.train.cuda_graph
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=stage.lr, fused=True, capturable=self._capturable)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        # An overflow of float16 in the forward pass would leave infinities in the running statistics for ever.
        guarded = self.model.buffers() if self.scaler.is_enabled() else ()
        self._statistics = [buffer for buffer in guarded if buffer.is_floating_point()]
        layers = [layer for layer in self.model.modules() if isinstance(layer, BatchNorm) and layer.training]
        self._counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
        self._done = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._rates = torch.full((1,), stage.lr, device=self.device)
        share = len(split_batch(range(stage.batch_size), ranks.rank, ranks.world_size))
        # A GPU and a compiled network prepare themselves for the size of the batches; a CPU would only take longer.
        self._warm_up(share if self.device.type == "cuda" or config.train.compile else 2)

    @property
    def steps(self) -> int:
        """The number of steps that changed the weights; reading it waits for the device."""
        return int(self._done)

    @property
    def rate(self) -> Tensor:
        """The learning rate of the next step, float32 (1,) on the device."""
        return self._rates.index_select(0, self._done.clamp(max=len(self._rates) - 1))

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set the rate of each step by the number of steps that changed the weights before it; the last one stays."""
        new = torch.tensor(rates, dtype=torch.float32, device=self.device)
        if len(rates) == len(self._rates):
            self._rates.copy_(new)  # a CUDA graph reads this address
        else:
            self._rates = new

    def _warm_up(self, films: int) -> None:
        """Run one backward on blank films, `films` on each rank, then restore the state.

        DDP rebuilds its gradient buckets after its first backward, and with three or more ranks the buckets decide the
        order of sums. After a warm-up at every start and resume, all training steps use the same buckets.
        """
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        blank = torch.zeros((films, 1, self.stage.size, self.stage.size), dtype=torch.uint8)
        self._backward(TrainBatch(blank, blank, torch.zeros(films), films * self.ranks.world_size, 0))
        self.optimizer.zero_grad()
        self.model.load_state_dict(before)

    def micro_batches(self, batch: TrainBatch) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
        """Cut this rank's films into micro-batches of images, masks and labels on the device.

        The flag marks the last micro-batch, which exchanges the gradients.
        """
        count = min(self.stage.accumulate, len(batch.images))
        indices = list(range(len(batch.images)))
        for i in range(count):
            chosen = split_batch(indices, i, count)
            part = slice(chosen[0], chosen[-1] + 1)
            images, masks, labels = (
                tensor[part].to(self.device, non_blocking=True) for tensor in (batch.images, batch.masks, batch.labels)
            )
            yield images, masks, labels, i == count - 1

    def _backward(self, batch: TrainBatch) -> Tensor:
        """Accumulate the gradient; return this rank's share of the loss and of its terms, as `BatchLoss.share`."""
        total = torch.zeros(4, device=self.device)
        for images, masks, labels, last in self.micro_batches(batch):
            with nullcontext() if last else self._no_sync():  # around the forward pass too: DDP requires it
                with autocast(self.dtype, self.device):
                    logits, film_logits = self.ddp(normalise(images))
                share = self.loss.share(logits, film_logits, masks, labels, batch.films, batch.positives)
                self.scaler.scale(share[0] * self.ranks.world_size).backward()
            total += share.detach()
            if self._counts:
                torch._foreach_add_(self._counts, 1)
        return total

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Return a context in which DDP does not exchange gradients."""
        return self.ddp.no_sync() if isinstance(self.ddp, DistributedDataParallel) else nullcontext()

    def step(self, batch: TrainBatch) -> StepResult:
        """Train on this rank's films of one global batch.

        If the gradient is not finite, the step is skipped: on all ranks, because gradients are averaged over them. A
        skipped step does not count for the schedule.
        """
        rate = self.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        statistics = torch.cat(self._statistics) if self._statistics else None
        loss, bce, dice, image = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.clip_norm:
            clip_grads_with_norm_(self.model.parameters(), self.clip_norm, norm)
        finite = torch.isfinite(norm)
        # Fused Adam reads this flag on the device and skips the update; an enabled scaler overwrites it with its own.
        self.optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self._done += finite
        if statistics is not None:
            kept = torch.where(finite, torch.cat(self._statistics), statistics)
            torch._foreach_copy_(self._statistics, kept.split([len(buffer) for buffer in self._statistics]))
        return StepResult(loss, bce, dice, image, norm, finite, rate)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizer, scaler and step count; the batch-norm buffers are those of this rank."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; a scaler state is used only if both runs have one (train.amp may change)."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["capturable"] = self._capturable
        # Fused Adam ignores strides: moments that another device saved must get the memory layout of the weights here.
        for weight, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == weight.shape:
                    moments[name] = torch.empty_like(weight).copy_(value)
        self._done.fill_(state["steps"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
