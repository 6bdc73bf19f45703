"""Manifests of the shard directory: what is in it, with hashes; checking it, clearing it.

Nothing here opens a film. Only files of this program are ever removed.
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
    """Turn a full or read-only disk into one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot write the shards ({error.strerror or error}): make room or set data.shard_dir=DIR; "
            "finished shards are kept"
        ) from None


def changed(out: Path, what: str) -> ConfigError:
    return ConfigError(f"{out}: {what} since its shards were written: --redo starts over, or set data.shard_dir=DIR")


def write_listing(path: Path, value: dict[str, Any]) -> None:
    """Write a long JSON object atomically, a line per key and per item of a list of objects: quick, yet readable."""
    lines = []
    for name, part in value.items():
        rows = part if isinstance(part, list) and part and isinstance(part[0], dict) else None
        text = "[\n    " + ",\n    ".join(map(json.dumps, rows)) + "\n  ]" if rows else json.dumps(part)
        lines.append(f"  {json.dumps(name)}: {text}")
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def remove_leftovers(out: Path, shards: set[str] | None = None) -> None:
    """Remove what killed writers left behind: of these shards, or all."""
    for path in (*out.iterdir(), *(out / "pictures").glob(".*")):
        match = files.TEMPORARY.match(path.name)
        if match and (shards is None or any(match["stem"].endswith(name) for name in shards)):
            path.unlink(missing_ok=True)


def write_manifests(
    out: Path, found: Source, listings: list[dict[str, Any]], parts: dict[int, list[dict[str, Any]]], config: Config
) -> dict[str, Path]:
    """Write one manifest per size, and manifest.json over everything that is in the directory."""
    count = len(found.jobs)
    settings = {"unannotated": config.data.unannotated, "max_pixels": config.data.max_pixels, "shards": count}
    for size, each in parts.items():
        content = {"format": FORMAT, "size": size, "shards": count, "settings": settings, "parts": each}
        write_listing(out / f"manifest-{size}.json", content)
    sizes = sorted(int(path.stem.split("-")[1]) for path in out.glob("manifest-*.json"))
    outputs = {f"manifest-{size}": out / f"manifest-{size}.json" for size in sizes}  # those of earlier runs as well
    shards = []
    for j, listing in enumerate(listings):
        ids = [film["id"] for film in listing["films"]]
        decoders = sorted({film["decoder"] for film in listing["films"]})
        names = [f(size, j, count) for size in sizes for f in (files.image_name, files.mask_name)]
        own = [files.films_name(j, count), *(files.size_name(size, j, count) for size in sizes)]
        hashes = {n: h for name in own[1:] for n, h in read_json(out / name)["files"].items()}
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
                "files": {name: hashes[name] for name in names} | {name: sha256_file(out / name) for name in own},
            }
        )
    listed = ["cases.csv", "audit.json", "audit.txt", *(f"manifest-{size}.json" for size in sizes)]
    others = {name: sha256_file(out / name) for name in listed}
    content = {
        "format": FORMAT,
        "shards": count,
        "sizes": sizes,
        "settings": settings,
        "files": others,
        "parts": shards,
    }
    write_listing(out / "manifest.json", content)
    return outputs | {"manifest": out / "manifest.json"}


def verify(folder: Path) -> list[str]:
    """Hash every file of a finished shard directory again; return what is wrong, one line each, [] when all is well.

    Raises:
        ConfigError: there is no finished shard directory.
    """
    folder = Path(folder)
    try:
        manifest = read_json(folder / "manifest.json")
        wanted = dict(manifest["files"])
        for part in manifest["parts"]:
            wanted |= part["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}: no finished shards here: run --stage preprocess first") from None

    def problem(item: tuple[str, str]) -> str | None:
        path = folder / item[0]
        try:
            return None if sha256_file(path) == item[1] else f"{path}: its content has changed"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"

    with ThreadPoolExecutor(cores(0)) as pool:
        problems = [line for line in pool.map(problem, sorted(wanted.items())) if line]
    foreign = (path.name for path in folder.iterdir() if files.OURS.match(path.name))
    return problems + [f"{folder / name}: not in the manifest" for name in sorted(foreign) if name not in wanted]


def clear(folder: Path, names: Iterable[str] = ("cases.csv", "audit.json", "audit.txt", "DONE.json")) -> None:
    """Remove the files of this program, and no others, from a shard directory, so that it can be written anew."""
    for path in [*folder.iterdir()] if folder.is_dir() else []:
        ours = files.OURS.match(path.name) or files.TEMPORARY.match(path.name) or path.name.startswith("manifest")
        if path.is_file() and (ours or path.name in names):
            path.unlink(missing_ok=True)
    (folder / "pictures" / "augmented.png").unlink(missing_ok=True)
