"""What is no mistake but worth knowing before jobs wait in a queue: time and memory, against what was measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.planning.plan import Plan
from launch.planning.site import Site
from launch.state import progress
from launch.state import slurm_client as slurm
from launch.state.ledger import Ledger
from pneumo_dist.chain import Node
from pneumo_dist.config import TRAIN_STAGES, Config, ConfigError
from pneumo_dist.run import Run, RunFolder

LOOK_BACK = 5  # earlier runs that are looked at


@dataclass(frozen=True)
class Measured:
    """How fast a training was: the images that are left for the one asked about, per second, and in which run."""

    images_left: float
    images_per_s: float
    run: str


def remarks(plan: Plan, site: Site) -> Iterator[str]:
    """Yield one line for each finding about the trainings of a plan."""
    config = plan.run.config
    if any(node.stage == config.train_stages[0] for node in plan.todo):
        yield from _download(config)
    for node in plan.todo:
        if node.stage in TRAIN_STAGES:
            name = plan.title(node.stage, node.fold)
            yield from (f"{name} {line}" for line in (*_time(plan, node, site), *_memory(plan, node, site)))


def _download(config: Config) -> Iterator[str]:
    """Warn where training would have to fetch the ImageNet weights: compute nodes seldom have internet."""
    first = config.train_stage(config.train_stages[0])
    if config.model.pretrained != "imagenet" or config.model.weights or first.init_from:
        return
    # Where torch.hub keeps them; asking torch itself would take seconds.
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    folder = Path(os.environ.get("TORCH_HOME", cache)).expanduser() / "hub" / "checkpoints"
    if not any(folder.glob("resnet34-*.pth")):
        yield (
            f"the ImageNet weights are not in {folder}: the job will fetch them; if its nodes have no internet, run "
            "`.venv/bin/python -m pneumo_dist.model.pretrained` here first"
        )


def _time(plan: Plan, node: Node, site: Site) -> Iterator[str]:
    limit = site.profile.minutes(node.stage) if site.slurm else None
    known = measured(plan, node, site) if limit else None
    if not limit or not known:
        return
    need = known.images_left / known.images_per_s / 60
    times = int(need // limit)
    if times < 1:
        return
    often = f"{times} times" if times > 1 else "once"
    if not site.profile.requeue:
        then = f"the profile forbids requeueing, so the same command has to be repeated about {often}"
    elif times > site.profile.max_timeouts:
        then = f"it would be requeued about {often}, more than max_timeouts={site.profile.max_timeouts} allows"
    else:
        then = f"it will be requeued about {often}"
    speed = f"{known.images_per_s:.1f} images/s measured in run {known.run}"
    yield f"needs about {need:.0f} more minutes at the {speed} and has {limit}: {then}"


def measured(plan: Plan, node: Node, site: Site) -> Measured | None:
    """Return the speed of this training so far, else that of the newest run of as many ranks by the same profile."""
    run, ranks = plan.run, site.ranks(plan.request.nodes)
    settings = run.config.train_stage(node.stage)
    own = _rows(run, node)
    if own and _alike(run, node, site, ranks):
        steps = own[-1]["steps"] - own[-1]["step"] or own[-1]["steps"]  # all of them again with --redo
        return Measured(steps * settings.batch_size, own[-1]["images_per_s"], run.name)
    files = list(run.folder.parent.glob(f"*/fold*/stage{node.stage}/metrics.jsonl"))
    for path in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True)[:LOOK_BACK]:
        folder = RunFolder(path.parents[2])
        other = Node(node.stage, int(path.parents[1].name.removeprefix("fold")), ())
        if not _alike(folder, other, site, ranks):
            continue
        try:
            its = Run.load(folder.folder).config.train_stage(node.stage)
        except ConfigError:
            continue
        rows = _rows(folder, other)
        if rows and its.size == settings.size:
            epoch = rows[-1]["steps"] / rows[-1]["epochs"] * its.batch_size
            return Measured(settings.epochs * epoch, rows[-1]["images_per_s"], folder.name)
    return None


def _alike(run: RunFolder, node: Node, site: Site, ranks: int) -> bool:
    """Tell whether a training was last submitted with as many ranks and the same profile."""
    job = Ledger(run).latest().get(node.key)
    profile = str(site.profile_path) if site.profile_path else None
    return job is not None and job.processes == ranks and job.extra.get("profile") == profile


def _rows(run: RunFolder, node: Node) -> list[dict[str, Any]]:
    return [row for row in progress.epochs(run, node) if row.get("images_per_s")]


def _memory(plan: Plan, node: Node, site: Site) -> Iterator[str]:
    """Compare the shards of a training with the memory of a node: what does not fit is read again in every epoch."""
    size = plan.run.config.train_stage(node.stage).size
    held = sum(p.stat().st_size for p in plan.run.shard_dir.glob(f"*-{size}-*.npy"))
    asked = site.profile.resources(node.stage)
    if not site.slurm:
        memory, what = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, "this machine has"
    elif asked.mem_gb:
        memory, what = asked.mem_gb, "mem_gb is"
    else:
        facts = slurm.partition(asked.partition) if held else None
        memory, what = (facts.memory_mb / 1024 if facts else 0), "the partition's nodes have"
    if memory and held / 2**30 > memory:
        yield (
            f"reads shards of {size} px of {held / 2**30:.1f} GiB, {what} {memory:.3g} GiB: "
            "they will be read from the disk again in every epoch"
        )
