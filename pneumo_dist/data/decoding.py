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
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.data.dicom import FilmError, load, parse_film
from pneumo_dist.data.rle import RleError, decode_union, encode_rle, runs
from pneumo_dist.data.shards import masks_to_sizes, to_size, to_sizes
from pneumo_dist.data.source import FilmJob
from pneumo_dist.runtime import stopping

HASH_SIZE = 256  # films with equal images of this size are looked at again for being duplicates
FILM_TIMEOUT_S = 300.0
AHEAD = 4  # films in flight per process


@dataclass(frozen=True)
class Decoded:
    """What came of one film: facts (see `_facts`) with images and packed masks, or a reason and nothing else."""

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
    if "PNEUMO_STORE" in os.environ:  # several tasks of this machine's own executor share its cores
        mine //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, mine)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that kill -9 leaves no worker behind."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _start_worker(parent: int) -> None:
    stopping.ignore()
    die_with_parent()
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    import cv2

    cv2.setNumThreads(0)


def _facts(job: FilmJob, folder: Path, sizes: tuple[int, ...], max_pixels: int) -> tuple[dict[str, Any], Any, Any]:
    """Decode one film; return (facts, {size: image}, {size: packed mask} or None). Raises FilmError."""
    path = folder / job.path
    data = load(path, max_pixels)
    film = parse_film(data, max_pixels, path.suffix.lower() in (".dcm", ".dicom"))
    rows, columns = film.pixels.shape
    images = to_sizes(film.pixels, sizes)
    small = images[HASH_SIZE] if HASH_SIZE in images else to_size(film.pixels, HASH_SIZE)
    facts: dict[str, Any] = {"id": job.id, "path": job.path, "bytes": len(data), "sha256": film.sha256}
    facts |= {"rows": rows, "columns": columns, "view": film.view, "sex": film.sex, "decoder": film.decoder}
    facts |= {
        "pixels": hashlib.sha256(small.tobytes()).hexdigest(),
        "blank": bool(small.min() == small.max()),
    }
    facts |= {"named_by_uid": film.sop_uid in ("", job.id), "warnings": list(film.warnings)}
    facts |= {"annotation": job.digest, "annotation_rows": len(job.texts), "rle": "-1", "area": 0, "overlap": 0}
    try:
        found = [pair for pair in map(runs, job.texts) if len(pair[0])]
        if not found:
            return facts, images, None
        mask = decode_union(job.texts, rows, columns)
    except RleError as error:
        raise FilmError(f"annotation at {job.where}: {error}") from None
    area = int(mask.sum())
    single = len(job.texts) == 1
    facts["rle"] = " ".join(job.texts[0].split()) if single else encode_rle(mask)
    facts["area"], facts["overlap"] = area, sum(int((ends - starts).sum()) for starts, ends in found) - area
    return facts, images, {size: np.packbits(small).tobytes() for size, small in masks_to_sizes(mask, sizes).items()}


class Decoder:
    """Decodes films in `workers` processes. Use as a context manager: leaving it ends the processes."""

    def __init__(self, folder: Path, sizes: Iterable[int], workers: int, max_pixels: int) -> None:
        self._folder, self._sizes, self._max_pixels = Path(folder), tuple(sorted(set(sizes))), max_pixels
        self._workers = workers
        self._slot_bytes = sum(size * size for size in self._sizes)
        self._slots = mmap.mmap(-1, max(1, self._slot_bytes * workers * AHEAD))  # shared with the forked workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self, workers: int) -> ProcessPoolExecutor:
        if self._pool is None:
            # fork: the workers share the slots, and nothing in this process holds threads or a device.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
        return self._pool

    def _end(self) -> None:
        if self._pool is not None:
            processes = list((getattr(self._pool, "_processes", None) or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()  # a hanging decoder does not listen to anything else
            for process in processes:
                process.join()
            self._pool = None

    def _views(self, slot: int) -> dict[int, np.ndarray]:
        views, at = {}, slot * self._slot_bytes
        for size in self._sizes:
            views[size] = np.frombuffer(self._slots, np.uint8, size * size, at).reshape(size, size)
            at += size * size
        return views

    def _work(self, job: FilmJob, slot: int) -> tuple[dict[str, Any], dict[int, bytes] | None, str]:
        """In a worker: decode one film into a slot."""
        if job.broken:
            return _bad(job, self._folder), None, f"annotation at {job.broken}"
        try:
            facts, images, masks = _facts(job, self._folder, self._sizes, self._max_pixels)
        except FilmError as error:
            return _bad(job, self._folder), None, str(error)
        except MemoryError:
            return _bad(job, self._folder), None, "not enough memory to decode it"
        for size, view in self._views(slot).items():
            view[:] = images[size]
        return facts, masks, ""

    def run(self, jobs: Iterable[FilmJob]) -> Iterator[tuple[FilmJob, Decoded]]:
        """Yield (job, what came of it) in the order of `jobs`."""
        waiting: deque[tuple[FilmJob, int, Future[Any]]] = deque()
        free = deque(range(self._workers * AHEAD))
        todo = iter(jobs)
        ended = False
        while True:
            while free and not ended:
                job = next(todo, None)
                if job is None:
                    ended = True
                    break
                slot = free.popleft()
                try:
                    future = self._start(self._workers).submit(_call, self._key(), job, slot)
                except BrokenProcessPool:
                    future = Future()
                    future.set_exception(BrokenProcessPool())
                waiting.append((job, slot, future))
            if not waiting:
                return
            job, slot, future = waiting.popleft()
            try:
                facts, masks, reason = future.result(FILM_TIMEOUT_S)
            except (BrokenProcessPool, FutureTimeout):
                # One film of those in flight did it: each is tried again by itself.
                inflight = [(job, slot), *((other, at) for other, at, _ in waiting)]
                waiting.clear()
                for other, at in inflight:
                    yield other, self._alone(other, at)
                    free.append(at)
                self._end()
                continue
            yield job, Decoded(facts, {} if reason else self._views(slot), masks, reason)
            free.append(slot)

    def _alone(self, job: FilmJob, slot: int) -> Decoded:
        self._end()
        try:
            facts, masks, reason = self._start(1).submit(_call, self._key(), job, slot).result(FILM_TIMEOUT_S)
        except BrokenProcessPool:
            return Decoded(_bad(job, self._folder), reason="the decoder crashed on it")
        except FutureTimeout:
            return Decoded(_bad(job, self._folder), reason=f"not decoded within {FILM_TIMEOUT_S:.0f} s")
        return Decoded(facts, {} if reason else self._views(slot), masks, reason)

    def _key(self) -> int:
        _DECODERS[id(self)] = self
        return id(self)


_DECODERS: dict[int, Decoder] = {}  # inherited by the forked workers: a decoder with its shared memory is not pickled


def _call(key: int, job: FilmJob, slot: int) -> Any:
    return _DECODERS[key]._work(job, slot)


def _bad(job: FilmJob, folder: Path) -> dict[str, Any]:
    """Return what identifies a quarantined film: enough to notice that its source has changed."""
    try:
        size = (folder / job.path).stat().st_size
        with open(folder / job.path, "rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        size, sha256 = -1, ""
    return {"id": job.id, "path": job.path, "bytes": size, "sha256": sha256, "annotation": job.digest}
