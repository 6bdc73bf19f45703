"""`--wait` and `runs.py wait`: follow submitted jobs until they end, and return their result. Never cancels one."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.backends.prepare import ledger_entry
from launch.monitor.display import Display
from launch.monitor.outcome import print_result, short_path
from launch.monitor.status import folds_of, job_rows, query_slurm
from launch.monitor.table import trouble
from launch.planning.plan import DERIVED, Plan
from launch.planning.recipe import ROOT
from launch.planning.site import Site
from launch.state import codecopy, progress
from launch.state import slurm_client as slurm
from launch.state.ledger import Ledger
from pneumo_dist import done
from pneumo_dist.chain import Node, closing, job_key
from pneumo_dist.config import ConfigError, to_yaml
from pneumo_dist.run import Run

POLL_S = (2.0, 10.0)  # first and longest pause between two queries
SETTLE_S = 20.0  # how long a shared file system may take to show the last DONE.json
Jobs = Mapping[Node, str]  # the SLURM job of each node


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


def wait(run: Run) -> int:
    """Follow the newest SLURM jobs of the stages that are not done; return their result as `follow` does.

    Raises:
        ConfigError: SLURM does not answer, nothing has been submitted, or what is not done runs without SLURM.
    """
    answer = query_slurm([run])
    if answer.note:
        raise ConfigError(answer.note)
    submitted = [row for row in job_rows(run, answer) if row.job_id]
    jobs = {row.node: row.job_id for row in submitted if row.state != "done" and row.job_id != "local"}
    if needed := _live_and_needed(run, [row.job_id for row in submitted if row.state in slurm.LIVE]):
        jobs = {node: job_id for node, job_id in jobs.items() if job_id in needed}
    if jobs:
        return follow(run, jobs, list(jobs), folds_of(run, []))
    undone = next((row for row in submitted if row.state != "done"), None)
    if undone or not submitted:
        reason = f"{undone.node.key} was started without SLURM" if undone else "nothing has been submitted"
        raise ConfigError(f"{run.name}: no SLURM job to wait for: {reason} (runs.py status shows all jobs)")
    print_result(run, [row.node for row in submitted], folds_of(run, []))
    return 0


def _live_and_needed(run: Run, live: Sequence[str]) -> set[str]:
    """Return the ids of live jobs and of those that they depend on, directly or not; empty without a live one."""
    needed = set(live)
    for entry in reversed(Ledger(run).entries()):  # a job is submitted after those that it depends on
        if entry.job_id in needed:
            needed.update(re.findall(r"\d+", " ".join(entry.after)))
    return needed


def under_way(plan: Plan) -> Jobs:
    """Return the jobs of the plan if all are queued or running with its settings and folds; else {}.

    An array counts until the job that merges it has ended: only then the stage is done.
    """
    run = plan.run
    ledger, settings = Ledger(run), to_yaml(run.config)
    try:
        live = ledger.live()
    except slurm.SlurmError:  # reported where the jobs are submitted
        return {}
    newest = ledger.latest()
    for node in plan.todo:
        submitted = run.job_config_file(node.key)
        if not live.keys() & {node.key, job_key(closing(node.stage), node.fold)} or node.key not in newest:
            return {}
        if not submitted.is_file() or submitted.read_text() != settings:
            return {}
        if node.stage in DERIVED and newest[node.key].extra.get("folds") != sorted(plan.folds):
            return {}
    return {node: newest[node.key].job_id for node in plan.todo}


def changed_request(plan: Plan, site: Site) -> str:
    """Return in what the submitted jobs of the plan differ from the present command, as text; "" in nothing."""
    newest, code = Ledger(plan.run).latest(), Path(codecopy.code_hash(ROOT))
    waits = {job_id for node in plan.todo for job_id in re.findall(r"\d+", " ".join(newest[node.key].after))}
    differing = {}
    for node in plan.todo:
        was, now = newest[node.key], ledger_entry(plan, site, node, code)
        for name in ("nodes", "gpus_per_node", "profile"):
            if was.extra.get(name) != now.extra[name]:
                differing[name] = f"{name} {was.extra.get(name)}, now {now.extra[name]}"
        if was.code != now.code:
            differing["code"] = "code other than that of the checkout"
    if not waits.issuperset(re.findall(r"\d+", plan.request.after or "")):
        differing["after"] = f"no --after {plan.request.after}"
    return "; ".join(differing.values())


def follow(run: Run, jobs: Jobs, targets: Sequence[Node], folds: Sequence[int]) -> int:
    """Print every change of state until all jobs have ended; return 0 (all done), 1 (not all), 130 (Ctrl-C).

    Args:
        targets: the jobs whose result is printed at the end.
    """
    display = Display()
    queue = _Queue(run, jobs, display)
    try:
        while queue.idle_queries < 2:  # one query may miss a job that is being requeued
            queue.pause()
            queue.show()
        display.close()
        return _result(run, jobs, targets, folds)
    except KeyboardInterrupt:
        display.close()  # before the next lines: it would erase them
        name = short_path(run.folder)
        going_on = ", ".join(f"{jobs[node]} ({node.key})" for node in jobs if node.key not in queue.ended)
        print(
            f"\nno longer waiting; these jobs stay in SLURM: {going_on or 'none'}\n"
            f"follow them again: python launch/runs.py wait {name}\n"
            f"cancel them:       python launch/runs.py cancel {name}",
            file=sys.stderr,
        )
        return 130
    finally:
        display.close()


class _Queue:
    """Asks SLURM for the states of jobs and shows what has changed."""

    def __init__(self, run: Run, jobs: Jobs, display: Display) -> None:
        self.idle_queries = 0  # answers in a row in which no job is queued or running
        self.ended: set[str] = set()  # keys of jobs
        self._run, self._jobs, self._display = run, jobs, display
        self._began, self._pause_s = time.time(), POLL_S[0]
        self._shown: dict[str, str] = {}
        self._reported_error = False

    def pause(self) -> None:
        """Wait before the next query, a little longer each time."""
        time.sleep(self._pause_s)
        self._pause_s = min(POLL_S[1], self._pause_s * 1.2)

    def show(self) -> None:
        """Query SLURM once and show new states and the progress of running jobs."""
        try:
            rows = slurm.queued(self._jobs.values())
        except slurm.SlurmError as error:
            if not self._reported_error:
                self._display.say(f"{error}: waiting for SLURM to answer again")
            self._reported_error = True
            return
        self._reported_error = False
        running = {}
        for node, job_id in self._jobs.items():
            tasks = [row for row in rows if row.parent == job_id]
            state = _state(tasks)
            if self._shown.get(node.key) != state:
                self._shown[node.key] = state
                self._display.say(f"{time.strftime('%H:%M:%S')} {node.key:18} {job_id:>8} {state}")
            if any(row.state == "RUNNING" for row in tasks):
                running[node.key] = progress.of(self._run, node, self._began)
            if not any(row.live for row in tasks):
                self.ended.add(node.key)
        self._display.progress({key: (now.share, str(now)) for key, now in running.items() if now})
        self.idle_queries = 0 if any(row.live for row in rows) else self.idle_queries + 1


def _result(run: Run, jobs: Jobs, targets: Sequence[Node], folds: Sequence[int]) -> int:
    """Print the result, or why a job failed, and return the exit status."""
    deadline = time.monotonic() + SETTLE_S
    runs = {node: Run.of_job(run.folder, node.key) for node in jobs}  # with the settings of each job
    while True:
        undone = [node for node in jobs if done.differences(runs[node], closing(node.stage), node.fold) != []]
        if not undone:
            print_result(list(runs.values())[-1], targets, folds)
            return 0
        try:
            states = slurm.states(jobs.values())
        except slurm.SlurmError:
            states = {}
        completed = all(row.state == "COMPLETED" for row in states.values())
        if not completed or time.monotonic() > deadline:
            break
        time.sleep(1)
    answer = query_slurm([run])
    failures = trouble([row for row in job_rows(run, answer) if row.node in jobs])
    print(f"error: {failures or answer.note or f'{undone[-1].key} ended without a result'}", file=sys.stderr)
    return 1
