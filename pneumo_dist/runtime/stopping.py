"""Signals become flags: nothing is ever done inside a handler. Standard library only, quick to import.

SIGUSR2 (time limit) asks to save and leave. SIGTERM and SIGINT ask for the same on this machine; under SLURM a
SIGTERM asks for a save only, because SLURM has decided already: leaving inside a preemption's grace time would
end the job for good, and a requeue would undo a scancel.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

from pneumo_dist.runtime.ranks import is_local_worker

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The state is saved and the process should leave; `signum` is the signal that asked for it."""

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
    """What the signals received so far ask for. Reading is free; nothing here talks to other ranks."""

    def __init__(self) -> None:
        self.leave: int = 0  # number of the signal that asks to save and leave, 0 for none
        self.save: bool = False  # SIGTERM under SLURM: save once, go on
        self.saved: bool = False  # that has been done

    def note(self, signum: int, _frame: Any = None) -> None:
        """Signal handler: remember what is asked."""
        if signum == signal.SIGTERM and under_slurm():
            self.save = True
        elif not self.leave:
            self.leave = int(signum)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to save and leave."""
        return bool(self.leave)

    @property
    def save_due(self) -> bool:
        """Whether a save is asked for that has not been made."""
        return self.save and not self.saved

    def check(self) -> None:
        """Raise Stopped when asked to leave. For work without collectives, between units of work."""
        if self.leave:
            raise Stopped(self.leave)


def install() -> StopSignal:
    """Install the handlers, then let in what was blocked while Python started.

    Launchers start Python with the signals blocked: one that came early is pending, not lost.
    """
    stop = StopSignal()
    for signum in SIGNALS:
        signal.signal(signum, stop.note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return stop


def ignore() -> None:
    """Make a helper process (loader worker, decoder) deaf to all of them: its owner decides when it ends."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def requeue() -> None:
    """Ask SLURM to requeue this job, for plain scripts; under submitit its own handler does the same.

    Raises:
        subprocess.CalledProcessError: SLURM refused, or killed scontrol together with the job.
        subprocess.TimeoutExpired: SLURM did not answer.
    """
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
