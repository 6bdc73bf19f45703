"""Films decoded by several processes, handed out in order. A decoder that crashes or hangs costs one film, no more.

Pixels come back through shared anonymous memory, so that nothing large is pickled. No files are written in here.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.data.films.dicom import FilmError, load, parse_film
from pneumo_dist.data.films.rle import EMPTY, RleError, area_px, encode_rle, paint, past_the_end, runs
from pneumo_dist.data.preprocess.source import FilmJob
from pneumo_dist.data.shards import masks_to_sizes, to_size, to_sizes
from pneumo_dist.runtime import stopping
from pneumo_dist.runtime.ranks import is_local_worker

HASH_SIZE = 256  # films with equal images of this size are looked at again for being duplicates
FILM_TIMEOUT_S = 120.0  # a cut JPEG-LS stream can take 10 s until its decoder gives up
CHUNK = 8  # films handed to a process at once: fewer messages
AHEAD = 2  # chunks in flight per process


@dataclass(frozen=True)
class Decoded:
    """What came of one film: facts (see `decode_film`) with images and packed masks, or a reason and nothing else."""

    facts: dict[str, Any]
    images: dict[int, np.ndarray] = field(default_factory=dict)  # uint8 (size, size), valid until the next film
    masks: dict[int, bytes] | None = None  # packed bits, of a positive film
    reason: str = ""


def cores(wanted: int) -> int:
    """Return how many processes this task should use: `wanted`, or its share of the cores it may run on."""
    if wanted:
        return wanted
    mine = len(os.sched_getaffinity(0))
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        mine = min(mine, int(os.environ["SLURM_CPUS_PER_TASK"]))
    if is_local_worker():  # several of them share the cores
        mine //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, mine)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that kill -9 leaves no worker behind."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def keep_memory(largest: int = 64 << 20) -> None:
    """Let this process keep freed pieces of up to `largest` bytes instead of faulting new pages in every time.

    Measured: a third of the time that was spent beside decoding. M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt:
        mallopt(-1, 2 * largest)
        mallopt(-3, largest)


def _start_worker(parent: int) -> None:
    stopping.ignore()
    die_with_parent()
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    keep_memory()
    import cv2

    cv2.setNumThreads(0)


def decode_film(
    job: FilmJob, folder: Path, max_pixels: int, images: dict[int, np.ndarray]
) -> tuple[dict[str, Any], dict[int, bytes] | None]:
    """Decode one film into `images` (uint8 (size, size) by size); return its facts and packed masks, None when empty.

    Raises:
        FilmError: the reason why it cannot be used.
    """
    data = load(os.path.join(folder, job.path), max_pixels)  # pathlib costs more than opening the file
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
        "blank": bool(small.min() == small.max()),
        "annotation": job.digest,
        "annotation_rows": len(job.texts),
    }
    facts["rle"], facts["area"], masks = _mask(job, rows, columns, tuple(images))
    return facts | {"label": int(masks is not None)}, masks


def _mask(job: FilmJob, rows: int, columns: int, sizes: tuple[int, ...]) -> tuple[str, int, dict[int, bytes] | None]:
    """Return (union of the annotation rows, its area in film pixels, {size: packed mask} or None when empty)."""
    pairs = []
    for text, where in zip(job.texts, job.where, strict=True):
        try:
            pairs.append(runs(text))
            if len(pairs[-1][1]) and pairs[-1][1][-1] > rows * columns:
                raise past_the_end(int(pairs[-1][1][-1]), rows, columns)
        except RleError as error:
            raise FilmError(f"annotation at {where}: {error}") from None
    if all(text.strip() == EMPTY for text in job.texts):
        return EMPTY, 0, None
    mask = paint(pairs, rows, columns, np.uint8(255))
    text = " ".join(job.texts[0].split()) if len(job.texts) == 1 else encode_rle(mask)
    packed = {size: np.packbits(small).tobytes() for size, small in masks_to_sizes(mask, sizes).items()}
    return text, area_px(pairs)[0], packed


class Decoder:
    """Decodes films in `workers` processes. Use as a context manager: leaving it ends the processes."""

    def __init__(self, folder: Path, sizes: Iterable[int], workers: int, max_pixels: int) -> None:
        self._folder, self._sizes, self._max_pixels = Path(folder), tuple(sorted(set(sizes))), max_pixels
        self._workers = workers
        self._film_bytes = sum(size * size for size in self._sizes)
        self._slots = workers * AHEAD
        self._pixels = mmap.mmap(-1, self._film_bytes * CHUNK * self._slots)  # shared with the forked workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Decoder:
        _DECODERS[id(self)] = self
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        del _DECODERS[id(self)]

    def run(self, jobs: Iterable[FilmJob]) -> Iterator[tuple[FilmJob, Decoded]]:
        """Yield (job, what came of it) in the order of `jobs`."""
        todo = iter(jobs)
        free = deque(range(self._slots))
        waiting: deque[tuple[list[FilmJob], int, Future[list[Any]] | None]] = deque()
        while True:
            while free and (chunk := list(islice(todo, CHUNK))):
                slot = free.popleft()
                waiting.append((chunk, slot, self._submit(self._workers, chunk, slot)))
            if not waiting:
                return
            chunk, slot, future = waiting.popleft()
            try:
                if future is None:
                    raise BrokenProcessPool
                results = future.result(FILM_TIMEOUT_S)
            except (BrokenProcessPool, FutureTimeout):
                # One film of those in flight did it: each is tried again by itself.
                for films, at, _ in [(chunk, slot, None), *waiting]:
                    for film in films:
                        yield film, self._alone(film, at)
                    free.append(at)
                waiting.clear()
                self._end()
                continue
            for place, (job, result) in enumerate(zip(chunk, results, strict=True)):
                yield job, self._decoded(result, slot, place)
            free.append(slot)

    def _submit(self, workers: int, chunk: list[FilmJob], slot: int) -> Future[list[Any]] | None:
        """Hand a chunk to the pool, which is started where there is none; None where it has broken."""
        if self._pool is None:
            # fork: the workers share the pixels, and this process holds neither a device nor a process group.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
        try:
            return self._pool.submit(_call, id(self), chunk, slot)
        except BrokenProcessPool:
            return None

    def _alone(self, job: FilmJob, slot: int) -> Decoded:
        """Decode one film in a process of its own."""
        self._end()
        future = self._submit(1, [job], slot)
        try:
            return self._decoded(future.result(FILM_TIMEOUT_S)[0] if future else None, slot, 0)
        except BrokenProcessPool:
            return Decoded(_bad(job, self._folder), reason="the decoder crashed on it")
        except FutureTimeout:
            return Decoded(_bad(job, self._folder), reason=f"not decoded within {FILM_TIMEOUT_S:.0f} s")

    def _end(self) -> None:
        if self._pool is not None:
            processes = list((getattr(self._pool, "_processes", None) or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()  # a hanging decoder listens to nothing else
            for process in processes:
                process.join()
            self._pool = None

    def _decoded(self, result: Any, slot: int, place: int) -> Decoded:
        facts, masks, reason = result
        return Decoded(facts, {} if reason else self._views(slot, place), masks, reason)

    def _views(self, slot: int, place: int) -> dict[int, np.ndarray]:
        """Return the shared memory of one film as {size: uint8 (size, size)}."""
        views, at = {}, (slot * CHUNK + place) * self._film_bytes
        for size in self._sizes:
            views[size] = np.frombuffer(self._pixels, np.uint8, size * size, at).reshape(size, size)
            at += size * size
        return views

    def work(self, job: FilmJob, slot: int, place: int) -> tuple[dict[str, Any], dict[int, bytes] | None, str]:
        """In a worker: decode one film into shared memory; return (facts, packed masks, reason)."""
        reason = f"annotation at {job.broken}" if job.broken else ""
        try:
            if not reason:
                return *decode_film(job, self._folder, self._max_pixels, self._views(slot, place)), ""
        except FilmError as error:
            reason = str(error)
        except MemoryError:
            reason = "not enough memory to decode it"
        except Exception as error:  # a film nobody has thought of must not stop the others
            place_of = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"unexpected {type(error).__name__} in {Path(place_of.filename).name}, line {place_of.lineno}"
        return _bad(job, self._folder), None, reason


_DECODERS: dict[int, Decoder] = {}  # inherited by the forked workers: a decoder with its shared memory is not pickled


def _call(key: int, chunk: list[FilmJob], slot: int) -> list[Any]:
    return [_DECODERS[key].work(job, slot, place) for place, job in enumerate(chunk)]


def _bad(job: FilmJob, folder: Path) -> dict[str, Any]:
    """Return what identifies a quarantined film: enough to notice that its source has changed."""
    try:
        size = (folder / job.path).stat().st_size
        with open(folder / job.path, "rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        size, sha256 = -1, ""
    return {"id": job.id, "path": job.path, "bytes": size, "sha256": sha256, "annotation": job.digest}
