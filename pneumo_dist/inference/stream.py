"""Infer the parts of one array task as a stream of batches: reading, forward pass and writing overlap.

The result of a film depends on the film and the models only: batches are cut from the plan, not from the films left.
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

from pneumo_dist.data.films import codecs, grey
from pneumo_dist.inference.dicomseg import SegJob, try_write_seg
from pneumo_dist.inference.film_plan import FilmPlan, PlannedFilm, signature
from pneumo_dist.inference.outputs import FilmWriter, Row, Segment, empty_row
from pneumo_dist.inference.parts import append_batch, begin_part, finish_part, part_folder, read_part
from pneumo_dist.inference.reading import PICTURE_PX, THUMB_PX, ReadFilm, ReadJob, read_ahead, start_readers
from pneumo_dist.prediction.ensemble import Ensemble, load_ensemble
from pneumo_dist.prediction.filmsize import mean_film_probability
from pneumo_dist.prediction.overlap import film_threads, overlap
from pneumo_dist.prediction.predictor import Forward, Predictor
from pneumo_dist.run import pooled_thresholds
from pneumo_dist.runtime import ranks
from pneumo_dist.runtime.files import sha256_text
from pneumo_dist.runtime.processes import Answer, Pool, cores
from pneumo_dist.runtime.processor import set_precision
from pneumo_dist.runtime.runlog import progress_bar
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.records import Triplet
from pneumo_dist.scoring.submission_csv import IGNORED, UNREADABLE

log = logging.getLogger(__name__)


@dataclass
class OpenPart:
    """An unfinished part: its working folder and the rows written so far."""

    index: int
    films: int
    working: Path
    writer: FilmWriter
    signature: str
    kept: list[Row]  # of a stopped task
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class FilmBatch:
    """Films of one part that are forwarded together."""

    part: OpenPart
    films: Sequence[PlannedFilm]


def stream_parts(task: Task, plan: FilmPlan, indices: Sequence[int]) -> None:
    """Infer the parts of `indices` that are missing or outdated."""
    config, device = task.config, ranks.discover().device
    _preload("dicomseg" in config.infer.outputs)
    readers = start_readers(_reader_count(config.data.workers, device))  # forked before CUDA and threads start
    predictor: Predictor | None = None
    try:
        set_precision(config.train)
        if device.type == "cpu":
            torch.set_num_threads(cores(config.train.threads))
        paths = task.run.model_paths()
        pooled, rule = pooled_thresholds(paths), config.infer.triplet
        given = Triplet(rule[0], int(rule[1]), rule[2]) if rule else None
        ensemble = load_ensemble(paths, device, config.infer.tta, config.train.amp, pooled, given)
        predictor = ensemble.predictor
        settings = ensemble.settings | {
            "outputs": sorted({"csv", *config.infer.outputs}), "codecs": codecs.installed(), "grey": grey.VERSION,
        }  # fmt: skip
        todo = [j for j in indices if read_part(part_folder(task.out, j), signature(plan, j, settings)) is None]
        films = sum(len(plan.part(j)) for j in todo)
        log.info("%d of %d parts are finished, inferring %d films", len(indices) - len(todo), len(indices), films)
        _stream(task, plan, todo, readers, ensemble, settings)
    finally:
        if predictor is not None:
            predictor.close()
        readers.close()


def _preload(segmentations: bool) -> None:
    """Import packages before the fork, or every reader would import them."""
    import pydicom  # noqa: F401

    if segmentations:
        import highdicom  # noqa: F401


def _reader_count(workers: int, device: torch.device) -> int:
    # On the CPU the forward pass takes 100 times as long as reading (1 s per film): two readers suffice.
    return workers or (min(2, cores(0)) if device.type == "cpu" else cores(0))


def _stream(
    task: Task, plan: FilmPlan, todo: Sequence[int], readers: Pool, ensemble: Ensemble, settings: dict[str, Any]
) -> None:
    config, predictor = task.config, ensemble.predictor
    source = task.run.infer_source
    assert source is not None
    segment = _segmenter(readers, source, plan, settings) if "dicomseg" in config.infer.outputs else None
    picture_px = PICTURE_PX if "overlays" in config.infer.outputs else THUMB_PX

    def batches() -> Iterator[FilmBatch]:
        for j in todo:
            films = plan.part(j)
            size, signed = config.infer.batch_size, signature(plan, j, settings)
            working, finished = begin_part(task.out, j, f"{signed} {size}")
            # The last batch is inferred in any case, and completes the part.
            kept = [row for batch in finished[: (len(films) - 1) // size] for row in batch]
            writer = FilmWriter(working, tuple(config.infer.outputs), ensemble.triplet, segment)
            part = OpenPart(j, len(films), working, writer, signed, kept)
            for start in range(len(kept), len(films), size):
                yield FilmBatch(part, films[start : start + size])

    def read(batch: FilmBatch) -> list[Answer[ReadJob, ReadFilm]]:
        return [
            read_ahead(
                readers, ReadJob(str(source / film.path), tuple(predictor.sizes), picture_px, config.data.max_pixels)
            )
            for film in batch.films
        ]

    def compute(batch: FilmBatch, films: list[ReadFilm]) -> Callable[[], dict[int, Forward]]:
        slots = _slots(films, config.infer.batch_size, predictor.device)
        waiting = {size: predictor.launch(_stack(slots, size, predictor.device), size) for size in predictor.sizes}
        return lambda: {size: wait() for size, wait in waiting.items()}

    with film_threads() as pool:

        def write(batch: FilmBatch, films: list[ReadFilm], forward: dict[int, Forward]) -> list[Future[Row]]:
            slots = _slots(films, config.infer.batch_size, predictor.device)
            slot_of = {id(film): i for i, film in enumerate(slots) if film}
            return [
                pool.submit(_write_film, batch.part.writer, film, read, *_of(predictor, forward, slot_of.get(id(read))))
                for film, read in zip(batch.films, films, strict=True)
            ]

        ahead = max(2, -(-2 * readers.count // config.infer.batch_size))
        done = overlap(batches(), read, compute, write, ahead, lambda: task.stop.requested)
        rows = _finished(task, done, settings)
        for _ in progress_bar(rows, sum(len(plan.part(j)) for j in todo), f"infer {plan.label}"):
            pass


def _segmenter(readers: Pool, source: Path, plan: FilmPlan, settings: dict[str, Any]) -> Segment:
    """Return a function that has a reader write a DICOM SEG: highdicom is slow and holds the interpreter lock."""
    models = tuple(settings["models"])
    deciding = {key: value for key, value in settings.items() if key not in ("outputs", "codecs")}
    answer = sha256_text(json.dumps(deciding, sort_keys=True))

    def segment(film: PlannedFilm, mask: NDArray[np.bool_], target: Path) -> tuple[int, str] | str:
        job = SegJob(
            film.id, str(source / film.path), str(target), mask.shape[0], mask.shape[1], np.packbits(mask).tobytes(),
            plan.label, answer, models, plan.created,
        )  # fmt: skip
        return readers.submit(try_write_seg, [job], lambda _, reason: reason).result()

    return segment


def _finished(task: Task, done: Iterator[tuple[FilmBatch, list[Row]]], settings: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows; record each batch, and finish each part when its last film is written."""
    for batch, rows in done:
        part = batch.part
        append_batch(part.working, rows)
        rows, part.kept = [*part.kept, *rows], []
        part.rows += rows
        yield from rows
        if len(part.rows) == part.films:
            content = {"signature": part.signature, "settings": settings, "rows": part.rows}
            finish_part(task.out, part.index, part.working, content)
    task.stop.check()


def _slots(films: Sequence[ReadFilm], batch_size: int, device: torch.device) -> list[ReadFilm | None]:
    """Return the films of a batch by position, None for an empty slot.

    On CUDA the last bits of a result can depend on the size of the batch, so every batch is full. On the CPU each film
    is forwarded alone, and only if it is readable.
    """
    if device.type == "cpu":
        return [film for film in films if not film.reason]
    return [None if film.reason else film for film in films] + [None] * (batch_size - len(films))


def _stack(slots: Sequence[ReadFilm | None], size: int, device: torch.device) -> Tensor:
    """Return uint8 (N, 1, size, size), 0 in empty slots."""
    stacked = torch.zeros((len(slots), 1, size, size), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for i, film in enumerate(slots):
        if film is not None:
            stacked[i, 0] = torch.from_numpy(film.inputs[size])
    return stacked


Maps = list[tuple[float, NDArray[np.float32]]]


def _of(predictor: Predictor, forward: dict[int, Forward], slot: int | None) -> tuple[Maps, float | None]:
    """Return (weight, probability map) of one film per size and its mean score; ([], None) for an unreadable film."""
    if slot is None:
        return [], None
    maps = [(predictor.weight(size), of_size.maps[slot].numpy()) for size, of_size in forward.items()]
    scores = [
        predictor.weight(size) * float(of_size.scores[slot])
        for size, of_size in forward.items()
        if of_size.scores is not None
    ]
    return maps, sum(scores) if predictor.scored else None


def _write_film(writer: FilmWriter, film: PlannedFilm, read: ReadFilm, maps: Maps, score: float | None) -> Row:
    if read.reason:
        return empty_row(film, read.reason, UNREADABLE if read.image else IGNORED)
    return writer.write(film, read, mean_film_probability(maps, read.rows, read.columns), score)
