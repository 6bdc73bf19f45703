"""Write films and annotations to shards, as an array of tasks; the finalize job follows.

The content of the shard directory is a pure function of films, annotations and settings: it holds no times, hosts,
absolute paths or patient keys. A shard under its final name is never rewritten.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pneumo_dist.config import Config
from pneumo_dist.data import shards as files
from pneumo_dist.data.films import grey
from pneumo_dist.data.preprocess.decoding import Decoded, Decoder
from pneumo_dist.data.preprocess.finalize import check_bad
from pneumo_dist.data.preprocess.manifest import FORMAT, changed, remove_leftovers, write_listing, writing
from pneumo_dist.data.preprocess.source import FilmJob, Source, read_source
from pneumo_dist.data.shards import ShardWriter
from pneumo_dist.runtime.files import read_json
from pneumo_dist.runtime.processes import cores
from pneumo_dist.runtime.runlog import progress_bar
from pneumo_dist.runtime.task import Task

log = logging.getLogger(__name__)


def write_shards(task: Task) -> dict[str, Path]:
    """Write the shards of array task i of N, those with j mod N == i; finished ones are skipped.

    Raises:
        ConfigError: the source is unusable or has changed since a shard was written, too many films are unreadable,
            or the disk is full.
        Stopped: a signal asked this process to stop; finished shards are kept.
    """
    config, out = task.config, task.run.shard_dir
    source = read_source(task.run)
    index, count = task.part
    shards = range(index, len(source.jobs), count)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out, {f"{j:05d}-of-{len(source.jobs):05d}" for j in shards})
    todo = {j: sizes for j in shards if (sizes := _missing_sizes(out, j, source, config))}
    log.info("task %d/%d: writing %d of %d shards", index + 1, count, len(todo), len(shards))
    if not todo:
        return {}
    bad: list[dict[str, Any]] = []
    for sizes in sorted(set(todo.values())):
        chosen = [j for j in todo if todo[j] == sizes]
        jobs = [job for j in chosen for job in source.jobs[j]]
        workers = min(cores(config.data.workers), len(jobs))
        with Decoder(source.folder, sizes, workers, config.data.max_pixels) as decoder:
            results = progress_bar(decoder.run(jobs), len(jobs), "preprocess")
            for j in chosen:
                bad += _write_shard(task, source, j, sizes, results)
                check_bad(bad, source.films, config)
    return {}


def _write_shard(
    task: Task, source: Source, shard: int, sizes: tuple[int, ...], results: Iterator[tuple[FilmJob, Decoded]]
) -> list[dict[str, Any]]:
    """Write one shard in the given sizes from the next results; return its unreadable films."""
    out, count, jobs = task.run.shard_dir, len(source.jobs), source.jobs[shard]
    films: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    with writing(out):
        with ShardWriter(out, shard, count, sizes, len(jobs)) as writer:
            for _ in jobs:
                task.stop.check()
                job, decoded = next(results)
                if decoded.reason:
                    bad.append(decoded.facts | {"reason": decoded.reason})
                    log.warning("%s is excluded: %s", job.path, decoded.reason)
                    continue
                writer.add(decoded.images, decoded.masks)
                films.append(decoded.facts)
            parts = writer.finish()
            settings = _settings(task.config)
            listing = {"format": FORMAT, "shard": shard, "of": count, "settings": settings, "films": films, "bad": bad}
            path = out / files.films_name(shard, count)
            if path.exists() and _identity(read_json(path)) != _identity(listing):
                raise changed(out, f"films of shard {shard} have changed")
        if not path.exists():
            write_listing(path, listing)
        for size in sizes:
            write_listing(out / files.size_name(size, shard, count), parts[size])
    return bad


def _identity(listing: dict[str, Any]) -> dict[str, Any]:
    """Return a listing without texts: other versions word them differently. The hashes of the content stay."""
    texts = {"decoder", "warnings", "reason"}
    return listing | {
        kind: [{key: value for key, value in film.items() if key not in texts} for film in listing[kind]]
        for kind in ("films", "bad")
    }


def _settings(config: Config) -> dict[str, Any]:
    return {"max_pixels": config.data.max_pixels, "grey": grey.VERSION}


def _missing_sizes(out: Path, shard: int, source: Source, config: Config) -> tuple[int, ...]:
    """Return the sizes to write of a shard; raise ConfigError if its existing files come from another source."""
    count = len(source.jobs)
    path = out / files.films_name(shard, count)
    if path.exists():
        listing = read_json(path)
        written = sorted(
            (film["id"], film["path"], film["annotation"]) for film in (*listing["films"], *listing["bad"])
        )
        if written != [(job.id, job.path, job.digest) for job in source.jobs[shard]]:
            raise changed(out, f"the films or annotations of shard {shard} have changed")
        if listing["settings"] != _settings(config):
            raise changed(out, "data.max_pixels or this program's grey mapping has changed")
    return tuple(size for size in config.sizes if not (out / files.size_name(size, shard, count)).exists())
