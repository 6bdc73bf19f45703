"""The parts of one inference on disk. A part becomes visible only when it is complete; an unfinished one goes on."""

from __future__ import annotations

import json
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from pneumo_dist.runtime.files import read_json, write_bytes, write_text

JOURNAL = "batches.jsonl"  # in a working folder: its signature, then the rows of each finished batch


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
        return dict(part) if _whole(folder, part["rows"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _whole(folder: Path, rows: list[dict[str, Any]]) -> bool:
    """Tell whether the files of these films have the recorded sizes."""
    return all((folder / name).stat().st_size == size for row in rows for name, (size, _) in row["files"].items())


def begin_part(out: Path, index: int, signature: str) -> tuple[Path, list[list[dict[str, Any]]]]:
    """Return a working folder for a part, and the rows of the batches that a stopped task has finished in it.

    Args:
        signature: of the part and of how it is cut into batches; what has another one is removed.
    """
    parent = out / "parts"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".part-{index:05d}.{uuid.uuid4().hex}"
    batches: list[list[dict[str, Any]]] = []
    for stale in sorted(parent.glob(f".part-{index:05d}.*")):
        if not batches and (batches := _batches(stale, signature)):
            stale.rename(folder)
        else:
            shutil.rmtree(stale, ignore_errors=True)
    if not batches:
        folder.mkdir()
    write_text(folder / JOURNAL, "".join(f"{json.dumps(line)}\n" for line in [signature, *batches]))
    return folder, batches


def append_batch(working: Path, rows: list[dict[str, Any]]) -> None:
    """Record a finished batch of an unfinished part."""
    with (working / JOURNAL).open("a") as file:
        file.write(f"{json.dumps(rows)}\n")


def _batches(folder: Path, signature: str) -> list[list[dict[str, Any]]]:
    """Return the batches of an unfinished part with this signature, up to the first one that is not whole."""
    batches: list[list[dict[str, Any]]] = []
    # Line by line as bytes: where a node lost power, the last line may hold anything.
    damage = (OSError, ValueError, TypeError, KeyError, AttributeError)
    with suppress(*damage), (folder / JOURNAL).open("rb") as lines:
        if json.loads(next(lines, b"null")) != signature:
            return []
        for line in lines:
            rows = json.loads(line)
            if not rows or not _whole(folder, rows):
                break
            batches.append(rows)
    return batches


def finish_part(out: Path, index: int, working: Path, part: dict[str, Any]) -> None:
    """Move a complete part to its final name; it replaces an outdated one."""
    (working / JOURNAL).unlink()
    write_bytes(working / "part.json", (json.dumps(part, sort_keys=True) + "\n").encode())
    final = part_folder(out, index)
    if final.exists():
        shutil.rmtree(final)
    working.rename(final)
