"""What `runs.py list` and `runs.py status` print: a line for each run, or the whole state of one. Only reads."""

from __future__ import annotations

from pathlib import Path

from launch.monitor.outcome import outcome_text
from launch.monitor.status import SlurmAnswer, folds_of, job_rows, query_slurm
from launch.monitor.table import heading, table, trouble
from launch.state.ledger import Ledger
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run, RunFolder


def print_runs(root: Path) -> None:
    """Print a line for each run in a folder: how many jobs are done, and the first one that is not."""
    runs = [RunFolder(path.parent) for path in sorted(root.glob("*/config.yaml"))]
    if not runs:
        print(f"{root}: no runs yet: start one with python launch/submit.py --stage 1 --nodes 2")
    answer = query_slurm(runs)  # once for all runs, because accounting is slow
    for run in runs:
        try:
            print(_run_line(Run.load(run.folder), answer))
        except ConfigError as error:
            print(f"{run.name:24} {error}")
    if answer.note:
        print(f"\n{answer.note}")


def _run_line(run: Run, answer: SlurmAnswer) -> str:
    rows = job_rows(run, answer)
    done = sum(row.state == "done" for row in rows)
    # A failed or running job says more than one that waits.
    current = next((row for row in rows if row.failed or row.active), None) or next(
        (row for row in rows if row.state not in ("done", "-")), None
    )
    cells = [current.node.key, current.state, str(current.progress or "") if current.active else ""] if current else []
    return f"{run.name:24} {f'{done}/{len(rows)} done':12}  {' '.join(filter(None, cells))}".rstrip()


def print_status(run: Run) -> None:
    """Print the table of a run's jobs, what to do about failed ones, its scores and its files."""
    entries = Ledger(run).entries()
    answer = query_slurm([run])
    rows = job_rows(run, answer)
    inferred = Run.of_job(run.folder, "merge")  # its configuration names the folder of the last inference
    outcome = outcome_text(inferred, folds_of(run, entries))
    parts = [heading(run, entries), table(rows), answer.note, trouble(rows), outcome.strip("\n")]
    print("\n\n".join(filter(None, parts)))
