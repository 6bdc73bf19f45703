"""The training step beside what people would use instead, and every option of it alone.

    python -m tests.benchmarks step [--parts speed,memory,options,arithmetic] [--cases 256x4,128x8]
    python -m tests.benchmarks step --device cuda      # on a GPU machine: the paper's stages, larger batches, options

speed: images a second in turns of one process. memory: the peak of separate processes, in turns. options: one option
the other way, in turns. arithmetic: bf16 and compile() through the configuration, in separate processes, in turns.
schedule: the paper's stages in bf16 and fp16 beside a plain loop with autocast, and the time of the whole schedule.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from tests.benchmarks import frame, whole_schedule
from tests.benchmarks.contestants import LOOPS, OURS, Case, Ours, Run, wait
from tests.benchmarks.frame import Table
from tests.benchmarks.nnunet import nnunet_loop
from tests.benchmarks.variants import ALONE, BASE, step_of

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"cpu": "speed,memory,options,arithmetic", "cuda": "schedule,options"}
CASES = {"cpu": "256x4,128x8", "cuda": whole_schedule.STAGES}
MAKERS = LOOPS | {"nnU-Net's own network and train_step": nnunet_loop}
CHILD_LIMIT_S = 300
WORDS = {
    "float32, eager": ("train.amp=off",),
    "bf16": ("train.amp=bf16",),
    "compile": ("train.amp=off", "train.compile=true"),
    "bf16 and compile": ("train.amp=bf16", "train.compile=true"),
}


def cases(text: str, device: str) -> list[Case]:
    """Read "256x4,128x8"; the empty text is no case."""
    pairs = [case.split("x") for case in text.split(",") if case]
    return [Case(int(size), int(batch), device=device) for size, batch in pairs]


def speed(case: Case, rounds: int, steps: int) -> Table:
    """Measure all loops in turns of this process."""
    runs = {name: make(case) for name, make in MAKERS.items()}
    table = _rates(f"Training step: {case}", case, runs, rounds, steps, OURS, "ours over it")
    reached = table.rows[0][1] * whole_schedule.operations(case.size)
    peak = whole_schedule.peak_operations(case.dtype or torch.float32, case.device)
    table.notes.append(
        f"ours computes {reached / 1e9:.0f} GFLOP/s in convolutions, {reached / peak:.2f} of a large matrix product here"
    )
    return table


def options(case: Case, rounds: int, steps: int) -> Table:
    """Measure each option alone in turns of this process."""
    runs: dict[str, Run] = {"the step that training uses": Ours(case), "the same loop taken apart": step_of(BASE, case)}
    runs |= {name: step_of(variant, case) for name, variant in ALONE.items()}
    title = f"Options of the step, each alone: {case}"
    return _rates(title, case, runs, rounds, steps, "the same loop taken apart", "base over it")


def _rates(title: str, case: Case, runs: dict[str, Run], rounds: int, steps: int, base: str, ratio: str) -> Table:
    for run in runs.values():
        run(1)
    turns = {name: lambda run=run: case.batch * steps / run(steps) for name, run in runs.items()}
    return frame.speed_table(title, "images/s", frame.in_turns(turns, rounds), base, ratio)


def memory(case: Case, rounds: int) -> Table:
    """Measure the peak memory of each loop in a process of its own."""
    runs = {name: lambda name=name: _child("memory", name, case) for name in MAKERS}
    found = frame.in_turns(runs, rounds)
    table = Table(f"Peak memory: {case}", ["", "MB above the imports (median)", "peak MB (median)", "ours over it"])
    above = {name: [v["peak_mb"] - v["imports_mb"] for v in values] for name, values in found.items()}
    for name, values in found.items():
        peak = statistics.median(v["peak_mb"] for v in values)
        table.rows.append([name, statistics.median(above[name]), peak, frame.ratio(above[OURS], above[name])])
    return table


def arithmetic(case: Case, rounds: int) -> Table:
    """Measure the options that the configuration has, each in processes of its own."""
    runs = {name: lambda name=name: _child("arithmetic", name, case) for name in WORDS}
    found = frame.in_turns(runs, rounds)
    table = Table(
        f"Arithmetic and compilation through the configuration: {case}",
        ["", "images/s (median)", "over eager float32", "first step s", "peak MB"],
    )
    base = [v["images_s"] for v in found["float32, eager"]]
    for name, values in found.items():
        rates = [v["images_s"] for v in values]
        first, peak = (statistics.median(v[key] for v in values) for key in ("first_s", "peak_mb"))
        table.rows.append([name, statistics.median(rates), frame.ratio(rates, base), first, peak])
    return table


def _child(what: str, name: str, case: Case) -> dict[str, float]:
    """Run one contestant in a fresh process and return what it measured."""
    command = [sys.executable, "-m", "tests.benchmarks.step", "--child", what, "--name", name]
    command += ["--cases", f"{case.size}x{case.batch}", "--device", case.device]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=CHILD_LIMIT_S)
    return json.loads(done.stdout.splitlines()[-1])


def child(options: argparse.Namespace) -> int:
    """Be the fresh process: print one line of JSON."""
    case = cases(options.cases, options.device)[0]
    begin = time.perf_counter()
    if options.child == "memory":
        MAKERS[options.name](Case(32, 2, device=case.device))(1)  # imports, threads, the libraries' own start
        imports = frame.settled_memory_mb()
        MAKERS[options.name](case)(4)
        print(json.dumps({"imports_mb": imports, "peak_mb": frame.peak_memory_mb()}))
        return 0
    run = Ours(case, None, *WORDS[options.name])
    with run.settings():
        run.step()
        wait(case.device)
    first = time.perf_counter() - begin
    seconds = [run(1) for _ in range(4)]
    rate = case.batch / statistics.median(seconds)
    print(json.dumps({"images_s": rate, "first_s": first, "peak_mb": frame.peak_memory_mb()}))
    return 0


def main() -> int:
    """Measure what the command line asks for."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--parts", help=f"default: {PARTS['cpu']}; on a GPU {PARTS['cuda']}")
    parser.add_argument("--cases", help=f"SIZExBATCH, ... (default: {CASES['cpu']}; on a GPU {CASES['cuda']})")
    parser.add_argument("--larger", default=whole_schedule.LARGER, help="more cases of the schedule part")
    parser.add_argument("--amp", default="bf16,fp16", help="arithmetic of the schedule part")
    parser.add_argument("--steps", type=int, help="steps in a turn (default: 2, on a GPU 20)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(frame.cores())
    if asked.child:
        return child(asked)
    device, parts, tables = asked.device, (asked.parts or PARTS[asked.device]).split(","), []
    steps = asked.steps or (20 if device == "cuda" else 2)
    wanted = cases(asked.cases or CASES[device], device)
    for case in wanted:
        if "speed" in parts:
            tables.append(speed(case, asked.rounds, steps))
        if "memory" in parts:
            tables.append(memory(case, 3))
        if "options" in parts:
            tables.append(options(case if device == "cpu" else replace(case, amp="bf16"), asked.rounds, steps))
        if "arithmetic" in parts:
            tables.append(arithmetic(case, 2))
    if "schedule" in parts:
        larger = cases(asked.larger, device)
        tables += whole_schedule.tables(wanted, larger, asked.amp.split(","), asked.rounds, steps)
    return frame.report(tables, asked, {"gpu": torch.cuda.get_device_name()} if device == "cuda" else None)


if __name__ == "__main__":
    sys.exit(main())
