"""The command line of submit.py: words to a checked `Request`. Standard library only, so that --help is instant.

Never looks at a file or a configuration: that is plan.py's business.
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
      without data: synthetic phantom films, missing upstream first
  python launch/submit.py --stage all --nodes 2 --run chest --profile configs/cluster/gpu.yaml \\
      data.dicom_dir=/data/dicom-images-train data.rle_csv=/data/train-rle.csv infer.dir=/data/dicom-images-test
      the whole chain as dependent SLURM jobs
  python launch/submit.py --stage all --run chest --nodes 2
      continue: what is done is left alone
  python launch/submit.py --stage infer --run chest infer.dir=/data/new infer.outputs=csv,masks,overlays
  python launch/submit.py --stage 1 --nodes 4 --gpus-per-node 4 --run chest --dry-run
      print the sbatch scripts, write nothing

exit status: 0 done or submitted, 1 a job failed, 2 something to correct first, 130 Ctrl-C (state is saved)
Every key of the configuration, with default and meaning: python -m pneumo_dist.config; recipes: configs/*.yaml
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, checked as far as that is possible without looking at anything."""

    stage: str
    nodes: int = 1
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

    def names(self, *prefixes: str) -> bool:
        """Tell whether a `key=value` word sets a key that starts with one of `prefixes`."""
        return any(word.strip().startswith(prefixes) for word in self.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/submit.py",
        description="Submit one stage, or the whole chain, to SLURM or run it on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stage", required=True, choices=STAGE_NAMES, help="what to run; all: the chain that the recipe lists")
    add("--nodes", type=int, default=1, metavar="N", help="nodes, or elements of an array stage (default 1)")
    add(
        "--gpus-per-node",
        type=int,
        metavar="G",
        help="GPUs and ranks per node (default: the profile's, else 1 where there are any)",
    )
    add(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="auto: SLURM where a controller answers, else this machine",
    )
    add(
        "--profile",
        metavar="YAML",
        help="cluster profile, a file or a name in configs/cluster/ (default there: default.yaml)",
    )
    add("--config", metavar="YAML", help="recipe (default: the run's own, else configs/paper.yaml)")
    add("--run", metavar="NAME", help="name of the run (default: the recipe's file name)")
    add("--folds", metavar="K[,K...]", help="folds to train (default 0); several are pooled")
    add("--after", metavar="JOBID", help="start after these SLURM jobs have succeeded")
    add("--redo", action="store_true", help="put the stage's old result aside and run it again")
    add("--verify", action="store_true", help="with --stage preprocess: hash the shards in place again")
    add("--dry-run", action="store_true", help="print the SLURM scripts and write nothing")
    add("--wait", action="store_true", help="follow the SLURM jobs and exit with their result")
    add("overrides", nargs="*", metavar="key=value", help="settings over the recipe; lists take commas")
    return parser


def _folds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UsageError(f"--folds {text!r} is not a list of fold numbers such as 0,1,2")
    folds = tuple(int(word) for word in text.split(","))
    if len(set(folds)) < len(folds):
        raise UsageError(f"--folds {text} names a fold twice")
    return folds


def parse(words: list[str]) -> Request:
    """Return the checked request.

    Raises:
        UsageError: one line naming the word. `--help` prints and exits 0 as usual.
    """
    found = _parser().parse_intermixed_args(words)
    for word in found.overrides:
        if "=" not in word:
            raise UsageError(f"{word!r} is neither an option nor key=value (for example stage1.epochs=10)")
    if found.nodes < 1:
        raise UsageError(f"--nodes {found.nodes} must be at least 1")
    if found.gpus_per_node is not None and found.gpus_per_node < 0:
        raise UsageError(f"--gpus-per-node {found.gpus_per_node} must not be negative (0: CPU only)")
    if found.run is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", found.run):
        raise UsageError(f"--run {found.run!r} must be a plain name of letters, digits, '.', '_' and '-'")
    if found.after is not None and not re.fullmatch(r"\d+(_\d+)?([,:]\d+(_\d+)?)*", found.after):
        raise UsageError(f"--after {found.after!r} is not a SLURM job id such as 12345, or several as 12,13")
    if found.verify and found.stage != "preprocess":
        raise UsageError("--verify goes with --stage preprocess: it hashes the shards again")
    if found.verify and (found.redo or found.dry_run):
        raise UsageError("--verify only reads: it does not go with --redo or --dry-run")
    if found.after is not None and found.cluster == "local":
        raise UsageError("--after waits for a SLURM job: it does not go with --cluster local")
    values = vars(found) | {
        "folds": None if found.folds is None else _folds(found.folds),
        "overrides": tuple(found.overrides),
        "after": found.after.replace(",", ":") if found.after else None,
    }
    return Request(**values)
