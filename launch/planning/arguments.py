"""The command line of submit.py, parsed into a checked `Request`. Standard library only, so that --help is instant.

Never reads a file or a configuration: plan.py does.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from launch.planning.parser import Parser, UsageError

STAGE_NAMES = ("preprocess", "1", "2", "swa", "evaluate", "infer", "all")

EXAMPLES = """\
examples:
  python launch/submit.py --stage 1 --nodes 2
      no data given: synthetic phantom films; runs the missing earlier stages first
  python launch/submit.py --stage all --nodes 2 --run chest --profile configs/cluster/gpu.yaml \\
      data.dicom_dir=/data/dicom-images-train data.rle_csv=/data/train-rle.csv infer.dir=/data/dicom-images-test
      the whole chain as dependent SLURM jobs
  python launch/submit.py --stage all --run chest --nodes 2
      continue the run: finished stages are skipped
  python launch/submit.py --stage infer --run chest infer.dir=/data/new infer.outputs=csv,masks,overlays
  python launch/submit.py --stage 1 --nodes 4 --gpus-per-node 4 --run chest --dry-run
      print the sbatch scripts, write nothing

exit status: 0 done or submitted, 1 a job failed or could not be submitted, 2 the request must be corrected,
130 Ctrl-C (state is saved)
All configuration keys with default and meaning: python -m pneumo_dist.config; recipes: configs/*.yaml
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line, checked as far as that is possible without reading a file."""

    stage: str
    nodes: int | None = None  # None: as in the last submission, else 1
    gpus_per_node: int | None = None
    cluster: str = "auto"
    profile: str | None = None
    config: str | None = None
    run: str | None = None
    folds: tuple[int, ...] | None = None
    after: str | None = None
    redo: bool = False
    verify: bool = False
    dry_run: bool = False
    wait: bool = False
    overrides: tuple[str, ...] = ()

    def sets(self, *prefixes: str) -> bool:
        """Tell whether a `key=value` argument sets a key that starts with one of `prefixes`."""
        return any(override.strip().startswith(prefixes) for override in self.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/submit.py",
        description="Run one stage, or the whole chain, on SLURM or on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stage", required=True, choices=STAGE_NAMES, help="stage to run; all: every stage of the recipe")
    add("--nodes", type=int, metavar="N", help="nodes, or tasks of an array stage (default: as last time, else 1)")
    add(
        "--gpus-per-node",
        type=int,
        metavar="G",
        help="GPUs, and ranks, per node (default: as last time, else the profile's value, else 1 if the partition has "
        "GPUs)",
    )
    add(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="auto (default): SLURM if a controller answers, else this machine",
    )
    add(
        "--profile",
        metavar="YAML",
        help="cluster profile: a file, or a name in configs/cluster/ (default: as last time, else default.yaml if it "
        "exists)",
    )
    add(
        "--config",
        metavar="YAML",
        help="recipe: a file, or a name in configs/ (default: the config.yaml of the run, else configs/paper.yaml)",
    )
    add("--run", metavar="NAME", help="name of the run (default: the file name of the recipe)")
    add("--folds", metavar="K[,K...]", help="folds to train, also 0-4 (default 0); their scores are pooled")
    add("--after", metavar="JOBID", help="start after these SLURM jobs have succeeded")
    add("--redo", action="store_true", help="rename the old result of the stage and run it again")
    add("--verify", action="store_true", help="with --stage preprocess: check the shards against their hashes")
    add("--dry-run", action="store_true", help="print the SLURM scripts, or the jobs on this machine; write nothing")
    add("--wait", action="store_true", help="follow the SLURM jobs and exit with their result")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings over those of the recipe; commas separate list items",
    )
    return parser


def _folds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UsageError(f"--folds {text!r} is not a list of fold numbers such as 0,1,2 or 0-4")
    ranges = [part.split("-") for part in text.split(",")]
    folds = tuple(fold for ends in ranges for fold in range(int(ends[0]), int(ends[-1]) + 1))
    if not folds:
        raise UsageError(f"--folds {text} names no fold: the first number must be the smaller one")
    if len(set(folds)) < len(folds):
        raise UsageError(f"--folds {text} names a fold twice")
    return folds


def parse(arguments: list[str]) -> Request:
    """Return the checked request.

    Raises:
        UsageError: one line that names the wrong argument. `--help` prints and exits 0.
    """
    options = _parser().parse_intermixed_args(arguments)
    for override in options.overrides:
        if "=" not in override:
            raise UsageError(f"{override!r} is neither an option nor key=value (for example stage1.epochs=10)")
    if options.nodes is not None and options.nodes < 1:
        raise UsageError(f"--nodes {options.nodes} must be at least 1")
    if options.gpus_per_node is not None and options.gpus_per_node < 0:
        raise UsageError(f"--gpus-per-node {options.gpus_per_node} must not be negative (0: CPU only)")
    if options.run is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", options.run):
        raise UsageError(f"--run {options.run!r} must be a name of letters, digits, '.', '_' and '-'")
    if options.after is not None and not re.fullmatch(r"\d+(_\d+)?([,:]\d+(_\d+)?)*", options.after):
        raise UsageError(f"--after {options.after!r} is not a SLURM job id such as 12345, or several as 12,13")
    if options.verify and options.stage != "preprocess":
        raise UsageError("--verify needs --stage preprocess: it checks the shards")
    if options.verify and (options.redo or options.dry_run):
        raise UsageError("--verify only reads: it cannot be combined with --redo or --dry-run")
    if options.after is not None and options.cluster == "local":
        raise UsageError("--after waits for a SLURM job: it cannot be combined with --cluster local")
    values = vars(options) | {
        "folds": None if options.folds is None else _folds(options.folds),
        "overrides": tuple(options.overrides),
        "after": options.after.replace(",", ":") if options.after else None,
    }
    return Request(**values)
