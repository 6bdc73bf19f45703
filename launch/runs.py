"""Look after runs: `python launch/runs.py list`, status, logs, cancel, tensorboard, validate, score; `--help`.

Changes nothing, except that `cancel` cancels. Any Python starts this file (launch/bootstrap.py).
"""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    # `launch` is a package of the repository: its folder must not stand on the import path by itself.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from launch import bootstrap

if TYPE_CHECKING:
    from pneumo_dist.run import Run, RunFolder

EXAMPLES = """\
examples:
  python launch/runs.py list
  python launch/runs.py status chest              what runs, what waits, what failed and why
  python launch/runs.py logs chest 2 -f           follow stage 2's first rank
  python launch/runs.py logs chest 1 --fold 3 --rank 5
  python launch/runs.py cancel chest              every live SLURM job of the run
  python launch/runs.py tensorboard chest         on localhost, with the ssh line for a login node
  python launch/runs.py validate submission.csv --against /data/dicom-images-test
  python launch/runs.py score submission.csv --truth /data/train-rle.csv

RUN is a name in the run root (--run-root, default runs/ beside launch/), or the path of a run directory.
"""


class UsageError(Exception):
    """A mistake on the command line: one line, exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help shows examples)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch/runs.py",
        description="Look after runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = _Parser(add_help=False)
    shared.add_argument("--run-root", default=os.path.join(bootstrap.ROOT, "runs"), help="folder that holds the runs")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    commands.add_parser("list", parents=[shared], help="the runs that there are")
    status = commands.add_parser("status", parents=[shared], help="one table for the chain of a run")
    status.add_argument("run")
    logs = commands.add_parser("logs", parents=[shared], help="print a job's log")
    logs.add_argument("run")
    logs.add_argument("stage", nargs="?", help="preprocess, 1, 2, swa, evaluate, infer (default: the newest)")
    logs.add_argument("--fold", type=int)
    logs.add_argument("--rank", type=int, default=0, help="rank, or element of an array (default 0)")
    logs.set_defaults(family=False)
    logs.add_argument("-f", "--follow", action="store_true", help="go on showing what is appended")
    cancel = commands.add_parser("cancel", parents=[shared], help="cancel the live SLURM jobs of a run")
    cancel.add_argument("run")
    cancel.add_argument("stage", nargs="?")
    cancel.set_defaults(family=True)
    board = commands.add_parser("tensorboard", parents=[shared], help="show a run's events on localhost")
    board.add_argument("run")
    board.add_argument("--port", type=int, default=6006)
    validate = commands.add_parser("validate", help="check the form of a submission")
    validate.add_argument("submission")
    validate.add_argument("--against", required=True, metavar="DIR_OR_CSV", help="the films, or a csv with their ids")
    score = commands.add_parser("score", help="score a submission")
    score.add_argument("submission")
    score.add_argument("--truth", required=True, metavar="RLE.csv")
    score.add_argument("--patients", metavar="MAP.csv", help="ImageId,PatientKey: intervals by patient")
    return parser


def _folder(options: argparse.Namespace) -> RunFolder:
    from pneumo_dist.run import RunFolder

    named = RunFolder(Path(options.run).expanduser().absolute())
    if os.sep in options.run or named.config_file.is_file():
        return named
    return RunFolder(Path(options.run_root).expanduser().absolute() / options.run)


def _run(options: argparse.Namespace) -> Run:
    from pneumo_dist.run import Run

    return Run.load(_folder(options).folder)


def _list(found: argparse.Namespace) -> int:
    from launch.monitor.status import ask, collect
    from pneumo_dist.config import ConfigError
    from pneumo_dist.run import Run, RunFolder

    root = Path(found.run_root).expanduser().absolute()
    runs = [RunFolder(path.parent) for path in sorted(root.glob("*/config.yaml"))]
    if not runs:
        print(f"{root}: no runs yet: python launch/submit.py --stage 1 --nodes 2 makes one")
    asked = ask(runs)  # once for all: accounting is slow to answer
    for run in runs:
        try:
            rows, _ = collect(Run.load(run.folder), asked)
        except ConfigError as error:
            print(f"{run.name:24} {error}")
            continue
        count = sum(row.state == "done" for row in rows)
        now = next((row for row in rows if row.failed or row.active), None) or next(
            (row for row in rows if row.state not in ("done", "-")), None
        )
        words = [now.node.key, now.state, str(now.progress or "") if now.active else ""] if now else []
        print(f"{run.name:24} {f'{count}/{len(rows)} done':12}  {' '.join(filter(None, words))}".rstrip())
    if asked[1]:
        print(f"\n{asked[1]}")
    return 0


def _status(found: argparse.Namespace) -> int:
    from launch.monitor.outcome import outcome_text
    from launch.monitor.status import collect, folds_of
    from launch.monitor.table import heading, table, trouble
    from launch.state.ledger import Ledger
    from pneumo_dist.run import Run

    run = _run(found)
    rows, note = collect(run)
    entries = Ledger(run).entries()
    newest = Run.of_job(run.folder, "merge")  # names the folder that was inferred last
    outcome = outcome_text(newest, tuple(folds_of(run, entries)))
    parts = [heading(run, entries), table(rows), note, trouble(rows), outcome.strip("\n")]
    print("\n\n".join(filter(None, parts)))
    return 0


def _entries(found: argparse.Namespace) -> list:  # type: ignore[type-arg]
    """Return the run's submissions of the named stage, oldest first."""
    from launch.planning.plan import command_stage
    from launch.state.ledger import Ledger
    from pneumo_dist.config import ConfigError

    run = _run(found)
    entries = [e for e in Ledger(run).entries() if e.event == "submitted"]
    stage = found.stage
    mine = [e for e in entries if getattr(found, "fold", None) in (None, e.fold)]
    if not found.family:  # `logs preprocess` means the array itself, when there is one
        chosen = [e for e in mine if stage in (None, e.stage, e.key)]
    if found.family or not chosen:
        chosen = [e for e in mine if stage in (None, e.key, command_stage(e.stage))]
    if not chosen:
        known = ", ".join(dict.fromkeys(e.key for e in entries)) or "nothing"
        raise ConfigError(f"{run.name}: no job of {stage or 'any stage'} has been submitted; there is: {known}")
    return chosen


def _newest(entries: list) -> list:  # type: ignore[type-arg]
    """Return the jobs of the newest submission, newest first: an earlier one of the same job ends it."""
    found: dict = {}  # type: ignore[type-arg]
    for entry in reversed(entries):
        if entry.key in found:
            break
        found[entry.key] = entry
    return list(found.values())


def _logs(found: argparse.Namespace) -> int:
    from launch.monitor.status import logs_of
    from pneumo_dist.config import ConfigError

    run = _run(found)
    while True:
        entries = _entries(found)
        looked_at = _newest(entries) if found.follow else reversed(entries)
        entry = next((e for e in looked_at if logs_of(run, e)), None)
        if entry or not found.follow:
            break
        time.sleep(2)  # the job has not started yet
    if entry is None:
        raise ConfigError(f"{run.name}: no log yet: the job has not started (python launch/runs.py status {run.name})")
    logs = logs_of(run, entry)
    if not 0 <= found.rank < len(logs):
        raise ConfigError(f"--rank {found.rank}: {entry.key} has logs 0 to {len(logs) - 1}")
    path = logs[found.rank]
    print(f"==> {path} <==", file=sys.stderr)
    with open(path, "rb") as log:
        while True:
            new = log.read(1 << 16)
            if new:
                sys.stdout.buffer.write(new)
                sys.stdout.flush()
            elif not found.follow:
                return 0
            else:
                time.sleep(0.5)


def _cancel(found: argparse.Namespace) -> int:
    from launch.state import slurm_client as slurm
    from launch.state.ledger import Ledger
    from launch.state.locks import holder
    from pneumo_dist.config import ConfigError

    run = _run(found)
    keys = {e.key for e in _entries(found)}
    try:
        live = Ledger(run).live(keys)
        slurm.cancel(live.values())
    except slurm.SlurmError as error:
        raise ConfigError(f"SLURM does not answer ({error}): nothing has been cancelled") from None
    for key, job_id in live.items():
        print(f"{key}: job {job_id} cancelled")
    if live and found.stage:
        print("jobs that wait for it are cancelled with it")
    local = {held for key in keys if (held := holder(run.lock(key)))}
    for held in sorted(local):
        print(f"{held} runs jobs of this run in the foreground: stop it there with Ctrl-C")
    if not live and not local:
        print("nothing is waiting or running")
    return 0


def _tensorboard(found: argparse.Namespace) -> int:
    from pneumo_dist.config import ConfigError

    run = _folder(found)
    if not run.folder.is_dir():
        raise ConfigError(f"{run.folder}: no such run: python launch/runs.py list shows what there is")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", found.port)) == 0:
            raise ConfigError(f"port {found.port} is taken: choose another one with --port")
    names = (socket.getfqdn(), socket.gethostname())
    host = next((name for name in names if not name.startswith("localhost")), names[1])
    print(f"http://localhost:{found.port}/")
    print(
        f"from your own machine: ssh -L {found.port}:localhost:{found.port} {getpass.getuser()}@{host}",
        flush=True,
    )
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(run.folder),
        "--host",
        "localhost",
        "--port",
        str(found.port),
    ]
    os.execv(sys.executable, command)


def _validate(found: argparse.Namespace) -> int:
    from pneumo_dist.inference.outputs import validate_submission

    problems = validate_submission(Path(found.submission), Path(found.against))
    for problem in problems:
        print(problem)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print(f"{found.submission}: {count}" if problems else f"{found.submission}: valid")
    return 1 if problems else 0


def _score(found: argparse.Namespace) -> int:
    from pneumo_dist.inference.outputs import score_submission

    patients = Path(found.patients) if found.patients else None
    result = score_submission(Path(found.submission), Path(found.truth), patients)
    print(f"{result['films']} films, {result['positive']} with pneumothorax, {result['called_positive']} called so")
    names = ("dice", "dice_all_empty", "dice_positive", "iou", "iou_positive", "sensitivity", "specificity", "auc")
    for name in names:
        span = result["intervals"].get(name)
        value = "-" if result[name] is None else f"{result[name]:.4f}"
        print(
            f"{name:16}{value:>8}"
            + (f"   95 % by {result['intervals_by']} {span[0]:.4f} to {span[1]:.4f}" if span else "")
        )
    for row in result["by_mask_size"]:
        if row["films"]:
            size = f"{row['from_px']:,} px" + (f" to {row['below_px']:,}" if row["below_px"] else " and more")
            print(f"dice {row['dice']:.4f} on {row['films']} films with a mask of {size} (of 1024x1024)")
    for name in ("films_without_truth", "truth_without_answer"):
        if result[name]:
            print(f"{result[name]} {name.replace('_', ' ')}: not scored")
    print(f"auc from the {result['auc_from']}")
    return 0


COMMANDS = {
    "list": _list, "status": _status, "logs": _logs, "cancel": _cancel, "tensorboard": _tensorboard,
    "validate": _validate, "score": _score,
}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Do what the command line asks and return the exit status."""
    try:
        found = _parser().parse_args(words)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if words is None:
        bootstrap.ensure()
    from pneumo_dist.config import ConfigError

    try:
        return COMMANDS[found.command](found)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        return 130


if __name__ == "__main__":
    sys.exit(main())
