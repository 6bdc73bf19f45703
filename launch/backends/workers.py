"""Run one job of a chain as worker processes of this machine, in the foreground. Standard library only.

No worker outlives this process: the kernel kills them with it, however it ends. Nothing here starts a thread,
since code between fork and exec is only safe without any.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from pneumo_dist.run import RunFolder
from pneumo_dist.runtime.processes import die_with_parent
from pneumo_dist.runtime.ranks import LOCAL_STORE

BLOCKED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
COOPERATIVE = tuple(128 + s for s in BLOCKED)  # exit statuses of a worker that saved and left
GRACE_AFTER_STOP_S = 120.0  # the other ranks are saving
GRACE_AFTER_FAILURE_S = 5.0  # the other ranks hang in a collective, or are about to say why


@dataclass(frozen=True)
class Worker:
    """One process: its command, what it gets on top of the environment, and the file that takes its output."""

    command: list[str]
    environ: dict[str, str]
    log: Path
    folder: Path  # where it starts


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the exit status for the shell, and the worker that failed first (index, its status)."""

    status: int
    failed: tuple[int, int] | None = None


def gpus() -> list[str]:
    """Return the GPUs of this machine that CUDA would show to a worker, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def workers(
    *,
    key: str,
    stage: str,
    fold: int | None,
    kind: str,
    count: int,
    run: RunFolder,
    code: Path,
    store: Path,
    python: str = sys.executable,
) -> list[Worker]:
    """Return the `count` processes of one job: ranks of one group ("ranks") or independent elements ("array")."""
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    cards = gpus() if kind == "array" and stage == "infer" else []
    found = []
    for i in range(count):
        command = [python, "-m", "pneumo_dist.stages", "--stage", stage, "--run-dir", str(run.folder)]
        command += ["--fold", str(fold)] if fold is not None else []
        command += ["--part", f"{i}/{count}"] if kind == "array" else []
        ranks = kind == "ranks"
        environ = {
            "RANK": str(i if ranks else 0),
            "WORLD_SIZE": str(count if ranks else 1),
            "LOCAL_RANK": str(i if ranks else 0),
            "LOCAL_WORLD_SIZE": str(count),  # elements of an array share the cores as well
            LOCAL_STORE: str(store),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "PYTHONPATH": os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
        }
        if cards:
            environ["CUDA_VISIBLE_DEVICES"] = cards[i % len(cards)]
        found.append(Worker(command, environ, run.jobs_dir / f"local-{key}-{i}.out", code))
    return found


def _child_setup(parent: int) -> Callable[[], None]:
    def setup() -> None:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # until the worker has its handlers

    return setup


class Foreground:
    """Runs jobs one after another and passes Ctrl-C, SIGTERM and a closed terminal on, so that workers save.

    Use as a context manager: it owns the signal handlers meanwhile. A second signal kills the workers at once.
    """

    def __init__(self, show: Callable[[bytes], None], tick: Callable[[], None] = lambda: None) -> None:
        """Give what the first worker writes to `show`, and call `tick` often while workers run."""
        self.received = 0  # the first signal, 0 for none
        self._again = False
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
        if signum == signal.SIGHUP:  # the terminal has gone: writing to it would raise before the workers have saved
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        self._again = bool(self.received)
        self.received = self.received or signum

    @property
    def status(self) -> int:
        """The exit status that the received signal asks for, 0 for none."""
        return 0 if not self.received else 130 if self.received == signal.SIGINT else 143

    def run(self, group: Sequence[Worker], keep: Sequence[int] = ()) -> Outcome:
        """Start the workers, show the first one's output, and return when all have ended.

        Args:
            keep: descriptors (locks) that the workers hold as well, until the last of them has ended.
        """
        if self.received:
            return Outcome(self.status)
        running: dict[int, subprocess.Popen[bytes]] = {}
        for worker in group:
            worker.log.parent.mkdir(parents=True, exist_ok=True)
            with open(worker.log, "ab") as log:  # attempts append to one file: this line parts them
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(worker.command[1:])}\n".encode())
        shown = _Tail(group[0].log, self._show)
        try:
            for i, worker in enumerate(group):
                with open(worker.log, "ab") as log:
                    running[i] = subprocess.Popen(
                        worker.command,
                        env={**os.environ, **worker.environ},
                        cwd=worker.folder,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
                        pass_fds=tuple(keep),
                        preexec_fn=_child_setup(os.getpid()),
                    )
            return self._follow(running, shown)
        finally:
            for process in running.values():
                _kill(process)
            shown.more()

    def _follow(self, running: dict[int, subprocess.Popen[bytes]], shown: _Tail) -> Outcome:
        failed: tuple[int, int] | None = None
        told = False
        deadline = float("inf")
        while True:
            alive = {i: p for i, p in running.items() if p.poll() is None}
            shown.more()
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
            if self.received and not told:
                told = True
                self._show(b"\nstopping: the workers save their state (once more to stop at once)\n")
                _signal(alive, signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM)
            if self._again or time.monotonic() > deadline:
                for process in alive.values():
                    _kill(process)
            time.sleep(0.05)


def _signal(group: dict[int, subprocess.Popen[bytes]], signum: int) -> None:
    for process in group.values():
        process.send_signal(signum)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and all that it started; it leads its own process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


class _Tail:
    """Shows what is appended to a file."""

    def __init__(self, path: Path, show: Callable[[bytes], None]) -> None:
        self._path, self._show = path, show
        self._at = path.stat().st_size if path.exists() else 0

    def more(self) -> None:
        """Show what has come since the last call."""
        try:
            with open(self._path, "rb") as log:
                log.seek(self._at)
                new = log.read()
        except FileNotFoundError:
            return
        if new:
            self._at += len(new)
            self._show(new)


def store_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a fresh folder for the file through which the ranks find each other."""
    return tempfile.TemporaryDirectory(prefix="pneumo-store-")
