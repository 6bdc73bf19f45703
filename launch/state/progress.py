"""How far a job is, from the files that it writes: steps of a training, films of an array. Only reads, never waits."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pneumo_dist.chain import Node
from pneumo_dist.config import TRAIN_STAGES, ConfigError
from pneumo_dist.data.shards import HEADER_BYTES, image_name, size_name
from pneumo_dist.inference.film_plan import read_film_plan
from pneumo_dist.run import Run, RunFolder
from pneumo_dist.runtime import history
from pneumo_dist.runtime.files import read_json


@dataclass(frozen=True)
class Progress:
    """How much of a job is done, in words, as a share and in seconds still to go where that is known."""

    text: str
    share: float
    left_s: float | None = None

    def __str__(self) -> str:
        return self.text + (f", {duration(self.left_s)} left" if self.left_s else "")


def duration(seconds: float) -> str:
    """Return a time span for people."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def of(run: Run, node: Node, since: float = 0.0) -> Progress | None:
    """Return how far a job is, None where nothing tells.

    Args:
        since: when the job was submitted (epoch seconds): the rate of an array is that of its own files.
    """
    try:
        if node.stage in TRAIN_STAGES:
            return _training(run, node)
        if node.stage == "preprocess":
            return _shards(run, since)
        if node.stage == "infer":
            return _parts(run.infer_dir, since)
    except (OSError, ValueError, KeyError, ConfigError):  # being written, or of another version
        return None
    return None


def epochs(run: RunFolder, node: Node) -> list[dict[str, Any]]:
    """Return the rows of a training's metrics.jsonl; [] where there are none."""
    if node.stage not in TRAIN_STAGES:
        return []
    try:
        return history.read(run.metrics(node.stage, node.fold))
    except (OSError, ValueError):
        return []


def _training(run: Run, node: Node) -> Progress | None:
    folder = run.dir_of(node.stage, node.fold)
    rows = epochs(run, node)
    row = rows[-1] if rows else None
    live = folder / history.LIVE
    if live.exists() and (row is None or live.stat().st_mtime > run.metrics(node.stage, node.fold).stat().st_mtime):
        row = read_json(live)
    if row is None:
        return None
    text = f"epoch {row['epoch']}/{row['epochs']}, step {row['step']}/{row['steps']}"
    share, speed = row["step"] / row["steps"], row["images_per_s"]
    if not speed:
        return Progress(text, share)
    images = (row["steps"] - row["step"]) * run.config.train_stage(node.stage).batch_size
    return Progress(f"{text}, {speed:.1f} images/s", share, images / speed)


def _shards(run: Run, since: float) -> Progress | None:
    """Count the films of whole shards; the others are about as large."""
    folder = run.shard_dir
    found = sorted(folder.glob(size_name(run.config.sizes[-1], 0, 0).replace("00000", "*")))
    if not found:
        return None
    names = [path.stem.split("-") for path in found]  # size-256-00003-of-00016
    count = int(names[0][4])
    films = []
    for path, name in zip(found, names, strict=True):
        size = int(name[1])
        pixels = (folder / image_name(size, int(name[2]), count)).stat().st_size - HEADER_BYTES
        films.append((path.stat().st_mtime, pixels // size**2))
    done = sum(n for _, n in films)
    total = round(done / len(films) * count)
    about = "" if len(films) == count else "about "
    return _films(films, done, total, since, f"{done} of {about}{total} films (shard {len(films)} of {count})")


def _parts(folder: Path, since: float) -> Progress | None:
    plan = read_film_plan(folder)
    if plan is None:
        return None
    found = [path for path in (folder / "parts").glob("part-*") if path.is_dir()]
    films = [(path.stat().st_mtime, len(plan.part(int(path.name[5:])))) for path in found]
    done, total = sum(n for _, n in films), len(plan.films)
    return _films(films, done, total, since, f"{done} of {total} films (part {len(films)} of {plan.parts})")


def _films(films: Iterable[tuple[float, int]], done: int, total: int, since: float, text: str) -> Progress:
    """Add rate and time left, from the moments at which this submission's files came to be."""
    own = sorted(entry for entry in films if entry[0] > since)
    span = own[-1][0] - own[0][0] if own else 0.0
    share = done / max(total, 1)
    if span <= 0 or done >= total:
        return Progress(text, share)
    rate = sum(n for _, n in own[1:]) / span
    silent = time.time() - own[-1][0]  # what is under way has been so for a while
    return Progress(f"{text}, {rate:.3g} films/s", share, max((total - done) / rate - silent, 1.0))
