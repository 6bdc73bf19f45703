"""The progress of a job, read from the files that it writes: training steps, films of an array. Never waits."""

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
    """The progress of a job: as text, as a share between 0 and 1, and the estimated seconds left if known."""

    text: str
    share: float
    left_s: float | None = None

    def __str__(self) -> str:
        return self.text + (f", {duration(self.left_s)} left" if self.left_s else "")


def duration(seconds: float) -> str:
    """Return a time span as text: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def of(run: Run, node: Node, since: float = 0.0) -> Progress | None:
    """Return the progress of a job, or None if it has written nothing yet.

    Args:
        since: time of submission (epoch seconds): older files do not count for the rate of an array.
    """
    try:
        if node.stage in TRAIN_STAGES:
            return _training(run, node)
        if node.stage == "preprocess":
            return _shards(run, since)
        if node.stage == "infer":
            return _parts(run.infer_dir, since)
    except (OSError, ValueError, KeyError, ConfigError):  # a file is being written, or another version wrote it
        return None
    return None


def epochs(run: RunFolder, node: Node) -> list[dict[str, Any]]:
    """Return the rows of a training's metrics.jsonl; [] without one."""
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
    """Count the films of finished shards; estimate the total, since all shards are about as large."""
    folder = run.shard_dir
    markers = sorted(folder.glob(size_name(run.config.sizes[-1], 0, 0).replace("00000", "*")))
    if not markers:
        return None
    names = [path.stem.split("-") for path in markers]  # size-256-00003-of-00016
    count = int(names[0][4])
    films = []
    for path, name in zip(markers, names, strict=True):
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
    parts = [path for path in (folder / "parts").glob("part-*") if path.is_dir()]
    films = [(path.stat().st_mtime, len(plan.part(int(path.name[5:])))) for path in parts]
    done, total = sum(n for _, n in films), len(plan.films)
    return _films(films, done, total, since, f"{done} of {total} films (part {len(films)} of {plan.parts})")


def _films(films: Iterable[tuple[float, int]], done: int, total: int, since: float, text: str) -> Progress:
    """Add rate and time left, from the modification times of the files of this submission."""
    recent = sorted(entry for entry in films if entry[0] > since)
    span = recent[-1][0] - recent[0][0] if recent else 0.0
    share = done / max(total, 1)
    if span <= 0 or done >= total:
        return Progress(text, share)
    rate = sum(n for _, n in recent[1:]) / span
    elapsed = time.time() - recent[-1][0]  # time already spent on the unfinished files
    return Progress(f"{text}, {rate:.3g} films/s", share, max((total - done) / rate - elapsed, 1.0))
