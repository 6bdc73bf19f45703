"""`metrics.jsonl`: one line per epoch, written by rank 0, read by status displays and reports.

`progress.json` beside it says where the training is within its epoch.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pneumo_dist.runtime.files import write_json, write_text

LIVE = "progress.json"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows, oldest first; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add an epoch; rows that a lost attempt wrote for it or for later ones are dropped."""
    rows = [old for old in read(path) if old["epoch"] < row["epoch"]]
    write_text(path, "".join(json.dumps(r) + "\n" for r in [*rows, row]))


def speed(path: Path, epoch: int, images: int, seconds: float, waited_s: float) -> dict[str, float]:
    """Return an epoch's images/s and share of waiting; without images (only its validation was left) the noted ones."""
    if images:
        return {"images_per_s": round(images / seconds, 2), "wait_share": round(waited_s / seconds, 4)}
    noted = next((row for row in read(path) if row["epoch"] == epoch), {})
    return {name: noted.get(name, 0.0) for name in ("images_per_s", "wait_share")}


def line(row: dict[str, Any]) -> str:
    """Return a row as one line for people."""
    text = f"epoch {row['epoch']}/{row['epochs']}  loss {row['train_loss']:.4f}"
    if "dice" in row:
        text += f"  validation: loss {row['loss']:.4f}, Dice {row['dice']:.4f}, on positives {row['dice_positive']:.4f}"
    return text + f"  {row['images_per_s']:.1f} images/s, {100 * row['wait_share']:.0f} % waiting"


class Live:
    """Rewrites `progress.json` at most every `every_s` seconds, on rank 0; on other ranks it does nothing."""

    def __init__(self, folder: Path, first: bool, every_s: float = 10.0) -> None:
        self._path, self._first, self._every_s = folder / LIVE, first, every_s
        self._next = 0.0

    def note(self, *, epoch: int, epochs: int, step: int, steps: int, images_per_s: float) -> None:
        """Say where the training is; a file that cannot be written is no reason to stop it."""
        if not self._first or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_s
        row = {"epoch": epoch, "epochs": epochs, "step": step, "steps": steps, "images_per_s": round(images_per_s, 2)}
        try:
            write_json(self._path, row)
        except OSError:
            pass
