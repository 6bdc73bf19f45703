"""The parts of one array element as a stream of batches: read, forward, write at once, with bounded memory.

A film's answer depends on the film and the models only: batches are cut from the plan, never from what is left to do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pneumo_dist.inference.dicomseg import SegJob, try_write_seg
from pneumo_dist.inference.film_plan import FilmPlan, PlannedFilm, signature
from pneumo_dist.inference.outputs import FilmWriter, Row, Segment, unreadable_row
from pneumo_dist.inference.parts import begin_part, finish_part, part_folder, read_part
from pneumo_dist.inference.reading import PICTURE_PX, THUMB_PX, ReadFilm, ReadJob, read_ahead, start_readers
from pneumo_dist.prediction.ensemble import Ensemble, load_ensemble
from pneumo_dist.prediction.filmsize import mean_film_probability
from pneumo_dist.prediction.overlap import film_threads, overlap
from pneumo_dist.prediction.predictor import Predictor
from pneumo_dist.run import pooled_thresholds
from pneumo_dist.runtime import ranks
from pneumo_dist.runtime.files import sha256_text
from pneumo_dist.runtime.processes import Answer, Pool, cores
from pneumo_dist.runtime.runlog import progress_bar
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.records import Triplet

log = logging.getLogger(__name__)


@dataclass
class OpenPart:
    """A part under way: its working folder and the rows written so far."""

    index: int
    films: int
    working: Path
    writer: FilmWriter
    signature: str
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class FilmBatch:
    """Films that are forwarded together; all of one part."""

    part: OpenPart
    films: Sequence[PlannedFilm]


def run_parts(task: Task, made: FilmPlan, indices: Sequence[int]) -> None:
    """Do the parts of `indices` that are missing or outdated."""
    config, device = task.config, ranks.discover().device
    _preload("dicomseg" in config.infer.outputs)
    helpers = start_readers(_helpers(config.data.workers, device))  # before CUDA and threads
    predictor: Predictor | None = None
    try:
        if device.type == "cpu":
            torch.set_num_threads(cores(config.train.threads))
        paths = task.run.model_paths()
        pooled, rule = pooled_thresholds(paths), config.infer.triplet
        given = Triplet(rule[0], int(rule[1]), rule[2]) if rule else None
        ensemble = load_ensemble(paths, device, config.infer.tta, config.train.amp, pooled, given)
        predictor = ensemble.predictor
        settings = ensemble.settings | {"outputs": sorted({"csv", *config.infer.outputs})}
        todo = [j for j in indices if read_part(part_folder(task.out, j), signature(made, j, settings)) is None]
        films = sum(len(made.part(j)) for j in todo)
        log.info("%d of %d parts are done already, %d films to do", len(indices) - len(todo), len(indices), films)
        _stream(task, made, todo, helpers, ensemble, settings)
    finally:
        if predictor is not None:
            predictor.close()
        helpers.close()


def _preload(segmentations: bool) -> None:
    """Import once what every helper would import for itself after the fork."""
    import pydicom  # noqa: F401

    if segmentations:
        import highdicom  # noqa: F401


def _helpers(asked: int, device: torch.device) -> int:
    # On the CPU the forward pass takes a second a film and reading a hundredth: one or two readers keep up.
    return asked or (min(2, cores(0)) if device.type == "cpu" else cores(0))


def _stream(
    task: Task, made: FilmPlan, todo: Sequence[int], helpers: Pool, ensemble: Ensemble, settings: dict[str, Any]
) -> None:
    config, predictor = task.config, ensemble.predictor
    source = task.run.infer_source
    assert source is not None
    segment = _segmenter(helpers, source, made, settings) if "dicomseg" in config.infer.outputs else None
    picture_px = PICTURE_PX if "overlays" in config.infer.outputs else THUMB_PX

    def batches() -> Iterator[FilmBatch]:
        for j in todo:
            films = made.part(j)
            working = begin_part(task.out, j)
            writer = FilmWriter(working, tuple(config.infer.outputs), ensemble.triplet, segment)
            part = OpenPart(j, len(films), working, writer, signature(made, j, settings))
            for start in range(0, len(films), config.infer.batch_size):
                yield FilmBatch(part, films[start : start + config.infer.batch_size])

    def read(batch: FilmBatch) -> list[Answer[ReadJob, ReadFilm]]:
        return [
            read_ahead(
                helpers, ReadJob(str(source / film.path), tuple(predictor.sizes), picture_px, config.data.max_pixels)
            )
            for film in batch.films
        ]

    def compute(batch: FilmBatch, films: list[ReadFilm]) -> Callable[[], dict[int, Tensor]]:
        slots = _slots(films, config.infer.batch_size, predictor.device)
        waiting = {size: predictor.launch(_stack(slots, size, predictor.device), size) for size in predictor.sizes}
        return lambda: {size: wait() for size, wait in waiting.items()}

    with film_threads() as pool:

        def write(batch: FilmBatch, films: list[ReadFilm], probs: dict[int, Tensor]) -> list[Future[Row]]:
            place = {
                id(film): i for i, film in enumerate(_slots(films, config.infer.batch_size, predictor.device)) if film
            }
            return [
                pool.submit(_write_one, batch.part.writer, film, read, _maps(predictor, probs, place.get(id(read))))
                for film, read in zip(batch.films, films, strict=True)
            ]

        done = overlap(batches(), read, compute, write, ahead=max(2, -(-2 * helpers.count // config.infer.batch_size)))
        for _ in progress_bar(
            _finished(task, done, settings), sum(len(made.part(j)) for j in todo), f"infer {made.label}"
        ):
            pass


def _segmenter(helpers: Pool, source: Path, made: FilmPlan, settings: dict[str, Any]) -> Segment:
    """Return what writes a DICOM SEG in a helper process: highdicom is slow and holds the interpreter."""
    models = tuple(settings["models"])
    answer = sha256_text(
        json.dumps({key: value for key, value in settings.items() if key != "outputs"}, sort_keys=True)
    )

    def segment(film: PlannedFilm, mask: NDArray[np.bool_], target: Path) -> tuple[int, str] | str:
        job = SegJob(
            film.id, str(source / film.path), str(target), mask.shape[0], mask.shape[1], np.packbits(mask).tobytes(),
            made.label, answer, models, made.created,
        )  # fmt: skip
        return helpers.submit(try_write_seg, [job], lambda _, reason: reason).result()

    return segment


def _finished(task: Task, done: Iterator[tuple[FilmBatch, list[Row]]], settings: dict[str, Any]) -> Iterator[Row]:
    """Collect rows, and make each part visible when its last film is written."""
    for batch, rows in done:
        part = batch.part
        part.rows += rows
        yield from rows
        if len(part.rows) == part.films:
            content = {"signature": part.signature, "settings": settings, "rows": part.rows}
            finish_part(task.out, part.index, part.working, content)
        task.stop.check()  # what is under way is dropped: there is little time


def _slots(films: Sequence[ReadFilm], batch_size: int, device: torch.device) -> list[ReadFilm | None]:
    """Return who is where in a batch.

    On CUDA a film's last bits can depend on its batch's size, so every batch is full. On the CPU films are forwarded
    alone, and only the readable ones.
    """
    if device.type == "cpu":
        return [film for film in films if not film.reason]
    return [None if film.reason else film for film in films] + [None] * (batch_size - len(films))


def _stack(slots: Sequence[ReadFilm | None], size: int, device: torch.device) -> Tensor:
    """Return uint8 (N, 1, size, size); an empty slot is black."""
    stacked = torch.zeros((len(slots), 1, size, size), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for i, film in enumerate(slots):
        if film is not None:
            stacked[i, 0] = torch.from_numpy(film.inputs[size])
    return stacked


def _maps(predictor: Predictor, probs: dict[int, Tensor], place: int | None) -> list[tuple[float, np.ndarray]]:
    if place is None:
        return []
    return [(predictor.weight(size), prob[place].numpy()) for size, prob in probs.items()]


def _write_one(writer: FilmWriter, film: PlannedFilm, read: ReadFilm, maps: list[tuple[float, np.ndarray]]) -> Row:
    if read.reason:
        return unreadable_row(film, read.reason)
    return writer.write(film, read, mean_film_probability(maps, read.rows, read.columns))
