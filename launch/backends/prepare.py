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

from launch.planning.plan import DERIVED, ROOT, Plan
from launch.planning.site import Site
from launch.state import codecopy
from launch.state import slurm_client as slurm
from launch.state.ledger import Entry, Ledger
from launch.state.locks import holder
from pneumo_dist import config as configuration
from pneumo_dist.chain import Node
from pneumo_dist.config import ConfigError
from pneumo_dist.inference.film_plan import write_film_plan
from pneumo_dist.runtime.files import write_text


def refuse_live(plan: Plan, ledger: Ledger, slurm_answers: bool) -> None:
    """Raise ConfigError while another job, on SLURM or on this machine, writes one of the plan's stages.

    Args:
        slurm_answers: SLURM was there a moment ago. Where there is none (a run taken to another machine), its
            jobs are taken as ended and said to be; an attempt that is overtaken leaves without writing.
    """
    try:
        live = ledger.live([node.key for node in plan.todo])
    except slurm.SlurmError as error:
        if slurm_answers:
            raise ConfigError(
                f"SLURM does not say which jobs of this run are live ({error}): try again later"
            ) from None
        print(
            "note: this run has been on SLURM; no SLURM answers here, so its jobs there are taken as ended", flush=True
        )
        live = {}
    for node in plan.todo:
        name = plan.title(node.stage, node.fold)
        if node.key in live:
            raise ConfigError(
                f"SLURM job {live[node.key]} is on {name} of this run already: wait for it, "
                f"or cancel it with launch/runs.py cancel {plan.runs_argument}"
            )
        held = holder(plan.run.lock(node.key))
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


def prepare(plan: Plan) -> Prepared:
    """Put old results aside (--redo), write the configurations and the copy of the code."""
    run = plan.run
    aside = _put_aside(plan) if plan.request.redo else ()
    text = configuration.to_yaml(run.config)
    if not run.config_file.exists():
        write_text(run.config_file, text)
    for node in plan.todo:
        if node.stage in DERIVED:  # plan anew from what it reads; an old mark would be in the way
            run.done_file(node.stage, node.fold).unlink(missing_ok=True)
        write_text(run.job_config_file(node.key), text)
    films = run.infer_source if any(node.stage == "infer" for node in plan.todo) else None
    if films and films.is_dir():  # synthetic films may not be there yet: then the first task decides
        write_film_plan(run)
    return Prepared(codecopy.copy(ROOT, run), aside)


def _put_aside(plan: Plan) -> tuple[tuple[Path, Path], ...]:
    run = plan.run
    shared = run.config.data.shard_dir and any(node.stage == "preprocess" for node in plan.todo)
    if shared and run.shard_dir.exists():
        raise ConfigError(
            f"--redo: the shards in {run.config.data.shard_dir} may serve other runs: remove that folder yourself, "
            "or name another data.shard_dir"
        )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    done: list[tuple[Path, Path]] = []
    for folder in dict.fromkeys(run.dir_of(node.stage, node.fold) for node in plan.todo):
        if folder.exists():
            aside = folder.with_name(f"{folder.name}.old-{stamp}")
            folder.rename(aside)
            done.append((folder, aside))
            print(f"--redo: the old result is now {aside}", flush=True)
    return tuple(done)


_git_state = functools.lru_cache(maxsize=1)(codecopy.git_state)


def entry(plan: Plan, site: Site, node: Node, code: Path, **more: Any) -> Entry:
    """Return the ledger's line for a job."""
    extra = {
        "nodes": plan.request.nodes,
        "gpus_per_node": site.gpus_per_node,
        "profile": str(site.profile_path) if site.profile_path else None,
        "git": _git_state(ROOT),
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
