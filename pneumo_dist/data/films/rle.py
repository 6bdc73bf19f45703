"""Run-length masks of the SIIM-ACR competition: text to boolean mask and back, exact to the last pixel.

Numpy only, no files: submit.py and the scoring tools import this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

Runs = tuple[np.ndarray, np.ndarray]  # starts and ends of runs, see `runs`
EMPTY = "-1"
PAIRS = re.compile(r"\s*\d{1,10}\s+\d{1,10}(?:\s+\d{1,10}\s+\d{1,10})*\s*", re.ASCII)
# The number of the first pixel in lists of absolute positions: most Kaggle competitions count from 1.
FIRST_PIXEL = {"absolute": 1, "absolute0": 0}


class RleError(ValueError):
    """An invalid run-length text; the message is the reason, without file or id."""


def runs(text: str) -> Runs:
    """Return the (start, end) pixel positions of the runs of one annotation row, end exclusive.

    Tokens are pairs (offset, length); an offset counts from the end of the previous run (the first from 0),
    in column-major order. `-1` is the empty mask.

    Returns:
        Two int64 arrays of equal length, ascending, not overlapping.
    Raises:
        RleError: no token, an odd number of tokens, a token that is no integer, an offset below 0, a length below 1.
    """
    pairs = _pairs(text)
    ends = np.cumsum(pairs.ravel())[1::2]
    return ends - pairs[:, 1], ends


def _pairs(text: str) -> np.ndarray:
    """Return the (offset, length) pairs of one annotation row, int64 (n, 2). Raises as `runs`."""
    if not PAIRS.fullmatch(text):
        _check_empty(text.split())
        return np.zeros((0, 2), np.int64)
    pairs = np.fromstring(text, dtype=np.int64, sep=" ").reshape(-1, 2)
    if not pairs[:, 1].all():
        raise RleError("a run of length 0")
    return pairs


def ascending_steps(text: str) -> tuple[int, int]:
    """Return (steps between runs whose offset is not before the end of the previous run, all steps) of one row.

    In a list of absolute positions every step ascends. In the competition's list, whose offsets are the gaps between
    runs, 3 % do: at most 46 % of one film's, and never all of one row's.
    """
    try:
        pairs = _pairs(text)
    except RleError:
        return 0, 0
    return int((pairs[1:, 0] >= pairs[:-1].sum(axis=1)).sum()), max(len(pairs) - 1, 0)


def relative_text(text: str, first: int) -> str:
    """Convert a row of absolute positions, where the first pixel has the number `first`, to the competition's form.

    Raises:
        RleError: as `runs`, a position before the first pixel, or runs that do not ascend.
    """
    pairs = _pairs(text)
    if not len(pairs):
        return EMPTY
    starts = pairs[:, 0] - first
    gaps = np.diff(starts, prepend=0) - np.concatenate([[0], pairs[:-1, 1]])
    if gaps.min() < 0:
        raise RleError("position 0, but positions count from 1" if starts[0] < 0 else "the positions do not ascend")
    return " ".join(map(str, np.stack([gaps, pairs[:, 1]], axis=1).ravel().tolist()))


def _check_empty(tokens: list[str]) -> None:
    """Raise RleError with the reason unless the tokens are those of the empty mask."""
    if tokens == [EMPTY]:
        return
    if not tokens:
        raise RleError("empty cell (a film without pneumothorax is -1)")
    for token in tokens:
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise RleError(f"{token[:20]!r} is not a whole number of at most 10 digits without sign")
    raise RleError(f"odd number of values ({len(tokens)}): runs are pairs of offset and length")


def past_the_end(end: int, rows: int, columns: int) -> RleError:
    """Return the error for runs that end outside the film."""
    return RleError(f"the runs end at pixel {end}, past the {rows} x {columns} film ({rows * columns} pixels)")


def decode_union(texts: Iterable[str], rows: int, columns: int) -> np.ndarray:
    """Return the union of several annotation rows as a boolean mask of shape (rows, columns), column-major in memory.

    Raises:
        RleError: as `runs`, or a run that ends past rows * columns.
    """
    return paint(map(runs, texts), rows, columns)


def paint(pairs: Iterable[Runs], rows: int, columns: int, inside: np.generic = np.True_) -> np.ndarray:
    """Return the union of several results of `runs` as a mask of shape (rows, columns), column-major in memory.

    `inside` is the value of pixels inside and gives the dtype, boolean by default; pixels outside are 0.

    Raises:
        RleError: a run ends past rows * columns.
    """
    flat: np.ndarray | None = None
    for starts, ends in pairs:
        if not len(starts):
            continue
        if ends[-1] > rows * columns:
            raise past_the_end(int(ends[-1]), rows, columns)
        # Alternating counts of zeros and ones: np.repeat fills whole runs at memory speed.
        counts = np.empty(2 * len(starts) + 1, dtype=np.int64)
        counts[1::2] = ends - starts
        counts[0] = starts[0]
        counts[2:-1:2] = starts[1:] - ends[:-1]
        counts[-1] = rows * columns - ends[-1]
        values = np.zeros(len(counts), dtype=inside.dtype)
        values[1::2] = inside
        row = np.repeat(values, counts)
        flat = row if flat is None else np.maximum(flat, row, out=flat)
    if flat is None:
        flat = np.zeros(rows * columns, dtype=inside.dtype)
    return flat.reshape(columns, rows).T


def area_px(pairs: Sequence[Runs]) -> tuple[int, int]:
    """Return (pixels of the union of several results of `runs`, sum of their pixels minus that union)."""
    starts, ends = (np.concatenate([np.zeros(0, np.int64), *(pair[i] for pair in pairs)]) for i in (0, 1))
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    covered = np.maximum.accumulate(ends)
    before = np.concatenate([[0], covered[:-1]]) if len(ends) else ends
    union = int(np.maximum(covered - np.maximum(before, starts), 0).sum())
    return union, int((ends - starts).sum()) - union


def decode_rle(text: str, rows: int, columns: int) -> np.ndarray:
    """Return one annotation row as a boolean mask of shape (rows, columns). Raises as `decode_union`."""
    return decode_union([text], rows, columns)


def encode_rle(mask: np.ndarray) -> str:
    """Return a mask of shape (rows, columns), any dtype, non-zero inside, as text; `-1` if empty.

    The inverse of `decode_rle`; a run that touches the last pixel is kept.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask has 2 dimensions, not {mask.ndim}")
    flat = np.zeros(mask.size + 2, dtype=np.int8)
    flat[1:-1] = (mask != 0).T.ravel()
    edges = np.flatnonzero(np.diff(flat))
    if not len(edges):
        return EMPTY
    return " ".join(map(str, np.diff(edges, prepend=0).tolist()))
