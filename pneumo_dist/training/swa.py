"""The batch-norm update: averaged weights have no statistics of their own, so they are measured on the training films.

Fixed whole batches in a seeded order, without augmentation, dealt to the ranks. The statistics are the plain mean
over batches of each batch's mean and unbiased variance, as `torch.optim.swa_utils.update_bn` has it, summed in
float64; all ranks end with the same bits.
"""

from __future__ import annotations

import faulthandler
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.loaders import FilmDataset, deal, epoch_order, fixed_batches, fold_cases, make_loader
from pneumo_dist.model.modelfile import load_model, portable, save_model
from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.unet import IMAGENET_MEAN, IMAGENET_STD, normalise
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import Stopped, StopSignal
from pneumo_dist.runtime.task import Task
from pneumo_dist.training.machine import set_threads

log = logging.getLogger(__name__)


@contextmanager
def _one_batch_statistics(model: nn.Module) -> Iterator[list[nn.BatchNorm2d]]:
    """Train mode with momentum 1: after a forward pass the running statistics are those of that batch alone."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    training = model.training
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = 1.0
    model.train()
    try:
        yield layers
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.train(training)


def _statistics(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None  # this network's layers all track them
    return layer.running_mean, layer.running_var


@torch.no_grad()
def update_batch_norm(
    model: nn.Module,
    batches: Iterable[Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    ranks: Ranks,
    stop: StopSignal,
) -> int:
    """Set every batch-norm layer's statistics from this rank's uint8 (n, 1, S, S) batches and the other ranks'.

    Returns:
        the number of batches over all ranks.

    Raises:
        Stopped: a rank was asked to leave; nothing is kept, the measurement starts anew.
    """
    with _one_batch_statistics(model) as layers:
        sums = [torch.zeros(2, layer.num_features, dtype=torch.float64, device=device) for layer in layers]
        count = 0
        for images in batches:
            if stop.requested:
                break
            x = normalise(images.to(device, non_blocking=True))
            with autocast(dtype, device):
                model(x)
            for total, layer in zip(sums, layers, strict=True):
                total += torch.stack(_statistics(layer))
            count += 1
        leave = ranks.maximum([stop.leave])[0]
        if leave:
            raise Stopped(leave)
        flat = torch.cat(
            [s.flatten() for s in sums] + [torch.tensor([count], dtype=torch.float64, device=device)]
        ).cpu()
        if ranks.world_size > 1:
            dist.all_reduce(flat)
        count = int(flat[-1])
        if not count:
            raise ConfigError("the batch-norm update has no batch: the training fold is empty")
        offset = 0
        for layer in layers:
            means = (flat[offset : offset + 2 * layer.num_features] / count).view(2, -1)
            for buffer, mean in zip(_statistics(layer), means, strict=True):
                buffer.copy_(mean)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(count)
            offset += 2 * layer.num_features
    return count


def _batches(task: Task, size: int, batch_size: int) -> tuple[list[list[tuple[int, int]]], FilmDataset]:
    """This rank's batches of (epoch 0, index) keys: whole batches of the stage's size in a seeded order."""
    cases, _ = fold_cases(read_cases(task.run.shard_dir), task.fold or 0)
    order = epoch_order(len(cases), task.config.train.seed, 0).tolist()
    whole = [b for b in fixed_batches(len(order), batch_size) if len(b) == batch_size] or [list(range(len(order)))]
    whole = whole[: task.config.swa.bn_batches or None]
    dealt = deal(whole, task.ranks.rank, task.ranks.world_size)
    return [[(0, order[i]) for i in batch] for batch in dealt], FilmDataset(task.run.shard_dir, size, cases, None)


def run(task: Task) -> dict[str, Path]:
    """Turn the last stage's running average into `swa/model.pt`; every rank calls it."""
    config, ranks = task.config, task.ranks
    name = config.last_stage
    stage = config.train_stage(name)
    set_threads(config.train)
    source = task.dir_of(name) / "swa.pt"
    model, meta = load_model(source, device=ranks.device)
    keys, dataset = _batches(task, stage.size, stage.batch_size)
    cuda = ranks.device.type == "cuda"
    loader = make_loader(dataset, keys, config.train.workers, config.train.seed, cuda, config.train.first_timeout_s)

    def watched() -> Iterator[Tensor]:
        for images, _, _ in loader:
            faulthandler.dump_traceback_later(config.train.timeout_s / 2)  # the watchdog: a batch is progress
            yield images

    faulthandler.dump_traceback_later(config.train.first_timeout_s / 2)
    try:
        count = update_batch_norm(
            model, watched(), ranks.device, amp_dtype(config.train.amp, ranks.device), ranks, task.stop
        )
    finally:
        faulthandler.cancel_dump_traceback_later()
    log.info("batch-norm statistics of %d batches of %d films", count, stage.batch_size)
    path = task.out / "model.pt"
    meta = meta | {
        "size": stage.size,
        "threshold": config.evaluate.threshold,
        "tta": config.evaluate.tta,
        "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
        "config": portable(config),
        "provenance": meta["provenance"]
        | {"averaged_from": name, "bn_batches": count, "inputs": task.inputs, "result_hash": task.result_hash},
    }

    def write() -> None:
        task.check_attempt()
        save_model(path, model.state_dict(), meta)

    ranks.on_first(write)
    return {"model": path}
