"""Read and resize films for inference in reader processes. A crash or a hang of a decoder costs one film only.

Readers return pixels, hashes, reasons and the SOP Instance UID, but no other header text.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.data.films.dicom import FilmError, NotAnImage, read_film
from pneumo_dist.data.shards import to_sizes
from pneumo_dist.runtime.processes import Answer, Pool

THUMB_PX = 256  # longer side of a thumbnail
PICTURE_PX = 1024  # longer side of an overlay


@dataclass(frozen=True)
class ReadJob:
    """One film to read."""

    path: str
    sizes: tuple[int, ...]  # inputs of the models
    picture_px: int  # longer side of the grey picture to return
    max_pixels: int


@dataclass(frozen=True)
class ReadFilm:
    """One film as inference needs it; `reason` is empty if it is readable."""

    reason: str = ""
    rows: int = 0
    columns: int = 0
    inputs: dict[int, NDArray[np.uint8]] = field(default_factory=dict)  # size -> (size, size)
    picture: NDArray[np.uint8] | None = None  # (rows, columns) within picture_px
    sha256: str = ""
    warnings: tuple[str, ...] = ()
    sop_uid: str = ""
    image: bool = True  # False: a DICOM object of another kind, which is no film


def fit(pixels: NDArray[np.uint8], longest: int) -> NDArray[np.uint8]:
    """Return the picture, reduced by area if its longer side exceeds `longest`."""
    import cv2

    scale = longest / max(pixels.shape)
    if scale >= 1:
        return pixels
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def read_job(job: ReadJob) -> ReadFilm:
    """Read one film; return the reason if it is unreadable."""
    try:
        film = read_film(Path(job.path), job.max_pixels)
        rows, columns = film.pixels.shape
        inputs = to_sizes(film.pixels, job.sizes)
        picture = fit(film.pixels, job.picture_px)
    except FilmError as error:
        return ReadFilm(reason=str(error), image=not isinstance(error, NotAnImage))
    except MemoryError:
        return ReadFilm(reason="not enough memory to decode it")
    except Exception as error:  # the type only: the message could quote the header
        return ReadFilm(reason=f"cannot be decoded ({type(error).__name__})")
    return ReadFilm("", rows, columns, inputs, picture, film.sha256, film.warnings, film.sop_uid)


def _prepare() -> None:
    warnings.simplefilter("ignore")  # those of pydicom and highdicom quote header values
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import cv2

    cv2.setNumThreads(0)  # one reader per core already


def start_readers(count: int) -> Pool:
    """Fork the processes that read films."""
    return Pool(count, _prepare)


def read_ahead(readers: Pool, job: ReadJob) -> Answer[ReadJob, ReadFilm]:
    """Submit one film to the readers without waiting."""
    return readers.submit(read_job, [job], lambda _, reason: ReadFilm(reason=reason))
