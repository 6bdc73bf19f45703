"""What can be known to be wrong before anything starts: one line for each finding.

Writes nothing, apart from one test file that is removed at once when a run is really to start.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.planning.plan import Plan
from launch.planning.shape import shape_of
from launch.planning.site import Site
from launch.state import slurm_client as slurm
from pneumo_dist.chain import STAGES
from pneumo_dist.config import TRAIN_STAGES, ConfigError

CHECKPOINT_BYTES = 400_000_000  # 24.4 million weights in float32, Adam's two averages, the SWA average
WEIGHTS_BYTES = 100_000_000


def _existing(path: Path) -> Path:
    """Return the nearest folder above that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _writable(run_dir: Path, probe: bool) -> str | None:
    """Say why the run directory cannot be written, or None. With `probe` it is plan, and a file in it tried."""
    advice = "choose another place with run_root=DIR"
    parent = _existing(run_dir)
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"{parent} is not writable: {advice}"
    if not probe:
        return None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        test = run_dir / f".write-test-{uuid.uuid4().hex[:8]}"
        try:
            test.write_bytes(b"x" * 4096)
        finally:
            test.unlink(missing_ok=True)
    except OSError as error:
        return f"{run_dir} cannot be written ({error.strerror}): {advice}"
    return None


def _space(plan: Plan) -> str | None:
    config = plan.run.config
    training = [node for node in plan.todo if node.stage in TRAIN_STAGES]
    if not training:
        return None
    each = (config.train.keep + 1) * CHECKPOINT_BYTES + 3 * WEIGHTS_BYTES
    need = len(training) * each
    there = _existing(plan.run.folder)
    free = shutil.disk_usage(there).free
    kept = sum(
        f.stat().st_size for node in training for f in plan.run.dir_of(node.stage, node.fold).rglob("*") if f.is_file()
    )
    if free + kept >= need:
        return None
    return (
        f"{there} has {free / 1e9:.1f} GB free, but the checkpoints need {need / 1e9:.1f} GB: "
        "make room, or choose another place with run_root=DIR"
    )


def _ranks(plan: Plan, site: Site) -> Iterator[str]:
    nodes = plan.request.nodes
    ranks = site.ranks(nodes)
    for stage in dict.fromkeys(node.stage for node in plan.todo if node.stage in TRAIN_STAGES):
        batch = plan.run.config.train_stage(stage).batch_size
        if ranks > batch:
            yield (
                f"stage{stage}.batch_size={batch} cannot feed {ranks} ranks (--nodes {nodes} x {ranks // nodes}): "
                f"use at most {batch} ranks, or a larger batch"
            )


def _paths(plan: Plan) -> Iterator[str]:
    config = plan.run.config
    stages = {node.stage for node in plan.todo}
    if "1" in stages and config.model.weights and not Path(config.model.weights).is_file():
        fetch = "`.venv/bin/python -m pneumo_dist.model.pretrained` fetches them and prints their place"
        yield f"model.weights={config.model.weights}: no such file: give torchvision's resnet34 weights; {fetch}"
    for stage in stages & set(TRAIN_STAGES):
        start = config.train_stage(stage).init_from
        if start:
            from pneumo_dist.model.start import start_path

            for fold in plan.folds:
                try:
                    start_path(start, fold)
                except ConfigError as error:
                    yield f"stage{stage}.{error}"
    if "infer" in stages:
        for path in config.infer.models:
            if not Path(path).exists():
                yield f"infer.models={path}: no such file"


def _sources(plan: Plan) -> Iterator[str]:
    """Ask the packages that read films whether there is something to read."""
    stages = {node.stage for node in plan.todo}
    run, config = plan.run, plan.run.config
    if "preprocess" in stages and not config.phantom.films:
        from pneumo_dist.data.preprocess.source import check_source

        yield from _said(lambda: check_source(run))
    listed = config.phantom.films or "preprocess" in stages  # without infer.dir the same films once more
    if "infer" in stages and (config.infer.dir or not listed):
        from pneumo_dist.inference.film_plan import check_films

        yield from _said(lambda: check_films(run))


def _said(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ConfigError as error:
        yield str(error)


def _limits(plan: Plan, site: Site) -> Iterator[str]:
    """Compare what is asked for with what the partitions allow: SLURM would let such a job wait for ever."""
    known: dict[str | None, slurm.Partition | None] = {}
    for stage in dict.fromkeys(node.stage for node in plan.todo):
        asked, minutes = site.profile.resources(stage), site.profile.minutes(stage)
        if asked.partition not in known:
            known[asked.partition] = slurm.partition(asked.partition)
        facts, name = known[asked.partition], asked.partition or "(default)"
        if facts is None:
            continue
        shape, title = shape_of(stage, plan.request.nodes, site.gpus_per_node), STAGES[stage].title
        if shape.nodes > facts.nodes:
            yield f"--nodes {shape.nodes}: partition {name} has {facts.nodes} nodes"
        if minutes and facts.max_minutes and minutes > facts.max_minutes:
            yield (
                f"time_min: the profile asks for {minutes} minutes for {title}, but partition {name} allows "
                f"{facts.max_minutes}"
            )
        cpus = (asked.cpus_per_task or 0) * shape.tasks_per_node
        if facts.cpus and cpus > facts.cpus:
            yield (
                f"cpus_per_task={asked.cpus_per_task} x {shape.tasks_per_node} tasks a node: {cpus} CPUs for {title}, "
                f"but the nodes of partition {name} have {facts.cpus}"
            )


def problems(plan: Plan, site: Site, probe: bool) -> Iterator[str]:
    """Yield what is wrong with a plan, gravest first.

    Args:
        probe: really try to write; False for a dry run.
    """
    yield from plan.differing
    yield from _ranks(plan, site)
    yield from _paths(plan)
    yield from _sources(plan)
    unwritable = _writable(plan.run.folder, False)
    if unwritable:
        yield unwritable
        return
    cramped = _space(plan)
    if cramped:
        yield cramped
    if site.slurm:
        yield from _limits(plan, site)
    if probe:
        unwritable = _writable(plan.run.folder, True)
        if unwritable:
            yield unwritable


def refuse(plan: Plan, site: Site) -> None:
    """Raise ConfigError with the gravest thing that is wrong."""
    for line in problems(plan, site, probe=True):
        raise ConfigError(line)
