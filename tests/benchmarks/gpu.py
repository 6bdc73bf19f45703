"""Every figure that needs a GPU, in phases of a few minutes, for machines that are lent for ten minutes a command.

    python -m tests.benchmarks gpu --phase facts,step256 --out DIR      # the phases and their minutes: --phase list
    python -m tests.benchmarks gpu --merge DIR                          # on any machine: DIR/*.json into RESULTS.md

Each phase writes DIR/<phase>.json as soon as it is done, so that a stopped command loses one phase. --small walks a phase
with tiny cases, on a CPU as well: it shows that the phase runs, not how fast a GPU is. The peer's rows are left out
where segmentation_models_pytorch is not installed. Without a network, packages travel as wheels:
`pip download --no-deps --only-binary=:all: --python-version 3.12 -d WHEELS NAME==VERSION` here,
`pip install --no-index --no-deps --target SITE WHEELS/*.whl` there, then PYTHONPATH=SITE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.frame import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")
BEGIN, END = "<!-- measured on a GPU: begin -->", "<!-- measured on a GPU: end -->"
LIMIT_S = 540


@dataclass(frozen=True)
class Phase:
    """A benchmark with its words; `small` are the words that walk it in seconds."""

    minutes: float  # expected on one H100
    benchmark: str
    words: str
    small: str


SMALL_STEP = "--larger= --rounds 1 --steps 1 --amp bf16"
PHASES = {
    "facts": Phase(2, "gpu_facts", "", "--small"),
    "step256": Phase(5, "step", "--parts schedule --cases 256x64 --larger= --rounds 5", f"--parts schedule --cases 32x4 {SMALL_STEP}"),
    "step512": Phase(6, "step", "--parts schedule --cases 512x16 --larger= --rounds 5", f"--parts schedule --cases 64x2 {SMALL_STEP}"),
    "larger": Phase(8, "step", "--parts schedule --cases 256x128 --larger 256x256,512x32,512x64 --amp bf16 --rounds 3", f"--parts schedule --cases 32x8 {SMALL_STEP}"),
    "options": Phase(4, "step", "--parts options --rounds 5", "--parts options --cases 32x4 --rounds 1 --steps 1"),
    "stages": Phase(8, "gpu_stages", "", "--small"),
    "infer": Phase(5, "infer", "--count 192 --batch 32", "--count 4 --size 64 --batch 2 --rounds 1"),
    "checkpoint": Phase(2, "checkpoint", "", "--rounds 1"),
    "ranks": Phase(5, "ddp", "--parts scaling,options --cases 256x64 --rounds 3", "--parts scaling --cases 32x4 --rounds 1"),
}  # fmt: skip


def run(name: str, out: Path, device: str, small: bool) -> bool:
    """Run one phase in a process of its own; its tables are in `out`/<name>.json afterwards."""
    phase = PHASES[name]
    out.mkdir(parents=True, exist_ok=True)
    words = (phase.small if small else phase.words).split()
    command = [sys.executable, "-m", f"tests.benchmarks.{phase.benchmark}", "--device", device]
    print(f"\n## {name}: {phase.benchmark} {' '.join(words)}", flush=True)
    try:
        done = subprocess.run([*command, "--json", str(out / f"{name}.json"), *words], cwd=ROOT, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {LIMIT_S} s", file=sys.stderr)
        return False
    return done.returncode == 0


def section(folder: Path) -> str:
    """Return the phases measured in `folder` as markdown, each with its machine."""
    lines = []
    for name in PHASES:
        path = folder / f"{name}.json"
        if not path.exists():
            lines += [f"Phase `{name}`: not measured.", ""]
            continue
        found = json.loads(path.read_text())
        about = ", ".join(f"{key} {value}" for key, value in (found["machine"] | found["versions"]).items())
        lines += [f"Phase `{name}`: {about}.", ""]
        for table in found["tables"]:
            lines += [Table(**table).markdown().replace("### ", "#### "), ""]
    return "\n".join(lines)


def merge(folder: Path, results: Path) -> None:
    """Write the phases measured in `folder` between the two marks of `results`.

    Raises:
        SystemExit: nothing was measured, or the marks are missing.
    """
    text = results.read_text(encoding="utf-8")
    if not any((folder / f"{name}.json").exists() for name in PHASES):
        sys.exit(f"error: {folder} holds no phase's .json; known phases: {', '.join(PHASES)}")
    if BEGIN not in text or END not in text:
        sys.exit(f"error: {results} lacks the lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    results.write_text(f"{before}{BEGIN}\n\n{section(folder)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    """Run phases, or merge what they wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", default="list", help="one or more of " + ", ".join(PHASES) + "; all; list")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR")
    parser.add_argument(
        "--merge", type=Path, metavar="DIR", help="write DIR/*.json into RESULTS.md and measure nothing"
    )
    parser.add_argument("--small", action="store_true", help="tiny cases, to see that a phase runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    asked = parser.parse_args()
    if asked.merge:
        merge(asked.merge, RESULTS)
        return 0
    if asked.phase == "list":
        for name, phase in PHASES.items():
            print(f"{name:12} {phase.minutes:3.0f} min   {phase.benchmark} {phase.words}")
        return 0
    names = list(PHASES) if asked.phase == "all" else asked.phase.split(",")
    if unknown := [name for name in names if name not in PHASES]:
        parser.error(f"no phase {', '.join(unknown)}; known: {', '.join(PHASES)}")
    if asked.device == "cpu" and not asked.small:
        parser.error("--device cpu walks the phases only: add --small")
    failed = [name for name in names if not run(name, asked.out.absolute(), asked.device, asked.small)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
