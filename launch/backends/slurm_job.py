"""The job that SLURM runs. It holds only the stage, its shape and the run directory, so that its pickle stays small.

Imports only the standard library until the signal handlers are installed: a signal in the first second counts too.
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
    """The work of one process. Pickles as launch.jobs.Job; all state is in the run directory."""

    stage: str
    fold: int | None
    part: tuple[int, int]  # array task: index, count
    run_dir: str
    ranks: int = 0  # 0: a stage without
    gpus: int = 0  # per node

    def __call__(self) -> None:
        """Run the stage; after a time-limit signal save the state, then requeue the job from rank 0."""
        requeue_handler = signal.getsignal(signal.SIGUSR2)  # submitit installs it after unpickling
        stop = stopping.install()
        _remove_stale_result()
        _silence_duplicate_logging()
        from pneumo_dist.runtime.ending import exit_status
        from pneumo_dist.runtime.meeting.devices import ASKED_GPUS
        from pneumo_dist.runtime.meeting.launcher import ASKED_RANKS
        from pneumo_dist.stages import run_stage

        os.environ |= {ASKED_RANKS: str(self.ranks), ASKED_GPUS: str(self.gpus)}
        try:
            run_stage(self.stage, Path(self.run_dir), self.fold, self.part, stop=stop)
        except Exception as error:
            # submitit catches what exit_status raises and writes the traceback into the log and the result file.
            requeue = partial(requeue_handler, signal.SIGUSR2, None) if callable(requeue_handler) else None
            sys.exit(exit_status(error, requeue))

    def checkpoint(self) -> Any:
        """Return the same job again (submitit's protocol for a requeue)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


# The name in pickles of queued jobs. launch/jobs.py provides it, so that this file may move.
Job.__module__ = "launch.jobs"


def _silence_duplicate_logging() -> None:
    """Keep one of submitit's log handlers: it logs to both streams, which are one file here, and to the root logger."""
    logger = logging.getLogger("submitit")
    logger.propagate = False
    logger.handlers = [h for h in logger.handlers if getattr(h, "stream", None) is not sys.stderr]


def _remove_stale_result() -> None:
    """Remove the result file of an earlier attempt of this task: submitit would take it for this attempt's."""
    if "SUBMITIT_FOLDER" in os.environ:
        from submitit import JobEnvironment

        JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
