"""Find a Python that has the requirements: this one, else `.venv` beside launch/. Standard library only.

Must run under any Python 3 that can parse it. Never installs anything.
"""

import importlib.util
import os
import sys
from pathlib import Path

# abspath removes `..` and keeps symbolic links: an automounter's target may not exist on another node.
ROOT = Path(os.path.abspath(__file__)).parents[1]
NEEDED = ("torch", "numpy", "cv2", "albumentations", "pydicom", "simplejpeg", "omegaconf", "yaml", "tensorboard")
SLURM_NEEDED = ("submitit",)
OLDEST = (3, 11)  # numpy 2.4 requires it
_MARK = "PNEUMO_REEXECUTED"  # set before re-execution, so that a broken .venv does not re-execute itself forever
SETUP = "bash launch/setup_env.sh"


def missing(names):
    """Return those of `names` that this Python cannot import, without importing any."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def ensure(slurm=False):
    """Return if this Python has the requirements; else re-execute with `.venv`, or exit 2 with the set-up command."""
    lacking = missing(NEEDED + (SLURM_NEEDED if slurm else ()))
    if not lacking and sys.version_info >= OLDEST:
        os.environ.pop(_MARK, None)
        return
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists() and not os.environ.get(_MARK):
        os.environ[_MARK] = "1"
        sys.stdout.flush()
        os.execv(str(python), [str(python), *sys.argv])
    reason = "lacks " + ", ".join(lacking) if lacking else "is older than %d.%d" % OLDEST
    used = python if os.environ.get(_MARK) else sys.executable
    sys.stderr.write("error: %s %s: set up the environment with `cd %s && %s`\n" % (used, reason, ROOT, SETUP))
    sys.exit(2)
