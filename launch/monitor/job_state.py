"""State and reason of one job, from SLURM's states of its tasks or from the lock of a local job. Only reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from launch.planning.plan import title
from launch.state.ledger import Entry
from launch.state.locks import process_name
from launch.state.slurm_client import JobState
from pneumo_dist import done
from pneumo_dist.chain import Node, closing
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run

# SLURM's words, and for jobs on this machine KILLED and INTERRUPTED. ENDED: no source knows how the job ended.
FAILED = (
    "FAILED",
    "TIMEOUT",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "BOOT_FAIL",
    "DEADLINE",
    "CANCELLED",
    "PREEMPTED",
    "REVOKED",
    "KILLED",
    "INTERRUPTED",
    "ENDED",
)
ACTIVE = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "RESIZING")


def is_done(run: Run, stage: str, fold: int | None) -> bool:
    """Tell whether a stage has its result; an array's is that of the job that merges it."""
    try:
        return done.read_done(run, closing(stage), fold) is not None
    except ConfigError:  # no folder to infer on, so no result
        return False


def combined_state(tasks: Sequence[JobState], elements: int) -> tuple[str, str]:
    """Return state and reason of a job; of an array the most important state, and how many tasks are done."""

    def rank(task: JobState) -> int:
        return 0 if task.state in ACTIVE else 1 if task.live else 3 if task.state == "COMPLETED" else 2

    first = min(tasks, key=rank)
    if elements < 2:
        return first.state, first.reason
    counts = Counter(task.state for task in tasks)
    completed = counts.pop("COMPLETED", 0)
    counts.pop(first.state if first.live else "", None)
    # One failure state alone needs no count: the row's state says it.
    others = [f"{n} {state}" for state, n in counts.items()] if completed or len(counts) > 1 or first.live else []
    share = [f"{completed} of {elements} done"] if completed else []
    return first.state, ", ".join([*share, *others, *([first.reason] if first.reason else [])])


def local_state(run: Run, node: Node, folds: int, last: Entry, lock_holder: str | None) -> tuple[str, str]:
    """Return state and reason of a job that last ran without SLURM, on this machine or another one.

    Args:
        last: the job's newest line in the ledger.
        lock_holder: the process that holds the job's lock now.
    """
    if lock_holder and lock_holder != process_name(last.job_id, last.host):
        # A later submit.py holds the locks of its whole plan from the start, and runs another job of it.
        return "PENDING", waits_for(run, node, folds, lock_holder)
    if lock_holder and last.event == "submitted":
        return "RUNNING", lock_holder
    if last.event == "submitted":
        return "KILLED", "submit.py was killed"
    if last.status == 0:
        return "COMPLETED", ""
    return ("INTERRUPTED" if last.status in (130, 143) else "FAILED"), f"exit {last.status}"


def waits_for(run: Run, node: Node, folds: int, lock_holder: str) -> str:
    """Return the reason of a job that waits in a chain on this machine: the stage before it, and the process."""
    undone = [job for job in node.after if not is_done(run, *job)]
    return f"waits for {title(*undone[-1], folds)}; {lock_holder}" if undone else f"waits; {lock_holder}"
