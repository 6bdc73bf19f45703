"""How long a checkpoint holds up training: the real store and the real step, the file written while training goes on.

    python -m tests.benchmarks checkpoint [--case 128x8] [--steps 8] [--folder DIR] [--every 60]

Turns without and with a save at their start alternate, with the same number of steps. What a turn with a save takes
longer is all that the save costs: the copy, and what writing, hashing and fsync take from the steps beside them. Its
share of the time between two saves is how much slower the average step is.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from pneumo_dist.training.checkpoint import CheckpointStore
from tests.benchmarks import frame
from tests.benchmarks.contestants import Ours, wait
from tests.benchmarks.frame import Table
from tests.benchmarks.step import cases


def main() -> int:
    """Measure and print."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--case", default="128x8", help="image side x batch")
    parser.add_argument("--steps", type=int, default=8, help="steps in a turn; a write should end within them")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: the temporary folder)")
    parser.add_argument("--every", type=float, default=60, help="seconds between two saves")
    asked = parser.parse_args()
    torch.set_num_threads(frame.cores())
    (case,) = cases(asked.case, asked.device)
    ours = Ours(case)
    average = AveragedModel(ours.stepper.model)
    ours(2)
    copies, writes, steps = [], [], []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        store = CheckpointStore(Path(folder))

        def turn(save: bool) -> float:
            begin = time.perf_counter()
            if save:
                store.save(f"{len(copies):010d}", ours.stepper.state_dict() | {"average": average.state_dict()})
                copies.append(time.perf_counter() - begin)
            lengths = []
            for _ in range(asked.steps):
                start = time.perf_counter()
                ours.step()
                wait(case.device)
                lengths.append(time.perf_counter() - start)
            took = time.perf_counter() - begin
            if save:
                store.wait()
                writes.append(time.perf_counter() - begin)
            else:
                steps.extend(lengths)
            return took

        with ours.settings():
            found = frame.in_turns({"without": lambda: turn(False), "with": lambda: turn(True)}, asked.rounds)
        size = max(path.stat().st_size for path in Path(folder).glob("*.pt"))
    extra = [a - b for a, b in zip(found["with"], found["without"], strict=True)]
    median = statistics.median
    table = Table(f"A checkpoint of {size / 1e6:.0f} MB during training: {case}", ["", "median", "lowest", "highest"])
    table.rows = [
        ["step without a save, s", median(steps), min(steps), max(steps)],
        ["copy at the step boundary, s", median(copies), min(copies), max(copies)],
        ["from the save to the end of its write, s (at least a turn)", median(writes), min(writes), max(writes)],
        [f"a turn of {asked.steps} steps without a save, s", *(f(found["without"]) for f in (median, min, max))],
        [f"a turn of {asked.steps} steps with a save, s", *(f(found["with"]) for f in (median, min, max))],
        ["what a save costs in all, s", median(extra), min(extra), max(extra)],
        [f"stall of the average step at a save every {asked.every:g} s, %", *(100 * f(extra) / asked.every for f in (median, min, max))],
    ]  # fmt: skip
    if late := sum(w > t + 0.05 for w, t in zip(writes, found["with"], strict=True)):
        table.notes.append(f"{late} writes outlasted their turn, and the cost is more than this: raise --steps")
    return frame.report([table], asked)


if __name__ == "__main__":
    sys.exit(main())
