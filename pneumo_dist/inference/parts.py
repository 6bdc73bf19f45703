"""The parts of one inference on disk, the unit of a restart. A part becomes visible only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from pneumo_dist.runtime.files import read_json, write_bytes


def part_folder(out: Path, index: int) -> Path:
    """Return the folder of one finished part."""
    return out / "parts" / f"part-{index:05d}"


def read_part(folder: Path, expected: str | None = None) -> dict[str, Any] | None:
    """Return a finished part, or None if it is missing, damaged, or does not have the `expected` signature.

    A file of another size than recorded (its node lost power) makes the whole part count as missing.
    """
    try:
        part = read_json(folder / "part.json")
        if expected is not None and part["signature"] != expected:
            return None
        for row in part["rows"]:
            for name, (size, _) in row["files"].items():
                if (folder / name).stat().st_size != size:
                    return None
        return dict(part)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def begin_part(out: Path, index: int) -> Path:
    """Return an empty working folder for a part; remove those of killed tasks."""
    parent = out / "parts"
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(f".part-{index:05d}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = parent / f".part-{index:05d}.{socket.gethostname()}.{os.getpid()}"
    folder.mkdir()
    return folder


def finish_part(out: Path, index: int, working: Path, part: dict[str, Any]) -> None:
    """Move a complete part to its final name; it replaces an outdated one."""
    write_bytes(working / "part.json", (json.dumps(part, sort_keys=True) + "\n").encode())
    final = part_folder(out, index)
    if final.exists():
        shutil.rmtree(final)
    working.rename(final)
