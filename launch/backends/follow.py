"""`--wait`: follow submitted jobs until they have ended, and return their result. Never cancels a job."""

from __future__ import annotations

import sys
import time

from launch.monitor.display import Display
from launch.monitor.outcome import print_result
from launch.monitor.status import job_rows, query_slurm
from launch.monitor.table import trouble
from launch.planning.plan import Plan
from launch.state import progress
from launch.state import slurm_client as slurm
from pneumo_dist import done
from pneumo_dist.chain import closing

POLL_S = (2.0, 10.0)  # first and longest pause between two queries
SETTLE_S = 20.0  # how long a shared file system may take to show the last DONE.json


def _state(rows: list[slurm.JobState]) -> str:
    """Return the state of a job, or of all tasks of an array, as text."""
    names = sorted({row.state for row in rows}, key=lambda name: (name not in slurm.LIVE, name))
    live = [row for row in rows if row.live]
    text = "+".join(names) if names else "ENDED"
    if live and live[0].state == "PENDING" and live[0].reason:
        text += f" ({live[0].reason})"
    elif live and live[0].nodes:
        text += f" on {' '.join(dict.fromkeys(row.nodes for row in live if row.nodes))}"
    return text


def follow(plan: Plan, submitted: dict[str, str]) -> int:
    """Print every change of state until all jobs have ended; return 0 (all done), 1 (not all), 130 (Ctrl-C)."""
    display = Display()
    began = time.time()
    pause, idle_queries, reported_error = POLL_S[0], 0, False
    shown: dict[str, str] = {}
    try:
        while idle_queries < 2:  # one query may miss a job that is being requeued
            time.sleep(pause)
            pause = min(POLL_S[1], pause * 1.2)
            try:
                rows = slurm.queued(submitted.values())
            except slurm.SlurmError as error:
                if not reported_error:
                    display.say(f"{error}: waiting for SLURM to answer again")
                reported_error = True
                continue
            reported_error = False
            running = {}
            for node in plan.todo:
                job_id = submitted[node.key]
                tasks = [row for row in rows if row.parent == job_id]
                state = _state(tasks)
                if shown.get(node.key) != state:
                    shown[node.key] = state
                    display.say(f"{time.strftime('%H:%M:%S')} {node.key:18} {job_id:>8} {state}")
                if any(row.state == "RUNNING" for row in tasks):
                    running[node.key] = progress.of(plan.run, node, began)
            display.progress({key: (now.share, str(now)) for key, now in running.items() if now})
            idle_queries = 0 if any(row.live for row in rows) else idle_queries + 1
    except KeyboardInterrupt:
        display.close()  # before the next lines: it would erase them
        print(
            f"\nno longer waiting; the jobs continue (python launch/runs.py cancel {plan.runs_argument} cancels them)",
            file=sys.stderr,
        )
        return 130
    finally:
        display.close()
    return _result(plan, submitted)


def _result(plan: Plan, submitted: dict[str, str]) -> int:
    """Print the result, or why a job failed, and return the exit status."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        undone = [node for node in plan.todo if done.differences(plan.run, closing(node.stage), node.fold) != []]
        if not undone:
            print_result(plan)
            return 0
        try:
            states = slurm.states(submitted.values())
        except slurm.SlurmError:
            states = {}
        completed = all(row.state == "COMPLETED" for row in states.values())
        if not completed or time.monotonic() > deadline:
            break
        time.sleep(1)
    answer = query_slurm([plan.run])
    failures = trouble([row for row in job_rows(plan.run, answer) if row.node.key in submitted])
    print(f"error: {failures or answer.note or f'{undone[-1].key} ended without a result'}", file=sys.stderr)
    return 1
