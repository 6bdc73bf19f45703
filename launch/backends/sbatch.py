"""The SLURM side of a submission: a profile and a job's shape become an sbatch script, printed or submitted.

Never decides what to run: plan.py does. The executor of this machine is in local.py.
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
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from launch.jobs import Job
from launch.planning.profile import Profile
from launch.planning.shape import Shape
from launch.state import slurm_client as slurm

# Where neither profile nor partition says more: a day, enough for a stage, short enough for most partitions.
DEFAULT_MINUTES = 1440
MOST_CPUS = {"ranks": 8, "array": 16, "single": 4}
CPUS_UNKNOWN = 4


@functools.lru_cache(maxsize=1)
def blocks_signals() -> bool:
    """Tell whether this machine's `env` can start a program with signals blocked (coreutils 8.31)."""
    try:
        return (
            subprocess.run(
                ["env", "--block-signal=USR2", "true"], capture_output=True, timeout=5, check=False
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def python_command(profile: Profile, guard: bool = True) -> str:
    """Return the shell words that start Python on a node.

    USR2 and TERM are blocked until the job has its handlers: one that comes in the first second stays pending
    across exec, where it would otherwise kill the job without a requeue.
    """
    python = profile.python or shlex.quote(sys.executable)
    return f"env --block-signal=USR2 --block-signal=TERM {python}" if guard else python


class _Script(SlurmExecutor):
    """submitit's executor on any machine: renders the script, and submits where sbatch exists."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(
    folder: Path,
    profile: Profile,
    stage: str,
    shape: Shape,
    *,
    name: str,
    comment: str,
    code: Path,
    after: str,
    facts: slurm.Partition | None,
) -> _Script:
    asked = profile.resources(stage)
    minutes = profile.minutes(stage)
    if minutes is None:
        limits = [DEFAULT_MINUTES, *([facts.max_minutes] if facts and facts.max_minutes else [])]
        minutes = min(limits)
    cpus = asked.cpus_per_task
    if cpus is None:
        most = facts.cpus // shape.tasks_per_node if facts and facts.cpus else CPUS_UNKNOWN
        cpus = max(1, min(most, MOST_CPUS[shape.kind]))
    setup = [
        *profile.setup,
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",  # else `python -m` would find the checkout's code before the copy, if started there
        # SLURM 22.05 to 23.02: srun does not take the job's --cpus-per-task over by itself.
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(profile.env.items())),
    ]
    more: dict[str, object] = {"requeue" if profile.requeue else "no-requeue": True, "kill-on-invalid-dep": "yes"}
    if asked.mem_gb is not None:
        more["mem"] = f"{round(asked.mem_gb * 1024)}M"
    if shape.gpus_per_node and not asked.gres:
        more["gpus-per-node"] = shape.gpus_per_node
    more |= asked.sbatch
    executor = _Script(folder, max_num_timeout=profile.max_timeouts, python=python_command(profile, blocks_signals()))
    executor.update_parameters(
        job_name=name,
        comment=comment,
        time=minutes,
        nodes=shape.nodes,
        ntasks_per_node=shape.tasks_per_node,
        cpus_per_task=cpus,
        gres=f"{asked.gres}:{shape.gpus_per_node}" if asked.gres and shape.gpus_per_node else None,
        partition=asked.partition,
        account=asked.account,
        qos=asked.qos,
        constraint=asked.constraint,
        exclude=asked.exclude,
        mail_type=profile.mail_type or ("FAIL,END" if profile.mail_user else None),
        mail_user=profile.mail_user,
        dependency=after or None,
        # A warning longer than the job would come at its start, again and again.
        signal_delay_s=max(1, min(profile.signal_delay_s, minutes * 60 // 2)),
        setup=setup,
        srun_args=["--kill-on-bad-exit=1", *profile.srun],
        stderr_to_stdout=True,
        array_parallelism=shape.elements,
        wckey=None,
        additional_parameters=more,
    )
    return executor


def script(folder: Path, profile: Profile, stage: str, shape: Shape, **names: object) -> str:
    """Return the sbatch script of a job without submitting it; needs no SLURM on this machine."""
    executor = _executor(folder, profile, stage, shape, **names)  # type: ignore[arg-type]
    if shape.elements > 1:
        executor.parameters["map_count"] = shape.elements
    return executor._make_submission_file_text(executor._submitit_command_str, "")


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """Hide the variables of a job that submit.py itself runs in: sbatch and srun would take them over."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k.startswith(("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")) and k != "SLURM_CONF"
    }
    inside = "SLURM_JOB_ID" in kept
    try:
        for key in kept if inside else ():
            del os.environ[key]
        yield
    finally:
        if inside:
            os.environ.update(kept)


def submit(folder: Path, profile: Profile, stage: str, shape: Shape, jobs: Sequence[Job], **names: object) -> str:
    """Submit one job, or one array when there are several elements, and return its (parent) id.

    Raises:
        slurm.SlurmError: sbatch refused it: its own words.
    """
    executor = _executor(folder, profile, stage, shape, **names)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # submitit prints what sbatch says as well; it is in the error already.
        with _outside_any_job(), redirect_stderr(io.StringIO()):
            submitted = executor.submit_array(list(jobs))
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()]
        raise slurm.SlurmError("; ".join(lines) or "sbatch failed without a word") from None
    return str(submitted[0].job_id).split("_")[0]
