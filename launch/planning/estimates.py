"""Estimates and warnings before submission: unused annotations; run time and memory, from earlier measurements."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.planning.inference import inference_notes
from launch.planning.plan import Plan
from launch.planning.site import Site
from launch.state import progress
from launch.state.ledger import Ledger
from pneumo_dist.chain import Node
from pneumo_dist.config import TRAIN_STAGES, Config, ConfigError
from pneumo_dist.run import Run, RunFolder

MAX_EARLIER_RUNS = 5


@dataclass(frozen=True)
class Throughput:
    """A measured training speed, the run that measured it, and the images that the planned training has left."""

    images_left: float
    images_per_s: float
    run: str


def estimates(plan: Plan, site: Site) -> Iterator[str]:
    """Yield estimates and warnings about the films and trainings of a plan, one line each."""
    config = plan.run.config
    if not config.phantom.films and any(node.stage == "preprocess" for node in plan.todo):
        yield from _annotations(plan.run)
    if any(node.stage == config.train_stages[0] for node in plan.todo):
        yield from _download(config)
    stages, shards = {node.stage for node in plan.todo}, config.data.shards
    if "infer" in stages:
        yield from inference_notes(plan, site)
    if "preprocess" in stages and site.array_tasks > shards:
        yield f"{site.array_tasks - shards} tasks of preprocess have nothing to do: data.shards={shards}"
    for node in plan.todo:
        if node.stage in TRAIN_STAGES:
            name = plan.title(node.stage, node.fold)
            yield from (f"{name} {line}" for line in (*_run_time(plan, node, site), *_memory(plan, node, site)))


def _annotations(run: Run) -> Iterator[str]:
    """Say which films and annotations will not be used."""
    from pneumo_dist.data.preprocess.source import read_source
    from pneumo_dist.data.preprocess.truth import notes

    with suppress(ConfigError):  # a dry run prints it as a warning, with the other problems
        source = read_source(run)
        yield from notes(source.truth, source.unannotated, run.config)


def _download(config: Config) -> Iterator[str]:
    """Warn if training has to download the ImageNet weights: compute nodes often have no internet."""
    first = config.train_stage(config.train_stages[0])
    if config.model.pretrained != "imagenet" or config.model.weights or first.init_from:
        return
    # The cache of torch.hub; importing torch to query it would take seconds.
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    folder = Path(os.environ.get("TORCH_HOME", cache)).expanduser() / "hub" / "checkpoints"
    if not any(folder.glob("resnet34-*.pth")):
        yield (
            f"the ImageNet weights are not in {folder}: the job will download them; if its nodes have no internet, "
            "run `.venv/bin/python -m pneumo_dist.model.pretrained` here first"
        )


def _run_time(plan: Plan, node: Node, site: Site) -> Iterator[str]:
    """Warn if a training needs more time than one job has."""
    limit = site.profile.minutes(node.stage) if site.slurm else None
    throughput = measured_throughput(plan, node, site) if limit else None
    if not limit or not throughput:
        return
    minutes = throughput.images_left / throughput.images_per_s / 60
    timeouts = int(minutes // limit)
    if timeouts < 1:
        return
    count = f"{timeouts} times" if timeouts > 1 else "once"
    if not site.profile.requeue:
        consequence = f"the profile forbids requeueing, so the same command has to be repeated about {count}"
    elif timeouts > site.profile.max_timeouts:
        consequence = f"it would be requeued about {count}, more than max_timeouts={site.profile.max_timeouts} allows"
    else:
        consequence = f"it will be requeued about {count}"
    speed = f"{throughput.images_per_s:.1f} images/s measured in run {throughput.run}"
    yield f"needs about {minutes:.0f} more minutes at {speed}, but its time limit is {limit} minutes: {consequence}"


def measured_throughput(plan: Plan, node: Node, site: Site) -> Throughput | None:
    """Return the throughput of this training so far, else of the newest run with as many ranks and the same profile."""
    run, ranks = plan.run, site.ranks
    settings = run.config.train_stage(node.stage)
    rows = _timed_epochs(run, node)
    if rows and _same_setup(run, node, site, ranks):
        steps = rows[-1]["steps"] - rows[-1]["step"] or rows[-1]["steps"]  # a finished training: --redo repeats it all
        return Throughput(steps * settings.batch_size, rows[-1]["images_per_s"], run.name)
    files = list(run.folder.parent.glob(f"*/fold*/stage{node.stage}/metrics.jsonl"))
    for path in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True)[:MAX_EARLIER_RUNS]:
        earlier_run = RunFolder(path.parents[2])
        earlier_node = Node(node.stage, int(path.parents[1].name.removeprefix("fold")), ())
        if not _same_setup(earlier_run, earlier_node, site, ranks):
            continue
        try:
            earlier = Run.load(earlier_run.folder).config.train_stage(node.stage)
        except ConfigError:  # written by another version
            continue
        rows = _timed_epochs(earlier_run, earlier_node)
        if rows and earlier.size == settings.size:
            images_per_epoch = rows[-1]["steps"] / rows[-1]["epochs"] * earlier.batch_size
            return Throughput(settings.epochs * images_per_epoch, rows[-1]["images_per_s"], earlier_run.name)
    return None


def _same_setup(run: RunFolder, node: Node, site: Site, ranks: int) -> bool:
    """Tell whether the newest submission of a training has this number of ranks and this profile."""
    job = Ledger(run).latest().get(node.key)
    profile = str(site.profile_path) if site.profile_path else None
    return job is not None and job.processes == ranks and job.extra.get("profile") == profile


def _timed_epochs(run: RunFolder, node: Node) -> list[dict[str, Any]]:
    return [row for row in progress.epochs(run, node) if row.get("images_per_s")]


def _memory(plan: Plan, node: Node, site: Site) -> Iterator[str]:
    """Warn if the shards exceed the memory of a node: the page cache cannot hold them from one epoch to the next."""
    size = plan.run.config.train_stage(node.stage).size
    shards_gib = sum(p.stat().st_size for p in plan.run.shard_dir.glob(f"*-{size}-*.npy")) / 2**30
    mem_gb = site.profile.resources(node.stage).mem_gb
    if not site.slurm:
        memory, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, "this machine has"
    elif mem_gb:
        memory, limit = mem_gb, "mem_gb is"
    else:
        partition = site.partition(node.stage)
        memory, limit = (partition.memory_mb / 1024 if partition else 0), "the partition's nodes have"
    if memory and shards_gib > memory:
        yield (
            f"reads {shards_gib:.1f} GiB of shards ({size} px), but {limit} {memory:.3g} GiB: "
            "every epoch will read them from disk again"
        )
