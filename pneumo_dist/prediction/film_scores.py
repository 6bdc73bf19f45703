"""Counts and loss terms of a rank's validation films at film size: on the host's cores, or on the GPU.

On a GPU only numbers come back, one batch late: on a core a film takes many times its forward pass. There the GPU
resizes, with its own rounding (2e-6 of a probability); the final evaluation counts on the host, as inference does.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pneumo_dist.data.cases import Case
from pneumo_dist.data.films.rle import decode_rle
from pneumo_dist.data.loaders import to_device
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.prediction.filmsize import film_probability
from pneumo_dist.prediction.forward import predict_records, rank_batches, read_images
from pneumo_dist.prediction.overlap import film_threads, overlap
from pneumo_dist.prediction.predictor import Forward, Predictor
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.records import FilmRecord, Records


@dataclass(frozen=True)
class FilmLoss:
    """The terms of one film's loss at film size, before weighting, and its highest probability."""

    bce: float
    dice: float  # 1 - soft Dice
    highest: float


Losses = dict[str, FilmLoss]  # by film id
Mask = NDArray[np.bool_]
Masks = dict[str, Mask]  # by film id, of the films to draw
_GROUP_PX = 1 << 22  # pixels counted at once on a GPU: 4 films of 1024 x 1024, about 100 MB of intermediates


class Share(NamedTuple):
    """What one rank says of its films."""

    records: Records
    losses: Losses
    masks: Masks


def film_loss(prob: NDArray[np.float32], truth: NDArray[np.bool_], smooth: float) -> FilmLoss:
    """Return the terms of one film from float32 probabilities at film size (clipped at 1e-7)."""
    likelihood = np.clip(np.where(truth, prob, 1 - prob), 1e-7, 1)
    bce = -float(np.log(likelihood).mean(dtype=np.float64))
    overlap = float(prob.sum(where=truth, dtype=np.float64))
    total = float(prob.sum(dtype=np.float64)) + float(np.count_nonzero(truth))
    return FilmLoss(bce, _dice_loss(overlap, total, smooth * prob.size), float(prob.max(initial=0)))


def _dice_loss(overlap: float, total: float, smooth_px: float) -> float:
    return 1 - (2 * overlap + smooth_px) / (total + smooth_px)


@dataclass(frozen=True)
class FilmScorer:
    """Scores this rank's share of the fixed batches at the recipe's threshold."""

    task: Task
    cases: Sequence[Case]  # of all ranks, sorted by id
    shard_dir: Path
    size: int
    stop: StopSignal
    shown: Container[str]  # ids of the films to draw
    draw: Callable[[Case, NDArray[np.float32]], Mask]  # from the probability at film size

    def score(self, predictor: Predictor) -> Share:
        """Return this rank's share; after a request in `stop` the remaining batches are left out."""
        return self._on_host(predictor) if predictor.device.type == "cpu" else self._on_gpu(predictor)

    def _on_host(self, predictor: Predictor) -> Share:
        ranks, settings = self.task.ranks, self.task.config.evaluate
        losses: Losses = {}
        masks: Masks = {}

        def note(case: Case, prob: NDArray[np.float32], truth: NDArray[np.bool_]) -> None:
            losses[case.id] = film_loss(prob, truth, self.task.config.loss.smooth)
            if case.id in self.shown:
                masks[case.id] = self.draw(case, prob)
            self._alive()

        records = predict_records(
            predictor, self.cases, self.shard_dir, self.size, settings.batch_size, [settings.threshold],
            ranks.rank, ranks.world_size, self.stop, note,
        )  # fmt: skip
        return Share(records, losses, masks)

    def _on_gpu(self, predictor: Predictor) -> Share:
        ranks, settings = self.task.ranks, self.task.config.evaluate
        reader = ShardReader(self.shard_dir, self.size)
        scored: list[Case] = []
        found: list[tuple[FilmRecord, FilmLoss]] = []
        masks: Masks = {}

        def compute(batch: list[Case], inputs: list[tuple[Tensor, Truths]]) -> Callable[[], list[Tensor]]:
            images, truths = inputs[0]
            return predictor.reduce(images, lambda forward: self._counted(batch, truths, forward))

        def write(batch: list[Case], _: object, counted: list[Tensor]) -> list[Future[tuple[FilmRecord, FilmLoss]]]:
            numbers, maps = counted
            drawn = [case for case in batch if case.id in self.shown]
            for case, prob in zip(drawn, maps.numpy(), strict=True):
                masks[case.id] = self.draw(case, film_probability(prob, case.rows, case.columns))
            self._alive()
            return [pool.submit(self._film, case, row) for case, row in zip(batch, numbers.tolist(), strict=True)]

        with film_threads() as pool:
            batches = rank_batches(self.cases, settings.batch_size, ranks.rank, ranks.world_size, self.stop)
            for batch, films in overlap(batches, lambda b: [pool.submit(_read, reader, b)], compute, write):
                scored += batch
                found += films
        records = Records.build(scored, [record for record, _ in found], [settings.threshold], predictor.scored)
        return Share(records, {c.id: loss for c, (_, loss) in zip(scored, found, strict=True)}, masks)

    def _counted(self, batch: Sequence[Case], truths: Truths, forward: Forward) -> list[Tensor]:
        """Return the numbers that `_film` reads, float64 (N, 7) on the device, and the maps of the films to draw."""
        counted, device = [], forward.maps.device
        for films in _groups(batch):
            shape = batch[films[0]].rows, batch[films[0]].columns
            maps = forward.maps[films[0] : films[-1] + 1].unsqueeze(1)
            prob = interpolate(maps, shape, mode="bilinear", align_corners=False).squeeze(1)
            truth = torch.zeros(prob.shape, dtype=torch.bool, device=device)
            for at, film in enumerate(films):
                if (annotated := truths[film]) is not None:
                    truth[at] = to_device(annotated, device).T
            above = prob > self.task.config.evaluate.threshold
            likelihood = torch.where(truth, prob, 1 - prob).clamp(1e-7, 1)
            columns = (prob * truth, prob, likelihood.log().neg(), truth, above, above & truth)
            sums = [column.flatten(1).sum(1, dtype=torch.float64) for column in columns]
            counted.append(torch.stack([*sums, prob.flatten(1).amax(1).double()], dim=1))
        numbers = torch.cat(counted)
        if forward.scores is not None:
            numbers = torch.cat([numbers, forward.scores.double().unsqueeze(1)], dim=1)
        drawn = [map for case, map in zip(batch, forward.maps, strict=True) if case.id in self.shown]
        return [numbers, torch.stack(drawn) if drawn else forward.maps[:0]]

    def _film(self, case: Case, numbers: Sequence[float]) -> tuple[FilmRecord, FilmLoss]:
        overlapping, total, bce, truth, area, hits, highest, *score = numbers
        pixels = case.rows * case.columns
        dice = _dice_loss(overlapping, total + truth, self.task.config.loss.smooth * pixels)
        top = score[0] if score else highest
        record = FilmRecord(top, np.array([area], np.int64), np.array([hits], np.int64), int(truth), pixels)
        return record, FilmLoss(bce / pixels, dice, highest)

    def _alive(self) -> None:
        """Let the next film, or batch of a GPU, take as long again before the stacks are printed."""
        faulthandler.dump_traceback_later(self.task.config.train.timeout_s / 2)


Truths = list[Tensor | None]  # bool (columns, rows) of each film on the CPU, as run lengths are ordered; None: empty


def _read(reader: ShardReader, batch: Sequence[Case]) -> tuple[Tensor, Truths]:
    truths = [torch.from_numpy(decode_rle(c.rle, c.rows, c.columns).T) if c.label else None for c in batch]
    return read_images(reader, batch), truths


def _groups(batch: Sequence[Case]) -> Iterator[list[int]]:
    """Cut the positions in a batch into runs of films of one size, `_GROUP_PX` pixels at most."""
    for (rows, columns), group in groupby(range(len(batch)), lambda i: (batch[i].rows, batch[i].columns)):
        films, most = list(group), max(1, _GROUP_PX // (rows * columns))
        yield from (films[start : start + most] for start in range(0, len(films), most))
