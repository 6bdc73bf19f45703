"""How a failed or stopped stage ends its process: exit status and error line, for SLURM jobs and plain scripts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from pneumo_dist.config import ConfigError
from pneumo_dist.runtime.failure import error_line
from pneumo_dist.runtime.ranks import discover
from pneumo_dist.runtime.runlog import plain_text
from pneumo_dist.runtime.stopping import Stopped


def exit_status(error: Exception, requeue: Callable[[], object] | None) -> int:
    """Print the error line of a stage that raised `error`, and return the exit status of its process.

    Args:
        requeue: asks SLURM to requeue this job, and raises what submitit and subprocess raise when that fails;
            None outside SLURM.

    Raises:
        Exception: `error` itself, after its line, when it is a programming error and needs its traceback.
    """
    ranks = discover()
    if isinstance(error, ConfigError):
        if ranks.first:  # every rank raises the same error: one line is enough
            _print(f"error: {error}")
        return 2
    if isinstance(error, Stopped):
        if error.signum == signal.SIGUSR2 and requeue:
            # With --kill-on-bad-exit an error status of another rank would kill rank 0 before it has requeued the job.
            return _requeued(requeue) if ranks.first else 0
        _print(f"rank {ranks.rank}: {error}; repeat the same command to continue")
        return error.status
    line = error_line(error)
    _print(f"error: {ranks.label}: {line or ' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
    if line is None:
        raise error
    return 1


def _requeued(requeue: Callable[[], object]) -> int:
    """Requeue the job and return 0, or 1 where that fails: status 0 would let dependent jobs start."""
    limits: tuple[type[Exception], ...] = ()
    with suppress(ImportError):  # plain scripts run without submitit, and nothing raises its error there
        from submitit.core.utils import UncompletedJobError

        limits = (UncompletedJobError,)
    try:
        requeue()
        return 0
    except limits:
        reason = "the job has reached its time limit as often as the profile's max_timeouts allows"
    except subprocess.CalledProcessError as failed:
        if failed.returncode < 0:  # SLURM has requeued the job and killed scontrol together with it
            return 0
        reason = f"SLURM refused to requeue (scontrol exited {failed.returncode})"
    except subprocess.TimeoutExpired:
        reason = "scontrol requeue did not answer"
    _print(f"error: stopped before the time limit, but {reason}: repeat the same command to continue")
    return 1


def _print(line: str) -> None:
    print(plain_text(line), file=sys.stderr, flush=True)
