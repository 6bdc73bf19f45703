"""Carry a request out: print it, run it on this machine, or hand it to SLURM as a chain of dependent jobs.

The order matters: look at everything, take the lock, and only then change something on disk.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch import checks, codecopy, plan, profile, slurm
from launch.arguments import Request
from launch.ledger import Entry, Ledger, Lock, Locked, holder, lock
from launch.local import Foreground, store_folder, workers
from launch.plan import Plan
from launch.profile import Profile
from pneumo_dist import config as configuration
from pneumo_dist.chain import STAGES, Node
from pneumo_dist.config import ConfigError
from pneumo_dist.runtime.files import write_text
from pneumo_dist.runtime.task import shard_dir, stage_dir


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where the jobs go."""

    slurm: bool
    profile: Profile
    profile_path: Path | None
    gpus_per_node: int
    line: str  # why this machine, or which SLURM


def say(text: str) -> None:
    """Print a line for the user."""
    print(text, flush=True)


def _site(request: Request) -> Site:
    """Choose between SLURM and this machine, and how many GPUs a node gives.

    Raises:
        ConfigError: SLURM was asked for and is not there; the profile is wrong.
    """
    path = profile.find(request.profile)
    chosen = profile.load(path)
    reason = "asked for" if request.cluster == "local" else slurm.why_not()
    if request.cluster == "slurm" and reason and not request.dry_run:
        raise ConfigError(f"--cluster slurm: {reason}")
    if request.after and reason and not request.dry_run:
        raise ConfigError(f"--after waits for a SLURM job, and there is no SLURM here: {reason}")
    gpus = request.gpus_per_node
    if gpus is None:
        gpus = chosen.gpus_per_node
    if gpus is None:
        facts = None if reason else slurm.partition(chosen.partition)
        gpus = 1 if facts and facts.gpus else 0
    line = f"running on this machine ({reason})" if reason else "submitting to SLURM"
    return Site(slurm=not reason, profile=chosen, profile_path=path, gpus_per_node=gpus, line=line)


def run(request: Request) -> int:
    """Carry the request out and return the exit status.

    Raises:
        ConfigError: something is to be corrected first; nothing has been started.
    """
    if request.verify:
        return _verify(request)
    made = plan.make(request)
    recipe = made.recipe
    for note in made.notes:
        say(note)
    if not recipe.config.infer.dir and any(node.stage == "infer" for node in made.todo):
        say("no infer.dir: inferring on the training films; their scores say nothing about new films")
    if not made.todo and not made.differing and not request.dry_run:
        name = "the whole chain" if request.stage == "all" else plan.title(request.stage, None)
        say(f"{name} is done already (--redo runs it again)")
        finish(request, made)
        return 0
    if not request.dry_run:
        plan.check_recipe(recipe, request.stage)
    site = _site(request)
    ranks = request.nodes * max(1, site.gpus_per_node)
    wrong = checks.problems(
        made, nodes=request.nodes, ranks=ranks, profile=site.profile, slurm_asked=site.slurm, probe=not request.dry_run
    )
    if request.dry_run:
        return _dry_run(request, made, site, list(wrong))
    say(site.line)
    if site.slurm:
        from launch.to_slurm import submit_chain

        return submit_chain(request, made, site, wrong)
    for node, job in made.missing:
        raise ConfigError(plan.missing_line(made, node, job))
    for line in wrong:
        raise ConfigError(line)
    return _here(request, made, site)


def _verify(request: Request) -> int:
    from pneumo_dist.data.manifest import verify

    recipe = plan.resolve(request)
    folder = shard_dir(recipe.config, recipe.run_dir)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no shards to verify: run --stage preprocess first")
    problems = verify(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    say(f"{folder}: {len(problems)} problems" if problems else f"{folder}: every shard is as it was written")
    return 1 if problems else 0


def _dry_run(request: Request, made: Plan, site: Site, wrong: list[str]) -> int:
    from launch.to_slurm import render

    try:
        plan.check_recipe(made.recipe, request.stage)
    except ConfigError as error:
        wrong.insert(0, str(error))
    for line in [*wrong, *(plan.missing_line(made, node, job) for node, job in made.missing)]:
        print(f"warning: {line}", file=sys.stderr)
    for text in render(request, made, site):
        say(text)
    return 0


def lock_path(run_dir: Path, node: Node) -> Path:
    """Return the lock file of one job of a run."""
    return run_dir / "jobs" / f".{node.key}.lock"


def refuse_live(made: Plan, ledger: Ledger) -> None:
    """Raise ConfigError while another job, on SLURM or on this machine, writes one of the plan's stages."""
    run_dir = made.recipe.run_dir
    try:
        live = ledger.live(node.key for node in made.todo)
    except slurm.SlurmError as error:
        raise ConfigError(
            f"this run has SLURM jobs, and SLURM does not say whether they still run ({error}): try again later"
        ) from None
    for node in made.todo:
        name = plan.title(node.stage, node.fold, len(made.folds))
        if node.key in live:
            raise ConfigError(
                f"SLURM job {live[node.key]} is on {name} of this run already: wait for it, "
                f"or cancel it with launch/runs.py cancel {made.recipe.word}"
            )
        held = holder(lock_path(run_dir, node))
        if held:
            raise ConfigError(f"{held} is on {name} of this run already: wait for it, or stop it")


def prepare(request: Request, made: Plan) -> Path:
    """Put old results aside (--redo), write the configurations and the copy of the code; return the copy."""
    recipe = made.recipe
    if request.redo:
        _put_aside(made)
    text = configuration.to_yaml(recipe.config)
    if not (recipe.run_dir / "config.yaml").exists():
        write_text(recipe.run_dir / "config.yaml", text)
    for node in made.todo:
        write_text(recipe.run_dir / "jobs" / f"{node.key}.yaml", text)
    return codecopy.copy(plan.ROOT, recipe.run_dir)


def _put_aside(made: Plan) -> None:
    config, run_dir = made.recipe.config, made.recipe.run_dir
    folders = dict.fromkeys(stage_dir(config, run_dir, node.stage, node.fold) for node in made.todo)
    if (
        config.data.shard_dir
        and any(node.stage == "preprocess" for node in made.todo)
        and shard_dir(config, run_dir).exists()
    ):
        raise ConfigError(
            f"--redo: the shards in {config.data.shard_dir} may serve other runs: remove that folder yourself, "
            "or name another data.shard_dir"
        )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for folder in folders:
        if folder.exists():
            aside = folder.with_name(f"{folder.name}.old-{stamp}")
            folder.rename(aside)
            say(f"--redo: the old result is now {aside}")


def entry(request: Request, made: Plan, site: Site, node: Node, code: Path, **more: object) -> Entry:
    """Return the ledger's line for a job."""
    extra = {
        "nodes": request.nodes,
        "gpus_per_node": site.gpus_per_node,
        "profile": str(site.profile_path) if site.profile_path else None,
        "git": codecopy.git_state(plan.ROOT),
        "command": sys.argv,
        "total_epochs": made.recipe.config.train_stage(node.stage).epochs
        if node.stage in configuration.TRAIN_STAGES
        else None,
    }
    return Entry(
        key=node.key, stage=node.stage, fold=node.fold, cluster="slurm" if site.slurm else "local", code=code.name, extra=extra, **more  # type: ignore[arg-type]
    )  # fmt: skip


def _here(request: Request, made: Plan, site: Site) -> int:
    """Run the plan's jobs one after another in the foreground."""
    run_dir = made.recipe.run_dir
    ledger = Ledger(run_dir)
    locks: list[Lock] = []
    with Foreground() as foreground:
        try:
            refuse_live(made, ledger)
            for node in made.todo:
                try:
                    locks.append(lock(lock_path(run_dir, node)))
                except Locked as error:
                    raise ConfigError(
                        f"{error.holder} is on {node.key} of this run already: wait for it, or stop it"
                    ) from None
            code = prepare(request, made)
            for at, node in enumerate(made.todo, 1):
                status = _one_here(
                    request,
                    made,
                    site,
                    node,
                    foreground,
                    ledger,
                    code,
                    [one.descriptor for one in locks],
                    f"[{at}/{len(made.todo)}]",
                )
                if status:
                    return status
        finally:
            for one in locks:
                one.release()
    finish(request, made)
    return 0


def _one_here(
    request: Request,
    made: Plan,
    site: Site,
    node: Node,
    foreground: Foreground,
    ledger: Ledger,
    code: Path,
    keep: list[int],
    mark: str,
) -> int:
    run_dir, kind = made.recipe.run_dir, STAGES[node.stage].shape
    count = 1 if kind == "single" else request.nodes * max(1, site.gpus_per_node)
    name = plan.title(node.stage, node.fold, len(made.folds))
    say(f"{mark} {name}" + (f": {count} processes" if count > 1 else ""))
    with store_folder() as folder:
        group = workers(
            key=node.key,
            stage=node.stage,
            fold=node.fold,
            kind=kind,
            count=count,
            run_dir=run_dir,
            code=code,
            store=Path(folder) / "store",
        )
        log = f"local-{node.key}-%r.out"
        ledger.append(entry(request, made, site, node, code, job_id=str(os.getpid()), processes=count, log=log))
        began = time.monotonic()
        outcome = foreground.run(group, keep)
    ledger.append(
        entry(
            request,
            made,
            site,
            node,
            code,
            event="ended",
            job_id=str(os.getpid()),
            processes=count,
            log=log,
            status=outcome.status,
        )
    )
    if not outcome.status:
        say(f"{mark} {name} took {time.monotonic() - began:.0f} s")
        return 0
    if foreground.received:
        print(f"stopped during {name}; the same command continues", file=sys.stderr)
        return outcome.status
    from launch.outcome import last_error

    worker, status = outcome.failed or (0, 1)
    path = group[worker].log
    how = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
    print(f"error: {name}: process {worker} {how}: {last_error(path) or 'no message'}", file=sys.stderr)
    print(f"its log: {path}; after correcting the cause, the same command continues", file=sys.stderr)
    return 1


def finish(request: Request, made: Plan) -> None:
    """Say what has come out, and where it is."""
    from launch.outcome import outcome_text

    last = made.targets[-1]
    say(f"done: {stage_dir(made.recipe.config, made.recipe.run_dir, last.stage, last.fold)}")
    if request.stage in ("evaluate", "infer", "all"):
        say(outcome_text(made.recipe.config, made.recipe.run_dir, made.folds))
