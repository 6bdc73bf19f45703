"""Decode compressed images to stored values. The stream itself, not the header of the file, names its codec.

Sizes are read from the compressed stream and checked before any decoder runs: a crafted header must not make one
allocate memory. A cut-off stream is refused, although some decoders would fill in what is missing. All packages in
requirements.txt have permissive licences (MIT, BSD, HPND, Apache).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

JPEG_FAMILY = "1.2.840.10008.1.2.4."
MAX_TILES = 65_535  # JPEG 2000 part 1, A.4.2: the tile index has 16 bits
START, END = b"\xff\x4f\xff\x51", b"\xff\xd9"  # of a JPEG 2000 codestream; of any stream
JPEG, JPEG_12, LOSSLESS, JPEG_LS, JPEG_2000 = "JPEG", "12-bit JPEG", "lossless JPEG", "JPEG-LS", "JPEG 2000"
HUFFMAN = (JPEG, JPEG_12, LOSSLESS)


class FilmError(ValueError):
    """An unreadable film; the message is the reason, without path or name or id of a patient."""


class NotAnImage(FilmError):
    """A DICOM object that holds no image, for example a report: it is no film, so no answer is missing."""


@dataclass(frozen=True)
class Stream:
    """A compressed image, and the codec and size that it declares."""

    data: bytes
    codec: str
    rows: int
    columns: int
    components: int
    bits: int

    @property
    def whole(self) -> bytes:
        """The data up to the end marker: padding may follow it.

        Raises:
            FilmError: there is no end marker. It cannot occur within the compressed data.
        """
        end = self.data.rfind(END)
        if end < 0:
            raise FilmError(f"cut-off {self.codec} data: no end marker")
        return self.data[: end + 2]


def check_size(rows: int, columns: int, max_pixels: int) -> None:
    """Raise FilmError if a matrix is empty or larger than the limit."""
    if rows < 1 or columns < 1:
        raise FilmError(f"empty matrix ({rows} x {columns})")
    if rows * columns > max_pixels:
        raise FilmError(f"matrix of {rows} x {columns} pixels: more than data.max_pixels={max_pixels}")


def stream_of(data: bytes) -> Stream | None:
    """Return the data as a JPEG, JPEG-LS or JPEG 2000 stream without JP2 boxes, None if they are none."""
    if data[4:8] == b"jP  ":
        data = data[max(data.find(START), 0) :]
    if data[:4] == START and len(data) >= 43:  # SOC, SIZ
        numbers = [int.from_bytes(data[at : at + 4], "big") for at in range(8, 40, 4)]
        width, height, left, top, tile_width, tile_height = numbers[:6]
        if not (tile_width and tile_height) or -(-width // tile_width) * -(-height // tile_height) > MAX_TILES:
            raise FilmError("JPEG 2000 stream with an impossible number of tiles")
        components, bits = int.from_bytes(data[40:42], "big"), (data[42] & 0x7F) + 1
        return Stream(data, JPEG_2000, height - top, width - left, components, bits)
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan without a frame header
            return None
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns, components = (
                data[at + 4],
                int.from_bytes(data[at + 5 : at + 7], "big"),
                int.from_bytes(data[at + 7 : at + 9], "big"),
                data[at + 9],
            )
            codec = {0xF7: JPEG_LS, 0xC3: LOSSLESS}.get(marker, JPEG if bits == 8 else JPEG_12)
            if codec == JPEG_12 and bits != 12:
                raise FilmError(f"JPEG stream of {bits} bits: the standard has 8 and 12")
            return Stream(data, codec, rows, columns, components, bits)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def decode(stream: Stream) -> tuple[np.ndarray, str]:
    """Decode a stream; return (array of 8 or 16 bits, (rows, columns) or (rows, columns, 3), decoder and version).

    The decoders of a codec are asked in turn until one succeeds or raises FilmError. All of them refuse cut-off data.

    Raises:
        FilmError: the stream is damaged or cut off, or no decoder is installed (the message names the package).
    """
    failure, missing = "", ""
    for package, decoder in DECODERS[stream.codec]:
        try:
            pixels = decoder(stream)
            shape = (stream.rows, stream.columns, *([stream.components] if stream.components > 1 else []))
            if pixels.shape != shape:
                raise ValueError(f"decoded to {pixels.shape}")
            return pixels, versioned(package)
        except ImportError:
            missing = missing or package
        except FilmError:
            raise
        except Exception as error:  # decoders raise various errors on damaged input
            failure = failure or plain(error)
    if failure:
        raise FilmError(f"damaged {stream.codec} data ({failure})")
    raise FilmError(f"no decoder for {stream.codec}: install {missing}")


def _simplejpeg(stream: Stream) -> np.ndarray:
    """Decode 8-bit JPEG. It raises on the corruption warnings of libjpeg-turbo, which Pillow and OpenCV ignore."""
    import simplejpeg

    colours = "GRAY" if stream.components == 1 else "RGB"
    for strict in (True, False):
        try:
            pixels = simplejpeg.decode_jpeg(stream.data, colorspace=colours, strict=strict)
            break
        except ValueError as error:
            # The one warning of libjpeg-turbo that does not concern the pixels.
            if not strict or "unknown JFIF revision" not in str(error):
                raise FilmError(f"damaged JPEG data ({plain(error)})") from None
    return np.asarray(pixels[..., 0] if stream.components == 1 else pixels)


def _opencv(stream: Stream) -> np.ndarray:
    """Decode 8-bit JPEG, in which it detects less damage than simplejpeg, or unsigned JPEG 2000."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    with _heard():
        pixels = cv2.imdecode(np.frombuffer(stream.whole, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("damaged or truncated")
    return np.asarray(pixels)


def _openjpeg(stream: Stream) -> np.ndarray:
    import openjpeg

    return np.asarray(openjpeg.decode(stream.whole))  # type: ignore[attr-defined]


def _gdcm(stream: Stream) -> np.ndarray:
    import gdcm

    for silence in (gdcm.Trace.ErrorOff, gdcm.Trace.WarningOff, gdcm.Trace.DebugOff):
        silence()
    data, syntax = stream.whole, GDCM_SYNTAXES[stream.codec]
    if stream.codec in HUFFMAN:
        data = _without_comments(data)
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(data)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((stream.columns, stream.rows, 1))
    image.SetDataElement(element)
    kinds = gdcm.PhotometricInterpretation
    image.SetPhotometricInterpretation(kinds(kinds.MONOCHROME2 if stream.components == 1 else kinds.RGB))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(JPEG_FAMILY + syntax)))
    width = 8 if stream.bits <= 8 else 16
    allocated = 12 if stream.codec == JPEG_12 else width  # with 16, gdcm tries another decoder first, which complains
    image.SetPixelFormat(gdcm.PixelFormat(stream.components, allocated, stream.bits, stream.bits - 1, 0))
    with _heard():
        text = image.GetBuffer()
    if text is None:
        raise ValueError("incomplete or damaged")
    pixels = np.frombuffer(text.encode("utf-8", "surrogateescape"), f"<u{width // 8}")
    return pixels.reshape(stream.rows, stream.columns, *([stream.components] if stream.components > 1 else []))


_STDERR = threading.Lock()
LIBJPEG = re.compile(
    rb"(?:Corrupt JPEG data: |(?=Premature end))(.*)|Bogus \w|Unsupported (marker|JPEG)|\w+ table 0x|"
    rb"Invalid (SOS|component|lossless|JPEG)"
)


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Raise FilmError if libjpeg reports damage, which it does on stderr only; pass on what others print there."""
    with _STDERR, open(os.memfd_create("stderr"), "w+b") as said:
        stderr = os.dup(2)
        try:
            os.dup2(said.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            lines = [(line, LIBJPEG.match(line)) for line in said.read().splitlines(keepends=True)]
            os.write(2, b"".join(line for line, known in lines if not known))
    for reason in (known[1] for _, known in lines if known and known[1]):
        raise FilmError(f"damaged JPEG data ({plain(ValueError(reason.decode('ascii', 'replace')))})")


CHANNEL_STEPS = 2  # by how much the channels of a grey image may differ: colour transformations round


def _without_comments(data: bytes) -> bytes:
    """Return a JPEG stream without its comments and application data; raise ValueError if its header has gaps.

    gdcm ends the process where libjpeg warns of the header: of gaps, or of unknown versions in application data.
    """
    kept, at = [data[:2]], 2
    while data[at : at + 2] != b"\xff\xda":
        marker, length = data[at : at + 2], 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == b"\xff\xff":  # fill byte
            at += 1
            continue
        if marker[:1] != b"\xff" or length < 4:
            raise ValueError("damaged header")
        if 0xC0 <= marker[1] <= 0xCF or marker[1] in (0xDB, 0xDD):  # frame, Huffman and quantisation tables, restarts
            kept.append(data[at : at + length])
        elif not (0xE0 <= marker[1] <= 0xEF or marker[1] == 0xFE):
            raise ValueError("damaged header")
        at += length
    return b"".join([*kept, data[at:]])


# The packages and functions for each codec, in the order in which they are asked.
DECODERS: dict[str, tuple[tuple[str, Callable[[Stream], np.ndarray]], ...]] = {
    JPEG: (("simplejpeg", _simplejpeg), ("opencv-python-headless", _opencv)),
    JPEG_12: (("python-gdcm", _gdcm),),
    LOSSLESS: (("python-gdcm", _gdcm),),
    JPEG_LS: (("python-gdcm", _gdcm),),
    JPEG_2000: (("pylibjpeg-openjpeg", _openjpeg), ("opencv-python-headless", _opencv)),
}
GDCM_SYNTAXES = {JPEG_12: "51", LOSSLESS: "70", JPEG_LS: "80"}


def installed() -> list[str]:
    """Return the names of the packages that decode and are installed: what can be read depends on them."""
    packages = {package for decoders in DECODERS.values() for package, _ in decoders}
    return sorted(package for package in packages if versioned(package) != package)


def decode_picture(data: bytes, max_pixels: int) -> tuple[np.ndarray, str]:
    """Decode a PNG or JPEG file; return (uint8 or uint16 array (rows, columns), decoder name and version).

    Raises:
        FilmError: the file is damaged, too large, multi-frame, or in colour (equal colour channels count as grey).
    """
    if data[:2] == b"\xff\xd8":
        stream = stream_of(data)
        if stream and (stream.codec, stream.components) == (JPEG, 1):
            check_size(stream.rows, stream.columns, max_pixels)
            return decode(stream)
    from PIL import Image

    try:
        Image.open(io.BytesIO(data), formats=("PNG", "JPEG")).verify()  # decoding ignores PNG checksums
        image: Any = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        check_size(image.height, image.width, max_pixels)
        if getattr(image, "n_frames", 1) > 1:
            raise FilmError(f"multi-frame picture ({image.n_frames} frames): give one film per file")
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")
        if image.mode == "1":
            image = image.convert("L")
        pixels = np.asarray(image)
    except FilmError:
        raise
    except Exception as error:  # decoders raise various errors on damaged input
        raise FilmError(f"damaged picture ({plain(error)})") from None
    if image.mode in ("RGB", "RGBA", "LA"):
        pixels = one_channel(pixels[..., : 1 if image.mode == "LA" else 3], "picture")
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16):
        raise FilmError(f"picture of mode {image.mode}: films are 8 or 16 bit grey")
    return pixels, versioned("pillow")


def one_channel(pixels: np.ndarray, kind: str = "image", ycc: bool = False) -> np.ndarray:
    """Return the grey channel of an image (rows, columns, channels) whose channels are equal.

    Args:
        kind: what the message calls it.
        ycc: the channels may also be luminance and two colour differences, which have to be neutral.

    Raises:
        FilmError: the image has colours.
    """
    grey, others = pixels[..., 0], pixels[..., 1:].astype(np.int32)
    neutral = [grey[..., None]] + ([np.array(1 << (8 * pixels.itemsize - 1))] if ycc else [])
    if not any((np.abs(others - wanted) <= CHANNEL_STEPS).all() for wanted in neutral):
        raise FilmError(f"colour {kind}: its channels differ, films are grey")
    return np.ascontiguousarray(grey)


def plain(error: BaseException) -> str:
    """Return a decoder's message as one short line without memory addresses, so that it is the same in every run."""
    words = [word for word in str(error).split() if "0x" not in word and "<" not in word]
    return " ".join(words)[:100] or type(error).__name__


def name_of(uid: str) -> str:
    """Return a known transfer syntax as text for people; of another one, the header may hold anything."""
    from pydicom.uid import UID_dictionary

    return f"{UID_dictionary[uid][0]} ({uid})" if uid in UID_dictionary else "unknown"


@functools.cache
def versioned(package: str) -> str:
    """Return the name of a package with its version, the name alone if it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
