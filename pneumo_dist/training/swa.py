"""The batch-norm update after weight averaging: batch-norm statistics are measured on the training films.

Fixed whole batches in a seeded order, without augmentation, dealt to the ranks. As in
`torch.optim.swa_utils.update_bn`, the statistics are the plain mean over batches of the batch mean and the unbiased
batch variance; they are summed in float64, and all ranks end with the same bits.
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
from pneumo_dist.data.loaders import FilmDataset, deal, epoch_order, fixed_batches, fold_cases
from pneumo_dist.model.modelfile import load_model, portable, save_model
from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.unet import IMAGENET_MEAN, IMAGENET_STD, normalise
from pneumo_dist.runtime.processor import set_threads
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import Stopped, StopSignal
from pneumo_dist.runtime.task import Task
from pneumo_dist.training.batches import film_loader

log = logging.getLogger(__name__)


@contextmanager
def _one_batch_statistics(model: nn.Module) -> Iterator[list[nn.BatchNorm2d]]:
    """Set train mode with momentum 1: after a forward pass the running statistics are those of that batch alone."""
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
    assert layer.running_mean is not None and layer.running_var is not None  # for mypy: every layer tracks them
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
    """Set the statistics of every batch-norm layer from the uint8 (n, 1, S, S) batches of all ranks; collective.

    Returns:
        the number of batches over all ranks.

    Raises:
        Stopped: a rank was asked to leave; the next attempt starts over.
        ConfigError: no rank has a batch.
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
        counted = [torch.tensor([count], dtype=torch.float64, device=device)]
        flat = torch.cat([total.flatten() for total in sums] + counted).cpu()
        if ranks.world_size > 1:
            dist.all_reduce(flat)
        count = int(flat[-1])
        if not count:
            raise ConfigError("the batch-norm update has no batch: the training fold is empty")
        _set_statistics(layers, flat[:-1] / count, count)
    return count


def _set_statistics(layers: Iterable[nn.BatchNorm2d], flat: Tensor, count: int) -> None:
    """Set mean and variance of each layer from float64 `flat`, which holds them in the order of the layers."""
    offset = 0
    for layer in layers:
        means = flat[offset : offset + 2 * layer.num_features].view(2, -1)
        for buffer, mean in zip(_statistics(layer), means, strict=True):
            buffer.copy_(mean)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(count)
        offset += 2 * layer.num_features


def _batches(task: Task, size: int, batch_size: int) -> tuple[list[list[tuple[int, int]]], FilmDataset]:
    """Return this rank's batches of (epoch 0, index) keys in a seeded order, and the films that the keys refer to."""
    cases, _ = fold_cases(read_cases(task.run.shard_dir), task.fold or 0)
    order = epoch_order(len(cases), task.config.train.seed, 0).tolist()
    whole = [b for b in fixed_batches(len(order), batch_size) if len(b) == batch_size] or [list(range(len(order)))]
    whole = whole[: task.config.swa.bn_batches or None]
    dealt = deal(whole, task.ranks.rank, task.ranks.world_size)
    return [[(0, order[i]) for i in batch] for batch in dealt], FilmDataset(task.run.shard_dir, size, cases, None)


def _measure(task: Task, model: nn.Module) -> int:
    """Set the batch-norm statistics of `model` from the training films; return the number of batches over all ranks."""
    train, device = task.config.train, task.ranks.device
    stage = task.config.train_stage(task.config.last_stage)
    keys, dataset = _batches(task, stage.size, stage.batch_size)

    def watched() -> Iterator[Tensor]:
        for images, _, _ in film_loader(task, dataset, keys):
            faulthandler.dump_traceback_later(train.timeout_s / 2)  # the next batch gets as long again
            yield images

    faulthandler.dump_traceback_later(train.first_timeout_s / 2)
    try:
        count = update_batch_norm(model, watched(), device, amp_dtype(train.amp, device), task.ranks, task.stop)
    finally:
        faulthandler.cancel_dump_traceback_later()
    log.info("batch-norm statistics measured on %d batches of %d films", count, stage.batch_size)
    return count


def run(task: Task) -> dict[str, Path]:
    """Write `swa/model.pt` from the weight average of the last stage; every rank calls it."""
    config, name, path = task.config, task.config.last_stage, task.out / "model.pt"
    set_threads(config.train)
    model, averaged = load_model(task.dir_of(name) / "swa.pt", device=task.ranks.device)
    count = _measure(task, model)
    meta = averaged | {
        "size": config.train_stage(name).size,
        "threshold": config.evaluate.threshold,
        "tta": config.evaluate.tta,
        "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
        "config": portable(config),
        "provenance": averaged["provenance"]
        | {"averaged_from": name, "bn_batches": count, "inputs": task.inputs, "result_hash": task.result_hash},
    }

    def write() -> None:
        task.check_attempt()
        save_model(path, model.state_dict(), meta)

    task.ranks.on_first(write)
    return {"model": path}
