"""The copy of the code that the jobs of a run use, so that edits of the checkout do not change submitted jobs.

An existing copy is compared with the checkout before it is used again: its name is the hash of its files.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from pneumo_dist.config import ConfigError
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
    """Copy the code to `code/<hash>` of the run unless that folder exists, and return the folder.

    Raises:
        ConfigError: an existing copy has a changed, additional or linked file, which the jobs would run, or the disk
            fails.
    """
    try:
        return _copy(root, run.code_dir / code_hash(root))
    except OSError as error:
        raise ConfigError(f"{error.filename or run.code_dir}: cannot copy the code: {error.strerror}") from None


def _copy(root: Path, target: Path) -> Path:
    if target.is_symlink() or target.exists():
        for path in _differences(root, target):
            raise ConfigError(
                f"{target / path} is not as it was copied from {root}: find out who changed it, cancel the jobs of "
                "this run, remove that folder, and repeat the command"
            )
        for cache in list(target.rglob("__pycache__")):  # Python would run what it holds in place of the sources
            shutil.rmtree(cache, ignore_errors=True)  # a running job may write to it
        return target
    temporary = target.with_name(f".copying-{uuid.uuid4().hex[:8]}")
    try:
        for path in _files(root):
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, temporary / path)
        for path in (target.parent, temporary, *temporary.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o022)  # jobs run it: only its owner may write, under any umask
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another submission has just made the same copy
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _differences(root: Path, copied: Path) -> Iterator[Path]:
    """Yield what differs in a copy. Links are not followed: none is made by a copy. Hidden files are never run."""
    if copied.is_symlink():
        yield Path()
        return
    expected = set(_files(root))
    found = {
        path.relative_to(copied)
        for path in copied.rglob("*")
        if path.is_symlink()
        or not (path.is_dir() or path.name.startswith(".") or "__pycache__" in path.relative_to(copied).parts)
    }
    yield from sorted(expected ^ found)
    for path in sorted(expected & found):
        if (copied / path).is_symlink() or (copied / path).read_bytes() != (root / path).read_bytes():
            yield path


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
