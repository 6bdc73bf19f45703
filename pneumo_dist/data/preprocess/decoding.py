"""Decode films in worker processes and yield them in order. A crash or a hang of a decoder costs one film only.

Workers return pixels through shared anonymous memory, so that nothing large is pickled. This module writes no files.
"""

from __future__ import annotations

import hashlib
import mmap
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.data.films.dicom import Film, FilmError, NotAnImage, load, parse_film
from pneumo_dist.data.films.masks import read_mask
from pneumo_dist.data.films.rle import EMPTY, RleError, area_px, encode_rle, paint, past_the_end, runs
from pneumo_dist.data.preprocess.source import FilmJob
from pneumo_dist.data.shards import masks_to_sizes, to_size, to_sizes
from pneumo_dist.runtime.files import sha256_file
from pneumo_dist.runtime.processes import Answer, Pool

HASH_SIZE = 256  # films with equal images of this size are candidates for duplicates
CHUNK = 8  # films per message to a worker: fewer messages
AHEAD = 2  # chunks in flight per worker

_Item = tuple[int, FilmJob, int]  # key of the decoder, film, index of its slot in the shared memory
_Result = tuple[dict[str, Any], dict[int, bytes] | None, str]  # facts, packed masks, reason


@dataclass(frozen=True)
class Decoded:
    """The result for one film: facts (see `decode_film`), images and packed masks, or the reason why it is unusable."""

    facts: dict[str, Any]
    images: dict[int, np.ndarray] = field(default_factory=dict)  # uint8 (size, size), valid until the next film
    masks: dict[int, bytes] | None = None  # packed bits, of a positive film
    reason: str = ""


def decode_film(
    job: FilmJob, folder: Path, max_pixels: int, images: dict[int, np.ndarray]
) -> tuple[dict[str, Any], dict[int, bytes] | None]:
    """Decode one film into `images` (uint8 (size, size) by size); return facts and packed masks (None if empty).

    Raises:
        FilmError: the film is unusable.
    """
    data = load(f"{folder}/{job.path}", max_pixels)  # pathlib takes longer than opening the file
    film = parse_film(data, max_pixels, job.path)
    rows, columns = film.pixels.shape
    to_sizes(film.pixels, images, images)
    small = images[HASH_SIZE] if HASH_SIZE in images else to_size(film.pixels, HASH_SIZE)
    facts: dict[str, Any] = {
        "id": job.id,
        "path": job.path,
        "bytes": len(data),
        "sha256": film.sha256,
        "rows": rows,
        "columns": columns,
        "view": film.view,
        "sex": film.sex,
        "decoder": film.decoder,
        "warnings": list(film.warnings),
        "named_by_uid": film.sop_uid in ("", job.id),
        "pixels": hashlib.sha256(small.tobytes()).hexdigest(),
        "annotation": job.digest,
        "annotation_rows": len(job.texts) + len(job.masks),
    }
    facts["rle"], facts["area"], mask = _union(job, film, facts["warnings"], max_pixels)
    _check_plausible(job, facts["area"], rows * columns)
    facts["label"] = int(mask is not None)
    if mask is None:
        return facts, None
    return facts, {size: np.packbits(small).tobytes() for size, small in masks_to_sizes(mask, images).items()}


def _union(job: FilmJob, film: Film, warnings: list[str], max_pixels: int) -> tuple[str, int, np.ndarray | None]:
    """Return (union of the annotation, its area in film pixels, the mask: uint8, 255 inside, None if empty)."""
    rows, columns = film.pixels.shape
    if job.masks:
        mask = np.zeros((rows, columns), np.uint8)
        for file in job.masks:
            inside, warned = read_mask(file, film.sop_uid, (rows, columns), max_pixels)
            mask[inside] = 255
            warnings += [text for text in warned if text not in warnings]
        area = int(np.count_nonzero(mask))
        return encode_rle(mask), area, mask if area else None
    pairs = []
    for text, where in zip(job.texts, job.where, strict=False):  # a list of films has rows without a text
        try:
            starts, ends = runs(text)
            if len(ends) and ends[-1] > rows * columns:
                raise past_the_end(int(ends[-1]), rows, columns)
            pairs.append((starts, ends))
        except RleError as error:
            raise FilmError(f"annotation at {where}: {error}") from None
    if all(text.strip() == EMPTY for text in job.texts):
        return EMPTY, 0, None
    mask = paint(pairs, rows, columns, np.uint8(255))
    text = " ".join(job.texts[0].split()) if len(job.texts) == 1 else encode_rle(mask)
    return text, area_px(pairs)[0], mask


def _check_plausible(job: FilmJob, area: int, pixels: int) -> None:
    """Raise FilmError if the mask contradicts the list, or covers more of the film than a pneumothorax can."""
    if job.label is not None and job.label != (area > 0):
        found = f"has {area} pixels" if area else "is empty" if job.masks or job.texts else "is missing"
        raise FilmError(f"annotation at {job.where[0]}: has_pneumo={job.label}, but the mask {found}")
    if 2 * area > pixels:
        raise FilmError(f"the mask covers {area / pixels:.0%} of the film: it is inverted, or no mask")


class Decoder:
    """Decode films in `workers` processes. Use as a context manager: its exit ends the processes."""

    _pool: Pool

    def __init__(self, folder: Path, sizes: Iterable[int], workers: int, max_pixels: int) -> None:
        self._folder, self._sizes, self._max_pixels = Path(folder), tuple(sorted(set(sizes))), max_pixels
        self._workers = workers
        self._film_bytes = sum(size * size for size in self._sizes)
        self._slots = workers * AHEAD
        self._pixels = mmap.mmap(-1, self._film_bytes * CHUNK * self._slots)  # shared with the forked workers

    def __enter__(self) -> Decoder:
        _DECODERS[id(self)] = self
        self._pool = Pool(self._workers, _prepare)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        del _DECODERS[id(self)]

    def run(self, jobs: Iterable[FilmJob]) -> Iterator[tuple[FilmJob, Decoded]]:
        """Yield (job, result) in the order of `jobs`."""
        todo = iter(jobs)
        free = deque(range(self._slots))
        waiting: deque[tuple[list[_Item], int, Answer[_Item, _Result]]] = deque()
        while True:
            while free and (chunk := list(islice(todo, CHUNK))):
                slot = free.popleft()
                batch = [(id(self), job, slot * CHUNK + i) for i, job in enumerate(chunk)]
                waiting.append((batch, slot, self._pool.submit(_work, batch, self._give_up)))
            if not waiting:
                return
            batch, slot, answer = waiting.popleft()
            for (_, job, at), (facts, masks, reason) in zip(batch, answer.results(), strict=True):
                yield job, Decoded(facts, {} if reason else self._views(at), masks, reason)
            free.append(slot)

    def _give_up(self, task: _Item, reason: str) -> _Result:
        return _quarantined(task[1], self._folder), None, reason

    def _views(self, index: int) -> dict[int, np.ndarray]:
        """Return one slot of the shared memory as {size: uint8 (size, size)}."""
        views, at = {}, index * self._film_bytes
        for size in self._sizes:
            views[size] = np.frombuffer(self._pixels, np.uint8, size * size, at).reshape(size, size)
            at += size * size
        return views

    def work(self, job: FilmJob, index: int) -> _Result:
        """Decode one film into a slot of the shared memory; return (facts, packed masks, reason). Runs in a worker."""
        reason, image = f"annotation at {job.broken}" if job.broken else "", True
        try:
            if not reason:
                return *decode_film(job, self._folder, self._max_pixels, self._views(index)), ""
        except FilmError as error:
            reason = str(error)
            image = bool(job.digest) or not isinstance(error, NotAnImage)  # what is annotated was a film
        except MemoryError:
            reason = "not enough memory to decode it"
        except Exception as error:  # one unforeseen film must not stop the others
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"unexpected {type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
        return _quarantined(job, self._folder, image), None, reason


_DECODERS: dict[int, Decoder] = {}  # workers inherit it by fork: a decoder with its shared memory cannot be pickled


def _work(task: _Item) -> _Result:
    key, job, index = task
    return _DECODERS[key].work(job, index)


def _prepare() -> None:
    import cv2

    cv2.setNumThreads(0)  # one worker per core already


def is_film(facts: dict[str, Any]) -> bool:
    """Return whether a quarantined file is a film, not a DICOM object without an image."""
    return bool(facts.get("image", True))


def _quarantined(job: FilmJob, folder: Path, image: bool = True) -> dict[str, Any]:
    """Return the identity of an unusable film, or of an object without an image: finalize detects a changed source."""
    try:
        size, sha256 = (folder / job.path).stat().st_size, sha256_file(folder / job.path)
    except OSError:
        size, sha256 = -1, ""
    facts = {"id": job.id, "path": job.path, "bytes": size, "sha256": sha256, "annotation": job.digest}
    return facts if image else facts | {"image": False}
