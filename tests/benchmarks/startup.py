"""From a typed command to the first optimizer step, split; and what --help and --dry-run take.

    python -m tests.benchmarks startup [--size 64] [--rounds 7]

Nothing of the product is changed for it: a `sitecustomize` on PYTHONPATH notes when an interpreter starts, when it
begins to import torch and when it opens the list of cases and the TensorBoard file; the first step is the time of the
first point in that file. Parts by these marks; a training start is repeated with `--redo` on shards that are there.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import frame
from tests.benchmarks.environment import ROOT
from tests.benchmarks.frame import Table

SPY = """
import json, os, sys, time

seen = set()

def note(mark):
    if mark not in seen:
        seen.add(mark)
        with open(os.environ["STARTUP_MARKS"], "a") as file:
            file.write(json.dumps([time.time(), " ".join(sys.orig_argv), mark]) + "\\n")

def hook(event, arguments):
    if event == "import" and arguments[0] == "torch":
        note("torch")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        name = os.path.basename(os.fsdecode(arguments[0]))
        if name == "cases.csv" or name.startswith("events.out"):
            note(name[:6])

note("start")
sys.addaudithook(hook)
"""
PARTS = (
    "command: arguments, plan, copy of the code",
    "worker: its start, until it imports torch",
    "worker: imports",
    "worker: cases, network, a warm-up step",
    "worker: loader's start, first step",
)


def command(*words: str) -> list[str]:
    """Return a submit.py command of this checkout."""
    return [sys.executable, str(ROOT / "launch" / "submit.py"), *words]


def seconds(words: list[str], folder: Path) -> float:
    """Run a command to its end; return how long it took."""
    begin = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def first_point(folder: Path) -> float:
    """Return the time of the first training point in the TensorBoard events of `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Scalars("train/lr")[0].wall_time


def split(folder: Path, run: list[str]) -> list[float]:
    """Train once and return the seconds of PARTS."""
    marks = folder / "marks"
    marks.unlink(missing_ok=True)
    environ = os.environ | {"PYTHONPATH": str(folder / "spy"), "STARTUP_MARKS": str(marks)}
    typed = time.time()
    done = subprocess.run(run, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(run)} failed:\n{done.stdout}")
    worker = {}
    for line in marks.read_text().splitlines():
        when, program, mark = json.loads(line)
        if "pneumo_dist.stages" in program:
            worker.setdefault(mark, when)
    events = folder / "runs" / "start" / "fold0" / "stage1" / "tensorboard"
    times = [typed, worker["start"], worker["torch"], worker["cases."], worker["events"], first_point(events)]
    return [b - a for a, b in itertools.pairwise(times)]


def training_start(folder: Path, size: int, rounds: int) -> Table:
    """Return the split of the time from the command to the first step."""
    (folder / "spy").mkdir()
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    words = [
        "--cluster", "local", "--run", "start", "phantom.films=16", "phantom.size=256", "data.shards=2", "data.folds=2",
        "model.pretrained=none", "stages=1", f"stage1.size={size}", "stage1.epochs=1", "stage1.batch_size=4",
        "train.log_every=1", "swa.stages=1", f"run_root={folder / 'runs'}",
    ]  # fmt: skip
    subprocess.run(
        command("--stage", "preprocess", *words), cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr
    )
    run = command("--stage", "1", "--redo", *words)
    split(folder, run)  # files come from the disk, modules are compiled
    found = [split(folder, run) for _ in range(rounds)]
    table = Table(
        f"From `submit.py --stage 1` to the first step, one process, {size} px, batch 4",
        ["", "s (median)", "lowest", "highest"],
    )
    for name, values in [*zip(PARTS, zip(*found, strict=True), strict=True), ("in all", [sum(f) for f in found])]:
        table.rows.append([name, statistics.median(values), min(values), max(values)])
    return table


def short_commands(folder: Path, rounds: int) -> Table:
    """Return the times of what must answer at once, beside what Python and torch take by themselves."""
    commands = {
        "submit.py --help": command("--help"),
        "submit.py --stage all --dry-run": command("--stage", "all", "--nodes", "2", "--dry-run"),
        "submit.py --stage 1 --dry-run key=value": command("--stage", "1", "--dry-run", "stage1.epochs=3"),
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }
    for words in commands.values():
        seconds(words, folder)
    turns = {name: lambda words=words: seconds(words, folder) for name, words in commands.items()}
    base = "python -c 'import torch'"
    title = "Commands that answer at once"
    return frame.speed_table(title, "s", frame.in_turns(turns, rounds), base, "of importing torch", invert=True)


def main() -> int:
    """Measure and print."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--size", type=int, default=64, help="image side of the training")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = [short_commands(folder, asked.rounds), training_start(folder, asked.size, asked.rounds)]
    return frame.report(tables, asked)


if __name__ == "__main__":
    sys.exit(main())
