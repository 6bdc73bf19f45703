"""`metrics.jsonl`: one line per epoch, written by rank 0, read by status displays and reports.

`progress.json` beside it holds the position within the epoch.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pneumo_dist.runtime.files import write_json, write_text

T = TypeVar("T")
LIVE = "progress.json"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows, oldest first; [] where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add an epoch; rows of a lost attempt for the same epoch or later ones are dropped."""
    rows = [old for old in read(path) if old["epoch"] < row["epoch"]]
    write_text(path, "".join(json.dumps(r) + "\n" for r in [*rows, row]))


def line(row: dict[str, Any]) -> str:
    """Return a row as one line of a log."""
    text = f"epoch {row['epoch']}/{row['epochs']}  loss {row['train_loss']:.4f}"
    if "dice" in row:
        losses = {"positive": "loss_positive", "negative": "loss_negative", "above an empty answer": "loss_above_empty"}
        scores = {"Dice": "dice", "on positives": "dice_positive", "AUC": "auc"}
        text += f"  validation: loss {row['loss']:.4f} ({_values(row, losses)}), {_values(row, scores)}, "
        empty = f"{100 * row['called_empty']:.0f} % called empty"
        text += f"{empty}, highest probability {row['highest_probability']:.2f}"
    return text + f"  {row['images_per_s']:.1f} images/s, {100 * row['wait_share']:.0f} % waiting"


def _values(row: dict[str, Any], columns: dict[str, str]) -> str:
    return ", ".join(f"{name} {row[key]:.4f}" for name, key in columns.items() if row[key] is not None)


class Throughput:
    """Images per second, and the share of the time spent waiting for data, since this object was made."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._images, self._waited_s = 0, 0.0

    def next(self, batches: Iterator[T]) -> T:
        """Return the next batch, and count the time until it is there as waiting."""
        begin = time.monotonic()
        batch = next(batches)
        self._waited_s += time.monotonic() - begin
        return batch

    def add(self, images: int) -> None:
        """Count the images of one step, over all ranks."""
        self._images += images

    def speed(self) -> tuple[float, float]:
        """Return images/s and the share of waiting up to now."""
        seconds = max(time.monotonic() - self._begin, 1e-9)
        return self._images / seconds, self._waited_s / seconds

    def row(self, path: Path, epoch: int) -> dict[str, float]:
        """Return both as part of an epoch's row; the values in `path` where only the epoch's validation was left."""
        if self._images:
            images_per_s, wait_share = self.speed()
            return {"images_per_s": round(images_per_s, 2), "wait_share": round(wait_share, 4)}
        noted = next((row for row in read(path) if row["epoch"] == epoch), {})
        return {name: noted.get(name, 0.0) for name in ("images_per_s", "wait_share")}


class Live:
    """Rewrites `progress.json` at most every `every_s` seconds, on rank 0; on other ranks it does nothing."""

    def __init__(self, folder: Path, first: bool, every_s: float = 10.0) -> None:
        self._path, self._first, self._every_s = folder / LIVE, first, every_s
        self._next = 0.0

    def note(self, *, epoch: int, epochs: int, step: int, steps: int, images_per_s: float) -> None:
        """Write the position; an error is ignored, because only status displays need the file."""
        if not self._first or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_s
        row = {"epoch": epoch, "epochs": epochs, "step": step, "steps": steps, "images_per_s": round(images_per_s, 2)}
        with contextlib.suppress(OSError):
            write_json(self._path, row)
