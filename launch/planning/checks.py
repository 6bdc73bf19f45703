"""Problems that can be known before anything starts: one line each.

Writes nothing, except one test file that is removed at once when a run is about to start.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.planning.plan import Plan
from launch.planning.shape import shape_of
from launch.planning.site import Site
from launch.state import environment
from launch.state.slurm_client import largest_array
from pneumo_dist.chain import STAGES
from pneumo_dist.config import TRAIN_STAGES, ConfigError

CHECKPOINT_BYTES = 400_000_000  # 24.4 million weights in float32: the weights, Adam's two averages, the SWA average
WEIGHTS_BYTES = 100_000_000
OTHER_FOLDER = "choose another folder with run_root=DIR"


def _existing_parent(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _not_writable(run_dir: Path) -> str | None:
    """Return why permissions forbid writing the run directory, or None. Writes nothing."""
    parent = _existing_parent(run_dir)
    if os.access(parent, os.W_OK | os.X_OK):
        return None
    return f"{parent} is not writable: {OTHER_FOLDER}"


def _write_fails(run_dir: Path) -> str | None:
    """Create the run directory and write a test file in it: a full or read-only disk has valid permissions."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        test = run_dir / f".write-test-{uuid.uuid4().hex[:8]}"
        try:
            test.write_bytes(b"x" * 4096)
        finally:
            test.unlink(missing_ok=True)
    except OSError as error:
        return f"{run_dir} cannot be written ({error.strerror}): {OTHER_FOLDER}"
    return None


def _no_space(plan: Plan) -> str | None:
    config = plan.run.config
    training = [node for node in plan.todo if node.stage in TRAIN_STAGES]
    if not training:
        return None
    needed = len(training) * ((config.train.keep + 1) * CHECKPOINT_BYTES + 3 * WEIGHTS_BYTES)
    folder = _existing_parent(plan.run.folder)
    free = shutil.disk_usage(folder).free
    # A continued training replaces its own checkpoints.
    reused = sum(
        f.stat().st_size for node in training for f in plan.run.dir_of(node.stage, node.fold).rglob("*") if f.is_file()
    )
    if free + reused >= needed:
        return None
    return (
        f"{folder} has {free / 1e9:.1f} GB free, but the checkpoints need {needed / 1e9:.1f} GB: "
        f"free some space, or {OTHER_FOLDER}"
    )


def _too_many_ranks(plan: Plan, site: Site) -> Iterator[str]:
    nodes, ranks = site.nodes, site.ranks
    for stage in dict.fromkeys(node.stage for node in plan.todo if node.stage in TRAIN_STAGES):
        batch = plan.run.config.train_stage(stage).batch_size
        if ranks > batch:
            yield (
                f"stage{stage}.batch_size={batch} is too small for {ranks} ranks (--nodes {nodes} x {ranks // nodes}): "
                f"use at most {batch} ranks, or a larger batch"
            )


def _gpus(site: Site) -> int:
    """Return how many GPUs a node has for its jobs; on this machine they need not be asked for."""
    shell = environment.passed(local=True) | site.profile.env
    return site.gpus_per_node if site.slurm else len(environment.gpus(shell))


def _bad_training(plan: Plan, site: Site) -> Iterator[str]:
    config = plan.run.config
    stages = {node.stage for node in plan.todo}
    if "1" in stages and config.model.weights and not Path(config.model.weights).is_file():
        yield (
            f"model.weights={config.model.weights}: no such file: name the resnet34 weights of torchvision; "
            "`.venv/bin/python -m pneumo_dist.model.pretrained` downloads them and prints their path"
        )
    if stages & set(TRAIN_STAGES):
        yield from _error_line(config.loss.check)
        if config.train.cuda_graph and (site.ranks > 1 or not _gpus(site)):
            yield (
                "train.cuda_graph=true needs one rank with a GPU: give --nodes 1 --gpus-per-node 1, or set "
                "train.cuda_graph=false"
            )
    for stage in stages & set(TRAIN_STAGES):
        init_from = config.train_stage(stage).init_from
        if init_from:
            from pneumo_dist.model.start import start_path

            for fold in plan.folds:
                try:
                    start_path(init_from, fold)
                except ConfigError as error:
                    yield f"stage{stage}.{error}"
    if "infer" in stages:
        for path in config.infer.models:
            if not Path(path).exists():
                yield f"infer.models={path}: no such file"


def _missing_films(plan: Plan) -> Iterator[str]:
    """Run the checks of the packages that read films."""
    stages = {node.stage for node in plan.todo}
    run, config = plan.run, plan.run.config
    if "preprocess" in stages and not config.phantom.films:
        from pneumo_dist.data.preprocess.source import check_source

        yield from _error_line(lambda: check_source(run))
    # Without infer.dir, inference reads the training films: missing ones are named above, or not generated yet.
    there = run.infer_source is not None and run.infer_source.is_dir()
    if "infer" in stages and (there or config.infer.dir or not (config.phantom.films or "preprocess" in stages)):
        from pneumo_dist.inference.film_plan import check_films

        yield from _error_line(lambda: check_films(run))


def _error_line(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ConfigError as error:
        yield str(error)


def _partition_limits(plan: Plan, site: Site) -> Iterator[str]:
    """Compare each job with the limits of its partition: SLURM would keep a job that exceeds them pending forever."""
    for stage in dict.fromkeys(node.stage for node in plan.todo):
        partition = site.partition(stage)
        if partition is None:
            continue
        resources, minutes = site.profile.resources(stage), site.profile.minutes(stage)
        name = resources.partition or "(default)"
        shape, title = shape_of(stage, site.nodes, site.gpus_per_node), STAGES[stage].title
        if shape.nodes > partition.nodes:
            yield f"--nodes {shape.nodes}: partition {name} has {partition.nodes} nodes"
        if minutes and partition.max_minutes and minutes > partition.max_minutes:
            yield (
                f"time_min: the profile requests {minutes} minutes for {title}, but partition {name} allows "
                f"{partition.max_minutes}"
            )
        cpus = (resources.cpus_per_task or 0) * shape.tasks_per_node
        if partition.cpus and cpus > partition.cpus:
            yield (
                f"cpus_per_task={resources.cpus_per_task} x {shape.tasks_per_node} tasks per node: {cpus} CPUs for "
                f"{title}, but the nodes of partition {name} have {partition.cpus}"
            )


def _array_limit(plan: Plan, site: Site) -> Iterator[str]:
    shapes = [shape_of(node.stage, site.nodes, site.gpus_per_node) for node in plan.todo]
    tasks = max((shape.array_tasks for shape in shapes), default=1)
    largest = largest_array() if site.slurm and tasks > 1 else None
    if largest and tasks > largest:
        yield f"--nodes {tasks}: this SLURM allows arrays of at most {largest} tasks (MaxArraySize)"


def problems(plan: Plan, site: Site, probe: bool) -> Iterator[str]:
    """Yield the problems of a plan, most serious first.

    Args:
        probe: also write a test file; False for a dry run.
    """
    yield from plan.conflicts
    if site.slurm and re.search(r"[%\\\x00-\x1f]", str(plan.run.folder)):  # SLURM would replace %j in the names of logs
        yield f"{plan.run.folder}: SLURM cannot write logs below a path with % or \\: {OTHER_FOLDER}"
    yield from _too_many_ranks(plan, site)
    yield from _bad_training(plan, site)
    yield from _missing_films(plan)
    not_writable = _not_writable(plan.run.folder)
    if not_writable:
        yield not_writable
        return
    no_space = _no_space(plan)
    if no_space:
        yield no_space
    yield from _array_limit(plan, site)
    yield from _partition_limits(plan, site)
    write_fails = _write_fails(plan.run.folder) if probe else None
    if write_fails:
        yield write_fails


def refuse(plan: Plan, site: Site) -> None:
    """Raise ConfigError with the most serious problem, if there is one."""
    for line in problems(plan, site, probe=True):
        raise ConfigError(line)
