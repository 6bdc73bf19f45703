"""Small JPEG encoders for tests, written from the standard (ITU-T T.81), independent of the decoders under test.

All Huffman codes of a table have one length: larger streams, shorter code.
"""

from __future__ import annotations

import struct

import numpy as np

ZIGZAG = sorted(((y, x) for y in range(8) for x in range(8)), key=lambda p: (sum(p), p[sum(p) % 2 == 0]))


class _Bits:
    """The entropy-coded segment under construction, as text of 0 and 1."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def code(self, index: int, length: int) -> None:
        self.parts.append(f"{index:0{length}b}")

    def value(self, number: int) -> int:
        """Append the additional bits of a difference or coefficient; return its category."""
        category = abs(number).bit_length()
        if category:
            self.code(number if number > 0 else number + (1 << category) - 1, category)
        return category

    def stuffed(self) -> bytes:
        text = "".join(self.parts)
        text += "1" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _table(where: int, symbols: bytes, length: int) -> bytes:
    counts = bytes(len(symbols) if i + 1 == length else 0 for i in range(16))
    return _segment(0xC4, bytes([where]) + counts + symbols)


def _frame(marker: int, bits: int, rows: int, columns: int) -> bytes:
    return _segment(marker, struct.pack(">BHHB", bits, rows, columns, 1) + b"\x01\x11\x00")


def lossless_jpeg(pixels: np.ndarray, bits: int, predictor: int = 1) -> bytes:
    """Return a lossless JPEG (process 14) of unsigned pixels; selection values 1 to 7 as in table H.1."""
    x = pixels.astype(int)
    out = _Bits()
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            left, up = x[r, c - 1], x[r - 1, c]
            corner = x[r - 1, c - 1]
            if r == 0 or c == 0:
                guess = 1 << (bits - 1) if r == c == 0 else left if r == 0 else up
            else:
                guess = (
                    left, up, corner, left + up - corner, left + ((up - corner) >> 1), up + ((left - corner) >> 1),
                    (left + up) >> 1,
                )[predictor - 1]  # fmt: skip
            difference = int(x[r, c] - guess + 32767) % 65536 - 32767
            out.code(16 if difference == 32768 else abs(difference).bit_length(), 5)
            if difference != 32768:
                out.value(difference)
    head = b"\xff\xd8" + _frame(0xC3, bits, *x.shape) + _table(0, bytes(range(17)), 5)
    return head + _segment(0xDA, bytes([1, 1, 0, predictor, 0, 0])) + out.stuffed() + b"\xff\xd9"


def extended_jpeg(pixels: np.ndarray, bits: int = 12) -> bytes:
    """Return a sequential DCT JPEG of unsigned pixels with quantisation 1: decoders are within one level of the pixels."""
    k = np.arange(8)
    basis = np.sqrt(np.where(k == 0, 0.125, 0.25))[:, None] * np.cos((2 * k + 1) * k[:, None] * np.pi / 16)
    pad = [(0, -size % 8) for size in pixels.shape]
    padded = np.pad(pixels.astype(float), pad, "edge") - (1 << (bits - 1))
    symbols = bytes([0x00, 0xF0, *(run << 4 | size for run in range(16) for size in range(1, 15))])
    out, last = _Bits(), 0
    for y in range(0, padded.shape[0], 8):
        for x in range(0, padded.shape[1], 8):
            block = np.rint(basis @ padded[y : y + 8, x : x + 8] @ basis.T).astype(int)
            numbers = [int(block[place]) for place in ZIGZAG]
            out.code(abs(numbers[0] - last).bit_length(), 5)
            out.value(numbers[0] - last)
            last, run = numbers[0], 0
            end = max((i for i, number in enumerate(numbers) if number and i), default=0)
            for number in numbers[1 : end + 1]:
                if not number and run == 15:
                    out.code(symbols.index(0xF0), 8)
                    run = 0
                elif not number:
                    run += 1
                else:
                    out.code(symbols.index(run << 4 | abs(number).bit_length()), 8)
                    out.value(number)
                    run = 0
            if end < 63:
                out.code(symbols.index(0x00), 8)
    head = b"\xff\xd8" + _segment(0xDB, b"\x00" + b"\x01" * 64) + _frame(0xC1, bits, *pixels.shape)
    tables = _table(0x00, bytes(range(17)), 5) + _table(0x10, symbols, 8)
    return head + tables + _segment(0xDA, bytes([1, 1, 0x00, 0, 63, 0])) + out.stuffed() + b"\xff\xd9"
