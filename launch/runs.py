"""The command for existing runs: `python launch/runs.py list`, status, logs, cancel, ...; `--help` shows examples.

Only `cancel` changes anything. Any Python starts this file (launch/bootstrap.py), so each command imports what it
needs after the arguments have been read.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # `launch` is a package of the repository, so the import path needs the folder above in place of this one.
    sys.path[0] = str(Path(os.path.abspath(__file__)).parents[1])

from launch import bootstrap
from launch.planning.parser import Parser, UsageError

if TYPE_CHECKING:
    from pneumo_dist.run import Run, RunFolder

EXAMPLES = """\
examples:
  python launch/runs.py list
  python launch/runs.py status chest              the state of every job, and the error of each failed one
  python launch/runs.py wait chest                follow its SLURM jobs again, as submit.py --wait does
  python launch/runs.py logs chest 2 -f           follow the log of stage 2's first rank
  python launch/runs.py logs chest 1 --fold 3 --rank 5
  python launch/runs.py cancel chest              all waiting and running SLURM jobs of the run
  python launch/runs.py tensorboard chest         on 127.0.0.1; prints the ssh command for remote access
  python launch/runs.py validate submission.csv --against /data/dicom-images-test
  python launch/runs.py score submission.csv --truth /data/train-rle.csv

RUN is the name of a run in the run root (--run-root, default runs/ beside launch/), or the path of a run directory.

exit status: 0 success, 1 a job failed or the submission is not valid, 2 a mistake to correct, 130 Ctrl-C
"""


def _parser() -> Parser:
    parser = Parser(
        prog="launch/runs.py",
        description="List, monitor and cancel runs; validate and score submissions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = Parser(add_help=False)
    root = bootstrap.ROOT / "runs"
    shared.add_argument("--run-root", default=str(root), help="folder that holds the runs (default runs/)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands.add_parser("list", parents=[shared], help="list all runs")
    status = commands.add_parser("status", parents=[shared], help="show the jobs of a run as a table")
    status.add_argument("run")
    waits = commands.add_parser("wait", parents=[shared], help="follow the SLURM jobs of a run until they have ended")
    waits.add_argument("run")
    logs = commands.add_parser("logs", parents=[shared], help="print the log of a job")
    logs.add_argument("run")
    logs.add_argument("stage", nargs="?", help="preprocess, 1, 2, swa, evaluate, infer (default: the newest job)")
    logs.add_argument("--fold", type=int, help="fold (default: the newest job)")
    logs.add_argument("--rank", type=int, default=0, help="rank, or task of an array (default 0)")
    logs.add_argument("-f", "--follow", action="store_true", help="keep printing new lines")
    cancel = commands.add_parser("cancel", parents=[shared], help="cancel the SLURM jobs of a run")
    cancel.add_argument("run")
    cancel.add_argument("stage", nargs="?", help="preprocess, 1, 2, swa, evaluate, infer (default: all)")
    tensorboard = commands.add_parser("tensorboard", parents=[shared], help="start TensorBoard for a run on 127.0.0.1")
    tensorboard.add_argument("run")
    tensorboard.add_argument("--port", type=int, default=6006, help="port to listen on (default 6006; 0: any)")
    validate = commands.add_parser("validate", help="check the format of a submission")
    validate.add_argument("submission")
    validate.add_argument(
        "--against", required=True, metavar="DIR_OR_CSV", help="folder of the films, or a csv file with their ids"
    )
    score = commands.add_parser("score", help="score a submission against annotations")
    score.add_argument("submission")
    score.add_argument("--truth", required=True, metavar="RLE.csv", help="annotations as run-length encoded masks")
    score.add_argument(
        "--rle", choices=("siim", "absolute", "absolute0"), help="offsets in RLE.csv (data.rle; default siim)"
    )
    score.add_argument("--patients", metavar="MAP.csv", help="ImageId,PatientKey: intervals by patient, not by film")
    return parser


def _folder(options: argparse.Namespace) -> RunFolder:
    """Return the folder that RUN names: a path, else a name in the run root."""
    from pneumo_dist.run import RunFolder

    folder = RunFolder(Path(options.run).expanduser().absolute())
    if os.sep in options.run or folder.config_file.is_file():
        return folder
    return RunFolder(Path(options.run_root).expanduser().absolute() / options.run)


def _run(options: argparse.Namespace) -> Run:
    from pneumo_dist.run import Run

    return Run.load(_folder(options).folder)


def _list(options: argparse.Namespace) -> int:
    from launch.monitor.overview import print_runs

    print_runs(Path(options.run_root).expanduser().absolute())
    return 0


def _status(options: argparse.Namespace) -> int:
    from launch.monitor.overview import print_status

    print_status(_run(options))
    return 0


def _wait(options: argparse.Namespace) -> int:
    from launch.backends.follow import wait

    return wait(_run(options))


def _logs(options: argparse.Namespace) -> int:
    from launch.monitor.logs import print_log

    print_log(_folder(options).existing(), options.stage, options.fold, options.rank, follow=options.follow)
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from launch.backends.cancel import cancel_jobs

    cancel_jobs(_folder(options).existing(), options.stage)
    return 0


def _tensorboard(options: argparse.Namespace) -> int:
    from launch.monitor.tensorboard import start_tensorboard

    start_tensorboard(_folder(options), options.port)
    return 0


def _validate(options: argparse.Namespace) -> int:
    from launch.monitor.scores import print_validation

    return 0 if print_validation(Path(options.submission), Path(options.against)) else 1


def _score(options: argparse.Namespace) -> int:
    from launch.monitor.scores import print_scores

    patients = Path(options.patients) if options.patients else None
    print_scores(Path(options.submission), Path(options.truth), patients, options.rle)
    return 0


COMMANDS = {
    "list": _list,
    "status": _status,
    "wait": _wait,
    "logs": _logs,
    "cancel": _cancel,
    "tensorboard": _tensorboard,
    "validate": _validate,
    "score": _score,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit status."""
    try:
        options = _parser().parse_args(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments is None:  # typed by a person, under whatever Python it was
        bootstrap.ensure()
    from launch.monitor.display import plain_output
    from pneumo_dist.config import ConfigError

    with plain_output():
        try:
            return COMMANDS[options.command](options)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or the reader has gone, for example `| head`
            return 130


if __name__ == "__main__":
    sys.exit(main())
