"""The one list of environment variables that reach SLURM's commands, the jobs and the workers of this machine.

Everything else of the calling shell is left out: an old filter, or what torchrun has left behind, changes nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from launch import bootstrap

# Who the user is; how SLURM, `module` and the network are reached; where packages and
# weights are. Not which modules are loaded:
# without their other variables, `module load` in a job would skip them.
PASSED = (
    "HOME", "LOGNAME", "PATH", "SHELL", "TZ", "USER",
    "SLURM_CONF", "SLURM_JWT",
    "BASH_ENV", "BASH_FUNC_ml%%", "BASH_FUNC_module%%", "BASH_FUNC__module_raw%%",
    "LMOD_CMD", "LMOD_DIR", "LMOD_PKG", "LMOD_ROOT", "MODULEPATH", "MODULESHOME", "MODULES_CMD",
    "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy", "http_proxy", "https_proxy", "no_proxy",
    "KRB5CCNAME", "SSL_CERT_DIR", "SSL_CERT_FILE",
    "PYTHONNOUSERSITE", "SOURCE_DATE_EPOCH", "TORCH_HOME", "XDG_CACHE_HOME",
)  # fmt: skip
# These describe this machine. Its workers run under the Python of submit.py, which may need LD_LIBRARY_PATH.
LOCAL = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "SLURM_TMPDIR", "TMPDIR")
# A user may have set these for the jobs, so a note names them. Filters such as SQUEUE_PARTITION need no note.
_MEANT = re.compile(
    r"(SBATCH|SLURM|SRUN|NCCL|GLOO|UCX|TORCH|OMP|KMP|MKL|CUBLAS|CUDNN|APPTAINER|SINGULARITY|LD)_|MASTER_|"
    r"(CUDA_VISIBLE_DEVICES|NVIDIA_TF32_OVERRIDE|PYTORCH_CUDA_ALLOC_CONF|RANK|WORLD_SIZE)$"
)


def passed(local: bool = False) -> dict[str, str]:
    """Return the variables of the list that this process has; `local`: for workers of this machine."""
    names = PASSED + LOCAL if local else PASSED
    return {name: os.environ[name] for name in names if name in os.environ}


def left_out(local: bool = False) -> set[str]:
    """Return the names of variables that do not reach the jobs although a user may have set them for these."""
    # Inside a job, SLURM_* are that job's own; no job of this machine reads any of them.
    other = ("SLURM_", "SRUN_", "SBATCH_") if local else ("SLURM_", "SRUN_") if "SLURM_JOB_ID" in os.environ else ()
    names = {name for name in os.environ if _MEANT.match(name) and not name.startswith(other)}
    return (names | set(bootstrap.taken_out)) - passed(local).keys()


def gpus(environ: Mapping[str, str]) -> list[str]:
    """Return the GPUs that CUDA shows to a worker with these variables, without importing torch."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
