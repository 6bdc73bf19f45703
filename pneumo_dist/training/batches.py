"""The films of a training stage and its batches: global batches dealt to the ranks, read by loader workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pneumo_dist.config import ConfigError, TrainStage
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.loaders import FilmDataset, TrainBatches, fold_cases, make_loader, stage_shards
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.task import Task
from pneumo_dist.training.step import TrainBatch


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

        One loader reads them all, so that its workers start once.
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
        augmenter = Augmenter(self._task.config.augment, train.seed)
        dataset = FilmDataset(self.shard_dir, self._stage.size, self.training, augmenter)
        cuda = ranks.device.type == "cuda"
        loader = make_loader(dataset, sampler, train.workers, train.seed, cuda, train.first_timeout_s)
        for (images, masks, indices), positives in zip(loader, sampler.positives(), strict=True):
            yield TrainBatch(images, masks, self.labels[indices], self._stage.batch_size, positives), indices


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
