"""Run a plan on this machine: its jobs one after another in the foreground, each as worker processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launch.backends.prepare import entry, prepare, refuse_live
from launch.backends.workers import Foreground, store_folder, workers
from launch.monitor.display import Display
from launch.monitor.outcome import failure_line, print_result
from launch.planning.plan import Plan
from launch.planning.site import Site
from launch.state import progress
from launch.state.ledger import Ledger
from launch.state.locks import Lock, Locked, lock
from pneumo_dist.chain import STAGES, Node
from pneumo_dist.config import ConfigError

LOOK_EVERY_S = 2.0


def run_here(plan: Plan, site: Site) -> int:
    """Run the plan's jobs in order and return the exit status: 0, 1 failed, 130 Ctrl-C, 143 SIGTERM.

    Raises:
        ConfigError: another process is on one of the stages.
    """
    run, ledger = plan.run, Ledger(plan.run)
    locks: list[Lock] = []
    display = Display()
    watched = _Watched(plan, display)
    with Foreground(display.pass_on, watched.look) as foreground:
        try:
            refuse_live(plan, ledger, slurm_answers=False)
            for node in plan.todo:
                try:
                    locks.append(lock(run.lock(node.key)))
                except Locked as error:
                    raise ConfigError(f"{error.holder} is on {node.key} of this run already: wait for it") from None
            code = prepare(plan).code
            chain = _Chain(plan, site, foreground, watched, ledger, code, [one.descriptor for one in locks])
            for node in plan.todo:
                status = chain.run(node)
                if status:
                    return status
        finally:
            for one in locks:
                one.release()
    print_result(plan)
    return 0


class _Watched:
    """The progress of the job that runs, looked at from time to time."""

    def __init__(self, plan: Plan, display: Display) -> None:
        self._plan, self._display = plan, display
        self._node: Node | None = None
        self._since = self._next = 0.0

    def begin(self, node: Node) -> None:
        """A job starts."""
        self._node, self._since = node, time.time()

    def end(self) -> None:
        """It has ended: what is said next stands below its log."""
        self._node = None
        self._display.close()

    def look(self) -> None:
        """Show how far the job is, unless that has just been done."""
        if self._node is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_EVERY_S
        at = progress.of(self._plan.run, self._node, self._since)
        name = self._plan.title(self._node.stage, self._node.fold)
        self._display.progress({name: (at.share, str(at))} if at else {})


class _Chain:
    """What the jobs of one plan share."""

    def __init__(
        self,
        plan: Plan,
        site: Site,
        foreground: Foreground,
        watched: _Watched,
        ledger: Ledger,
        code: Path,
        locks: list[int],
    ) -> None:
        self.plan, self.site = plan, site
        self.foreground, self.watched = foreground, watched
        self.ledger, self.code, self.locks = ledger, code, locks

    def run(self, node: Node) -> int:
        """Run one job to its end and return its exit status."""
        kind = STAGES[node.stage].shape
        count = 1 if kind == "single" else self.site.ranks(self.plan.request.nodes)
        title = self.plan.title(node.stage, node.fold)
        mark = f"[{self.plan.todo.index(node) + 1}/{len(self.plan.todo)}] {title}"
        print(mark + (f": {count} processes" if count > 1 else ""), flush=True)
        began = time.monotonic()
        with store_folder() as folder:
            group = workers(
                key=node.key,
                stage=node.stage,
                fold=node.fold,
                kind=kind,
                count=count,
                run=self.plan.run,
                code=self.code,
                store=Path(folder) / "store",
            )
            self._note(node, count)
            self.watched.begin(node)
            outcome = self.foreground.run(group, self.locks)
            self.watched.end()
            self._note(node, count, event="ended", status=outcome.status)
        if not outcome.status:
            print(f"{mark} took {time.monotonic() - began:.0f} s", flush=True)
        elif self.foreground.received:
            print(f"stopped during {title}; the same command continues", file=sys.stderr)
            if outcome.failed:
                log = group[outcome.failed[0]].log
                said = failure_line([log])
                print(f"but its last state may not be saved: {said[0] if said else f'see {log}'}", file=sys.stderr)
        else:
            worker, status = outcome.failed or (0, 1)
            how = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
            line, log = failure_line([group[worker].log, *(one.log for one in group)]) or (
                "no message",
                group[worker].log,
            )
            print(f"error: {title}: process {worker} {how}: {line}", file=sys.stderr)
            print(f"its log: {log}; after correcting the cause, the same command continues", file=sys.stderr)
        return outcome.status

    def _note(self, node: Node, count: int, event: str = "submitted", status: int | None = None) -> None:
        log = f"local-{node.key}-%r.out"
        more = {"event": event, "status": status, "job_id": str(os.getpid()), "processes": count, "log": log}
        self.ledger.append(entry(self.plan, self.site, node, self.code, **more))
