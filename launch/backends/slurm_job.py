"""The job that SLURM runs: which stage, fold, part and run directory, nothing else, so that its pickle stays small.

Standard library only until the signal handlers stand: a signal in the first second must not be lost.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pneumo_dist.runtime import stopping

Handler = Callable[[int, FrameType | None], Any]


@dataclass(frozen=True)
class Job:
    """One process's work. Pickles as launch.backends.slurm_job.Job; all state lies in the run directory."""

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
        from pneumo_dist.config import ConfigError
        from pneumo_dist.runtime.failure import told
        from pneumo_dist.runtime.ranks import discover
        from pneumo_dist.stages import run_stage

        me = discover()
        try:
            run_stage(self.stage, Path(self.run_dir), self.fold, self.part, stop=stop)
        except stopping.Stopped as stopped:
            leave(stopped, before if callable(before) else None, me.first)
        except ConfigError as error:
            if me.first:
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except Exception as error:
            line = told(error)
            said = line or " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"error: {me.place}: {said}", file=sys.stderr, flush=True)
            if line is None:
                raise  # submitit writes the traceback into the log and into its result
            sys.exit(1)

    def checkpoint(self) -> Any:
        """Return the same job again (submitit's protocol for a requeue)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


# Queued jobs are pickled by this name, and launch/jobs.py keeps it.
Job.__module__ = "launch.jobs"


def leave(stopped: stopping.Stopped, requeue: Handler | None, first: bool) -> None:
    """End this task after its state is saved: rank 0 requeues with submitit's handler, the others exit 0.

    A rank that exited with an error here would, by --kill-on-bad-exit, take the requeue down with it.
    """
    if stopped.signum != signal.SIGUSR2 or requeue is None:
        sys.exit(stopped.status)
    if not first:
        sys.exit(0)
    from submitit.core.utils import UncompletedJobError

    try:
        requeue(stopped.signum, None)
    except UncompletedJobError:
        print(
            "error: the state is saved, but the job has met its time limit as often as the profile's max_timeouts "
            "allows: repeat the same submit command to continue",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:
            # SLURM had requeued the job already and killed scontrol together with it: nothing went wrong.
            sys.exit(0)
        print(
            f"error: the state is saved, but SLURM refused to requeue (scontrol exited {error.returncode}): "
            "repeat the same submit command to continue",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except subprocess.TimeoutExpired:
        print(
            "error: the state is saved, but scontrol requeue did not answer: repeat the same submit command",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)


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
