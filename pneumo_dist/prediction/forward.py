"""Validation records of one rank, and `predict` for Python users. No collectives in here: callers gather.

Both use `Predictor` and `film_probability`, as inference does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pneumo_dist.data.cases import Case
from pneumo_dist.data.films.dicom import read_film
from pneumo_dist.data.films.rle import decode_rle
from pneumo_dist.data.loaders import deal, fixed_batches
from pneumo_dist.data.shards import ShardReader, to_size
from pneumo_dist.model.modelfile import load_model
from pneumo_dist.prediction.ensemble import stored_triplet
from pneumo_dist.prediction.filmsize import film_probability, mean_film_probability
from pneumo_dist.prediction.overlap import film_threads, overlap
from pneumo_dist.prediction.predictor import Forward, Predictor
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.scoring.records import FilmRecord, Records, Triplet, apply_triplet, film_record, film_score

__all__ = ["Prediction", "Predictor", "film_probability", "mean_film_probability", "predict", "predict_records"]

PerFilm = Callable[[Case, NDArray[np.float32], NDArray[np.bool_]], Any]


def predict_records(
    predictor: Predictor,
    cases: Sequence[Case],
    shard_dir: Path,
    size: int,
    batch_size: int,
    thresholds: Sequence[float],
    rank: int = 0,
    world_size: int = 1,
    stop: StopSignal | None = None,
    per_film: PerFilm | None = None,
) -> Records:
    """Score this rank's share of `cases` (sorted by id) at film size; fixed batches are dealt whole to ranks.

    Join the ranks' results with `Records.concatenate`. After a request in `stop` the remaining batches are left out:
    the ranks must agree on the stop before they use the result.

    Args:
        thresholds: mask thresholds to count at.
        per_film: called once per film, from threads, with (case, probability at film size, truth).
    """
    reader = ShardReader(shard_dir, size)
    batches = rank_batches(cases, batch_size, rank, world_size, stop)
    scored: list[Case] = []
    records: list[FilmRecord] = []
    with film_threads() as pool:

        def read(batch: list[Case]) -> list[Future[Tensor]]:
            return [pool.submit(read_images, reader, batch)]

        def count(batch: list[Case], _: list[Tensor], forward: Forward) -> list[Future[FilmRecord]]:
            return [
                pool.submit(_record, case, prob, score, thresholds, per_film)
                for case, (prob, score) in zip(batch, forward.films(), strict=True)
            ]

        for batch, counts in overlap(batches, read, lambda _, images: predictor.launch(images[0]), count):
            scored += batch
            records += counts
    return Records.build(scored, records, thresholds, predictor.scored)


def rank_batches(
    cases: Sequence[Case], batch_size: int, rank: int, world_size: int, stop: StopSignal | None
) -> Iterator[list[Case]]:
    """Return this rank's whole batches of the fixed list; they end at a request in `stop`."""
    batches = [[cases[i] for i in batch] for batch in deal(fixed_batches(len(cases), batch_size), rank, world_size)]
    return takewhile(lambda _: stop is None or not stop.requested, batches)


def read_images(reader: ShardReader, batch: Sequence[Case]) -> Tensor:
    """Return the films' inputs, uint8 (N, 1, S, S)."""
    return torch.from_numpy(np.stack([reader.image(case.shard, case.row) for case in batch]))[:, None]


def _record(
    case: Case,
    prob: NDArray[np.float32],
    score: float | None,
    thresholds: Sequence[float],
    per_film: PerFilm | None,
) -> FilmRecord:
    truth = decode_rle(case.rle, case.rows, case.columns)
    probability = film_probability(prob, case.rows, case.columns)
    if per_film is not None:
        per_film(case, probability, truth)
    return film_record(probability, truth, thresholds, score)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one film, at film size."""

    mask: NDArray[np.bool_]  # (rows, columns); all False: negative
    probability: NDArray[np.float32]  # (rows, columns)
    top_score: float  # probability of a pneumothorax; without an image-level head the mask's highest probability
    warnings: tuple[str, ...] = ()  # doubts about the film's grey values

    @property
    def positive(self) -> bool:
        """Whether the mask has any pixel."""
        return bool(self.mask.any())

    @property
    def area_px(self) -> int:
        """Return the number of pixels of the mask."""
        return int(np.count_nonzero(self.mask))


Loaded = tuple[nn.Module, dict[str, Any]]
Film = str | Path | NDArray[np.uint8]


def predict(
    model: Loaded | str | Path,
    films: Film | Sequence[Film],
    *,
    tta: str | None = None,
    triplet: Triplet | None = None,
    batch_size: int = 8,
) -> list[Prediction]:
    """Predict films with one model; for folders and ensembles use `submit.py --stage infer`.

    Args:
        model: what `load_model` returned, or the path of a model file. The model's device is used.
        films: one film or several, each the path of a DICOM, PNG or JPEG file or a uint8 array (rows, columns).
            In an array 0 is black.
        tta: "hflip" or "none"; default: the one stored in the model.
        triplet: decision rule; default: the one stored in the model.

    Raises:
        FilmError: a file is no readable film.
        TypeError: an array is not uint8 with two dimensions.
    """
    network, meta = load_model(model) if isinstance(model, (str, Path)) else model
    if isinstance(films, (str, Path, np.ndarray)):
        films = [films]
    rule = stored_triplet(meta) if triplet is None else triplet
    size = int(meta["size"])
    predictor = Predictor([network], size, next(network.parameters()).device, tta or meta.get("tta") or "none")
    predictions: list[Prediction] = []
    for start in range(0, len(films), batch_size):
        batch = [_read(film) for film in films[start : start + batch_size]]
        images = torch.from_numpy(np.stack([to_size(image, size) for image, _ in batch]))[:, None]
        for (image, warned), (prob, score) in zip(batch, predictor.probabilities(images).films(), strict=True):
            probability = film_probability(prob, *image.shape)
            mask = apply_triplet(probability, rule, score)
            predictions.append(Prediction(mask, probability, film_score(probability, score), warned))
    return predictions


def _read(film: Film) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    if isinstance(film, (str, Path)):
        read = read_film(film)
        return read.pixels, read.warnings
    if film.dtype != np.uint8 or film.ndim != 2:
        raise TypeError(f"a film array is uint8 with two dimensions, not {film.dtype} with {film.ndim}")
    return film, ()
