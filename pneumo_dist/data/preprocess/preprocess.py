"""The preprocessing job: films and annotations to shards, as an array of tasks; `finalize` closes it.

Everything in the shard directory is a pure function of films, annotations and settings: no times, no hosts, no
absolute paths, no patient keys. A shard under its final name is never rewritten.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pneumo_dist.config import Config
from pneumo_dist.data import shards as files
from pneumo_dist.data.preprocess.decoding import Decoded, Decoder
from pneumo_dist.data.preprocess.finalize import check_bad, finalize
from pneumo_dist.data.preprocess.manifest import (
    FORMAT,
    changed,
    clear,
    remove_leftovers,
    verify,
    write_listing,
    writing,
)
from pneumo_dist.data.preprocess.source import FilmJob, Source, check_source, read_source
from pneumo_dist.data.shards import ShardWriter
from pneumo_dist.runtime.files import read_json
from pneumo_dist.runtime.processes import cores
from pneumo_dist.runtime.runlog import progress_bar
from pneumo_dist.runtime.task import Task

__all__ = ["check_source", "clear", "finalize", "run_part", "verify"]

log = logging.getLogger(__name__)


def run_part(task: Task) -> dict[str, Path]:
    """Write shards j with j mod N == i for array element i of N; those that are there are skipped.

    Raises:
        ConfigError: the source cannot be used, has changed since a shard was written, too many films cannot be read,
            or the disk is full.
        Stopped: a signal asked to leave; finished shards stay.
    """
    config, out = task.config, task.run.shard_dir
    found = read_source(task.run)
    index, count = task.part
    mine = list(range(index, len(found.jobs), count))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out, {f"{j:05d}-of-{len(found.jobs):05d}" for j in mine})
    todo = {j: sizes for j in mine if (sizes := _missing_sizes(out, j, found, config))}
    log.info("element %d of %d: %d of its %d shards to write", index, count, len(todo), len(mine))
    if not todo:
        return {}
    allowed = int(config.data.max_bad * found.films)
    bad: list[dict[str, Any]] = []
    for sizes in sorted(set(todo.values())):
        chosen = [j for j in todo if todo[j] == sizes]
        jobs = [job for j in chosen for job in found.jobs[j]]
        with Decoder(
            found.folder, sizes, min(cores(config.data.workers), len(jobs)), config.data.max_pixels
        ) as decoder:
            results = progress_bar(decoder.run(jobs), len(jobs), "preprocess")
            for j in chosen:
                bad += _write_shard(task, found, j, sizes, results)
                check_bad(bad, allowed, found.films, config)
    return {}


def _write_shard(
    task: Task, found: Source, shard: int, sizes: tuple[int, ...], results: Iterator[tuple[FilmJob, Decoded]]
) -> list[dict[str, Any]]:
    """Write one shard in the given sizes from the next results; return its unreadable films."""
    out, count, jobs = task.run.shard_dir, len(found.jobs), found.jobs[shard]
    films: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    with writing(out):
        with ShardWriter(out, shard, count, sizes, len(jobs)) as writer:
            for _ in jobs:
                task.stop.check()
                job, decoded = next(results)
                if decoded.reason:
                    bad.append(decoded.facts | {"reason": decoded.reason})
                    log.warning("%s is left out: %s", job.path, decoded.reason)
                    continue
                writer.add(decoded.images, decoded.masks)
                films.append(decoded.facts)
            parts = writer.finish()
            limits = {"max_pixels": task.config.data.max_pixels}
            listing = {"format": FORMAT, "shard": shard, "of": count, "settings": limits, "films": films, "bad": bad}
            path = out / files.films_name(shard, count)
            if path.exists() and _without_decoder(read_json(path)) != _without_decoder(listing):
                raise changed(out, f"films of shard {shard} have changed")
        if not path.exists():
            write_listing(path, listing)
        for size in sizes:
            write_listing(out / files.size_name(size, shard, count), parts[size])
    return bad


def _without_decoder(listing: dict[str, Any]) -> dict[str, Any]:
    """Another version of a decoder gives the same pixels (the hash says so) under another name."""
    return listing | {"films": [{k: v for k, v in film.items() if k != "decoder"} for film in listing["films"]]}


def _missing_sizes(out: Path, shard: int, found: Source, config: Config) -> tuple[int, ...]:
    """Return the sizes that this shard lacks; ConfigError where what is there comes from another source."""
    count = len(found.jobs)
    path = out / files.films_name(shard, count)
    if path.exists():
        listing = read_json(path)
        have = sorted((film["id"], film["path"], film["annotation"]) for film in (*listing["films"], *listing["bad"]))
        if have != [(job.id, job.path, job.digest) for job in found.jobs[shard]]:
            raise changed(out, f"the films or annotations of shard {shard} have changed")
        if listing["settings"] != {"max_pixels": config.data.max_pixels}:
            raise changed(out, f"shard {shard} was made with another data.max_pixels")
    return tuple(size for size in config.sizes if not (out / files.size_name(size, shard, count)).exists())
