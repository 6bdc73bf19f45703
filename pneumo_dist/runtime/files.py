"""Atomic file writes (temporary name, fsync, rename), csv, JSON and hashes. Standard library only."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pneumo_dist.runtime.failure import disk_error


def _fsync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system can sync a directory."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on a clean exit, remove it on an error.

    The temporary name starts with a dot, carries the final suffix (writers such as np.save check it)
    and is unique, so that two writers of the same file cannot mix their bytes.

    Raises:
        OSError: the disk error, naming `path`, also where the writer has replaced it by its own (torch.save does).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except Exception as error:
        disk = disk_error(error)
        if disk is None or disk.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(disk.errno, disk.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # on a read-only disk the error above is the one to report
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically."""
    write_bytes(path, text.encode())


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows of cells as csv, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON atomically. Raise ValueError for NaN: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text())


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the hexadecimal sha256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()
