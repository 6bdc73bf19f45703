"""Read one film file (DICOM, PNG or JPEG) as an 8-bit grey image. Unreadable files raise FilmError with the reason.

Of the patient only view and sex leave this module, and no message may quote free text of a header.
pydicom is imported when the first film is read: listing a folder does not need it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.data.films import codecs, header
from pneumo_dist.data.films.attributes import text, whole
from pneumo_dist.data.films.codecs import FilmError, NotAnImage
from pneumo_dist.data.films.grey import grey_table, histogram, palette_table
from pneumo_dist.data.films.listing import SOP_CLASSES, dicom_head, no_image_reason
from pneumo_dist.data.films.stored import OVERLAY_BITS, Stored, matrix_of, stored_values

__all__ = ["Film", "FilmError", "NotAnImage", "read_film"]

VIEWS = ("AP", "PA", "LL", "RL", "LLD", "RLD", "LLO", "RLO")
SEXES = ("M", "F", "O")
HEADER_BYTES = 32 << 20  # allowance for everything in a file but the pixels
TAGS: list[str | int] = [
    "SOPClassUID", "SOPInstanceUID", "PresentationIntentType", "ViewPosition", "PatientSex", "SamplesPerPixel",
    "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "PixelIntensityRelationshipSign", "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PresentationLUTShape", "PixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", *OVERLAY_BITS,
    *(f"{name}PaletteColorLookupTable{part}" for name in ("Red", "Green", "Blue") for part in ("Data", "Descriptor")),
]  # fmt: skip
MAPPING = ("RescaleIntercept", "RescaleSlope", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTSequence")
GREY, PALETTE = ("MONOCHROME1", "MONOCHROME2"), "PALETTE COLOR"
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")  # read if the channels are equal
NOT_GREY = (*COLOUR, PALETTE, "YBR_PARTIAL_422", "YBR_PARTIAL_420", "HSV", "ARGB", "CMYK")  # may be named in a message


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
            if size > file_limit(max_pixels):
                raise FilmError(f"file of {size} bytes: more than a film of data.max_pixels={max_pixels} can have")
            return handle.read()
    except OSError as error:
        raise FilmError(f"cannot be read ({error.strerror})") from None


def file_limit(max_pixels: int) -> int:
    """Return the size in bytes that no uncompressed film within the limit exceeds."""
    return 2 * max_pixels + HEADER_BYTES


def parse_film(data: bytes, max_pixels: int, name: str = "") -> Film:
    """Decode the bytes of one film file; the name identifies DICOM whose first bytes are damaged.

    Raises:
        FilmError: the file is not a usable film; NotAnImage: it is a DICOM object of another kind.
    """
    film = _read(data, max_pixels, name)
    middle = film.pixels[len(film.pixels) // 2]
    if (middle == middle[0]).all() and film.pixels.min() == film.pixels.max():
        raise FilmError(f"blank image: every pixel is {middle[0]}")
    return film


def _read(data: bytes, max_pixels: int, name: str) -> Film:
    digest = hashlib.sha256(data).hexdigest()
    preamble = data[128:132] == b"DICM"
    if preamble and (film := _read_plain(data, max_pixels, digest)):
        return film
    if not preamble and (data[:8] == b"\x89PNG\r\n\x1a\n" or data[:3] == b"\xff\xd8\xff"):
        pixels, decoder = codecs.decode_picture(data, max_pixels)
        warnings: list[str] = []
        if pixels.dtype == np.uint16:
            pixels = grey_table({}, histogram(pixels, 16), 16, False, warnings)[pixels]
        return Film(pixels, "", "", "", digest, decoder, tuple(warnings))
    elements = dicom_head(data)
    if not data or (elements is None and not name.lower().endswith((".dcm", ".dicom"))):
        raise FilmError("neither DICOM, PNG nor JPEG" if data else "empty file")
    if elements and (reason := no_image_reason(elements)):
        raise NotAnImage(reason)
    return _read_dicom(data, max_pixels, digest)


# Samples, bits allocated, bits stored, high bit and sign of the films that are read without pydicom.
PLAIN = {0x00280002: 1, 0x00280100: 8, 0x00280101: 8, 0x00280102: 7, 0x00280103: 0}
MAPPING_TAGS = (
    0x00080068, 0x00281050, 0x00281051, 0x00281052, 0x00281053, 0x00283000, 0x00283010, 0x20500020,
)  # fmt: skip
JPEG_BASELINE, DEFLATED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.1.99"


def _read_plain(data: bytes, max_pixels: int, digest: str) -> Film | None:
    """Read the most common kind of film, an 8-bit JPEG without rescaling; return None if the file needs pydicom."""
    elements = header.elements_of(data)
    if elements is None or any(header.number(elements, tag) != value for tag, value in PLAIN.items()):
        return None
    if any(tag in elements for tag in MAPPING_TAGS) or header.text(elements, 0x00280008) not in ("", "1"):
        return None
    photometric = header.text(elements, 0x00280004)
    plain = photometric in ("MONOCHROME1", "MONOCHROME2")
    if not plain or header.text(elements, header.TRANSFER_SYNTAX) != JPEG_BASELINE:
        return None
    stream, rows, columns = (
        codecs.stream_of(elements[header.PIXEL_DATA]),
        header.number(elements, 0x00280010),
        header.number(elements, 0x00280011),
    )
    if rows is None or columns is None or rows * columns > max_pixels or stream is None:
        return None
    if (stream.codec, stream.rows, stream.columns, stream.components) != (codecs.JPEG, rows, columns, 1):
        return None
    pixels, decoder = codecs.decode(stream)
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


def _parse(data: bytes, max_pixels: int) -> Any:
    import pydicom

    # Other tags may be malformed: they are never used, and a warning would quote them in the log.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    data = inflated(data, max_pixels)
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=TAGS, force=data[128:132] != b"DICM")
        return dataset, "PixelData" in dataset and dataset["PixelData"].value is not None
    except Exception as error:  # the parser raises various errors on damaged files
        raise FilmError(f"damaged DICOM header ({type(error).__name__})") from None


def inflated(data: bytes, max_pixels: int) -> bytes:
    """Return the data set of a deflated file, any other file as it is. A few bytes may inflate to any size: limited."""
    preamble = data[128:132] == b"DICM"
    elements, start = header.file_meta(data, 132 if preamble else 0)
    if header.text(elements, header.TRANSFER_SYNTAX) != DEFLATED:
        # pydicom could read the header and inflate.
        if not elements and (preamble or data[:2] == b"\x02\0") and DEFLATED.encode() in data:
            raise FilmError("damaged DICOM header (deflated)")
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(data[start:], file_limit(max_pixels))
    except zlib.error:
        raise FilmError("damaged deflated data") from None
    if not inflater.eof:
        raise FilmError("cut-off deflated data, or more than a film within data.max_pixels can have")
    return data


def _read_dicom(data: bytes, max_pixels: int, digest: str) -> Film:
    dataset, has_pixels = _parse(data, max_pixels)
    if "Rows" not in dataset and not has_pixels:
        kind = text(dataset, "SOPClassUID")
        stated = header.text(header.file_meta(data, 132)[0], SOP_CLASSES[0])
        # Both must agree: in a damaged film, a mangled class is no sign of another kind of object.
        if kind and kind == stated and not kind.startswith("1.2.840.10008."):
            raise NotAnImage("not an image (private DICOM object without pixel matrix)")
        raise FilmError("no pixel matrix in the header: truncated, or not an image")
    frames = whole(dataset, "NumberOfFrames", 1)
    if frames not in (0, 1):
        raise FilmError(f"multi-frame image ({frames} frames): give one film per file")
    warnings: list[str] = []
    samples = whole(dataset, "SamplesPerPixel", 1)
    photometric = _photometric(dataset, samples, warnings)
    matrix = matrix_of(dataset, samples, photometric, max_pixels)
    if not has_pixels:
        raise FilmError("no pixel data")
    stored = stored_values(dataset, matrix, max_pixels, warnings)
    pixels = _shown(dataset, stored, photometric, warnings)
    if _inverted(dataset, photometric, warnings):
        pixels = 255 - pixels
    uid, view, sex = (text(dataset, name) for name in ("SOPInstanceUID", "ViewPosition", "PatientSex"))
    return _film(pixels, uid, view, sex, digest, stored.decoder, tuple(dict.fromkeys(warnings)))


def _photometric(dataset: Any, samples: int, warnings: list[str]) -> str:
    """Return the photometric interpretation; raise FilmError if no grey image can have it."""
    photometric = text(dataset, "PhotometricInterpretation")
    if photometric.replace(" ", "") in GREY:
        photometric = photometric.replace(" ", "")
    if not photometric and samples == 1:
        warnings.append("no photometric interpretation in the header: read as MONOCHROME2")
        photometric = "MONOCHROME2"
    if photometric not in (COLOUR if samples == 3 else (*GREY, PALETTE) if samples == 1 else ()):
        known = photometric if photometric in (*GREY, *NOT_GREY) else "unknown"
        raise FilmError(
            f"colour image (photometric interpretation {known}, {samples} samples per pixel): films are grey"
        )
    return photometric


def _shown(dataset: Any, stored: Stored, photometric: str, warnings: list[str]) -> np.ndarray:
    """Return the stored values as uint8 grey."""
    if photometric not in GREY and any(dataset.get(name) for name in ("WindowCenter", "VOILUTSequence")):
        warnings.append("window or VOI LUT of a colour image ignored: the standard has them for grey ones")
    if photometric in COLOUR:
        dataset = {}
    if stored.bits == 8 and not stored.signed and photometric != PALETTE and not any(n in dataset for n in MAPPING):
        return stored.patterns.astype(np.uint8, copy=False)
    counts = histogram(stored.patterns, stored.bits)
    try:
        if photometric == PALETTE:
            table = palette_table(dataset, counts, stored.bits, warnings)
        else:
            table = grey_table(dataset, counts, stored.bits, stored.signed, warnings)
    except FilmError:
        raise
    except Exception as error:  # damaged LUTs and windows raise various errors
        raise FilmError(f"unusable rescale, window or LUT ({type(error).__name__})") from None
    return np.asarray(table[stored.patterns])


def _inverted(dataset: Any, photometric: str, warnings: list[str]) -> bool:
    """Return whether the lowest value is white."""
    inverse = text(dataset, "PresentationLUTShape") == "INVERSE"
    if text(dataset, "PresentationIntentType") == "FOR PROCESSING":
        warnings.append("raw image (FOR PROCESSING): its grey scale is not that of a film for reading")
        sign = text(dataset, "PixelIntensityRelationshipSign")
        if sign in ("1", "-1"):  # 1: more exposure is a higher value, and what is exposed is black on a film
            return sign == "1"
    if inverse and photometric == "MONOCHROME2":
        warnings.append("MONOCHROME2 with an inverse presentation LUT: shown inverted")
    return photometric == "MONOCHROME1" or inverse
