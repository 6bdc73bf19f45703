"""Synthetic chest films with or without pneumothorax, for demonstration and tests, never for a real model.

Every file states that it is synthetic. The same (films, size, seed) gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.rle import encode_rle
from pneumo_dist.runtime.files import write_bytes, write_csv
from pneumo_dist.runtime.task import Task

NOTICE = "SYNTHETIC PHANTOM FILM - NOT A PATIENT - FOR SOFTWARE TESTS ONLY"
UID_ROOT = "1.2.826.0.1.3680043.8.498."  # pydicom's, for generated UIDs
POSITIVE_SHARE = 0.4
QUALITY = 90
DRAWN = 320  # pixels; larger films are enlarged, since drawing takes time with the area


@dataclass(frozen=True)
class _Grid:
    """Pixel coordinates, -1 to 1, y downwards."""

    x: np.ndarray
    y: np.ndarray


def _grid(size: int) -> _Grid:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    return _Grid(*(np.ascontiguousarray(part) for part in np.meshgrid(axis, axis)))


def _step(value: np.ndarray, width: float) -> np.ndarray:
    """Return a soft step: 0 below -width, 1 above width."""
    t = np.clip(value / (2 * width) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _clouds(random: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Return smooth noise of mean 0 and deviation about 1, with features of size / cells pixels."""
    import cv2

    coarse = random.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC))


def _lung(grid: _Grid, side: int, lean: float, scale: float) -> np.ndarray:
    """Return the level function of one lung, below 1 inside: narrow at the apex, limited below by the diaphragm."""
    x = side * grid.x - 0.40 - lean
    y = grid.y + 0.05
    half_width = (0.32 + 0.07 * np.clip(y, -1, 0.4)) * scale
    body = (np.abs(x + 0.04 * y) / half_width) ** 2.4 + (np.abs(y) / (0.72 * scale)) ** 3.0
    diaphragm = (grid.y - 0.60 * scale + 0.22 * np.cos(4.5 * x)) / 0.30 + 1
    return np.asarray(np.maximum(body, diaphragm))


def draw_film(size: int, seed: int, number: int, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw one film; return (uint8 pixels (size, size), bool mask (size, size)).

    Large films are drawn at DRAWN px and enlarged; their noise is drawn at full size.
    """
    import cv2

    random = np.random.default_rng([seed, number])
    film, mask = _draw(random, min(size, DRAWN), positive)
    if size > DRAWN:
        film = cv2.resize(film, (size, size), interpolation=cv2.INTER_CUBIC)
        mask = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR) > 0.5
    film += np.float32(random.uniform(0.012, 0.03)) * random.standard_normal((size, size), dtype=np.float32)
    exposure, gain, base = random.uniform(0.8, 1.25), random.uniform(0.85, 1.1), random.uniform(-0.03, 0.05)
    film = np.clip(film, 0, 1.2) ** np.float32(exposure) * np.float32(gain) + np.float32(base)
    return (np.clip(film, 0, 1) * 255).astype(np.uint8), mask


def _draw(random: np.random.Generator, size: int, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw the chest without noise; return (brightness about 0 to 1, float32 (size, size); bool mask (size, size))."""
    grid = _grid(size)
    tilt, dx, dy = random.uniform(-0.05, 0.05), random.uniform(-0.05, 0.05), random.uniform(-0.04, 0.06)
    grid = _Grid(grid.x + tilt * grid.y + np.float32(dx), grid.y - tilt * grid.x + np.float32(dy))
    scale = random.uniform(0.92, 1.05)
    body = _step(1 - (np.abs(grid.x) / 0.93) ** 4 - (np.clip(-grid.y - 0.55, 0, 1) * np.abs(grid.x) * 2.2) ** 2, 0.12)
    film = 0.10 + 0.62 * body + 0.03 * _clouds(random, size, 6)
    levels = {side: _lung(grid, side, random.uniform(-0.02, 0.02), scale) for side in (-1, 1)}
    air = np.maximum(*(_step(1 - level, 0.10) for level in levels.values()))
    fine = _clouds(random, size, max(8, size // 12))
    # Vessels: bright ridges of noise, denser near the hilum, absent in the air outside the lung.
    hilum = np.exp(-(((np.abs(grid.x) - 0.16) / 0.30) ** 2) - ((grid.y + 0.02) / 0.45) ** 2)
    wide, narrow = (np.exp(-((_clouds(random, size, cells) / width) ** 2)) for cells, width in ((20, 0.35), (40, 0.3)))
    vessels = (0.05 + 0.13 * hilum) * (wide + 0.7 * narrow) + 0.025 * fine + 0.05 + 0.03 * _clouds(random, size, 10)
    mask = np.zeros((size, size), dtype=bool)
    if positive:
        mask, line, outside = _collapse(random, grid, levels)
        vessels = vessels * (1 - outside) + 0.16 * line
        film -= 0.05 * outside * air
    heart = _step(1 - ((grid.x - 0.10) / 0.31) ** 2 - ((grid.y - 0.27) / 0.33) ** 2, 0.18)
    film += air * (vessels * (1 - 0.7 * heart) - 0.42)
    film += _ribs(random, grid) * (0.04 + 0.07 * air)
    film += 0.20 * np.exp(-((grid.x / 0.11) ** 2)) * body * (1 + 0.06 * np.cos(grid.y * 42))  # spine
    film += 0.34 * heart * np.maximum(air, 0.15)
    return film.astype(np.float32), mask


def _collapse(
    random: np.random.Generator, grid: _Grid, levels: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Collapse one lung from apex and side; return (mask, pleural line 0..1, air outside the lung 0..1)."""
    side = int(random.choice([-1, 1]))
    depth = random.uniform(0.30, 0.70)
    apical = random.uniform(0.7, 1.3)
    # The collapsed lung is the shape of the lung itself, shifted from the outer and upper wall.
    x, y = side * grid.x, grid.y
    shifted = _Grid(side * (x + 0.34 * depth), y - 0.45 * depth * apical)
    inner = np.maximum(_lung(shifted, side, 0.0, 1.0 - 0.18 * depth), levels[side] * 0.9)
    inner += random.uniform(-0.03, 0.03) * np.sin(6 * y + random.uniform(0, 6)).astype(np.float32)
    inside = levels[side] < 1
    mask = inside & (inner > 1) & (y < 0.42) & ((x > 0.30) | (y < -0.25))
    outside = _step(inner - 1, 0.05) * inside * _step(0.42 - y, 0.05)
    line = np.exp(-(((inner - 1) / 0.05) ** 2)) * inside * mask_near(mask)
    return mask, line.astype(np.float32), (outside * mask_near(mask)).astype(np.float32)


def mask_near(mask: np.ndarray) -> np.ndarray:
    """Return the mask dilated by about 2 % of the film, as float32 0 or 1."""
    import cv2

    width = max(3, mask.shape[0] // 50) | 1
    return np.asarray(cv2.dilate(mask.astype(np.uint8), np.ones((width, width), np.uint8)), np.float32)


def _ribs(random: np.random.Generator, grid: _Grid) -> np.ndarray:
    """Return bright curved bands, about eleven per side."""
    phase = random.uniform(0, 2 * np.pi)
    back = np.cos(2 * np.pi * 5.6 * (grid.y + 0.34 * (np.abs(grid.x) - 0.15) ** 2 - 0.10 * np.abs(grid.x)) + phase)
    front = np.cos(2 * np.pi * 4.2 * (grid.y - 0.55 * np.abs(grid.x)) + phase)
    inside = _step(0.86 - np.abs(grid.x), 0.06) * _step(0.75 - np.abs(grid.y), 0.2)
    return np.asarray((_step(back - 0.45, 0.25) + 0.5 * _step(front - 0.6, 0.25)) * inside)


def _uid(*parts: object) -> str:
    digest = hashlib.sha256("/".join(map(str, ("pneumo_dist phantom", *parts))).encode()).digest()
    return UID_ROOT + str(int.from_bytes(digest[:15], "big"))


def _dicom(pixels: np.ndarray, uids: tuple[str, str, str], view: str, sex: str, name: str) -> bytes:
    """Return the bytes of a JPEG Baseline film as in SIIM-ACR: Secondary Capture, modality CR."""
    from PIL import Image
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage

    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=QUALITY)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = uids[2]
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    film: Any = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    film.SOPClassUID = SecondaryCaptureImageStorage
    film.StudyInstanceUID, film.SeriesInstanceUID, film.SOPInstanceUID = uids
    film.StudyDate, film.StudyTime, film.AccessionNumber, film.Modality = "19010101", "000000.00", "", "CR"
    film.ConversionType, film.ReferringPhysicianName = "WSD", ""
    film.SeriesDescription = "SYNTHETIC PHANTOM"
    film.ImageComments = NOTICE
    film.PatientName = film.PatientID = name
    film.PatientBirthDate, film.PatientSex, film.BodyPartExamined, film.ViewPosition = "", sex, "CHEST", view
    film.StudyID, film.SeriesNumber, film.InstanceNumber, film.PatientOrientation = "", 1, 1, ""
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
    film.Rows, film.Columns = pixels.shape
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 8, 8, 7, 0
    film.LossyImageCompression, film.LossyImageCompressionMethod = "01", "ISO_10918_1"
    film.PixelData = encapsulate([jpeg.getvalue()])
    out = io.BytesIO()
    film.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _rows(mask: np.ndarray, several: bool) -> list[str]:
    """Return the annotation rows of the mask: one, or two overlapping ones, as in the competition."""
    if not several:
        return [encode_rle(mask)]
    inside = np.flatnonzero(mask.any(axis=1))
    at, overlap = inside[len(inside) // 2], max(1, len(inside) // 8)
    upper, lower = mask.copy(), mask.copy()
    upper[at + overlap :], lower[:at] = False, False
    return [encode_rle(upper), encode_rle(lower)]


def make_phantom(folder: Path, films: int, size: int, seed: int = 0) -> dict[str, Path]:
    """Write `films` films of size x size pixels in the layout of SIIM-ACR; return the paths of the two lists.

    About 40 % have a pneumothorax; every fifth of these has two overlapping annotation rows. A patient has one to three
    films, which only patients.csv shows. With 8 or more films, the last one has no annotation.
    """
    folder = Path(folder)
    random = np.random.default_rng([seed, 2**31])
    labels = np.zeros(films, dtype=bool)
    labels[: round(films * POSITIVE_SHARE)] = True
    random.shuffle(labels)
    patient, left, positives = 0, 0, 0
    table, patients = [], []
    for number in range(films):
        if left == 0:
            patient, left = patient + 1, int(random.integers(1, 4))
        left -= 1
        pixels, mask = draw_film(size, seed, number, bool(labels[number]))
        uids = (_uid(seed, size, patient, number, 2), _uid(seed, size, patient, number, 3), _uid(seed, size, number, 4))
        sex = "MF"[int(hashlib.sha256(f"{seed}/{patient}".encode()).digest()[0]) % 2]
        # As in SIIM-ACR, name and id of the patient are unique to the image and hide repeated patients.
        data = _dicom(pixels, uids, "PA" if random.random() < 0.6 else "AP", sex, f"PHANTOM-{number:05d}")
        write_bytes(folder / "dicom-images-train" / uids[0] / uids[1] / f"{uids[2]}.dcm", data)
        patients.append((uids[2], f"P{patient:05d}"))
        if films >= 8 and number == films - 1:
            continue
        positives += bool(mask.any())
        table += [(uids[2], f" {row}") for row in _rows(mask, bool(mask.any()) and positives % 5 == 0)]
    lists = {}
    for name, header, rows in (
        ("train-rle.csv", ("ImageId", " EncodedPixels"), table),
        ("patients.csv", ("ImageId", "PatientKey"), patients),
    ):
        lists[name] = folder / name
        write_csv(folder / name, [header, *sorted(rows)])
    return lists


def run(task: Task) -> dict[str, Path]:
    """Write the run's phantom films; return the two lists (the settings determine the films)."""
    phantom = task.config.phantom
    if not phantom.films:
        raise ConfigError("phantom.films=0: this run has no phantom films to write")
    lists = make_phantom(task.out, phantom.films, phantom.size, phantom.seed)
    return {"rle_csv": lists["train-rle.csv"], "patients": lists["patients.csv"]}
