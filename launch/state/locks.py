"""Lock files: one writer per stage. The kernel releases a lock when its holder dies. Standard library only."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path


class Locked(RuntimeError):
    """Another process holds the lock; `holder` names it."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.holder = holder


@dataclass(frozen=True)
class Lock:
    """A held lock. Worker processes inherit the descriptor, so the lock lasts until the last writer has ended."""

    descriptor: int

    def release(self) -> None:
        """Release the lock, unless workers still hold it."""
        os.close(self.descriptor)


def process_name(pid: int | str, host: str) -> str:
    """Return the name of a process in lock files and messages."""
    return f"process {pid} on {host}"


def lock(path: Path, wait_s: float = 0.0) -> Lock:
    """Take a lock file.

    Raises:
        Locked: another process still holds it after `wait_s` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = _read(descriptor)
                os.close(descriptor)
                raise Locked(path, holder) from None
            time.sleep(0.1)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{process_name(os.getpid(), socket.gethostname())}\n".encode(), 0)
    return Lock(descriptor)


def holder(path: Path) -> str | None:
    """Return the name of the process that holds a lock file, or None if it is free; writes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
