"""Every benchmark by one command, each in processes of its own.

    python -m tests.benchmarks [step|ddp|loader|preprocess|infer|checkpoint|startup|all] [--device cpu|cuda] [--json OUT]
    python -m tests.benchmarks real_films --dicom-dir DIR --csv FILE --patients FILE --work DIR [--weights FILE]
    python -m tests.benchmarks gpu --phase NAME,... | --merge DIR       # in phases of minutes, for a machine with a GPU

Further words go to the benchmark itself: `python -m tests.benchmarks step --help`. Those that have peers run under
`.venv-benchmarks`, which is made on first use (environment.py). What was measured stands in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.environment import ROOT, peers_python

WITH_PEERS = {"step": True, "ddp": False, "loader": True, "preprocess": False, "infer": False, "checkpoint": False, "startup": False}  # fmt: skip
NEEDS_FILMS = {"real_films": False}  # not part of "all"


def main() -> int:
    """Run the benchmarks asked for, one after the other, and gather their JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="?", choices=[*WITH_PEERS, *NEEDS_FILMS, "all"], default="all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every table there")
    if len(sys.argv) > 2 and {"-h", "--help"} & set(sys.argv[2:]) and sys.argv[1] in WITH_PEERS | NEEDS_FILMS:
        return subprocess.run([sys.executable, "-m", f"tests.benchmarks.{sys.argv[1]}", "--help"], cwd=ROOT).returncode
    if sys.argv[1:2] == ["gpu"]:  # its phases write one file each
        return subprocess.run([sys.executable, "-m", "tests.benchmarks.gpu", *sys.argv[2:]], cwd=ROOT).returncode
    asked, further = parser.parse_known_args()
    names = list(WITH_PEERS) if asked.benchmark == "all" else [asked.benchmark]
    if further and len(names) > 1:
        parser.error(f"{' '.join(further)}: name one benchmark for words of its own")
    environ = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if asked.device == "cpu" else {})
    found, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"\n## {name}", flush=True)
            out = Path(folder) / f"{name}.json"
            python = peers_python() if (WITH_PEERS | NEEDS_FILMS)[name] else sys.executable
            command = [python, "-m", f"tests.benchmarks.{name}", "--device", asked.device, "--json", str(out), *further]
            if subprocess.run(command, cwd=ROOT, env=environ).returncode:
                failed.append(name)
            else:
                found[name] = json.loads(out.read_text())
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
