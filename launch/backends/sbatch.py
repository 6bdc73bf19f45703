"""sbatch scripts: a job's profile and shape become a script, which is printed or submitted.

Never decides what to run: planning does.
"""

from __future__ import annotations

import functools
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from launch.jobs import Job
from launch.planning.profile import Profile, Resources
from launch.planning.shape import Shape
from launch.state import environment
from launch.state import slurm_client as slurm

# Used if neither the profile nor the partition has a limit: a day is enough for a stage, and most partitions allow it.
DEFAULT_MINUTES = 1440
MAX_CPUS = {"ranks": 8, "array": 16, "single": 4}  # more per task would idle
CPUS_UNKNOWN = 4


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What the sbatch script of one job is made from."""

    folder: Path  # scripts, pickles and logs
    profile: Profile
    stage: str
    shape: Shape
    name: str
    comment: str
    code: Path  # the copy of the code that the job runs
    after: str  # "afterok:12:13", or "" for none
    partition: slurm.Partition | None  # None: unknown


@functools.lru_cache(maxsize=1)
def blocks_signals() -> bool:
    """Tell whether this machine's `env` can start a program with signals blocked (coreutils 8.31)."""
    command = ["env", "--block-signal=USR2", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=5, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _python_command(profile: Profile) -> str:
    """Return the shell command that starts Python on a node.

    USR2 and TERM are blocked until the job has installed its handlers. A signal of the first second then stays
    pending across exec; unblocked, it would kill the job without a requeue.
    """
    python = profile.python or shlex.quote(sys.executable)
    return f"env --block-signal=USR2 --block-signal=TERM {python}" if blocks_signals() else python


class _Script(SlurmExecutor):
    """submitit's executor on any machine: renders the script; submits it if sbatch exists."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(spec: JobSpec) -> _Script:
    profile, shape = spec.profile, spec.shape
    resources = profile.resources(spec.stage)
    minutes = _minutes(spec)
    executor = _Script(spec.folder, max_num_timeout=profile.max_timeouts, python=_python_command(profile))
    executor.update_parameters(
        job_name=spec.name,
        comment=spec.comment,
        time=minutes,
        nodes=shape.nodes,
        ntasks_per_node=shape.tasks_per_node,
        cpus_per_task=resources.cpus_per_task or _default_cpus(spec),
        gres=f"{resources.gres}:{shape.gpus_per_node}" if resources.gres and shape.gpus_per_node else None,
        partition=resources.partition,
        account=resources.account,
        qos=resources.qos,
        constraint=resources.constraint,
        exclude=resources.exclude,
        mail_type=profile.mail_type or ("FAIL,END" if profile.mail_user else None),
        mail_user=profile.mail_user,
        dependency=spec.after or None,
        # A warning time longer than the job would send the signal at its start, after every requeue.
        signal_delay_s=max(1, min(profile.signal_delay_s, minutes * 60 // 2)),
        setup=_setup_lines(spec),
        # Without the first, the other ranks wait for one that has died; without the second, `export: NONE` in the
        # profile would keep the lines of `setup` from the ranks.
        srun_args=["--kill-on-bad-exit=1", "--export=ALL", *profile.srun],
        stderr_to_stdout=True,
        array_parallelism=shape.array_tasks,
        wckey=None,
        additional_parameters=_more_options(spec, resources),
    )
    return executor


def _minutes(spec: JobSpec) -> int:
    minutes = spec.profile.minutes(spec.stage)
    if minutes is not None:
        return minutes
    limit = spec.partition.max_minutes if spec.partition else None
    return min(DEFAULT_MINUTES, limit or DEFAULT_MINUTES)


def _default_cpus(spec: JobSpec) -> int:
    """Divide the CPUs of a node among its tasks."""
    known = spec.partition.cpus if spec.partition else 0
    share = known // spec.shape.tasks_per_node if known else CPUS_UNKNOWN
    return max(1, min(share, MAX_CPUS[spec.shape.kind]))


def _setup_lines(spec: JobSpec) -> list[str]:
    return [
        *spec.profile.setup,
        f"umask {spec.profile.file_mask:04o}",  # what `setup` sources may set another one
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(spec.profile.env.items())),
        f"export PYTHONPATH={shlex.quote(str(spec.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        # `python -m` searches the current directory first: in the checkout it would not run the copy. UTF-8 whatever
        # the locale: names of films and folders need not be ASCII.
        "export PYTHONSAFEPATH=1 PYTHONUTF8=1",
        # srun of SLURM 22.05 to 23.02 does not inherit --cpus-per-task from the job.
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
    ]


def _more_options(spec: JobSpec, resources: Resources) -> dict[str, object]:
    """Return the sbatch options for which submitit has no parameter, spelled as it does: with _."""
    options: dict[str, object] = {
        "requeue" if spec.profile.requeue else "no_requeue": True,
        "kill_on_invalid_dep": "yes",  # else the jobs after a failed one stay pending forever
        "export": "ALL",  # sbatch itself gets only the listed variables
        "propagate": "NONE",  # nor do the limits (ulimit) of the shell reach the job
    }
    if resources.mem_gb is not None:
        options["mem"] = f"{round(resources.mem_gb * 1024)}M"
    if spec.shape.gpus_per_node and not resources.gres:
        options["gpus_per_node"] = spec.shape.gpus_per_node
    # A bare option is True; one that a stage switches off is false.
    options |= resources.sbatch
    return {name: value for name, value in options.items() if value is not None and value is not False}


def script(spec: JobSpec) -> str:
    """Return the sbatch script of a job without submitting it; needs no SLURM on this machine."""
    executor = _executor(spec)
    if spec.shape.array_tasks > 1:
        executor.parameters["map_count"] = spec.shape.array_tasks
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


@contextmanager
def _listed_variables_only() -> Iterator[None]:
    """Hide all other variables: submitit calls sbatch with this process's environment, and the job inherits it."""
    shell = dict(os.environ)
    listed = environment.passed()
    try:
        os.environ.clear()
        os.environ.update(listed)
        yield
    finally:
        os.environ.update(shell)


def submit(spec: JobSpec, jobs: Sequence[Job]) -> str:
    """Submit one job, or an array if there are several tasks, and return its (parent) id.

    Raises:
        slurm.SlurmError: sbatch refused it; the message is sbatch's.
    """
    executor = _executor(spec)
    spec.folder.mkdir(parents=True, exist_ok=True)
    try:
        # submitit prints sbatch's message too; the error below has it already.
        with _listed_variables_only(), redirect_stderr(io.StringIO()):
            submitted = executor.submit_array(list(jobs))
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()]
        raise slurm.SlurmError("; ".join(lines) or "sbatch failed without a message") from None
    return str(submitted[0].job_id).split("_")[0]
