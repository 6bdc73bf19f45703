"""Manifests of the shard directory (its content with hashes): write, verify, clear.

This module opens no film, and removes only files of this program.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pneumo_dist.config import Config, ConfigError
from pneumo_dist.data import shards as files
from pneumo_dist.data.preprocess.source import Source
from pneumo_dist.runtime.files import read_json, sha256_file, write_text
from pneumo_dist.runtime.processes import cores

FORMAT = "pneumo_dist.shards/1"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise the errors of a full or read-only disk as ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot write the shards ({error.strerror or error}): free disk space or set "
            "data.shard_dir=DIR; finished shards are kept"
        ) from None


def changed(out: Path, change: str) -> ConfigError:
    """Return the error for a source that differs from the one of the shards."""
    return ConfigError(
        f"{out}: {change} since its shards were written: start over with --redo, or set data.shard_dir=DIR"
    )


def write_listing(path: Path, value: dict[str, Any]) -> None:
    """Write a long JSON object atomically, one line per key and per item of a list of objects.

    `json.dumps(indent=2)` would put every number on a line of its own, and takes its slow path in Python.
    """
    lines = []
    for name, part in value.items():
        rows = part if isinstance(part, list) and part and isinstance(part[0], dict) else None
        text = "[\n    " + ",\n    ".join(map(json.dumps, rows)) + "\n  ]" if rows else json.dumps(part)
        lines.append(f"  {json.dumps(name)}: {text}")
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def remove_leftovers(out: Path, shards: set[str] | None = None) -> None:
    """Remove the temporary files of killed writers, of the given shards or of all."""
    for path in (*out.iterdir(), *(out / "pictures").glob(".*")):
        match = files.TEMPORARY.match(path.name)
        if match and (shards is None or any(match["stem"].endswith(name) for name in shards)):
            path.unlink(missing_ok=True)


def write_manifests(
    out: Path, source: Source, listings: list[dict[str, Any]], parts: dict[int, list[dict[str, Any]]], config: Config
) -> dict[str, Path]:
    """Write one manifest per size, and manifest.json for the whole directory; return their paths."""
    count = len(source.jobs)
    settings = {"unannotated": config.data.unannotated, "max_pixels": config.data.max_pixels, "shards": count}
    settings |= source.truth.record
    for size, of_size in parts.items():
        content = {"format": FORMAT, "size": size, "shards": count, "settings": settings, "parts": of_size}
        write_listing(out / f"manifest-{size}.json", content)
    sizes = sorted(int(path.stem.split("-")[1]) for path in out.glob("manifest-*.json"))
    outputs = {f"manifest-{size}": out / f"manifest-{size}.json" for size in sizes}  # sizes of earlier runs, too
    shards = []
    for j, listing in enumerate(listings):
        ids = [film["id"] for film in listing["films"]]
        decoders = sorted({film["decoder"] for film in listing["films"]})
        names = [f(size, j, count) for size in sizes for f in (files.image_name, files.mask_name)]
        lists = [files.films_name(j, count), *(files.size_name(size, j, count) for size in sizes)]
        hashes = {n: h for name in lists[1:] for n, h in read_json(out / name)["files"].items()}
        shards.append(
            {
                "shard": j,
                "films": len(ids),
                "ids": ids,
                "rows": [[film["rows"], film["columns"]] for film in listing["films"]],
                "source_sha256": [film["sha256"] for film in listing["films"]],
                "annotation_sha256": [film["annotation"] for film in listing["films"]],
                "bad": [film["id"] for film in listing["bad"]],
                "decoders": decoders,
                "files": {name: hashes[name] for name in names} | {name: sha256_file(out / name) for name in lists},
            }
        )
    summaries = ["cases.csv", "audit.json", "audit.txt", *(f"manifest-{size}.json" for size in sizes)]
    content = {
        "format": FORMAT,
        "shards": count,
        "sizes": sizes,
        "settings": settings,
        "files": {name: sha256_file(out / name) for name in summaries},
        "parts": shards,
    }
    write_listing(out / "manifest.json", content)
    return outputs | {"manifest": out / "manifest.json"}


def verify(folder: Path) -> list[str]:
    """Hash every file of a finished shard directory again; return its problems, one line each.

    Raises:
        ConfigError: the directory is not a finished shard directory.
    """
    folder = Path(folder)
    try:
        manifest = read_json(folder / "manifest.json")
        hashes = dict(manifest["files"])
        for part in manifest["parts"]:
            hashes |= part["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}: no finished shards in this folder: run --stage preprocess first") from None

    def problem(item: tuple[str, str]) -> str | None:
        path = folder / item[0]
        try:
            return None if sha256_file(path) == item[1] else f"{path}: content has changed"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"

    with ThreadPoolExecutor(cores(0)) as pool:
        problems = [line for line in pool.map(problem, sorted(hashes.items())) if line]
    foreign = (path.name for path in folder.iterdir() if files.OURS.match(path.name))
    return problems + [f"{folder / name}: not in the manifest" for name in sorted(foreign) if name not in hashes]


def clear(folder: Path, names: Iterable[str] = ("cases.csv", "audit.json", "audit.txt", "DONE.json")) -> None:
    """Remove the files of this program, and no others, from a shard directory."""
    for path in [*folder.iterdir()] if folder.is_dir() else []:
        ours = files.OURS.match(path.name) or files.TEMPORARY.match(path.name) or path.name.startswith("manifest")
        if path.is_file() and (ours or path.name in names):
            path.unlink(missing_ok=True)
    (folder / "pictures" / "augmented.png").unlink(missing_ok=True)
