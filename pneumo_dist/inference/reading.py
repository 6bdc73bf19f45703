"""Films for inference, read and resized in helper processes. A file that kills its decoder costs one row, not the run.

Nothing leaves a helper but pixels, hashes and reasons: no header text.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.data.films.dicom import FilmError, read_film
from pneumo_dist.data.preprocess.decoding import FILM_TIMEOUT_S, die_with_parent
from pneumo_dist.data.shards import to_sizes
from pneumo_dist.runtime import stopping

THUMB_PX = 256  # longer side of a thumbnail
PICTURE_PX = 1024  # longer side of an overlay
T = TypeVar("T")


@dataclass(frozen=True)
class ReadJob:
    """What a helper process is asked for."""

    path: str
    sizes: tuple[int, ...]  # inputs of the models
    picture_px: int  # longer side of the grey picture to return
    max_pixels: int


@dataclass(frozen=True)
class ReadFilm:
    """One film as inference needs it; `reason` is empty for a readable one."""

    reason: str = ""
    rows: int = 0
    columns: int = 0
    inputs: dict[int, NDArray[np.uint8]] = field(default_factory=dict)  # size -> (size, size)
    picture: NDArray[np.uint8] | None = None  # (rows, columns) within picture_px
    sop_uid: str = ""
    sha256: str = ""
    warnings: tuple[str, ...] = ()


def fit(pixels: NDArray[np.uint8], longest: int) -> NDArray[np.uint8]:
    """Return the picture reduced by area so that its longer side is at most `longest`; smaller ones as they are."""
    import cv2

    scale = longest / max(pixels.shape)
    if scale >= 1:
        return pixels
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def read_job(job: ReadJob) -> ReadFilm:
    """Read one film; whatever is wrong with it comes back as a reason."""
    try:
        film = read_film(Path(job.path), job.max_pixels)
        rows, columns = film.pixels.shape
        inputs = to_sizes(film.pixels, job.sizes)
        picture = fit(film.pixels, job.picture_px)
    except FilmError as error:
        return ReadFilm(reason=str(error))
    except MemoryError:
        return ReadFilm(reason="not enough memory to decode it")
    except Exception as error:  # only the type: a message could quote the header
        return ReadFilm(reason=f"cannot be decoded ({type(error).__name__})")
    return ReadFilm("", rows, columns, inputs, picture, film.sop_uid, film.sha256, film.warnings)


def _prepare(parent: int) -> None:
    """Start a helper: deaf to signals, gone when its owner is, one thread."""
    stopping.ignore()
    die_with_parent()
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    warnings.simplefilter("ignore")  # pydicom's and highdicom's quote header values
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import cv2

    cv2.setNumThreads(0)


def _pool(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _prepare, (os.getpid(),))


def _kill(pool: ProcessPoolExecutor) -> None:
    """End a pool at once: a decoder that hangs does not listen to anything else."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()


class Answer(Generic[T]):
    """A result to come. Where the helpers died or hang, the job is done again alone, and given up if that fails too."""

    def __init__(
        self, helpers: Helpers, function: Callable[..., T], arguments: tuple[Any, ...], given_up: Callable[[str], T]
    ) -> None:
        self._helpers, self._function, self._arguments, self._given_up = helpers, function, arguments, given_up
        self._generation = helpers.generation
        self._future = helpers.start(function, *arguments)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result; after `timeout` (default FILM_TIMEOUT_S) seconds the helper counts as hanging."""
        timeout = FILM_TIMEOUT_S if timeout is None else timeout
        try:
            if self._future is not None:
                return self._future.result(timeout)
        except (BrokenProcessPool, CancelledError, TimeoutError):
            pass
        self._helpers.replace(self._generation)
        alone = _pool(1)
        try:
            return alone.submit(self._function, *self._arguments).result(timeout)
        except BrokenProcessPool:
            return self._given_up("the decoder crashed on it")
        except TimeoutError:
            return self._given_up(f"not decoded within {timeout:.0f} s")
        finally:
            _kill(alone)


class Helpers:
    """Helper processes, forked at once: make them before threads and CUDA are in use."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.generation = 0
        self._lock = threading.Lock()  # answers are waited for in several threads
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        pool = _pool(self.count)
        pool.submit(os.getpid).result()  # all of them are forked with the first job
        return pool

    def start(self, function: Callable[..., T], *arguments: Any) -> Future[T] | None:
        """Hand a job to a helper; None where they have just died (the answer then replaces them)."""
        try:
            return self._pool.submit(function, *arguments)
        except (BrokenProcessPool, RuntimeError):  # RuntimeError: another thread is replacing them
            return None

    def replace(self, generation: int) -> None:
        """End the helpers and fork new ones, once for each time they failed; what they had is done again alone."""
        with self._lock:
            if generation == self.generation:
                _kill(self._pool)
                self._pool = self._start()
                self.generation += 1

    def read(self, job: ReadJob) -> Answer[ReadFilm]:
        """Read one film in a helper."""
        return self.call(read_job, (job,), lambda reason: ReadFilm(reason=reason))

    def call(self, function: Callable[..., T], arguments: tuple[Any, ...], given_up: Callable[[str], T]) -> Answer[T]:
        """Do a job in a helper; `given_up` makes the result out of a reason where the helper dies of it or hangs."""
        return Answer(self, function, arguments, given_up)

    def close(self) -> None:
        """End the helpers; what they have not started is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
