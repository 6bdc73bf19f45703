"""The films of a training stage and its batches: global batches dealt to the ranks, read by loader workers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pneumo_dist.config import ConfigError, TrainStage
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.loaders import Batch, FilmDataset, TrainBatches, fold_cases, make_loader, stage_shards, to_device
from pneumo_dist.data.resident import ResidentFilms
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.task import Task
from pneumo_dist.training.step import TrainBatch

log = logging.getLogger(__name__)
_SHARE = 0.25  # of the GPU's free memory after the rehearsed step; the rest is for validation and other ranks


def check_batch(stage: TrainStage, name: str, ranks: Ranks) -> None:
    """Check that every rank gets an image of a batch, and batch norm more than one value a channel.

    Raises:
        ConfigError: it does not.
    """
    if ranks.world_size > stage.batch_size:
        raise ConfigError(
            f"stage{name}.batch_size={stage.batch_size} cannot feed {ranks.world_size} ranks: "
            f"use at most {stage.batch_size}"
        )
    share = stage.batch_size // ranks.world_size
    if stage.size == 32 and share // min(stage.accumulate, share) < 2:  # the encoder ends at 1x1 px there
        raise ConfigError(
            f"stage{name}: one film of 32 px a rank leaves batch norm a single value a channel: "
            f"raise stage{name}.size or stage{name}.batch_size, or use fewer ranks"
        )


def film_loader(task: Task, dataset: FilmDataset, batches: TrainBatches | Sequence[Sequence[Any]]) -> DataLoader[Batch]:
    """Return a loader over lists of keys, with the processes that `data.on_device` and `train.workers` ask for."""
    train, cuda = task.config.train, task.ranks.device.type == "cuda"
    # A CPU reads a film in a thousandth of the time that it trains it: handing it over would take longer.
    workers = train.workers if cuda or task.config.data.on_device == "off" else 0
    return make_loader(dataset, batches, workers, train.seed, cuda, train.first_timeout_s)


class StageFilms:
    """Training and validation films of one fold at one stage's size, and the training batches of this rank."""

    def __init__(self, task: Task) -> None:
        """Copy the shards to this node where `data.stage_dir` asks for it, and split the films by the fold.

        Raises:
            ConfigError: a node cannot copy the shards, or a batch is larger than the training films of the fold.
        """
        self._task, self._stage = task, task.config.train_stage(task.stage)
        self.shard_dir = _node_shards(task, self._stage.size)
        self.training, self.validation = fold_cases(read_cases(task.run.shard_dir), task.fold or 0)
        if len(self.training) < self._stage.batch_size:
            raise ConfigError(
                f"stage{task.stage}.batch_size={self._stage.batch_size} is more than the {len(self.training)} "
                f"training films of fold {task.fold}: lower it"
            )
        self.steps_per_epoch = len(self.training) // self._stage.batch_size
        self.labels = torch.tensor([case.label for case in self.training], dtype=torch.float32)

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[TrainBatch, Tensor]]:
        """Return this rank's batches of all epochs from a position on, each with the indices of its films.

        The films lie on the device, or one loader reads them all, so that its workers start once.
        """
        if epoch >= self._stage.epochs:
            return
        ranks, train = self._task.ranks, self._task.config.train
        sampler = TrainBatches(
            len(self.training),
            self._stage.batch_size,
            train.seed,
            self._stage.epochs,
            ranks.rank,
            ranks.world_size,
            start=(epoch, batch),
            labels=self.labels.numpy(),
            shares=self._stage.positive_share or None,
        )
        device = ranks.device
        for (images, masks, indices), positives in zip(self._read(sampler), sampler.positives(), strict=True):
            labels = to_device(self.labels[indices], device)
            yield TrainBatch(images, masks, labels, self._stage.batch_size, positives), indices

    def _read(self, sampler: TrainBatches) -> Iterable[Batch]:
        """Return the films of this rank's batches; each rank decides for itself where they lie: the bits are equal."""
        device = self._task.ranks.device
        augmenter = Augmenter(self._task.config.augment, self._task.config.train.seed)
        if not self._fits(augmenter, device):
            dataset = FilmDataset(self.shard_dir, self._stage.size, self.training, augmenter)
            return film_loader(self._task, dataset, sampler)
        films = ResidentFilms(FilmDataset(self.shard_dir, self._stage.size, self.training), augmenter, device)
        return map(films.batch, sampler)

    def _fits(self, augmenter: Augmenter, device: torch.device) -> bool:
        """Return whether this rank holds all training films on its device; the log says why where a GPU does not."""
        asked = self._task.config.data.on_device
        if asked != "auto" or device.type != "cuda":
            return asked == "on"
        size_bytes = self._stage.size**2 * (len(self.training) + int(self.labels.sum()) / 8)
        free, _ = torch.cuda.mem_get_info(device)
        problem = "" if augmenter.tabular else "augment.affine moves pixels"
        if size_bytes > _SHARE * free:
            problem = f"they take more than a quarter of the GPU's {free / 1e9:.1f} GB of free memory"
        where = f"read by loader processes, because {problem}" if problem else "in the GPU's memory"
        log.info("%d training films, %.2f GB: %s", len(self.training), size_bytes / 1e9, where)
        return not problem


def _node_shards(task: Task, size: int) -> Path:
    """Return the directory to read shards from; an error on one node is raised on all ranks, so that none waits."""
    if not task.config.data.stage_dir:
        return task.run.shard_dir
    problem, shard_dir = "", task.run.shard_dir
    try:
        shard_dir = stage_shards(task.run.shard_dir, Path(task.config.data.stage_dir).expanduser(), size)
    except ConfigError as error:
        problem = str(error)
    problem = task.ranks.agree(problem)
    if problem:
        raise ConfigError(problem)
    return shard_dir
