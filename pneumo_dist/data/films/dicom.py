"""Read one film file (DICOM, PNG or JPEG) as an 8-bit grey image. Unreadable files raise FilmError with the reason.

Of the patient only view and sex leave this module, and no message may quote free text of a header.
pydicom is imported when the first film is read: listing a folder does not need it.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.data.films import codecs, header
from pneumo_dist.data.films.codecs import FilmError, NotAnImage
from pneumo_dist.data.films.listing import dicom_head, no_image_reason

__all__ = ["Film", "FilmError", "NotAnImage", "read_film"]

VIEWS = ("AP", "PA", "LL", "RL", "LLD", "RLD", "LLO", "RLO")
SEXES = ("M", "F", "O")
HEADER_BYTES = 32 << 20  # allowance for everything in a file but the pixels
TAGS = [
    "SOPInstanceUID", "ViewPosition", "PatientSex", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames",
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "VOILUTSequence", "PlanarConfiguration", "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "SOPClassUID",
]  # fmt: skip
MAPPING = ("RescaleIntercept", "RescaleSlope", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTSequence")


@dataclass(frozen=True)
class Film:
    """One decoded film: `pixels` is uint8 (rows, columns), 0 is black; `sha256` is the hash of the source file."""

    pixels: np.ndarray
    sop_uid: str  # "" for PNG and JPEG files
    view: str
    sex: str
    sha256: str
    decoder: str
    warnings: tuple[str, ...] = ()


def read_film(path: Path | str, max_pixels: int = 64_000_000) -> Film:
    """Read one film.

    8-bit values without window, rescale or LUT are kept. All others pass the modality transformation, then the first
    VOI LUT or window; without either, the film's range of values is scaled linearly to 0..255 (PS3.3 C.7.6.3.1, C.11.1,
    C.11.2). MONOCHROME1 is inverted.

    Raises:
        FilmError: the file is not a usable film.
    """
    return parse_film(load(path, max_pixels), max_pixels, str(path))


def load(path: Path | str, max_pixels: int) -> bytes:
    """Return the bytes of a film file; raise FilmError if it is unreadable or larger than any film within the limit."""
    try:
        with open(path, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > 2 * max_pixels + HEADER_BYTES:
                raise FilmError(f"file of {size} bytes: more than a film of data.max_pixels={max_pixels} can have")
            return handle.read()
    except OSError as error:
        raise FilmError(f"cannot be read ({error.strerror})") from None


def parse_film(data: bytes, max_pixels: int, name: str = "") -> Film:
    """Decode the bytes of one film file; the name identifies DICOM whose first bytes are damaged.

    Raises:
        FilmError: the file is not a usable film; NotAnImage: it is a DICOM object of another kind.
    """
    digest = hashlib.sha256(data).hexdigest()
    preamble = data[128:132] == b"DICM"
    if preamble and (film := _read_plain(data, max_pixels, digest)):
        return film
    if not preamble and (data[:8] == b"\x89PNG\r\n\x1a\n" or data[:3] == b"\xff\xd8\xff"):
        pixels, decoder = codecs.decode_picture(data, max_pixels)
        return Film(_stretch(pixels), "", "", "", digest, decoder)
    elements = dicom_head(data)
    if not data or (elements is None and not name.lower().endswith((".dcm", ".dicom"))):
        raise FilmError("neither DICOM, PNG nor JPEG" if data else "empty file")
    if elements and (reason := no_image_reason(elements)):
        raise NotAnImage(reason)
    return _read_dicom(data, max_pixels, digest)


# Samples, bits allocated, bits stored, high bit and sign of the films that are read without pydicom.
PLAIN = {0x00280002: 1, 0x00280100: 8, 0x00280101: 8, 0x00280102: 7, 0x00280103: 0}
MAPPING_TAGS = (0x00281050, 0x00281051, 0x00281052, 0x00281053, 0x00283000, 0x00283010)


def _read_plain(data: bytes, max_pixels: int, digest: str) -> Film | None:
    """Read the most common kind of film, an 8-bit JPEG without rescaling; return None if the file needs pydicom."""
    elements = header.elements_of(data)
    if elements is None or any(header.number(elements, tag) != value for tag, value in PLAIN.items()):
        return None
    if any(tag in elements for tag in MAPPING_TAGS) or header.text(elements, 0x00280008) not in ("", "1"):
        return None
    photometric = header.text(elements, 0x00280004)
    plain = photometric in ("MONOCHROME1", "MONOCHROME2")
    if not plain or header.text(elements, header.TRANSFER_SYNTAX) != codecs.JPEG_8BIT[0]:
        return None
    stream, rows, columns = (
        elements[header.PIXEL_DATA],
        header.number(elements, 0x00280010),
        header.number(elements, 0x00280011),
    )
    if rows is None or columns is None or rows * columns > max_pixels:
        return None
    if codecs.stream_size(stream) != (rows, columns, 1, 8):
        return None
    pixels, decoder = codecs.decode_jpeg(stream)
    return _film(
        255 - pixels if photometric == "MONOCHROME1" else pixels,
        header.text(elements, 0x00080018),
        header.text(elements, 0x00185101),
        header.text(elements, 0x00100040),
        digest,
        decoder,
    )


def _film(
    pixels: np.ndarray, uid: str, view: str, sex: str, digest: str, decoder: str, warnings: tuple[str, ...] = ()
) -> Film:
    """Return the film with known values only: the text of a header may hold anything."""
    return Film(
        pixels=np.ascontiguousarray(pixels),
        sop_uid=uid if re.fullmatch(r"[0-9.]{1,64}", uid) else "",
        view=view if view in VIEWS else "",
        sex=sex if sex in SEXES else "",
        sha256=digest,
        decoder=decoder,
        warnings=warnings,
    )


def _stretch(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    low, high = int(pixels.min()), int(pixels.max())
    return _to_bytes((pixels.astype(np.float32) - low) / max(high - low, 1))


def _to_bytes(fraction: np.ndarray) -> np.ndarray:
    return np.asarray(np.floor(np.clip(fraction, 0, 1) * 255 + 0.5).astype(np.uint8))


def _parse(data: bytes) -> Any:
    import pydicom

    # Other tags may be malformed: they are never used, and a warning would quote them in the log.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    if codecs.DEFLATED.encode() in data:  # a few bytes may inflate to any size
        raise FilmError("deflated transfer syntax is not supported: convert the film")
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=TAGS, force=data[128:132] != b"DICM")
        return dataset, "PixelData" in dataset
    except Exception as error:  # the parser raises various errors on damaged files
        raise FilmError(f"damaged DICOM header ({type(error).__name__})") from None


def _number(dataset: Any, name: str, default: int | None = None) -> int:
    """Return a whole number of the header; raise FilmError if it is missing or not a whole number."""
    try:
        value = dataset.get(name)
        if value is None or value == "":
            value = default
        if value is not None and int(value) == float(value):
            return int(value)
    except Exception:  # the value may have any type, and its conversion may raise any error
        pass
    raise FilmError(f"header value {name} is missing or not a whole number")


def _text(dataset: Any, name: str) -> str:
    try:
        return str(dataset.get(name) or "").strip().upper()
    except Exception:  # undecodable text counts as missing
        return ""


def _read_dicom(data: bytes, max_pixels: int, digest: str) -> Film:
    dataset, has_pixels = _parse(data)
    if "Rows" not in dataset and not has_pixels:
        kind = _text(dataset, "SOPClassUID")
        if kind and not kind.startswith("1.2.840.10008."):
            raise NotAnImage("not an image (private DICOM object without pixel matrix)")
        raise FilmError("no pixel matrix in the header: truncated, or not an image")
    rows, columns = _number(dataset, "Rows"), _number(dataset, "Columns")
    codecs.check_size(rows, columns, max_pixels)
    frames = _number(dataset, "NumberOfFrames", 1)
    if frames != 1:
        raise FilmError(f"multi-frame image ({frames} frames): give one film per file")
    photometric, samples = _text(dataset, "PhotometricInterpretation"), _number(dataset, "SamplesPerPixel", 1)
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        known = photometric if re.fullmatch(r"[A-Z0-9_ ]{1,16}", photometric) else "none"
        raise FilmError(
            f"colour image (photometric interpretation {known}, {samples} samples per pixel): films are grey"
        )
    if not has_pixels:
        raise FilmError("no pixel data")
    warnings: list[str] = []
    stored, bits, signed, decoder = _stored_values(dataset, rows, columns, max_pixels, warnings)
    if bits == 8 and not signed and not any(name in dataset for name in MAPPING):
        pixels = stored
    else:
        try:
            table = _grey_table(dataset, stored, bits, signed, warnings)
        except FilmError:
            raise
        except Exception as error:  # damaged LUTs and windows raise various errors
            raise FilmError(f"unusable rescale, window or LUT ({type(error).__name__})") from None
        pixels = table[stored]
    if photometric == "MONOCHROME1":
        pixels = 255 - pixels
    uid, view, sex = (_text(dataset, name) for name in ("SOPInstanceUID", "ViewPosition", "PatientSex"))
    return _film(pixels, uid, view, sex, digest, decoder, tuple(warnings))


def _stored_values(
    dataset: Any, rows: int, columns: int, max_pixels: int, warnings: list[str]
) -> tuple[np.ndarray, int, bool, str]:
    """Return (unsigned bit patterns (rows, columns), bits stored, whether the values are signed, decoder)."""
    allocated = _number(dataset, "BitsAllocated")
    bits = _number(dataset, "BitsStored", allocated)
    signed = _number(dataset, "PixelRepresentation", 0) == 1
    high = _number(dataset, "HighBit", bits - 1)
    if allocated not in (8, 16) or not 1 <= bits <= allocated or not bits - 1 <= high < allocated:
        raise FilmError(f"{allocated} bits allocated, {bits} stored, high bit {high}: films have 8 to 16 bits")
    uid = _transfer_syntax(dataset)
    if uid.startswith(codecs.JPEG_FAMILY):
        stream = _frame(dataset)
        size = codecs.stream_size(stream)
        if size is None:
            raise FilmError("the compressed pixel data contains no image")
        codecs.check_size(*size[:2], max_pixels)
        if size[:2] != (rows, columns):
            raise FilmError(f"the header says {rows} x {columns}, the compressed image is {size[0]} x {size[1]}")
        if size[2] != 1:
            raise FilmError(f"colour image ({size[2]} components in the compressed data): films are grey")
        if uid in codecs.JPEG_8BIT and size[3] == 8:
            pixels, decoder = codecs.decode_jpeg(stream)
            if allocated != 8 or signed:
                raise FilmError(
                    f"8-bit JPEG, but the header declares {'signed' if signed else 'unsigned'} {allocated} bit"
                )
            return (pixels, bits, False, decoder) if bits == 8 else (pixels & ((1 << bits) - 1), bits, False, decoder)
    pixels, decoder, warned = codecs.decode_dataset(dataset, uid)
    if warned:
        warnings.append("pixel data does not conform to the standard")
    if pixels.shape != (rows, columns):
        raise FilmError(f"the header says {rows} x {columns}, the decoded image has shape {pixels.shape}")
    pattern: Any = pixels.view(np.uint8 if pixels.dtype.itemsize == 1 else np.uint16)
    # Bits above and below the stored ones hold an overlay in some old films.
    return (pattern >> (high + 1 - bits)) & ((1 << bits) - 1), bits, signed, decoder


def _transfer_syntax(dataset: Any) -> str:
    uid = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if uid:
        return str(uid)
    implicit, little = dataset.original_encoding
    uid = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1" if little else "1.2.840.10008.1.2.2"
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID

    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(uid)
    return uid


def _frame(dataset: Any) -> bytes:
    from pydicom.encaps import get_frame

    try:
        return bytes(get_frame(dataset.PixelData, 0, number_of_frames=1))
    except Exception as error:  # pydicom raises various errors on damaged fragments
        raise FilmError(f"damaged compressed pixel data ({type(error).__name__})") from None


def _grey_table(dataset: Any, stored: np.ndarray, bits: int, signed: bool, warnings: list[str]) -> np.ndarray:
    """Return the uint8 grey value of every bit pattern, shape (2 ** bits,)."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    patterns = np.arange(1 << bits)
    values = np.where(patterns >= 1 << (bits - 1), patterns - (1 << bits), patterns) if signed else patterns
    shown: np.ndarray = apply_modality_lut(values, dataset).astype(np.float64)
    if not np.isfinite(shown).all():
        raise FilmError("rescale slope or intercept is not a finite number")
    if dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        depth = int(item.LUTDescriptor[2])
        grey = apply_voi(np.rint(shown).astype(np.int64), dataset) / float((1 << depth) - 1)
        return _to_bytes(grey)
    window = _window(dataset, warnings)
    if window:
        return _to_bytes(_windowed(shown, *window, function=_text(dataset, "VOILUTFunction")))
    if bits == 8 and "ModalityLUTSequence" not in dataset:
        # The values of 8 bits refer to their full range, not to the range of the film.
        low, high = sorted((shown[values.argmin()], shown[values.argmax()]))
    else:
        used = np.bincount(stored.ravel(), minlength=1 << bits) > 0
        padding = dataset.get("PixelPaddingValue")
        if isinstance(padding, int) and used.sum() > 1:
            used[padding & ((1 << bits) - 1)] = False
        low, high = shown[used].min(), shown[used].max()
    return _to_bytes((shown - low) / (high - low if high > low else 1.0))


def _window(dataset: Any, warnings: list[str]) -> tuple[float, float] | None:
    """Return (centre, width) of the first window, None if there is no usable one."""
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centre in (None, "") or width in (None, ""):
        return None
    centre, width = (float(value if isinstance(value, (int, float)) else value[0]) for value in (centre, width))
    exact = _text(dataset, "VOILUTFunction") in ("LINEAR_EXACT", "SIGMOID")
    if not (math.isfinite(centre) and math.isfinite(width)) or (width < 1 and not (exact and width > 0)):
        warnings.append("unusable window ignored")
        return None
    return centre, width


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Return fractions of the display range (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return (values - (centre - 0.5)) / (width - 1) + 0.5
