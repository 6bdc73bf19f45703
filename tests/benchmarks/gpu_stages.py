"""Whole training stages on a device, with their data path and validation; and the paper's schedule carried from them.

    python -m tests.benchmarks gpu_stages --device cuda [--films 640] [--cases 256x64,512x16] [--epochs 4]

Phantom films, the ordinary stages of a run: shards, sampler, augmentation, step, validation. Films on the device, then
the loader's workers. Images a second are those of the last epoch.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pneumo_dist import config as configuration
from pneumo_dist.runtime import history
from pneumo_dist.stages import run_stage
from pneumo_dist.training import trainer
from tests.benchmarks import frame
from tests.benchmarks.contestants import Case
from tests.benchmarks.frame import Table
from tests.benchmarks.step import cases
from tests.benchmarks.whole_schedule import EPOCHS, FILMS

VALIDATION_FILMS = 1_200  # a fold of the paper's films
WAYS = {"films on the device": "on", "workers": "off"}


def words(films: int, stages: list[Case], amp: str, epochs: int) -> list[str]:
    """Return the settings of both ways."""
    found = [
        f"phantom.films={films}", f"phantom.size={max(case.size for case in stages)}", "data.folds=5", "data.shards=4",
        "model.pretrained=none", f"train.amp={amp}", f"train.eval_every={epochs}",
    ]  # fmt: skip
    for number, case in enumerate(stages, 1):
        stage = {"size": case.size, "batch_size": case.batch, "epochs": epochs}
        found += [f"stage{number}.{key}={value}" for key, value in stage.items()]
    return found


def new_run(run_dir: Path, settings: list[str]) -> Path:
    """Make the folder of a run with its configuration."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(configuration.to_yaml(configuration.load(None, settings)))
    return run_dir


def stage_of(run_dir: Path, number: int) -> tuple[float, float, float]:
    """Train one stage; return images/s of its last epoch, its share of waiting, and ms of validation a film."""
    took: list[float] = []

    def timed(validate: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = validate(*arguments)
            took.append((time.perf_counter() - begin) / len(arguments[2]))
            return result

        return call

    with mock.patch.object(trainer, "validate", timed(trainer.validate)):
        run_stage(str(number), run_dir, 0)
    last = history.read(run_dir / "fold0" / f"stage{number}" / "metrics.jsonl")[-1]
    return last["images_per_s"], last["wait_share"], 1000 * took[-1]


def table(folder: Path, settings: list[str], stages: list[Case]) -> Table:
    """Train every stage in both ways, one after the other."""
    data = new_run(folder / "data", settings)
    for stage in ("phantom", "preprocess", "finalize"):
        run_stage(stage, data)
    numbers = range(1, len(stages) + 1)
    columns = [
        "",
        *(f"stage {i} images/s" for i in numbers),
        "waiting %",
        "validation ms a film",
        "paper's schedule, min",
    ]
    found = Table(f"Whole stages: {'; '.join(str(case) for case in stages)}", columns)
    for way, key in WAYS.items():
        run_dir = new_run(folder / key, [*settings, f"data.shard_dir={data / 'shards'}", f"data.on_device={key}"])
        rows = [stage_of(run_dir, i) for i in numbers]
        seconds = sum(
            epochs * (FILMS / rate + VALIDATION_FILMS * ms / 1000)
            for epochs, (rate, _, ms) in zip(EPOCHS, rows, strict=True)
        )
        waiting, validation = ("/".join(f"{v:.2g}" for v in values) for values in zip(*((100 * r[1], r[2]) for r in rows), strict=True))  # fmt: skip
        found.rows.append([way, *(row[0] for row in rows), waiting, validation, seconds / 60])
    found.notes.append(
        f"the schedule is carried from these epochs to {EPOCHS[0]} and {EPOCHS[1]} epochs of {FILMS} films, with a "
        f"validation of {VALIDATION_FILMS} films after each"
    )
    return found


def main() -> int:
    """Measure what the command line asks for."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--cases", default="256x64,512x16", help="SIZExBATCH of stage 1 and of stage 2")
    parser.add_argument("--films", type=int, default=640, help="phantom films, a fifth of them for validation")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--small", action="store_true", help="tiny cases, to see that it runs")
    asked = parser.parse_args()
    if asked.small:
        asked.cases, asked.films, asked.epochs = "32x4,64x2", 30, 1
    logging.disable(logging.WARNING)
    stages = [replace(case, amp=asked.amp) for case in cases(asked.cases, asked.device)]
    with tempfile.TemporaryDirectory() as name:
        settings = words(asked.films, stages, asked.amp, asked.epochs)
        found = table(Path(name), settings, stages)
    return frame.report([found], asked, {"gpu": torch.cuda.get_device_name()} if asked.device == "cuda" else None)


if __name__ == "__main__":
    sys.exit(main())
