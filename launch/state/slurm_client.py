"""Queries to SLURM: availability, partitions, states of jobs; and `cancel`, the only function that changes anything.

Every call has a time limit, since SLURM's clients hang if the controller is dead. Standard library only.
"""

from __future__ import annotations

import dataclasses
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from launch.state import environment

LIVE = (
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED",
    "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "RESV_DEL_HOLD",
)  # fmt: skip


class SlurmError(RuntimeError):
    """SLURM does not answer, or refuses: one line."""


def _run(command: list[str], timeout_s: float = 20.0) -> str:
    environ = {**environment.passed(), "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, env=environ, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {timeout_s:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        message = lines[0].split("error: ")[-1] if lines else f"exit status {done.returncode}"
        raise SlurmError(f"{command[0]}: {message}")
    return done.stdout


def unavailable_reason() -> str | None:
    """Return why SLURM cannot be used from this machine, or None if it can."""
    if shutil.which("sbatch") is None:
        return "no sbatch on PATH"
    try:
        answer = _run(["scontrol", "ping"], 5.0)
    except SlurmError as error:
        return f"sbatch is installed, but no controller answers ({error})"
    if not re.search(r"\bis UP\b", answer):
        return "sbatch is installed, but no controller is up (scontrol ping)"
    return None


@dataclass(frozen=True)
class Partition:
    """The size of a partition; cpus, memory and gpus are those of its smallest node."""

    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    max_minutes: int | None  # None: no limit


def minutes(text: str) -> int | None:
    """Parse SLURM's time notation ([days-]hours:minutes:seconds and shorter forms); None for no limit.

    >>> minutes("1-02:00:00"), minutes("30:00"), minutes("infinite")
    (1560, 30, None)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        return None
    days, first, second, _seconds = (int(g) if g else 0 for g in match.groups())
    if match[1] is not None:
        return days * 1440 + first * 60 + second
    return first * 60 + second if match[4] is not None else first  # one or two numbers: minutes[:seconds]


def partition(name: str | None) -> Partition | None:
    """Return the named partition (None: the default one), or None if SLURM does not answer or does not know it."""
    try:
        text = _run(["sinfo", "-h", "-o", "%P|%D|%c|%m|%G|%l", *(["-p", name] if name else [])], 5.0)
    except SlurmError:
        return None
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 5]
    rows = [row for row in rows if name or row[0].endswith("*")]
    if not rows:
        return None

    def least(column: int) -> int:
        return min(int(match[0]) if (match := re.match(r"\d+", row[column].strip())) else 0 for row in rows)

    def gpus(text: str) -> int:
        return sum(int(n) for n in re.findall(r"gpu(?::[A-Za-z_][\w.-]*)?:(\d+)", text))

    limits = [m for row in rows if (m := minutes(row[5])) is not None]
    return Partition(
        sum(int(row[1]) for row in rows),
        least(2),
        least(3),
        min(gpus(row[4]) for row in rows),
        min(limits) if limits else None,
    )


def largest_array() -> int | None:
    """Return how many tasks an array may have, or None if SLURM does not answer."""
    try:
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"], 5.0), re.MULTILINE)
    except SlurmError:
        return None
    return int(match[1]) if match else None


@dataclass(frozen=True)
class JobState:
    """One job, or one task of an array, as SLURM reports it."""

    job_id: str  # "12" or, for an array task, "12_3"
    name: str
    state: str
    reason: str = ""  # why it waits, its exit code, or who cancelled it
    nodes: str = ""
    restarts: int = 0
    previous_state: str = ""  # the end of its previous run if it was requeued: PREEMPTED, NODE_FAIL, REQUEUED

    @property
    def parent(self) -> str:
        """The id without the array task."""
        return self.job_id.split("_")[0]

    @property
    def live(self) -> bool:
        """Whether the job is pending or running."""
        return self.state in LIVE


# Columns of squeue, wide enough to truncate nothing. Fixed widths, since a job name may contain any separator.
COLUMNS = {
    "JobArrayID": 40, "Name": 250, "State": 30, "Reason": 80, "NodeList": 600, "RestartCnt": 12, "exit_code": 12,
}  # fmt: skip


def queued(job_ids: Iterable[str]) -> list[JobState]:
    """Return the jobs (by parent id) that the controller still knows; one entry for each array task.

    Raises:
        SlurmError: the controller does not answer.
    """
    wanted = sorted({i.split("_")[0] for i in job_ids}, key=int)
    if not wanted:
        return []
    columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    try:
        text = _run(["squeue", "-h", "-r", "--states=all", "-O", columns, "-j", ",".join(wanted)])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [_queued(line) for line in text.splitlines() if line.strip()]


def jobs_of_user() -> int | None:
    """Return how many jobs and array tasks of this user are queued or running, or None if SLURM does not answer."""
    try:
        return len(_run(["squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i"]).splitlines())
    except SlurmError:
        return None


def _queued(line: str) -> JobState:
    cells, start = [], 0
    for width in COLUMNS.values():
        cells.append(line[start : start + width].strip())
        start += width
    job_id, name, state, reason, nodes, restarts, status = cells
    if state == "FAILED" and status.isdigit():
        reason = f"exit {int(status) >> 8}:{int(status) & 127}"  # squeue gives wait()'s status
    elif state not in LIVE and not reason.startswith("Dependency"):  # squeue repeats why an ended job once waited
        reason = ""
    return JobState(job_id, name, state, "" if reason == "None" else reason, nodes, int(restarts or 0))


def accounted(job_ids: Iterable[str]) -> list[JobState]:
    """Return the jobs (by parent id) that the accounting database knows; [] without accounting."""
    wanted = sorted({i.split("_")[0] for i in job_ids}, key=int)
    if not wanted or shutil.which("sacct") is None:
        return []
    fields = "JobID,State%30,ExitCode,NodeList%600,JobName%250"  # the name last: it may contain |
    try:
        text = _run(["sacct", "-n", "-X", "-P", "-D", "-o", fields, "-j", ",".join(wanted)])
    except SlurmError:
        return []
    runs: dict[str, list[JobState]] = {}
    for line in text.splitlines():
        cells = line.split("|", 4)
        if len(cells) == 5 and "[" not in cells[0]:
            job_id, state_text, status, nodes, name = cells
            state, _, uid = (state_text or "UNKNOWN").partition(" by ")  # "CANCELLED by 0"
            reason = f"by {_user(uid)}" if uid else f"exit {status}" if status not in ("0:0", "") else ""
            nodes = "" if nodes == "None assigned" else nodes
            runs.setdefault(job_id, []).append(JobState(job_id, name, state, reason, nodes))
    return [_newest(all_runs) for all_runs in runs.values()]


def _newest(runs: list[JobState]) -> JobState:
    """Return the last run of a job with what is known of the earlier ones; sacct -D lists runs oldest first."""
    previous = runs[-2].state if len(runs) > 1 else ""
    return dataclasses.replace(runs[-1], restarts=len(runs) - 1, previous_state=previous)


def _user(uid: str) -> str:
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (KeyError, ValueError):
        return f"user {uid}"


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return the newest state of every job and array task; the controller overrides accounting.

    Raises:
        SlurmError: the controller does not answer.
    """
    wanted = list(job_ids)
    rows = {row.job_id: row for row in accounted(wanted)}
    for row in queued(wanted):
        recorded = rows.get(row.job_id)
        if recorded:
            # Accounting lags behind: its last run may be the one that the controller has just requeued.
            requeued = recorded.restarts < row.restarts and not recorded.live
            previous = recorded.state if requeued else recorded.previous_state
            # Accounting alone knows who cancelled a job.
            reason = recorded.reason if recorded.state == row.state and not row.live else ""
            row = dataclasses.replace(row, reason=row.reason or reason, previous_state=previous)
        rows[row.job_id] = row
    return rows


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs; jobs that have already ended are ignored.

    Raises:
        SlurmError: the controller does not answer.
    """
    wanted = list(job_ids)
    if wanted:
        try:
            _run(["scancel", *wanted])
        except SlurmError as error:
            if "Invalid job id" not in str(error) and "already completed" not in str(error):
                raise
