"""How a stage ends when it does not end well: the exit status and the error line, for SLURM jobs and plain scripts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

from pneumo_dist.config import ConfigError
from pneumo_dist.runtime.failure import error_line
from pneumo_dist.runtime.ranks import discover
from pneumo_dist.runtime.stopping import Stopped


def exit_status(error: Exception, requeue: Callable[[], object] | None) -> int:
    """Return the exit status of a process whose stage raised `error`, and print its error line.

    Args:
        requeue: asks SLURM to requeue this job, and raises what submitit and subprocess raise when that fails;
            None outside SLURM.

    Raises:
        Exception: `error` itself, after its line, when it is a mistake in the program and needs its traceback.
    """
    me = discover()
    if isinstance(error, ConfigError):
        if me.first:  # all ranks raise the same one
            _print(f"error: {error}")
        return 2
    if isinstance(error, Stopped):
        if error.signum == signal.SIGUSR2 and requeue:
            # An error status of another rank would, by --kill-on-bad-exit, take the requeue down with it.
            return _requeued(requeue) if me.first else 0
        _print(f"rank {me.rank}: {error}; the same command continues")
        return error.status
    line = error_line(error)
    _print(f"error: {me.label}: {line or ' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
    if line is None:
        raise error
    return 1


def _requeued(requeue: Callable[[], object]) -> int:
    """Requeue the job; a refusal is exit status 1, since a job that ended well would let its dependants start."""
    from submitit.core.utils import UncompletedJobError

    try:
        requeue()
        return 0
    except UncompletedJobError:
        reason = "the job has met its time limit as often as the profile's max_timeouts allows"
    except subprocess.CalledProcessError as failed:
        if failed.returncode < 0:  # SLURM had requeued the job already and killed scontrol together with it
            return 0
        reason = f"SLURM refused to requeue (scontrol exited {failed.returncode})"
    except subprocess.TimeoutExpired:
        reason = "scontrol requeue did not answer"
    _print(f"error: the state is saved, but {reason}: repeat the same command to continue")
    return 1


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
