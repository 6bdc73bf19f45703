"""The copy of the code that the jobs of a run use, so that edits of the checkout do not change submitted jobs.

Never changes an existing copy: its name is the hash of its files.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from pneumo_dist.run import RunFolder

FOLDERS = ("launch", "pneumo_dist", "configs")


def _files(root: Path) -> list[Path]:
    return sorted(
        path.relative_to(root)
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    )


def code_hash(root: Path) -> str:
    """Return a short hash of the names and bytes of all copied files."""
    digest = hashlib.sha256()
    for path in _files(root):
        data = (root / path).read_bytes()
        digest.update(f"{path.as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:12]


def copy(root: Path, run: RunFolder) -> Path:
    """Copy the code to `code/<hash>` of the run unless that folder exists, and return the folder."""
    target = run.code_dir / code_hash(root)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".copying-", dir=target.parent))
    try:
        for path in _files(root):
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, temporary / path)
        temporary.chmod(0o755)  # mkdtemp allows only the owner
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another submission has just made the same copy
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def git_state(root: Path) -> dict[str, object] | None:
    """Return the commit of the checkout and the number of copied files that differ from it; None without git."""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=all", "--", *FOLDERS])
    try:
        answers = [
            subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=False)
            for args in commands
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answers[0].returncode:
        return None
    return {"commit": answers[0].stdout.strip(), "changed_files": len(answers[1].stdout.splitlines())}
