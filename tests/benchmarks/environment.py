"""The Python of the peers: `.venv-benchmarks`, a layer over the one that runs this, so that torch is not there twice.

Its own packages come first on the path, where an older numpy may stand; everything else is found in the layer below.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-benchmarks"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def peers_python() -> str:
    """Return the interpreter that has the peers; make and fill its environment first where that is not done."""
    python, mark = FOLDER / "bin" / "python", FOLDER / "requirements.sha256"
    below = sysconfig.get_paths()["purelib"]
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + below.encode()).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return str(python)
    print(f"installing the peers into {FOLDER.name} (once; minutes)", file=sys.stderr, flush=True)
    venv.create(FOLDER, clear=True, with_pip=True, symlinks=True)
    own = next((FOLDER / "lib").glob("python*/site-packages"))
    (own / "below.pth").write_text(below + "\n")
    # Never another torch: the registry's plain one is a CUDA build of several gigabytes.
    constraints = FOLDER / "constraints.txt"
    names = ("torch", "torchvision")
    constraints.write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in names))
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*command, "-c", str(constraints), "-r", str(REQUIREMENTS)]).returncode:
        sys.exit("error: pip could not install the peers (without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS)")
    mark.write_text(wanted)
    return str(python)
