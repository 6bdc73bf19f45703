"""The parts of one inference on disk: the unit that is restarted. A part is visible as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from pneumo_dist.runtime.files import read_json, write_bytes


def part_folder(out: Path, index: int) -> Path:
    """The folder of one finished part."""
    return out / "parts" / f"part-{index:05d}"


def read_part(folder: Path, wanted: str | None = None) -> dict[str, Any] | None:
    """Return a finished part, or None where it is missing, damaged, or (with `wanted`) of another signature.

    A file whose size is not the recorded one (a node that lost power) makes the whole part missing.
    """
    try:
        part = read_json(folder / "part.json")
        if wanted is not None and part["signature"] != wanted:
            return None
        for row in part["rows"]:
            for name, (size, _) in row["files"].items():
                if (folder / name).stat().st_size != size:
                    return None
        return dict(part)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def begin_part(out: Path, index: int) -> Path:
    """Return an empty working folder for a part; what a killed task left of it is removed."""
    parent = out / "parts"
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(f".part-{index:05d}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = parent / f".part-{index:05d}.{socket.gethostname()}.{os.getpid()}"
    folder.mkdir()
    return folder


def finish_part(out: Path, index: int, working: Path, part: dict[str, Any]) -> None:
    """Make a part visible as a whole, in place of an outdated one."""
    write_bytes(working / "part.json", (json.dumps(part, sort_keys=True) + "\n").encode())
    final = part_folder(out, index)
    if final.exists():
        shutil.rmtree(final)
    working.rename(final)
