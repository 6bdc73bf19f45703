"""`--wait`: follow submitted jobs until they have ended, and say how. Cancels nothing, whatever happens here."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launch import slurm
from launch.arguments import Request
from launch.outcome import last_error, tell
from launch.plan import Plan, closing
from launch.status import progress_text
from pneumo_dist import done

POLL_S = (2.0, 10.0)  # first and longest pause between two looks
SETTLE_S = 20.0  # how long a shared file system may take to show the last DONE.json


class _Display:
    """Prints what is new about each job; on a terminal the last line is written over while only its numbers change."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}
        self._open = ""  # key of the job whose line may be written over

    def show(self, key: str, job_id: str, state: str, progress: str) -> None:
        """Print a job's state and progress unless that is what was last said of it."""
        text = f"{state}, {progress}" if progress else state
        if self._told.get(key) == text:
            return
        again = self._open == key and self._told[key].split(",")[0] == state and sys.stdout.isatty()
        self._told[key], self._open = text, key
        line = f"{time.strftime('%H:%M:%S')} {key:18} {job_id:>8} {text}"
        print(f"\x1b[A\r\x1b[K{line}" if again else line, flush=True)


def _state(rows: list[slurm.JobState]) -> str:
    """Return a few words for a job, or for all elements of an array."""
    names = sorted({row.state for row in rows}, key=lambda name: (name not in slurm.LIVE, name))
    live = [row for row in rows if row.live]
    text = "+".join(names) if names else "ENDED"
    if live and live[0].state == "PENDING" and live[0].reason:
        text += f" ({live[0].reason})"
    elif live and live[0].nodes:
        text += f" on {' '.join(dict.fromkeys(row.nodes for row in live if row.nodes))}"
    return text


def follow(request: Request, made: Plan, submitted: dict[str, str]) -> int:
    """Print every change of the jobs until none is left, and return 0 when all of the plan is done, else 1."""
    display = _Display()
    pause, quiet_looks, complained = POLL_S[0], 0, False
    try:
        while quiet_looks < 2:  # a job that is being requeued may be missing from one look
            time.sleep(pause)
            pause = min(POLL_S[1], pause * 1.2)
            try:
                rows = slurm.queued(submitted.values())
            except slurm.SlurmError as error:
                if not complained:
                    print(f"{error}: waiting for SLURM to answer again", file=sys.stderr)
                complained = True
                continue
            complained = False
            for key, job_id in submitted.items():
                mine = [row for row in rows if row.parent == job_id]
                running = any(row.state == "RUNNING" for row in mine)
                more = progress_text(made.recipe.config, made.recipe.run_dir, key) if running else ""
                display.show(key, job_id, _state(mine), more)
            quiet_looks = 0 if any(row.live for row in rows) else quiet_looks + 1
    except KeyboardInterrupt:
        print(
            f"\nno longer waiting; the jobs go on (python launch/runs.py cancel {made.recipe.word} stops them)",
            file=sys.stderr,
        )
        return 130
    return _result(request, made, submitted)


def _result(request: Request, made: Plan, submitted: dict[str, str]) -> int:
    config, run_dir = made.recipe.config, made.recipe.run_dir
    deadline = time.monotonic() + SETTLE_S
    while True:
        undone = [node for node in made.todo if done.differences(config, run_dir, closing(node.stage), node.fold) != []]
        if not undone:
            tell(made, request.stage)
            return 0
        try:
            states = slurm.states(submitted.values())
        except slurm.SlurmError:
            states = {}
        ended_well = all(row.state == "COMPLETED" for row in states.values())
        if not ended_well or time.monotonic() > deadline:
            break
        time.sleep(1)
    for node in undone:
        job_id = submitted.get(node.key, "")
        mine = [row for row in states.values() if row.parent == job_id and row.state != "COMPLETED"]
        if mine or node is undone[-1]:
            worst = mine[0] if mine else None
            state = f"{worst.state} {worst.reason}".strip() if worst else "ended without a result"
            logs = _logs(run_dir, job_id)
            reason = next((text for path in logs if (text := last_error(path))), None)
            print(f"error: {node.key} (job {job_id}): {state}{f': {reason}' if reason else ''}", file=sys.stderr)
            if logs:
                print(f"its log: {logs[0]}; after correcting the cause, the same command continues", file=sys.stderr)
            break
    return 1


def _logs(run_dir: Path, job_id: str) -> list[Path]:
    """Return the logs of a job, newest first."""
    found = [*(run_dir / "jobs").glob(f"{job_id}_*_log.out")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
