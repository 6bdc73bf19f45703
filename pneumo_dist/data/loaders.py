"""Batches: the order of films, their split over ranks, and the loader that reads them.

Orders are pure functions of (seed, epoch), never of ranks or workers. Nothing in this module draws from a global
generator.
"""

from __future__ import annotations

import atexit
import functools
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pneumo_dist.config import ConfigError
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import HOLDOUT, Case
from pneumo_dist.data.folds import check_folds
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.data.staging import stage_shards
from pneumo_dist.runtime import stopping
from pneumo_dist.runtime.processes import die_with_parent, keep_memory

__all__ = [
    "FilmDataset", "TrainBatches", "deal", "epoch_order", "fixed_batches", "fold_cases", "make_loader", "share_at",
    "split_batch", "stage_shards", "to_device",
]  # fmt: skip

Key = tuple[int, int]  # (epoch, index)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
T = TypeVar("T")


def fold_cases(cases: Sequence[Case], fold: int) -> tuple[list[Case], list[Case]]:
    """Return (training, validation) films of a fold, each in the given order; neither includes the hold-out.

    Raises:
        ConfigError: a patient is in both, or one of them is empty.
    """
    check_folds([case.group for case in cases], [case.fold for case in cases])
    train = [case for case in cases if case.fold not in (fold, HOLDOUT)]
    validation = [case for case in cases if case.fold == fold]
    if not train or not validation:
        raise ConfigError(
            f"fold {fold} has {len(train)} training and {len(validation)} validation films: check data.folds"
        )
    return train, validation


def share_at(shares: Sequence[float], epoch: int, epochs: int) -> float:
    """Return the share of positive films in `epoch`, linear from shares[0] (first epoch) to shares[1] (last epoch)."""
    first, last = shares
    return first + (last - first) * (epoch / (epochs - 1) if epochs > 1 else 0.0)


def epoch_order(
    n: int, seed: int, epoch: int, labels: Sequence[int] | np.ndarray | None = None, positive_share: float | None = None
) -> np.ndarray:
    """Return the order of an epoch: int64 (n,), a permutation of 0 to n - 1.

    With a share (and labels, (n,)), round(share * n) films are positive; in each class no film repeats before all have
    been drawn. If a class has no films, the other fills the epoch.
    """
    generator = np.random.default_rng([seed, epoch])
    if positive_share is None:
        return generator.permutation(n).astype(np.int64)
    if labels is None or len(labels) != n:
        raise ValueError("a share of positives needs the label of each film")
    classes = [np.flatnonzero(np.asarray(labels) != 0), np.flatnonzero(np.asarray(labels) == 0)]
    counts = [round(positive_share * n), n - round(positive_share * n)]
    if not len(classes[0]):
        counts = [0, n]
    elif not len(classes[1]):
        counts = [n, 0]
    drawn = []
    for members, count in zip(classes, counts, strict=True):
        rounds = -(-count // max(len(members), 1))
        drawn += [generator.permutation(members)[: count - i * len(members)] for i in range(rounds)]
    return generator.permutation(np.concatenate(drawn)).astype(np.int64)


def split_batch(batch: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return this rank's slice of a global batch; the first ranks take the remainder: 14 on 4 ranks are 4, 4, 3, 3."""
    each, more = divmod(len(batch), world_size)
    start = rank * each + min(rank, more)
    return batch[start : start + each + (rank < more)]


class TrainBatches:
    """A batch sampler over all remaining epochs: this rank's (epoch, index) keys of each global batch.

    The k-th global batch is the same set of films for every number of ranks. The last incomplete batch of an epoch
    is dropped. `shares` is (first epoch, last epoch), see `share_at`, and needs `labels`.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        epochs: int,
        rank: int = 0,
        world_size: int = 1,
        start: Key = (0, 0),
        labels: Sequence[int] | np.ndarray | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        if not 1 <= batch_size <= n:
            raise ConfigError(f"a batch of {batch_size} does not fit into {n} training films")
        if world_size > batch_size:
            raise ConfigError(f"a batch of {batch_size} cannot feed {world_size} ranks: use at most {batch_size}")
        self.n, self.batch_size, self.seed, self.epochs = n, batch_size, seed, epochs
        self.rank, self.world_size, self.start = rank, world_size, start
        self.labels, self.shares = labels, shares

    @property
    def steps_per_epoch(self) -> int:
        """The number of complete global batches in an epoch."""
        return self.n // self.batch_size

    def __len__(self) -> int:
        epoch, batch = self.start
        return max(0, (self.epochs - epoch) * self.steps_per_epoch - batch)

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch, batch in self._global_batches():
            yield [(epoch, index) for index in split_batch(batch, self.rank, self.world_size)]

    def positives(self) -> Iterator[int]:
        """Yield the number of positive films of each global batch, in the order of the batches; needs `labels`."""
        assert self.labels is not None
        for _, batch in self._global_batches():
            yield sum(1 for index in batch if self.labels[index])

    def _global_batches(self) -> Iterator[tuple[int, list[int]]]:
        """Yield (epoch, indices of the films) of each global batch from `start` on."""
        first_epoch, first_batch = self.start
        for epoch in range(first_epoch, self.epochs):
            share = share_at(self.shares, epoch, self.epochs) if self.shares else None
            order = epoch_order(self.n, self.seed, epoch, self.labels, share).tolist()
            for batch in range(first_batch if epoch == first_epoch else 0, self.steps_per_epoch):
                yield epoch, order[batch * self.batch_size : (batch + 1) * self.batch_size]


def fixed_batches(n: int, batch_size: int) -> list[list[int]]:
    """Cut 0 to n - 1 into batches in order; the last may be shorter.

    Ranks share whole batches: the last bits of a film's result can depend on the size of its batch.
    """
    return [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]


def deal(batches: Sequence[T], rank: int, world_size: int) -> list[T]:
    """Return the batches j with j mod world_size == rank."""
    return list(batches[rank::world_size])


class FilmDataset(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Films of one size. The key (epoch, index) gives (image, mask, index): uint8 (1, size, size) each, mask 0 or 1.

    It opens files at the first use in each process, so that it pickles small.
    """

    def __init__(self, shard_dir: Path, size: int, cases: Sequence[Case], augmenter: Augmenter | None = None) -> None:
        self.size, self.augmenter = size, augmenter
        self._reader = ShardReader(shard_dir, size)
        self._positions = np.array([(case.shard, case.row) for case in cases], dtype=np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._positions)

    def _arrays(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        epoch, index = key
        shard, row = (int(value) for value in self._positions[index])
        image, mask = self._reader.image(shard, row), self._reader.mask(shard, row)
        return self.augmenter(image, mask, epoch, index) if self.augmenter else (image, mask)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, torch.Tensor, int]:
        image, mask = self._arrays(key)
        return torch.from_numpy(image)[None], torch.from_numpy(mask)[None], key[1]

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return a whole batch, each film written directly into it: twice (N, 1, size, size), and the indices (N,)."""
        shape = (len(keys), 1, self.size, self.size)
        images, masks = _empty(shape), _empty(shape)
        for at, key in enumerate(keys):
            images[at, 0].numpy()[:], masks[at, 0].numpy()[:] = self._arrays(key)
        return images, masks, torch.tensor([index for _, index in keys], dtype=torch.int64)


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """Return an uninitialised uint8 tensor; in a worker it is in shared memory, as in torch's own collate function.

    Otherwise the transfer to the main process would copy every batch again.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    tensor = torch.empty(0, dtype=torch.uint8)
    tensor.set_(storage, 0, shape)  # type: ignore[call-overload]
    return tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the CPU without waiting for a GPU: that needs pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _as_is(batch: Batch) -> Batch:
    return batch


@functools.cache
def _shut_down_workers_at_exit() -> None:
    """Register a handler that kills the remaining workers when this process ends.

    After an error the traceback keeps the loader's iterator alive, so that it does not stop its workers. They ignore
    the SIGTERM that Python then sends, and Python would wait for them for ever.
    """

    def kill() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for worker in multiprocessing.active_children():
            worker.kill()

    atexit.register(kill)


class _StartWorker:
    """Set up one loader worker: it ends only with its parent, and uses one core."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        _shut_down_workers_at_exit()

    def __call__(self, worker: int) -> None:
        stopping.ignore()
        if os.getppid() == self.parent:  # false under forkserver, where the parent is the server
            die_with_parent(self.parent)
        keep_memory()
        import cv2

        cv2.setNumThreads(0)
        torch.set_num_threads(1)


def make_loader(
    dataset: FilmDataset,
    batches: TrainBatches | Sequence[Sequence[Any]],
    workers: int,
    seed: int,
    pin: bool = False,
    timeout_s: float = 0.0,
) -> DataLoader[Batch]:
    """Return a loader over lists of keys (a sampler, or a list of lists); it never draws from the global generator.

    Args:
        workers: number of processes; 0 reads in this process, with the same result.
        pin: put the batches into pinned memory, so that copies to a GPU overlap its work.
        timeout_s: time limit for one batch of a worker; 0: no limit.
    """
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        timeout=timeout_s if workers else 0,
        collate_fn=_as_is,  # type: ignore[arg-type]
        pin_memory=pin,
        worker_init_fn=_StartWorker() if workers else None,
        generator=torch.Generator().manual_seed(seed),
        prefetch_factor=4 if workers else None,
    )
