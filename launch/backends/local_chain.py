"""Run a plan on this machine: its jobs one after another in the foreground, each as worker processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.backends.prepare import ledger_entry, prepare, refuse_live
from launch.backends.workers import Foreground, Outcome, Worker, job_workers, store_folder
from launch.monitor.display import Display
from launch.monitor.outcome import failure_line, print_result
from launch.planning.plan import Plan
from launch.planning.site import Site
from launch.state import progress
from launch.state.ledger import Ledger
from launch.state.locks import Lock, Locked, lock
from pneumo_dist.chain import STAGES, Node
from pneumo_dist.config import ConfigError

PROGRESS_EVERY_S = 2.0


def run_local_chain(plan: Plan, site: Site) -> int:
    """Run the plan's jobs in order and return the exit status: 0, 1 failed, 130 Ctrl-C, 143 SIGTERM.

    Raises:
        ConfigError: another process already runs one of the jobs.
    """
    run = plan.run
    if note := site.environment_note:
        print(note, flush=True)
    if os.environ.get("LD_LIBRARY_PATH"):
        print("note: the libraries in LD_LIBRARY_PATH of this shell come before those of PyTorch", flush=True)
    locks: list[Lock] = []
    display = Display()
    watch = _ProgressWatch(plan, display)
    with Foreground(display.pass_on, watch.update) as foreground:
        try:
            refuse_live(plan, Ledger(run), slurm_answers=False)
            for node in plan.todo:  # all locks first: two chains must not meet half-way
                try:
                    locks.append(lock(run.lock(node.key)))
                except Locked as error:
                    raise ConfigError(f"{error.holder} already runs {node.key} of this run: wait for it") from None
            code, _ = prepare(plan, site.array_tasks)
            chain = _LocalChain(plan, site, foreground, watch, code, [held.descriptor for held in locks])
            for node in plan.todo:
                status = chain.run(node)
                if status:
                    return status
        finally:
            for held in locks:
                held.release()
    print_result(run, plan.targets, plan.folds)
    return 0


def render(plan: Plan, site: Site) -> Iterator[str]:
    """Yield a line for every target, finished ones included; write nothing."""
    todo = {node.key for node in plan.todo}
    for number, node in enumerate(plan.targets, 1):
        state = "" if node.key in todo else "; already done, not run"
        heading = f"[{number}/{len(plan.targets)}] {plan.title(node.stage, node.fold)}{_count(_processes(node, site))}"
        yield f"{heading}; writes {plan.run.dir_of(node.stage, node.fold)}{state}"


def _processes(node: Node, site: Site) -> int:
    return 1 if STAGES[node.stage].shape == "single" else site.ranks


def _count(processes: int) -> str:
    return f": {processes} processes" if processes > 1 else ""


class _ProgressWatch:
    """Shows the progress of the running job at intervals."""

    def __init__(self, plan: Plan, display: Display) -> None:
        self._plan, self._display = plan, display
        self._node: Node | None = None
        self._since = self._next = 0.0

    def begin(self, node: Node) -> None:
        """Watch a job that starts now."""
        self._node, self._since = node, time.time()

    def end(self) -> None:
        """Stop watching, and close the display: the next message goes below the log of the job."""
        self._node = None
        self._display.close()

    def update(self) -> None:
        """Show the progress if the last update is long enough ago."""
        if self._node is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PROGRESS_EVERY_S
        now = progress.of(self._plan.run, self._node, self._since)
        name = self._plan.title(self._node.stage, self._node.fold)
        self._display.progress({name: (now.share, str(now))} if now else {})


class _LocalChain:
    """Runs the jobs of one plan on this machine."""

    def __init__(
        self, plan: Plan, site: Site, foreground: Foreground, watch: _ProgressWatch, code: Path, locks: list[int]
    ) -> None:
        self._plan, self._site, self._code = plan, site, code
        self._foreground, self._watch, self._locks = foreground, watch, locks
        self._ledger = Ledger(plan.run)

    def run(self, node: Node) -> int:
        """Run one job to its end and return its exit status."""
        kind, count = STAGES[node.stage].shape, _processes(node, self._site)
        title = self._plan.title(node.stage, node.fold)
        heading = f"[{self._plan.todo.index(node) + 1}/{len(self._plan.todo)}] {title}"
        print(heading + _count(count), flush=True)
        began = time.monotonic()
        with store_folder() as folder:
            group = job_workers(
                key=node.key,
                stage=node.stage,
                fold=node.fold,
                kind=kind,
                count=count,
                run=self._plan.run,
                code=self._code,
                store=Path(folder) / "store",
                profile_env=self._site.profile.env,
                gpus_asked=self._site.gpus_per_node,
            )
            self._record(node, count)
            self._watch.begin(node)
            outcome = self._foreground.run(group, self._locks)
            self._watch.end()
            self._record(node, count, event="ended", status=outcome.status)
        if not outcome.status:
            print(f"{heading} took {time.monotonic() - began:.0f} s", flush=True)
        else:
            self._print_end(title, group, outcome)
        return outcome.status

    def _print_end(self, title: str, group: list[Worker], outcome: Outcome) -> None:
        """Print why a job was stopped or failed, and how to continue."""
        if self._foreground.received:
            print(f"stopped during {title}; the same command continues", file=sys.stderr)
            if outcome.failed:
                log = group[outcome.failed[0]].log
                reason = failure_line([log])
                print(f"but its last state may not be saved: {reason[0] if reason else f'see {log}'}", file=sys.stderr)
            return
        index, status = outcome.failed or (0, 1)
        end = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
        # The worker that failed first comes first: the others may only report that it is gone.
        logs = [group[index].log, *(worker.log for worker in group)]
        line, log = failure_line(logs) or ("no message", logs[0])
        print(f"error: {title}: process {index} {end}: {line}", file=sys.stderr)
        print(f"log: {log}; after correcting the cause, the same command continues", file=sys.stderr)

    def _record(self, node: Node, count: int, event: str = "submitted", status: int | None = None) -> None:
        entry = ledger_entry(
            self._plan,
            self._site,
            node,
            self._code,
            event=event,
            status=status,
            job_id=str(os.getpid()),
            processes=count,
            log=f"local-{node.key}-%r.out",
        )
        self._ledger.append(entry)
