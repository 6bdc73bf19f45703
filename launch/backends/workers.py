"""Run one job of a chain as worker processes of this machine, in the foreground.

No worker outlives this process: the kernel kills the workers when it ends. Never start a thread in this process: the
code between fork and exec is safe only without threads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType, TracebackType

from launch.state import environment
from pneumo_dist.run import RunFolder
from pneumo_dist.runtime.meeting.devices import ASKED_GPUS
from pneumo_dist.runtime.meeting.launcher import LOCAL_STORE
from pneumo_dist.runtime.processes import die_with_parent

BLOCKED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
COOPERATIVE = tuple(128 + s for s in BLOCKED)  # exit statuses of a worker that has saved its state after a signal
GRACE_AFTER_STOP_S = 120.0  # the other ranks are saving
GRACE_AFTER_FAILURE_S = 5.0  # the other ranks hang in a collective, or are writing their own error


@dataclass(frozen=True)
class Worker:
    """One process: its command, its environment variables, and the file that receives its output."""

    command: list[str]
    environ: dict[str, str]
    log: Path
    folder: Path  # working directory


@dataclass(frozen=True)
class Outcome:
    """The end of a job: the exit status for the shell, and the worker that failed first (index, its exit status)."""

    status: int
    failed: tuple[int, int] | None = None


def job_workers(
    *,
    key: str,
    stage: str,
    fold: int | None,
    kind: str,
    count: int,
    run: RunFolder,
    code: Path,
    store: Path,
    profile_env: Mapping[str, str] = MappingProxyType({}),
    gpus_asked: int = 0,
    python: str = sys.executable,
) -> list[Worker]:
    """Return the `count` processes of one job: ranks of one group ("ranks") or independent tasks ("array")."""
    shared = {**environment.passed(local=True), **profile_env}
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    # Ranks choose a GPU by LOCAL_RANK; the tasks of an array all have LOCAL_RANK 0.
    devices = environment.gpus(shared) if kind == "array" and stage == "infer" else []
    group = []
    for i in range(count):
        command = [python, "-m", "pneumo_dist.stages", "--stage", stage, "--run-dir", str(run.folder)]
        command += ["--fold", str(fold)] if fold is not None else []
        command += ["--part", f"{i}/{count}"] if kind == "array" else []
        ranks = kind == "ranks"
        environ = {
            **shared,
            "RANK": str(i if ranks else 0),
            "WORLD_SIZE": str(count if ranks else 1),
            "LOCAL_RANK": str(i if ranks else 0),
            "LOCAL_WORLD_SIZE": str(count),  # tasks of an array share the cores too
            LOCAL_STORE: str(store),
            ASKED_GPUS: str(gpus_asked),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": shared.get("OMP_NUM_THREADS", str(threads)),
            "PYTHONPATH": os.pathsep.join([str(code), *filter(None, [shared.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONUTF8": "1",  # whatever the locale
        }
        if devices:
            environ["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
        group.append(Worker(command, environ, run.jobs_dir / f"local-{key}-{i}.out", code))
    return group


def _child_setup(parent: int) -> Callable[[], None]:
    def setup() -> None:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # until the worker has installed its handlers

    return setup


class Foreground:
    """Runs jobs one after another; forwards Ctrl-C, SIGTERM and a closed terminal, so that the workers save.

    Use it as a context manager, which installs the signal handlers. A second signal kills the workers at once.
    """

    def __init__(self, show: Callable[[bytes], None], tick: Callable[[], None] = lambda: None) -> None:
        """Pass the output of the first worker to `show`; call `tick` many times a second while workers run."""
        self.received = 0  # the first signal, 0 for none
        self._second_signal = False
        self._show, self._tick = show, tick
        self._before: dict[int, object] = {}

    def __enter__(self) -> Foreground:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:  # the terminal is gone: writing to it would fail before the workers save
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
        self._second_signal = bool(self.received)
        self.received = self.received or signum

    @property
    def status(self) -> int:
        """The exit status for the received signal, 0 for none."""
        return 0 if not self.received else 130 if self.received == signal.SIGINT else 143

    def run(self, group: Sequence[Worker], keep: Sequence[int] = ()) -> Outcome:
        """Start the workers, show the output of the first one, and return when all have ended.

        Args:
            keep: descriptors of locks that the workers inherit: a lock lasts until the last worker has ended.
        """
        if self.received:
            return Outcome(self.status)
        running: dict[int, subprocess.Popen[bytes]] = {}
        for worker in group:
            worker.log.parent.mkdir(parents=True, exist_ok=True)
            with worker.log.open("ab") as log:  # attempts append to one file: a line separates them
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(worker.command[1:])}\n".encode())
        tail = _Tail(group[0].log, self._show)
        try:
            for i, worker in enumerate(group):
                with worker.log.open("ab") as log:
                    running[i] = subprocess.Popen(
                        worker.command,
                        env=worker.environ,
                        cwd=worker.folder,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C reaches only this process, which forwards it
                        pass_fds=tuple(keep),
                        preexec_fn=_child_setup(os.getpid()),
                    )
            return self._follow(running, tail)
        finally:
            for process in running.values():
                _kill(process)
            tail.show_new()

    def _follow(self, running: dict[int, subprocess.Popen[bytes]], tail: _Tail) -> Outcome:
        failed: tuple[int, int] | None = None
        forwarded = False
        deadline = float("inf")
        while True:
            alive = {i: p for i, p in running.items() if p.poll() is None}
            tail.show_new()
            self._tick()
            for i, process in running.items():
                if failed is None and process.returncode:
                    failed = (i, process.returncode)
                    grace = GRACE_AFTER_STOP_S if process.returncode in COOPERATIVE else GRACE_AFTER_FAILURE_S
                    deadline = time.monotonic() + grace
                    _signal(alive, signal.SIGTERM)
            if not alive:
                if self.received:
                    return Outcome(self.status, failed if failed and failed[1] not in COOPERATIVE else None)
                return Outcome(1 if failed else 0, failed)
            if self.received and not forwarded:
                forwarded = True
                self._show(b"\nstopping: the workers save their state (Ctrl-C again stops at once, without saving)\n")
                _signal(alive, signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM)
            if self._second_signal or time.monotonic() > deadline:
                for process in alive.values():
                    _kill(process)
            time.sleep(0.05)


def _signal(group: dict[int, subprocess.Popen[bytes]], signum: int) -> None:
    for process in group.values():
        process.send_signal(signum)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and all processes that it started: it leads its own process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Tail:
    """Shows the lines that are appended to a file."""

    def __init__(self, path: Path, show: Callable[[bytes], None]) -> None:
        self._path, self._show = path, show
        self._offset = path.stat().st_size if path.exists() else 0

    def show_new(self) -> None:
        """Show what was appended since the last call."""
        try:
            with self._path.open("rb") as log:
                log.seek(self._offset)
                new = log.read()
        except FileNotFoundError:
            return
        if new:
            self._offset += len(new)
            self._show(new)


def store_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder for the file through which the ranks find each other."""
    return tempfile.TemporaryDirectory(prefix="pneumo-store-")
