"""Film files for tests: DICOM bytes in any transfer syntax and pixel format, and small data sets around them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

COMPRESSED = {"jpeg-ls": JPEGLSLossless, "jpeg-2000": JPEG2000Lossless, "rle": RLELossless}
ENCODERS = {
    JPEGLSLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    RLELossless: "pydicom",
}  # gdcm's RLE encoder aborts


def grey(rows: int, columns: int, bits: int = 8, signed: bool = False, seed: int = 0) -> np.ndarray:
    """Return a smooth picture with noise over the whole range of the given bits."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns]
    picture = (x / columns + y / rows) / 2 + 0.05 * random.standard_normal((rows, columns))
    values = np.clip(picture * (2**bits - 1), 0, 2**bits - 1).astype(np.int64)
    values.flat[0], values.flat[-1] = 0, 2**bits - 1
    if signed:
        values -= 2 ** (bits - 1)
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def dataset(pixels: np.ndarray, bits: int | None = None, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> Dataset:
    """Return a film with the given stored values; `tags` are set last and may make it invalid."""
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    film.file_meta.MediaStorageSOPClassUID = film.SOPClassUID = SecondaryCaptureImageStorage
    film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID = "1.2.3.4"
    film.PatientName, film.PatientID, film.PatientSex = "SECRET^NAME", "SECRET-ID", "F"
    film.Modality, film.ViewPosition = "CR", "PA"
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
    film.Rows, film.Columns = pixels.shape[:2]
    film.BitsAllocated = 8 * pixels.dtype.itemsize
    film.BitsStored = bits or film.BitsAllocated
    film.HighBit, film.PixelRepresentation = film.BitsStored - 1, int(pixels.dtype.kind == "i")
    film.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    film["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    if syntax == JPEGBaseline8Bit:
        film.PixelData = encapsulate([jpeg(pixels)])
        film.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    elif syntax in COMPRESSED.values():
        film.compress(syntax, encoding_plugin=ENCODERS[syntax], generate_instance_uid=False)
    else:
        film.file_meta.TransferSyntaxUID = syntax
    for name, value in tags.items():
        if value is None:
            delattr(film, name)
        else:
            setattr(film, name, value)
    return film


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """Return JPEG Baseline bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def written(film: Dataset, preamble: bool = True) -> bytes:
    """Return the bytes of a file; without preamble, only the data set."""
    syntax = film.file_meta.TransferSyntaxUID
    out = io.BytesIO()
    if preamble:
        film.save_as(out, enforce_file_format=True)
    else:
        bare = Dataset()
        bare.update(film)
        bare.save_as(out, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return out.getvalue()


def film_bytes(pixels: np.ndarray, bits: int | None = None, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """Return the bytes of one film file."""
    return written(dataset(pixels, bits, syntax, **tags))


def streamed_bytes(pixels: np.ndarray, stream: bytes, syntax: str, bits: int | None = None, **tags: Any) -> bytes:
    """Return the bytes of a film file whose pixel data is a compressed stream; its transfer syntax may be another's."""
    film = dataset(pixels, bits, **tags)
    film.PixelData = encapsulate([stream])
    film.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    # pydicom would not write compressed data under the name of uncompressed ones.
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    head = b"\x02\x00\x10\x00UI"
    return written(film).replace(head + b"\x16\0" + JPEGBaseline8Bit.encode(), head + bytes([len(value), 0]) + value, 1)


def lut(entries: Any, first: int, bits: int, words: bool = False, vr: str = "US") -> Sequence:
    """Return a sequence of one look-up table, its entries as numbers (US) or as words (OW)."""
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [len(entries) % 65536, first, bits])
    data = np.asarray(entries)
    if words:
        item.add_new("LUTData", "OW", data.astype("<u2" if bits > 8 else np.uint8).tobytes())
    else:
        item.add_new("LUTData", "US", data.tolist())
    return Sequence([item])


def small_set(folder: Path, films: int = 12, size: int = 64, seed: int = 0) -> dict[str, str]:
    """Write a phantom data set; return the settings that name it."""
    from pneumo_dist.data.phantom import make_phantom

    lists = make_phantom(folder, films, size, seed)
    return {
        "data.dicom_dir": str(folder / "dicom-images-train"),
        "data.rle_csv": str(lists["train-rle.csv"]),
        "data.patient_map": str(lists["patients.csv"]),
    }


def overrides(settings: dict[str, str]) -> list[str]:
    """Return settings as `key=value` overrides."""
    return [f"{key}={value}" for key, value in settings.items()]


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """Write a grey (or, with a third axis, coloured) picture; a boolean mask as 0 and 255."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels * np.uint8(255) if pixels.dtype == bool else pixels).save(path, "PNG")
    return path
