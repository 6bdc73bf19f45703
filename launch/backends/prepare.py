"""The changes on disk that precede any job: nobody else writing, old results aside, configurations, copy of the code.

Starts nothing and submits nothing.
"""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.planning import plan
from launch.planning.arguments import Request
from launch.planning.plan import Plan
from launch.planning.site import Site
from launch.state import codecopy
from launch.state import slurm_client as slurm
from launch.state.ledger import Entry, Ledger, holder
from pneumo_dist import config as configuration
from pneumo_dist.chain import Node
from pneumo_dist.config import ConfigError
from pneumo_dist.inference.film_plan import plan as plan_films
from pneumo_dist.runtime.files import write_text
from pneumo_dist.runtime.task import infer_source, shard_dir, stage_dir


def lock_path(run_dir: Path, key: str) -> Path:
    """Return the lock file of one job of a run."""
    return run_dir / "jobs" / f".{key}.lock"


def refuse_live(made: Plan, ledger: Ledger, slurm_answers: bool) -> None:
    """Raise ConfigError while another job, on SLURM or on this machine, writes one of the plan's stages.

    Args:
        slurm_answers: SLURM was there a moment ago. Where there is none (a run taken to another machine), its
            jobs are taken as ended and said to be; an attempt that is overtaken leaves without writing.
    """
    try:
        live = ledger.live([node.key for node in made.todo])
    except slurm.SlurmError as error:
        if slurm_answers:
            raise ConfigError(
                f"SLURM does not say which jobs of this run are live ({error}): try again later"
            ) from None
        print(
            "note: this run has been on SLURM; no SLURM answers here, so its jobs there are taken as ended", flush=True
        )
        live = {}
    for node in made.todo:
        name = plan.title(node.stage, node.fold, len(made.folds))
        if node.key in live:
            raise ConfigError(
                f"SLURM job {live[node.key]} is on {name} of this run already: wait for it, "
                f"or cancel it with launch/runs.py cancel {made.recipe.word}"
            )
        held = holder(lock_path(made.recipe.run_dir, node.key))
        if held:
            raise ConfigError(f"{held} is on {name} of this run already: wait for it, or stop it")


@dataclass(frozen=True)
class Prepared:
    """What was changed on disk."""

    code: Path  # the copy of the code
    aside: tuple[tuple[Path, Path], ...] = ()  # folders that were renamed: before, after

    def undo(self) -> None:
        """Put old results back where they were: the jobs that were to replace them have not been submitted."""
        for before, after in self.aside:
            if not before.exists():
                after.rename(before)


def prepare(request: Request, made: Plan) -> Prepared:
    """Put old results aside (--redo), write the configurations and the copy of the code."""
    recipe = made.recipe
    aside = _put_aside(made) if request.redo else ()
    text = configuration.to_yaml(recipe.config)
    if not (recipe.run_dir / "config.yaml").exists():
        write_text(recipe.run_dir / "config.yaml", text)
    for node in made.todo:
        if node.stage in plan.DERIVED:  # made anew from what it reads; an old mark would be in the way
            (stage_dir(recipe.config, recipe.run_dir, node.stage, node.fold) / "DONE.json").unlink(missing_ok=True)
        write_text(recipe.run_dir / "jobs" / f"{node.key}.yaml", text)
    films = infer_source(recipe.config, recipe.run_dir) if any(node.stage == "infer" for node in made.todo) else None
    if films and films.is_dir():  # synthetic films may not be there yet: then the first task decides
        plan_films(recipe.config, recipe.run_dir)
    return Prepared(codecopy.copy(plan.ROOT, recipe.run_dir), aside)


def _put_aside(made: Plan) -> tuple[tuple[Path, Path], ...]:
    config, run_dir = made.recipe.config, made.recipe.run_dir
    shared = config.data.shard_dir and any(node.stage == "preprocess" for node in made.todo)
    if shared and shard_dir(config, run_dir).exists():
        raise ConfigError(
            f"--redo: the shards in {config.data.shard_dir} may serve other runs: remove that folder yourself, "
            "or name another data.shard_dir"
        )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    done: list[tuple[Path, Path]] = []
    for folder in dict.fromkeys(stage_dir(config, run_dir, node.stage, node.fold) for node in made.todo):
        if folder.exists():
            aside = folder.with_name(f"{folder.name}.old-{stamp}")
            folder.rename(aside)
            done.append((folder, aside))
            print(f"--redo: the old result is now {aside}", flush=True)
    return tuple(done)


_git_state = functools.lru_cache(maxsize=1)(codecopy.git_state)


def entry(request: Request, made: Plan, site: Site, node: Node, code: Path, **more: Any) -> Entry:
    """Return the ledger's line for a job."""
    extra = {
        "nodes": request.nodes,
        "gpus_per_node": site.gpus_per_node,
        "profile": str(site.profile_path) if site.profile_path else None,
        "git": _git_state(plan.ROOT),
        "command": sys.argv,
    }
    cluster = "slurm" if site.slurm else "local"
    same: dict[str, Any] = {
        "key": node.key,
        "stage": node.stage,
        "fold": node.fold,
        "cluster": cluster,
        "code": code.name,
    }
    return Entry(**same, extra=extra, **more)
