"""Carry out a request: verify, dry run, run on this machine, or submit to SLURM. All checks come before any change."""

from __future__ import annotations

import os
import sys

from launch import bootstrap
from launch.backends.prepare import close_folders, write_config_alone
from launch.monitor.outcome import print_result
from launch.planning import checks
from launch.planning.arguments import Request
from launch.planning.estimates import estimates
from launch.planning.plan import Plan, check_recipe, make_plan, missing_line, title
from launch.planning.recipe import resolve
from launch.planning.site import choose_site
from pneumo_dist.config import ConfigError


def run(request: Request) -> int:
    """Carry out the request and return the exit status.

    Raises:
        ConfigError: a mistake that the user has to correct; no job has been started.
    """
    if request.verify:
        return _verify(request)
    plan = make_plan(request)
    for note in plan.notes:
        print(note, flush=True)
    if request.dry_run:
        return _dry_run(plan)
    if not plan.todo and not plan.conflicts:
        name = "the whole chain" if request.stage == "all" else title(request.stage, None)
        print(f"{name} is done already (--redo runs it again)")
        write_config_alone(plan.run)
        print_result(plan.run, plan.targets, plan.folds)
        return 0
    check_recipe(plan)
    if not plan.run.config.infer.dir and any(node.stage == "infer" for node in plan.todo):
        print("no infer.dir: inferring on the training films; scores on them are inflated", flush=True)
    site = choose_site(request, plan.run)
    print(site.line, flush=True)
    os.umask(site.profile.file_mask)
    if site.slurm:
        bootstrap.ensure(slurm=True)
        # Imported late: it needs submitit, which a machine without SLURM may lack.
        from launch.backends.slurm_chain import submit_chain

        return submit_chain(plan, site)
    from launch.backends.local_chain import run_local_chain

    for node, job in plan.missing:
        raise ConfigError(missing_line(plan, node, job))
    checks.refuse(plan, site)
    close_folders(plan.run, site.profile.file_mask)
    for estimate in estimates(plan, site):
        print(f"note: {estimate}", flush=True)
    return run_local_chain(plan, site)


def _verify(request: Request) -> int:
    """Hash the shards again and compare them with their manifests."""
    from pneumo_dist.data.preprocess.manifest import verify

    folder = resolve(request).run.shard_dir
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no shards to verify: run --stage preprocess first")
    problems = verify(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print(f"{folder}: {count}" if problems else f"{folder}: all shards are unchanged")
    return 1 if problems else 0


def _dry_run(plan: Plan) -> int:
    """Print the SLURM scripts, or what this machine would run, and as warnings what prevents it; write nothing."""
    if plan.request.cluster == "local":
        from launch.backends.local_chain import render
    else:
        from launch.backends.slurm_chain import render

    site = choose_site(plan.request, plan.run)
    warnings = [*checks.problems(plan, site, probe=False)]
    warnings += [missing_line(plan, node, job) for node, job in plan.missing]
    try:
        check_recipe(plan)
    except ConfigError as error:
        warnings.insert(0, str(error))
    for line in dict.fromkeys(warnings):
        print(f"warning: {line}", file=sys.stderr)
    for estimate in estimates(plan, site):
        print(f"note: {estimate}", file=sys.stderr)
    for text in render(plan, site):
        print(text, flush=True)
    return 0
