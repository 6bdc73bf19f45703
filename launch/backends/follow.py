"""`--wait`: follow submitted jobs until they have ended, and say how. Cancels nothing, whatever happens here."""

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

POLL_S = (2.0, 10.0)  # first and longest pause between two looks
SETTLE_S = 20.0  # how long a shared file system may take to show the last DONE.json


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


def follow(plan: Plan, submitted: dict[str, str]) -> int:
    """Print every change of the jobs until none is left, and return 0 when all of the plan is done, else 1."""
    display = Display()
    began = time.time()
    pause, quiet_looks, complained = POLL_S[0], 0, False
    told: dict[str, str] = {}
    try:
        while quiet_looks < 2:  # a job that is being requeued may be missing from one look
            time.sleep(pause)
            pause = min(POLL_S[1], pause * 1.2)
            try:
                rows = slurm.queued(submitted.values())
            except slurm.SlurmError as error:
                if not complained:
                    display.say(f"{error}: waiting for SLURM to answer again")
                complained = True
                continue
            complained = False
            running = {}
            for node in plan.todo:
                job_id = submitted[node.key]
                mine = [row for row in rows if row.parent == job_id]
                state = _state(mine)
                if told.get(node.key) != state:
                    told[node.key] = state
                    display.say(f"{time.strftime('%H:%M:%S')} {node.key:18} {job_id:>8} {state}")
                if any(row.state == "RUNNING" for row in mine):
                    running[node.key] = progress.of(plan.run, node, began)
            display.progress({key: (at.share, str(at)) for key, at in running.items() if at})
            quiet_looks = 0 if any(row.live for row in rows) else quiet_looks + 1
    except KeyboardInterrupt:
        display.close()  # it would take away what is written below it
        print(
            f"\nno longer waiting; the jobs go on (python launch/runs.py cancel {plan.runs_argument} stops them)",
            file=sys.stderr,
        )
        return 130
    finally:
        display.close()
    return _result(plan, submitted)


def _result(plan: Plan, submitted: dict[str, str]) -> int:
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
        ended_well = all(row.state == "COMPLETED" for row in states.values())
        if not ended_well or time.monotonic() > deadline:
            break
        time.sleep(1)
    answer = query_slurm([plan.run])
    said = trouble([row for row in job_rows(plan.run, answer) if row.node.key in submitted])
    print(f"error: {said or answer.note or f'{undone[-1].key} ended without a result'}", file=sys.stderr)
    return 1
