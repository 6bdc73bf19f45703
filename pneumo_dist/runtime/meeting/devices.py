"""The GPUs that a job was given, those that torch sees, and why it may see none."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pneumo_dist.runtime.meeting.launcher import in_step

ASKED_GPUS = "PNEUMO_GPUS"  # set by the job and the local executor: GPUs per node that were asked for
_COUNTS = (ASKED_GPUS, "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS")
_DRIVER = Path("/proc/driver/nvidia/version")


def given_gpus(environ: Mapping[str, str] = os.environ) -> str:
    """Return what says that this job has GPUs, as NAME=value; "" where nothing does.

    CUDA_VISIBLE_DEVICES=-1 hides them on purpose (srun replaces it).
    """
    if environ.get("CUDA_VISIBLE_DEVICES") == "-1":
        return ""
    # With --exclusive, a job has all GPUs of its nodes, but its steps only those that were asked for.
    lists = ("SLURM_STEP_GPUS",) if in_step(environ) else ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
    said = {name: environ[name] for name in _COUNTS if re.search("[1-9]", environ.get(name, "").rpartition(":")[2])}
    said |= {name: environ[name] for name in lists if environ.get(name)}
    return next((f"{name}={value}" for name, value in said.items()), "").replace(ASKED_GPUS, "--gpus-per-node")


def visible_gpus() -> list[tuple[str, str]]:
    """Return UUID and name of every GPU that torch sees, in its order."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(str(gpu.uuid), str(gpu.name)) for gpu in properties]


def driver() -> str:
    """Return the version of the NVIDIA driver of this node; "" without one."""
    try:
        found = re.search(r"\s(\d{3,}\.[\d.]+)\s", _DRIVER.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def blindness(environ: Mapping[str, str] = os.environ) -> str:
    """Return why this process must not work on the CPU: the job has GPUs and torch sees none. "" where it may."""
    import torch

    given = given_gpus(environ)
    if not given or torch.cuda.is_available():
        return ""
    build, version = torch.version.cuda or torch.version.hip, driver()
    if not build:
        advice = "install a CUDA build (PNEUMO_TORCH=cuda bash launch/setup_env.sh)"
    elif not version:
        advice = "report the node, and name it in the profile's exclude"
    else:
        try:
            torch.cuda.init()
            advice = "see nvidia-smi on this node"
        except (RuntimeError, AssertionError) as error:
            advice = " ".join(str(error).split())[:200]
    return (
        f"the job has GPUs ({given}), but torch {torch.__version__} ({f'CUDA {build}' if build else 'a CPU build'}) "
        f"sees none, with {f'driver {version}' if version else 'no NVIDIA driver'} on this node: {advice}; to work on "
        "the CPU, ask for none (--gpus-per-node 0; without srun also CUDA_VISIBLE_DEVICES=-1)"
    )
