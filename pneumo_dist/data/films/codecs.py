"""Decode compressed pixel data to stored values; choose the package for each transfer syntax.

Sizes are read from the compressed stream and checked before any decoder runs: a crafted header must not make one
allocate memory. All packages in requirements.txt have permissive licences (MIT, BSD, HPND). 12-bit JPEG needs
pylibjpeg-libjpeg (GPL), which users with such films install themselves.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

JPEG_8BIT = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")  # Baseline; Extended where it has 8 bits
JPEG_FAMILY = "1.2.840.10008.1.2.4."
DEFLATED = "1.2.840.10008.1.2.1.99"
MAX_TILES = 65_535  # JPEG 2000 part 1, A.4.2: the tile index has 16 bits

# Transfer syntax -> pydicom's name of the preferred plugin, and the package to install for it. JPEG-LS, JPEG 2000,
# high-throughput JPEG 2000, RLE lossless; then 12-bit and lossless JPEG, whose packages are not in requirements.txt.
PLUGINS = {
    "1.2.840.10008.1.2.4.80": ("pyjpegls", "pyjpegls"),
    "1.2.840.10008.1.2.4.81": ("pyjpegls", "pyjpegls"),
    "1.2.840.10008.1.2.4.90": ("pillow", "pillow"),
    "1.2.840.10008.1.2.4.91": ("pillow", "pillow"),
    **{f"1.2.840.10008.1.2.4.{end}": ("pylibjpeg", "pylibjpeg-openjpeg") for end in (201, 202, 203)},  # needs pylibjpeg
    "1.2.840.10008.1.2.5": ("pydicom", "pydicom"),
    "1.2.840.10008.1.2.4.51": ("pylibjpeg", "pylibjpeg-libjpeg"),  # 12 bit: pydicom lets gdcm decode 8 bit only
    "1.2.840.10008.1.2.4.57": ("gdcm", "python-gdcm"),
    "1.2.840.10008.1.2.4.70": ("gdcm", "python-gdcm"),
}


class FilmError(ValueError):
    """An unreadable film; the message is the reason, without path or name or id of a patient."""


class NotAnImage(FilmError):
    """A DICOM object that holds no image, for example a report: it is no film, so no answer is missing."""


def check_size(rows: int, columns: int, max_pixels: int) -> None:
    """Raise FilmError if a matrix is empty or larger than the limit."""
    if rows < 1 or columns < 1:
        raise FilmError(f"empty matrix ({rows} x {columns})")
    if rows * columns > max_pixels:
        raise FilmError(f"matrix of {rows} x {columns} pixels: more than data.max_pixels={max_pixels}")


def stream_size(stream: bytes) -> tuple[int, int, int, int] | None:
    """Return the declared (rows, columns, components, bits) of a JPEG, JPEG-LS or JPEG 2000 stream, or None."""
    if stream[:4] == b"\xff\x4f\xff\x51" and len(stream) >= 43:  # JPEG 2000: SOC, SIZ
        numbers = [int.from_bytes(stream[at : at + 4], "big") for at in range(8, 40, 4)]
        width, height, left, top, tile_width, tile_height = numbers[:6]
        if not (tile_width and tile_height) or -(-width // tile_width) * -(-height // tile_height) > MAX_TILES:
            raise FilmError("JPEG 2000 stream with an impossible number of tiles")
        return height - top, width - left, int.from_bytes(stream[40:42], "big"), (stream[42] & 0x7F) + 1
    if stream[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 < len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan without a frame header
            return None
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            frame = stream[at + 4 : at + 10]
            return int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5], frame[0]
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None


def decode_jpeg(stream: bytes) -> tuple[np.ndarray, str]:
    """Decode an 8-bit one-component JPEG; return (uint8 array (rows, columns), decoder name and version).

    simplejpeg raises on corruption warnings of libjpeg-turbo, which Pillow and OpenCV ignore. If it is not installed,
    OpenCV decodes: undamaged streams give the same pixels, but less damage is detected.

    Raises:
        FilmError: the stream is damaged.
    """
    try:
        import simplejpeg
    except ImportError:
        import cv2

        pixels = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_GRAYSCALE)
        if pixels is None:
            raise FilmError("damaged or truncated JPEG data") from None
        return pixels, f"opencv {cv2.__version__}"
    pixels = None
    for strict in (True, False):
        try:
            pixels = simplejpeg.decode_jpeg(stream, colorspace="GRAY", strict=strict)[..., 0]
            break
        except ValueError as error:
            # The one warning of libjpeg-turbo that does not concern the pixels.
            if not strict or "unknown JFIF revision" not in str(error):
                raise FilmError(f"damaged JPEG data ({plain(error)})") from None
    assert pixels is not None
    return pixels, f"simplejpeg {simplejpeg.__version__}"


def decode_picture(data: bytes, max_pixels: int) -> tuple[np.ndarray, str]:
    """Decode a PNG or JPEG file; return (uint8 or uint16 array (rows, columns), decoder name and version).

    Raises:
        FilmError: the file is damaged, too large, multi-frame, or in colour (equal colour channels count as grey).
    """
    if data[:2] == b"\xff\xd8":
        size = stream_size(data)
        if size and size[2:] == (1, 8):
            check_size(*size[:2], max_pixels)
            return decode_jpeg(data)
    import PIL
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
    colours = {"RGB": 3, "RGBA": 3, "LA": 1}.get(image.mode)
    if colours:
        if any((pixels[..., 0] != pixels[..., band]).any() for band in range(1, colours)):
            raise FilmError(f"colour picture ({image.mode}): films have one grey channel")
        pixels = np.ascontiguousarray(pixels[..., 0])
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16):
        raise FilmError(f"picture of mode {image.mode}: films are 8 or 16 bit grey")
    return pixels, f"pillow {PIL.__version__}"


def decode_dataset(dataset: Dataset, uid: str) -> tuple[np.ndarray, str, bool]:
    """Decode any other transfer syntax with pydicom; return (stored values, plugin and version, whether it warned).

    Raises:
        FilmError: the data is damaged, or the decoder is not installed (the message names the package).
    """
    import pydicom
    from pydicom.pixels import get_decoder

    first, package = PLUGINS.get(uid, ("", ""))
    try:
        decoder = get_decoder(pydicom.uid.UID(uid))
    except NotImplementedError:
        name = _name(uid) if re.fullmatch(r"[0-9.]{1,64}", uid) else "of the header"
        raise FilmError(f"transfer syntax {name} is not supported: convert the film") from None
    # JPEG Extended is here of 12 bits only, and Pillow, which pydicom would choose, decodes 8.
    if not decoder.is_available or (uid == JPEG_8BIT[1] and first not in decoder.available_plugins):
        raise FilmError(f"no decoder for {_name(uid)}: install {package or 'a plugin of pydicom'}")
    plugin = first if first in decoder.available_plugins else ""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pixels, _ = decoder.as_array(dataset, raw=True, decoding_plugin=plugin, correct_unused_bits=False)
    except Exception as error:  # plugins raise various errors of their libraries
        raise FilmError(f"damaged {_name(uid)} pixel data ({type(error).__name__})") from None
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    suffix = f" with {_version(package)}" if package not in ("", "pydicom") else ""
    return pixels, f"pydicom {pydicom.__version__}{suffix}", bool(caught)


def plain(error: BaseException) -> str:
    """Return a decoder's message as one short line without memory addresses, so that it is the same in every run."""
    words = [word for word in str(error).split() if "0x" not in word and "<" not in word]
    return " ".join(words)[:100] or type(error).__name__


def _name(uid: str) -> str:
    import pydicom

    name = pydicom.uid.UID(uid).name
    return f"{name} ({uid})" if name != uid else f"{uid[:64]!r}"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return "another plugin"
