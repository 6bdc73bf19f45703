"""Start, record and end the processes of one private cluster.

It must never signal a process that it did not start: a pid is valid only together with its start time, and
processes without a pid file are identified by a variable in their environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MARK = "PNEUMO_DEVCLUSTER"  # environment variable of every daemon: the cluster's directory


class ClusterError(Exception):
    """An error for users, in one line; the last lines of the file `log` explain it."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Process:
    """A process by pid and start time (clock ticks since boot), which differs when a pid is reused."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the running process `pid`, or None. A zombie counts as ended: not every process 1 reaps at once."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        """Tell whether this process still runs."""
        return Process.of(self.pid) == self

    def kill(self, within_s: float = 5.0) -> None:
        """Send SIGKILL and wait until the process is gone."""
        if self.alive():
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            wait(lambda: not self.alive(), within_s, f"process {self.pid} survived SIGKILL")


def wait(ready: Callable[[], bool], within_s: float, message: str, log: Path | None = None) -> None:
    """Poll `ready` until it holds.

    Raises:
        ClusterError: `message`, when `ready` does not hold within `within_s` seconds.
    """
    end = time.monotonic() + within_s
    while not ready():
        if time.monotonic() > end:
            raise ClusterError(message, log)
        time.sleep(0.03)


def run(*command: str | Path, within_s: float = 60.0, env: dict[str, str] | None = None) -> str:
    """Run a short command and return its output.

    Raises:
        ClusterError: the command failed (with its last line of output) or took too long.
    """
    arguments = [str(argument) for argument in command]
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=within_s, env=env, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{' '.join(arguments)}` did not end within {within_s:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ClusterError(f"`{' '.join(arguments)}` failed: {[f'exit status {done.returncode}', *lines][-1]}")
    return done.stdout


class Daemons:
    """The processes of the cluster in `folder`, each with a pid file in `folder`/run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def environment(self) -> dict[str, str]:
        """Return the daemons' environment: the caller's, without the variables of another cluster."""
        foreign = ("SLURM_", "SBATCH_", "SINFO_", "MYSQL_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), MARK: str(self.folder)}

    def spawn(self, name: str, *command: str | Path, **extra: str) -> Process:
        """Start a daemon in its own session, with its output in log/`name`.out and `extra` in its environment."""
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            child = subprocess.Popen(
                [str(argument) for argument in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment() | extra,
                start_new_session=True,
                umask=0o022,
            )
        process = Process.of(child.pid) or Process(child.pid, -1)
        (self.folder / "run" / name).write_text(f"{process.pid} {process.started}\n")
        return process

    def find(self, name: str) -> Process | None:
        """Return the daemon `name`, or None when it does not run."""
        try:
            pid, started = (self.folder / "run" / name).read_text().split()
        except (OSError, ValueError):
            return None
        process = Process(int(pid), int(started))
        return process if process.alive() else None

    def marked(self) -> list[Process]:
        """Return every process with this cluster's mark, also without a pid file (the start was killed)."""
        mark = f"{MARK}={self.folder}".encode()
        processes = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if mark in environment.split(b"\0"):
                    process = Process.of(int(entry.name))
                    processes += [process] if process else []
        return processes

    def kill_all(self) -> None:
        """End all processes of the cluster, including the process trees of the nodes."""
        names = [path.name for path in (self.folder / "run").glob("*")]
        known = [process for process in map(self.find, names) if process and process.pid != os.getpid()]
        for process in known + self.marked():
            process.kill()
