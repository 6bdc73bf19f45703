"""The job that SLURM runs: which stage, fold, part and run directory, nothing else, so that its pickle stays small.

Standard library only until the signal handlers stand: a signal in the first second must not be lost.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pneumo_dist.runtime import stopping


@dataclass(frozen=True)
class Job:
    """One process's work. Pickles as launch.jobs.Job; all state lies in the run directory."""

    stage: str
    fold: int | None
    part: tuple[int, int]  # array element: index, count
    run_dir: str

    def __call__(self) -> None:
        """Run the stage; on a time-limit signal save, then let rank 0 requeue the job."""
        before = signal.getsignal(signal.SIGUSR2)  # submitit's: it installs its own after unpickling
        stop = stopping.install()
        _forget_stale_result()
        _say_once()
        from pneumo_dist.runtime.ending import exit_status
        from pneumo_dist.stages import run_stage

        try:
            run_stage(self.stage, Path(self.run_dir), self.fold, self.part, stop=stop)
        except Exception as error:
            # What exit_status raises goes on to submitit, which writes the traceback into the log and its result.
            sys.exit(exit_status(error, partial(before, signal.SIGUSR2, None) if callable(before) else None))

    def checkpoint(self) -> Any:
        """Return the same job again (submitit's protocol for a requeue)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


# Queued jobs are pickled by this name, and launch/jobs.py keeps it.
Job.__module__ = "launch.jobs"


def _say_once() -> None:
    """Silence submitit's second voice: it warns on both streams, which share a file here, and to our log as well."""
    logger = logging.getLogger("submitit")
    logger.propagate = False
    logger.handlers = [h for h in logger.handlers if getattr(h, "stream", None) is not sys.stderr]


def _forget_stale_result() -> None:
    """Remove the result file that this task's earlier attempt left: it would be taken for this attempt's."""
    if "SUBMITIT_FOLDER" in os.environ:
        from submitit import JobEnvironment

        JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
