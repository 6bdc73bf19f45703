"""The pixel data of a DICOM data set as stored values. What the data are decides, not what the header calls them.

Compressed data name their codec themselves: headers that name another one are common after gateways and converters.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from pneumo_dist.data.films import codecs
from pneumo_dist.data.films.attributes import whole
from pneumo_dist.data.films.codecs import FilmError

RLE = "1.2.840.10008.1.2.5"
# Implicit and explicit VR little endian, the same in fragments, explicit VR big endian.
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.98", "1.2.840.10008.1.2.2")
ITEM = b"\xfe\xff\x00\xe0"  # begins each fragment of compressed data
NONCONFORMANT = "pixel data does not conform to the standard"
OVERLAY_BITS = [0x60000102 + (group << 16) for group in range(0, 32, 2)]  # positions of overlays in the pixel data


@dataclass(frozen=True)
class Stored:
    """Bit patterns (rows, columns), unsigned, of `bits` bits; `signed` says whether they are two's complements."""

    patterns: np.ndarray
    bits: int
    signed: bool
    decoder: str


@dataclass(frozen=True)
class Matrix:
    """What the header declares about the pixel data."""

    rows: int
    columns: int
    samples: int
    photometric: str
    allocated: int
    bits: int
    high: int
    signed: bool

    @property
    def bytes(self) -> int:
        """The length of the uncompressed pixel data; two pixels of YBR_FULL_422 share their colour."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return self.rows * self.columns * samples * self.allocated // 8


def matrix_of(dataset: Any, samples: int, photometric: str, max_pixels: int) -> Matrix:
    """Return the declared matrix; raise FilmError if it is missing, too large, or not of 8 to 16 bits."""
    rows, columns = whole(dataset, "Rows"), whole(dataset, "Columns")
    codecs.check_size(rows, columns, max_pixels)
    allocated = whole(dataset, "BitsAllocated")
    bits = whole(dataset, "BitsStored", allocated)
    high = whole(dataset, "HighBit", bits - 1)
    if allocated not in (8, 16) or not 1 <= bits <= allocated or not bits - 1 <= high < allocated:
        raise FilmError(f"{allocated} bits allocated, {bits} stored, high bit {high}: films have 8 to 16 bits")
    signed = whole(dataset, "PixelRepresentation", 0) == 1
    return Matrix(rows, columns, samples, photometric, allocated, bits, high, signed)


def stored_values(dataset: Any, matrix: Matrix, max_pixels: int, warned: list[str]) -> Stored:
    """Return the stored values; of an image with three equal channels those of one.

    Raises:
        FilmError: the pixel data are damaged, cut off, of another size than declared, in colour, or cannot be decoded.
    """
    uid = _transfer_syntax(dataset)
    depth, high = matrix.allocated, matrix.high
    data = bytes(dataset.PixelData)
    fits = len(data) in (matrix.bytes, matrix.bytes + 1)
    compressed = dataset["PixelData"].is_undefined_length or (data.startswith(ITEM) and not fits)
    data = _frame(data) if compressed else data
    stream = codecs.stream_of(data) if compressed or not fits else None
    if stream:
        pixels, decoder = _decoded(stream, matrix, max_pixels)
        if not (matrix.signed and stream.codec in codecs.HUFFMAN):  # its values have the sign bit of the header
            depth = stream.bits
    elif compressed and uid == RLE:
        pixels, decoder = _run_lengths(data, matrix, warned), codecs.versioned("pydicom")
    elif compressed and uid.startswith(codecs.JPEG_FAMILY):
        name = codecs.name_of(uid)
        raise FilmError(f"the compressed pixel data contains no image of a known codec ({name}): convert the film")
    elif uid in UNCOMPRESSED or uid == RLE or uid.startswith(codecs.JPEG_FAMILY):
        pixels, decoder = _uncompressed(dataset, data, matrix, warned), codecs.versioned("numpy")
    else:
        raise FilmError(f"transfer syntax {codecs.name_of(uid)} is not supported: convert the film")
    if matrix.samples > 1:
        raw = stream is None or stream.codec != codecs.JPEG  # the decoder of JPEG returns red, green and blue
        pixels = codecs.one_channel(pixels, ycc=raw and matrix.photometric.startswith("YBR_FULL"))
    patterns = _low_bits(pixels.view(f"u{pixels.dtype.itemsize}"), depth)
    bits = min(matrix.bits, depth)
    if bits < matrix.bits:
        warned.append(f"the compressed image has {depth} bits, the header says {matrix.bits}")
    if high >= depth:
        high = bits - 1
    if high == bits - 1 and not matrix.signed:
        bits, high = _bits_in_use(dataset, patterns, bits, warned)
    # Bits above and below the stored ones hold an overlay in some old films.
    shift = high + 1 - bits
    return Stored(_low_bits(patterns >> shift if shift else patterns, bits), bits, matrix.signed, decoder)


def _low_bits(patterns: np.ndarray, bits: int) -> np.ndarray:
    return patterns & ((1 << bits) - 1) if int(patterns.max()) >> bits else patterns


def _transfer_syntax(dataset: Any) -> str:
    uid = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    return str(uid) if uid else UNCOMPRESSED[0]


def _frame(data: bytes) -> bytes:
    from pydicom.encaps import get_frame

    try:
        return bytes(get_frame(data, 0, number_of_frames=1))
    except Exception as error:  # pydicom raises various errors on damaged fragments
        raise FilmError(f"damaged compressed pixel data ({type(error).__name__})") from None


def _decoded(stream: codecs.Stream, matrix: Matrix, max_pixels: int) -> tuple[np.ndarray, str]:
    """Return (pixels, decoder) of a compressed image whose size is the declared one."""
    codecs.check_size(stream.rows, stream.columns, max_pixels)
    if (stream.rows, stream.columns) != (matrix.rows, matrix.columns):
        size = f"{stream.rows} x {stream.columns}"
        raise FilmError(f"the header says {matrix.rows} x {matrix.columns}, the compressed image is {size}")
    if stream.components != matrix.samples:
        counts = f"{matrix.samples} samples per pixel, the compressed image has {stream.components} components"
        raise FilmError(f"the header says {counts}")
    if not 8 <= stream.bits <= 16:
        raise FilmError(f"the compressed image has {stream.bits} bits: films have 8 to 16 bits")
    if matrix.signed and matrix.allocated == 8 and stream.codec == codecs.JPEG:
        raise FilmError("8-bit JPEG, but the header declares signed values")
    return codecs.decode(stream)


def _run_lengths(frame: bytes, matrix: Matrix, warned: list[str]) -> np.ndarray:
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pixels, _ = get_decoder(RLELossless).as_array(
                encapsulate([frame]), raw=True, number_of_frames=1, rows=matrix.rows, columns=matrix.columns,
                samples_per_pixel=matrix.samples, bits_allocated=matrix.allocated, bits_stored=matrix.allocated,
                pixel_representation=0, photometric_interpretation="RGB" if matrix.samples > 1 else "MONOCHROME2",
                planar_configuration=0,
            )  # fmt: skip
    except Exception as error:  # pydicom raises various errors on damaged runs
        raise FilmError(f"damaged RLE pixel data ({type(error).__name__})") from None
    if caught:
        warned.append(NONCONFORMANT)
    return np.asarray(pixels)


def _uncompressed(dataset: Any, data: bytes, matrix: Matrix, warned: list[str]) -> np.ndarray:
    if not matrix.bytes <= len(data) < 2 * matrix.bytes:  # twice: several frames, or another matrix than declared
        raise FilmError(f"damaged uncompressed pixel data ({len(data)} bytes instead of {matrix.bytes})")
    if len(data) > matrix.bytes + matrix.bytes % 2:
        warned.append(NONCONFORMANT)
    little = dataset.original_encoding[1] is not False
    if matrix.allocated == 8 and not little and dataset["PixelData"].VR == "OW":
        data = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes()
    pixels = np.frombuffer(
        data, f"{'<' if little else '>'}u{matrix.allocated // 8}", matrix.bytes * 8 // matrix.allocated
    )
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    shape = matrix.rows, matrix.columns
    if matrix.photometric == "YBR_FULL_422":  # two grey values, then their colour
        pairs = pixels.reshape(-1, 4)
        channels = [pairs[:, :2].ravel(), *(pairs[:, band].repeat(2) for band in (2, 3))]
        return np.stack(channels, axis=-1).reshape(*shape, 3)
    if matrix.samples == 1:
        return pixels.reshape(shape)
    planes = whole(dataset, "PlanarConfiguration", 0) == 1
    return (
        pixels.reshape(matrix.samples, *shape).transpose(1, 2, 0) if planes else pixels.reshape(*shape, matrix.samples)
    )


def _bits_in_use(dataset: Any, patterns: np.ndarray, bits: int, warned: list[str]) -> tuple[int, int]:
    """Return (bits, high bit) of the values, which may exceed the declared bits if no overlay is declared there."""
    if not int(patterns.max()) >> bits:
        return bits, bits - 1
    above = patterns >> bits
    if above.min() == above.max() or any(tag in dataset for tag in OVERLAY_BITS):
        return bits, bits - 1
    used = int(patterns.max()).bit_length()
    warned.append(f"values have {used} bits, the header says {bits}")
    return used, used - 1
