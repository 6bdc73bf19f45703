"""Map stored values to 8-bit grey: modality transformation, then VOI LUT, window or full range (PS3.3 C.11.1, C.11.2).

The mapping is a table with one grey value per bit pattern. A VOI LUT or window that does not fit the film's values is
left out with a warning: no film is shown black because of a header.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pneumo_dist.data.films.attributes import decimals, integers, text
from pneumo_dist.data.films.codecs import FilmError

VERSION = "2"  # of the grey values that films get: results of another version are not mixed with those of this one
# Most of the pixels must use this many steps of grey (an eighth of all), or half of the steps between their values.
FEWEST_STEPS = 32
MOST = 0.9
# Values beyond a gap of more than half the range are a marker or a border, if they are so few or all equal.
FEW = 0.05
# A full range needs this many values, or a picture of a few values would lose some of them.
RANGE_VALUES = 16


@dataclass(frozen=True)
class Lut:
    """A look-up table: `entries[i]` belongs to the input value `first + i`, the ends to all values beyond them."""

    first: int
    entries: np.ndarray  # uint16
    depth: int  # bits of an entry

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return the entries of whole or rounded values."""
        # Clipped as numbers: a value may be too large for an integer.
        indices = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        return np.asarray(self.entries[indices.astype(np.intp)])

    def fractions(self, values: np.ndarray, warnings: list[str]) -> np.ndarray:
        """Return the entries as fractions of the brightest possible one."""
        depth, used = self.depth, max(int(self.entries.max()).bit_length(), 1)
        # Some vendors declare 16 bits for entries of 8, 10 or 12.
        if not used <= depth <= 16 or (depth == 16 and 8 <= used <= 12):
            warnings.append(f"LUT entries have {used} bits, the header says {depth}")
            depth = used
        return self(values) / float((1 << depth) - 1)


def lut_of(item: Any, signed: bool, prefix: str = "LUT") -> Lut | None:
    """Return the look-up table of a sequence item (or a palette's of a data set), None if it holds no data."""
    descriptor, entries = integers(item, f"{prefix}Descriptor"), integers(item, f"{prefix}Data").astype(np.uint16)
    if len(descriptor) < 3 or not len(entries):
        return None
    count, first, depth = int(descriptor[0]) & 0xFFFF or 1 << 16, int(descriptor[1]), int(descriptor[2])
    if signed and first >= 1 << 15:
        first -= 1 << 16
    if depth <= 8 and 2 * len(entries) <= count + 1:  # two entries in a word
        entries = np.frombuffer(entries.astype("<u2").tobytes(), np.uint8).astype(np.uint16)
    return Lut(first, entries[:count], depth)


def histogram(patterns: np.ndarray, bits: int) -> np.ndarray:
    """Return the number of pixels of every bit pattern, float64. OpenCV is seven times as fast as numpy's bincount."""
    import cv2

    counts = cv2.calcHist([np.ascontiguousarray(patterns)], [0], None, [1 << bits], [0, 1 << bits])
    return np.asarray(counts.ravel(), np.float64)


def grey_table(dataset: Any, counts: np.ndarray, bits: int, signed: bool, warnings: list[str]) -> np.ndarray:
    """Return the grey value, uint8, of every bit pattern; `counts` is the number of pixels of each."""
    patterns = np.arange(1 << bits)
    values = np.where(patterns >= 1 << (bits - 1), patterns - (1 << bits), patterns) if signed else patterns
    counts = _without_padding(dataset, counts, values, bits)
    shown, whole_range = _modality(dataset, values, signed, bits)
    for kind, fractions in _presentations(dataset, shown, warnings):
        table = to_bytes(fractions)
        if _fits(table, counts):
            return table
        if _spans(table, shown, counts):
            warnings.append(f"most of the film has few grey levels in its {kind}")
            return table
        warnings.append(f"{kind} that does not fit the film's values ignored")
    low, high = whole_range or _range(shown, counts, warnings)
    table = to_bytes((shown - low) / (high - low if high > low else 1.0))
    if not _fits(table, counts):
        warnings.append("most of the film has few grey levels: some values far from all others set the range")
    return table


def palette_table(dataset: Any, counts: np.ndarray, bits: int, warnings: list[str]) -> np.ndarray:
    """Return the grey value, uint8, of every bit pattern of a palette image whose colours are equal where it uses them.

    Raises:
        FilmError: there is no palette, or it has colours.
    """
    names = (f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue"))
    luts = [lut for name in names if (lut := lut_of(dataset, False, name))]
    if len(luts) < 3:
        raise FilmError("colour image (PALETTE COLOR without its look-up tables): films are grey")
    red, *others = (lut.fractions(np.arange(1 << bits), warnings) for lut in luts)
    if any((red != other)[counts > 0].any() for other in others):
        raise FilmError("colour image (PALETTE COLOR): films are grey")
    table = to_bytes(red)
    if not _fits(table, counts):
        warnings.append("most of the film has few grey levels in its palette")
    return table


def to_bytes(fractions: np.ndarray) -> np.ndarray:
    """Return fractions of the display range as uint8."""
    return np.asarray(np.floor(np.clip(fractions, 0, 1) * 255 + 0.5).astype(np.uint8))


def _fits(table: np.ndarray, counts: np.ndarray) -> bool:
    """Return whether the pixels of a film have several grey levels, and not few if they have many values."""
    several = len(np.unique(table[counts > 0])) > 1
    counts = counts.copy()
    counts[counts.argmax()] = 0  # a background
    return several and _steps(np.bincount(table, counts)) >= min(FEWEST_STEPS, _steps(counts) / 2)


def _steps(counts: np.ndarray) -> int:
    """Return the number of steps between the most frequent values that most of the pixels have."""
    return int(np.searchsorted(np.sort(counts)[::-1].cumsum(), MOST * counts.sum()))


def _spans(table: np.ndarray, shown: np.ndarray, counts: np.ndarray) -> bool:
    """Return whether grey values that are few neither clip the film nor belong to values of another depth."""
    low, high = _range(shown, counts, [])
    levels = np.unique(table[(counts > 0) & (shown >= low) & (shown <= high)])
    clipped = counts[(table == 0) | (table == 255)].sum()
    return len(levels) > FEWEST_STEPS and clipped <= FEW * counts.sum()


def _without_padding(dataset: Any, counts: np.ndarray, values: np.ndarray, bits: int) -> np.ndarray:
    """Return the counts without the pixels that are declared as padding (PS3.3 C.7.5.1.1.2)."""
    limits = [
        integers(dataset, name)[:1] & ((1 << bits) - 1) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    ]
    if not len(limits[0]):
        return counts
    low, high = sorted(values[limit] for limit in (limits[0][0], (limits[1] if len(limits[1]) else limits[0])[0]))
    kept = np.where((values < low) | (values > high), counts, 0)
    return kept if np.count_nonzero(kept) > 0 else counts


def _modality(
    dataset: Any, values: np.ndarray, signed: bool, bits: int
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Return (values after LUT or rescale, their whole range if it is the display range: that of 8 stored bits)."""
    sequence = dataset.get("ModalityLUTSequence")
    lut = lut_of(sequence[0], signed) if sequence else None
    if lut:
        return lut(values).astype(np.float64), None
    slope, intercept = ((decimals(dataset, f"Rescale{name}") or [default])[0] for name, default in _RESCALE)
    shown = values.astype(np.float64) * slope + intercept
    if not np.isfinite(shown).all():
        raise FilmError("rescale slope or intercept is not a finite number")
    ends = sorted((float(shown[values.argmin()]), float(shown[values.argmax()])))
    return shown, (ends[0], ends[1]) if bits == 8 else None


_RESCALE = (("Slope", 1.0), ("Intercept", 0.0))


def _presentations(dataset: Any, shown: np.ndarray, warnings: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (kind, fractions of the display range) of the VOI LUTs and windows in the order of the header."""
    for item in dataset.get("VOILUTSequence") or ():
        # The input of the LUT has the sign of the values after the modality transformation.
        lut = lut_of(item, bool(shown.min() < 0))
        if lut:
            yield "VOI LUT", lut.fractions(shown, warnings)
        else:
            warnings.append("VOI LUT without data ignored")
    function = text(dataset, "VOILUTFunction")
    for centre, width in zip(decimals(dataset, "WindowCenter"), decimals(dataset, "WindowWidth"), strict=False):
        exact = function in ("LINEAR_EXACT", "SIGMOID")
        if not (math.isfinite(centre) and math.isfinite(width)) or (width < 1 and not (exact and width > 0)):
            warnings.append("unusable window ignored")
        else:
            yield "window", _windowed(shown, centre, width, function)


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Return fractions of the display range (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return (values - (centre - 0.5)) / (width - 1) + 0.5


def _range(shown: np.ndarray, counts: np.ndarray, warnings: list[str]) -> tuple[float, float]:
    """Return the (lowest, highest) value of the film, without those of a marker or border far from all others."""
    used = np.unique(shown[counts > 0])
    if len(used) > RANGE_VALUES:
        gap = int(np.diff(used).argmax())
        parts = used[: gap + 1], used[gap + 1 :]
        pixels = [counts[(shown >= part[0]) & (shown <= part[-1])].sum() for part in parts]
        few = int(pixels[1] < pixels[0])
        rest = parts[1 - few]
        isolated = pixels[few] < FEW * sum(pixels) or len(parts[few]) == 1
        if used[gap + 1] - used[gap] > (used[-1] - used[0]) / 2 and isolated and len(rest) >= RANGE_VALUES:
            warnings.append("values far from all others (a marker or border) left out of the grey range")
            used = rest
    return float(used[0]), float(used[-1])
