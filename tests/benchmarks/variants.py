"""The training step taken apart: every option that the configuration does not name, switched alone.

The loop is that of `Stepper` in its plainest form; its base variant is measured beside the real one, so that a
difference between the two would show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from pneumo_dist import config as configuration
from pneumo_dist.config import Loss
from pneumo_dist.model.precision import autocast
from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.training.losses import BatchLoss
from pneumo_dist.training.step import _LEAVE_BUFFERS
from tests.benchmarks.contestants import Case, Run, Settings, films, timed


@dataclass(frozen=True)
class Variant:
    """How one loop differs from the others."""

    layout: torch.memory_format | None = None  # of all weights; None: as training lays them out
    fused: bool = True
    uint8: bool = True  # one byte a pixel to the device, normalised there; else three floats
    deterministic: bool = True
    fill: bool = False  # torch's default under determinism: fresh memory is filled with NaN
    ddp: dict[str, Any] = field(default_factory=lambda: {"gradient_as_bucket_view": True})
    hook: Callable[..., Any] | None = None


def step_of(variant: Variant, case: Case, ranks: int = 1) -> Run:
    """Return the loop of `variant`; with more than one rank the process group must exist."""
    device = torch.device(case.device)
    model = ResNet34UNet(0, film_head=True).to(device)
    if variant.layout is None:
        model.lay_out(case.size if case.device == "cpu" else None)
    else:
        model.to(memory_format=variant.layout)  # type: ignore[call-overload]
    wrapped: torch.nn.Module = model
    if ranks > 1:
        wrapped = DistributedDataParallel(model, **_LEAVE_BUFFERS, **variant.ddp)
        if variant.hook:
            wrapped.register_comm_hook(None, variant.hook)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=variant.fused)
    loss_of = BatchLoss(Loss())
    images, masks = films(case)
    labels = masks.flatten(1).any(1).float().to(device)
    counts = len(images) * ranks, int(labels.sum()) * ranks
    if not variant.uint8:
        images = normalise(images)

    def step() -> None:
        x, y = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        with autocast(case.dtype, device):
            logits, film_logits = wrapped(normalise(x) if variant.uint8 else x)
        (loss_of.share(logits, film_logits, y, labels, *counts)[0] * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()

    run = timed(step, case.device)
    words = [f"train.threads={torch.get_num_threads()}", f"train.deterministic={variant.deterministic}"]
    settings = Settings(configuration.load(None, words))

    def within_settings(steps: int) -> float:
        with settings:
            torch.utils.deterministic.fill_uninitialized_memory = variant.fill
            return run(steps)

    return within_settings


BASE = Variant()
ALONE = {  # name -> the base with one option the other way
    "all weights channels_last": Variant(layout=torch.channels_last),
    "all weights contiguous": Variant(layout=torch.contiguous_format),
    "Adam not fused": Variant(fused=False),
    "float32 batches of three channels instead of uint8": Variant(uint8=False),
    "deterministic=false": Variant(deterministic=False),
    "fresh memory filled with NaN": Variant(fill=True),
}
VIEW = {"gradient_as_bucket_view": True}
DISTRIBUTED = {  # torch refuses its bf16 hook without NCCL
    "gradient_as_bucket_view=False": Variant(ddp={}),
    "bucket_cap_mb=5": Variant(ddp=VIEW | {"bucket_cap_mb": 5}),
    "bucket_cap_mb=100": Variant(ddp=VIEW | {"bucket_cap_mb": 100}),
    "static_graph=True": Variant(ddp=VIEW | {"static_graph": True}),
    "hook: gradients sent as fp16": Variant(hook=default_hooks.fp16_compress_hook),
}
