"""Two gloo ranks against one, one thread each; where the time goes; each option of DDP alone; the model on paper.

    python -m tests.benchmarks ddp [--parts scaling,options,paper] [--cases 128x8,256x4,...] [--paper 256x64]

scaling: images a second of two ranks over twice those of one, and where their step goes: compute, waiting, exchange.
options: one option of DDP the other way, at the last case. All in turns. paper: step times on N nodes from steps measured here.
"""

from __future__ import annotations

import statistics
import sys

import torch

from pneumo_dist.model.unet import ResNet34UNet
from tests.benchmarks import frame, paper_model
from tests.benchmarks.contestants import Case, Ours
from tests.benchmarks.frame import Table
from tests.benchmarks.rank_work import Durations, rank_options, rank_turns
from tests.benchmarks.step import cases
from tests.dist.spawn import on_ranks

PARTS = "scaling,options,paper"


def scaling(case: Case, rounds: int, steps: int) -> list[Table]:
    """Measure one and two ranks in turns; return the efficiency and the split of the two-rank step."""
    turns: dict[str, list[list[Durations]]] = {"one": [], "whole": [], "two": []}
    whole = Case(case.size, 2 * case.batch)
    for turn in range(rounds):
        for name in list(turns)[:: -1 if turn % 2 else 1]:
            world_size, what = {"one": (1, case), "whole": (1, whole), "two": (2, case)}[name]
            turns[name].append(on_ranks(rank_turns, world_size, what, steps))
    one = [found[0]["step"][0] for found in turns["one"]]
    big = [found[0]["step"][0] for found in turns["whole"]]
    two = [max(rank["step"][0] for rank in found) for found in turns["two"]]
    table = Table(
        f"Scaling on one machine, gloo, one thread a rank: {case}",
        ["", "step s (median)", "images/s", "of twice one rank"],
    )
    pair = 2 * case.batch
    median = statistics.median
    quiet = [median(max(p) for p in zip(*(rank["alone"] for rank in ranks), strict=True)) for ranks in turns["two"]]
    table.rows = [
        [f"1 rank of {case.batch}", median(one), case.batch / median(one), None],
        [f"1 rank of {pair}", median(big), pair / median(big), None],
        [f"2 ranks of {case.batch}, over 1 rank of {case.batch}", median(two), pair / median(two), frame.ratio(one, two)],
        [f"2 ranks of {case.batch}, over 1 rank of {pair}", median(two), pair / median(two), frame.ratio(big, two) / 2],
        ["the same without any exchange: what two processes get here", median(quiet), pair / median(quiet), frame.ratio(one, quiet)],
    ]  # fmt: skip
    return [table, split(case, one, two, turns["two"])]


def split(case: Case, one: list[float], two: list[float], found: list[list[Durations]]) -> Table:
    """Split the two-rank step into compute, waiting for the slower rank, and exchange."""
    pairs = [pair for ranks in found for pair in zip(*(rank["alone"] for rank in ranks), strict=True)]
    compute = statistics.median(statistics.mean(pair) for pair in pairs)
    waiting = statistics.median(max(pair) - statistics.mean(pair) for pair in pairs)
    exchange = statistics.median(max(rank["exchange"]) for ranks in found for rank in ranks)
    step = statistics.median(two)
    table = Table(f"The step of two ranks: {case}", ["", "s", "share"])
    rest = step - compute - waiting
    table.rows = [
        ["compute (the same ranks under no_sync, mean of both)", compute, compute / step],
        ["waiting for the slower rank (slower - mean)", waiting, waiting / step],
        ["exchange that is not hidden (the rest)", rest, rest / step],
        ["whole step", step, 1.0],
    ]
    table.notes = [
        f"a rank that has the machine to itself computes its step in {statistics.median(one):.3g} s: beside another one "
        f"it takes {compute / statistics.median(one):.3f} of that, without any exchange",
        f"reducing the gradient alone, nothing beside it, takes {exchange:.3g} s",
    ]
    return table


def options(case: Case, rounds: int, steps: int) -> Table:
    """Measure each option of DDP alone on two ranks."""
    found = on_ranks(rank_options, 2, case, rounds, steps)
    slower = {name: [max(pair) for pair in zip(*(f[name] for f in found), strict=True)] for name in found[0]}
    title = f"Options of DDP, each alone: 2 ranks of {case.batch}, {case.size} px"
    return frame.speed_table(title, "step s", slower, "base", "over base", invert=True)


def paper(size: int, global_batch: int, device: str, steps: int) -> list[Table]:
    """Measure the step at two batch sizes on the whole of this machine and tell what N such nodes would do."""
    torch.set_num_threads(frame.cores())
    amp = "bf16" if device == "cuda" else "off"
    batches = (global_batch // 8, global_batch // 2) if device == "cuda" else (2, 6)
    runs = {n: Ours(Case(size, n, amp, device)) for n in batches}
    for run in runs.values():
        run(1)
    seconds = frame.in_turns({str(n): (lambda run=run: run(steps) / steps) for n, run in runs.items()}, 3)
    medians = tuple(statistics.median(seconds[str(n)]) for n in batches)
    gradient = 4.0 * sum(p.numel() for p in ResNet34UNet(0).parameters())
    step = paper_model.Step.through(batches, (medians[0], medians[1]), gradient)
    tables = [paper_model.table(step, global_batch, compression) for compression in (1, 2)]
    for table in tables:
        table.title += f" ({size} px, this {device.upper()})"
    return [*tables, paper_model.exchange_table(gradient)]


def main() -> int:
    """Measure what the command line asks for."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--parts", help=f"default: {PARTS}; on a GPU paper")
    parser.add_argument(
        "--cases", default="128x8,256x4,128x4", help="image side x images of a rank; options take the last"
    )
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--paper", default="256x64", help="image side x global batch of the model on paper")
    asked = parser.parse_args()
    parts = (asked.parts or {"cpu": PARTS, "cuda": "paper"}[asked.device]).split(",")
    wanted = cases(asked.cases, "cpu")
    tables: list[Table] = []
    if "scaling" in parts:
        for case in wanted:
            tables += scaling(case, asked.rounds, asked.steps)
    if "options" in parts:
        tables.append(options(wanted[-1], asked.rounds, asked.steps))
    if "paper" in parts:
        size, batch = map(int, asked.paper.split("x"))
        tables += paper(size, batch, asked.device, 2)
    return frame.report(tables, asked)


if __name__ == "__main__":
    sys.exit(main())
