"""Run a plan on this machine: its jobs one after another in the foreground, each as worker processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launch.backends.prepare import entry, lock_path, prepare, refuse_live
from launch.backends.workers import Foreground, store_folder, workers
from launch.monitor.display import Display
from launch.monitor.outcome import tell, why
from launch.planning import plan
from launch.planning.arguments import Request
from launch.planning.plan import Plan
from launch.planning.site import Site
from launch.state import progress
from launch.state.ledger import Ledger, Lock, Locked, lock
from pneumo_dist.chain import STAGES, Node
from pneumo_dist.config import ConfigError

LOOK_EVERY_S = 2.0


def run_here(request: Request, made: Plan, site: Site) -> int:
    """Run the plan's jobs in order and return the exit status: 0, 1 failed, 130 Ctrl-C, 143 SIGTERM.

    Raises:
        ConfigError: another process is on one of the stages.
    """
    run_dir = made.recipe.run_dir
    ledger = Ledger(run_dir)
    locks: list[Lock] = []
    display = Display()
    watched = _Watched(made, display)
    with Foreground(display.pass_on, watched.look) as foreground:
        try:
            refuse_live(made, ledger, slurm_answers=False)
            for node in made.todo:
                try:
                    locks.append(lock(lock_path(run_dir, node.key)))
                except Locked as error:
                    raise ConfigError(f"{error.holder} is on {node.key} of this run already: wait for it") from None
            code = prepare(request, made).code
            chain = _Chain(request, made, site, foreground, watched, ledger, code, [one.descriptor for one in locks])
            for node in made.todo:
                status = chain.run(node)
                if status:
                    return status
        finally:
            for one in locks:
                one.release()
    tell(made, request.stage)
    return 0


class _Watched:
    """The progress of the job that runs, looked at from time to time."""

    def __init__(self, made: Plan, display: Display) -> None:
        self._made, self._display = made, display
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
        recipe = self._made.recipe
        at = progress.of(recipe.config, recipe.run_dir, self._node, self._since)
        name = plan.title(self._node.stage, self._node.fold, len(self._made.folds))
        self._display.progress({name: (at.share, str(at))} if at else {})


class _Chain:
    """What the jobs of one plan share."""

    def __init__(
        self,
        request: Request,
        made: Plan,
        site: Site,
        foreground: Foreground,
        watched: _Watched,
        ledger: Ledger,
        code: Path,
        locks: list[int],
    ) -> None:
        self.request, self.made, self.site = request, made, site
        self.foreground, self.watched = foreground, watched
        self.ledger, self.code, self.locks = ledger, code, locks

    def run(self, node: Node) -> int:
        """Run one job to its end and return its exit status."""
        kind = STAGES[node.stage].shape
        count = 1 if kind == "single" else self.site.ranks(self.request.nodes)
        title = plan.title(node.stage, node.fold, len(self.made.folds))
        mark = f"[{self.made.todo.index(node) + 1}/{len(self.made.todo)}] {title}"
        print(mark + (f": {count} processes" if count > 1 else ""), flush=True)
        began = time.monotonic()
        with store_folder() as folder:
            group = workers(
                key=node.key,
                stage=node.stage,
                fold=node.fold,
                kind=kind,
                count=count,
                run_dir=self.made.recipe.run_dir,
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
                said = why([log])
                print(f"but its last state may not be saved: {said[0] if said else f'see {log}'}", file=sys.stderr)
        else:
            worker, status = outcome.failed or (0, 1)
            how = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
            line, log = why([group[worker].log, *(one.log for one in group)]) or ("no message", group[worker].log)
            print(f"error: {title}: process {worker} {how}: {line}", file=sys.stderr)
            print(f"its log: {log}; after correcting the cause, the same command continues", file=sys.stderr)
        return outcome.status

    def _note(self, node: Node, count: int, event: str = "submitted", status: int | None = None) -> None:
        log = f"local-{node.key}-%r.out"
        more = {"event": event, "status": status, "job_id": str(os.getpid()), "processes": count, "log": log}
        self.ledger.append(entry(self.request, self.made, self.site, node, self.code, **more))
