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
# Variables by which a shell makes Python import other packages, skip checks, or wait for input at its end.
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONINSPECT")
_TAKEN_OUT = "PNEUMO_TAKEN_OUT"  # carries `taken_out` over a re-execution
taken_out: list[str] = []  # those of FOREIGN that the shell had set


def missing(names):
    """Return those of `names` that this Python cannot import, without importing any."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def ensure(slurm=False):
    """Return if this Python has the requirements; else re-execute with `.venv`, or exit 2 with the set-up command.

    Re-executes first without the variables in FOREIGN, and in UTF-8 mode if the locale has another encoding.
    """
    foreign = [name for name in FOREIGN if name in os.environ]
    if foreign or (sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1"):
        for name in foreign:
            del os.environ[name]
        os.environ["PYTHONUTF8"] = "1"
        os.environ[_TAKEN_OUT] = " ".join(foreign)
        _reexecute(sys.executable)
    lacking = missing(NEEDED + (SLURM_NEEDED if slurm else ()))
    if not lacking and sys.version_info >= OLDEST:
        os.environ.pop(_MARK, None)
        taken_out.extend(os.environ.pop(_TAKEN_OUT, "").split())
        return
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists() and not os.environ.get(_MARK):
        os.environ[_MARK] = "1"
        _reexecute(str(python))
    reason = "lacks " + ", ".join(lacking) if lacking else "is older than %d.%d" % OLDEST
    if os.environ.get(_TAKEN_OUT):
        reason += " (without %s, which is ignored)" % os.environ[_TAKEN_OUT]
    used = python if os.environ.get(_MARK) else sys.executable
    sys.stderr.write("error: %s %s: set up the environment with `cd %s && %s`\n" % (used, reason, ROOT, SETUP))
    sys.exit(2)


def _reexecute(python):
    sys.stdout.flush()
    os.execv(python, [python, *sys.argv])
