"""Signal handlers that only set flags. Standard library only, quick to import.

SIGUSR2 (time limit) requests a save and an exit. SIGTERM and SIGINT request the same outside SLURM. Under SLURM,
SIGTERM requests a save only, because SLURM ends the job itself: an exit during the grace time of a preemption would
end the job for good, and a requeue would undo a scancel.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

from pneumo_dist.runtime.meeting.launcher import is_local_worker

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The state is saved and the process should exit; `signum` is the signal that requested it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status by the shell's convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


def under_slurm(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process is a SLURM task."""
    return "SLURM_JOB_ID" in environ and not is_local_worker(environ)


class StopSignal:
    """The requests of the signals received so far, in this process only: no communication with other ranks."""

    def __init__(self) -> None:
        self.leave: int = 0  # number of the signal that requests a save and an exit, 0 for none
        self.save: bool = False  # a save is requested (SIGTERM under SLURM)
        self.saved: bool = False  # the save that was requested is done

    def note(self, signum: int, _frame: Any = None) -> None:
        """Remember the request (the signal handler)."""
        if signum == signal.SIGTERM and under_slurm():
            self.save = True
        elif not self.leave:
            self.leave = int(signum)

    @property
    def requested(self) -> bool:
        """Whether a save and an exit are requested."""
        return bool(self.leave)

    @property
    def save_due(self) -> bool:
        """Whether a requested save is not done yet."""
        return self.save and not self.saved

    def check(self) -> None:
        """Raise Stopped when an exit is requested. For work without collectives, between two units of work."""
        if self.leave:
            raise Stopped(self.leave)


def install() -> StopSignal:
    """Install the handlers, then unblock the signals.

    Launchers start Python with the signals blocked, so that one that arrives during the start stays pending.
    """
    stop = StopSignal()
    for signum in SIGNALS:
        signal.signal(signum, stop.note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return stop


def ignore() -> None:
    """Ignore the signals in a child process (loader worker, decoder): its parent decides when it ends."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def requeue() -> None:
    """Ask SLURM to requeue this job (for plain scripts; in a submitit job its handler does this).

    Raises:
        subprocess.CalledProcessError: SLURM refused, or killed scontrol together with the job.
    """
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=True)
