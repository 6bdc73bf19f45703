"""`metrics.jsonl`: one line per epoch, written by rank 0, read by status displays and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pneumo_dist.runtime.files import write_text


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows, oldest first; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add an epoch; rows that a lost attempt wrote for it or for later ones are dropped."""
    rows = [old for old in read(path) if old["epoch"] < row["epoch"]]
    write_text(path, "".join(json.dumps(r) + "\n" for r in [*rows, row]))


def line(row: dict[str, Any]) -> str:
    """Return a row as one line for people."""
    text = f"epoch {row['epoch']}/{row['epochs']}  loss {row['train_loss']:.4f}"
    if "dice" in row:
        text += f"  validation: loss {row['loss']:.4f}, Dice {row['dice']:.4f}, on positives {row['dice_positive']:.4f}"
    return text + f"  {row['images_per_s']:.1f} images/s, {100 * row['wait_share']:.0f} % waiting"
