"""Carry a request out: verify, print, run on this machine, or hand to SLURM. Looks at all before anything changes."""

from __future__ import annotations

import sys

from launch import bootstrap
from launch.monitor.outcome import tell
from launch.planning import checks, plan
from launch.planning import site as place
from launch.planning.arguments import Request
from launch.planning.estimates import remarks
from launch.planning.plan import Plan
from pneumo_dist.config import ConfigError
from pneumo_dist.runtime.task import shard_dir


def run(request: Request) -> int:
    """Carry the request out and return the exit status.

    Raises:
        ConfigError: something is to be corrected first; nothing has been started.
    """
    if request.verify:
        return _verify(request)
    made = plan.make(request)
    for note in made.notes:
        print(note, flush=True)
    if request.dry_run:
        return _dry_run(request, made)
    if not made.todo and not made.differing:
        name = "the whole chain" if request.stage == "all" else plan.title(request.stage, None)
        print(f"{name} is done already (--redo runs it again)")
        tell(made, request.stage)
        return 0
    plan.check_recipe(made.recipe, request.stage)
    if not made.recipe.config.infer.dir and any(node.stage == "infer" for node in made.todo):
        print("no infer.dir: inferring on the training films; their scores say nothing about new films", flush=True)
    chosen = place.choose(request)
    print(chosen.line, flush=True)
    if chosen.slurm:
        bootstrap.ensure(slurm=True)
        from launch.backends.slurm_chain import submit_chain

        return submit_chain(request, made, chosen)
    from launch.backends.local_chain import run_here

    for node, job in made.missing:
        raise ConfigError(plan.missing_line(made, node, job))
    checks.refuse(made, request.nodes, chosen)
    for remark in remarks(made, request.nodes, chosen):
        print(f"note: {remark}", flush=True)
    return run_here(request, made, chosen)


def _verify(request: Request) -> int:
    from pneumo_dist.data.preprocess.manifest import verify

    recipe = plan.resolve(request)
    folder = shard_dir(recipe.config, recipe.run_dir)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no shards to verify: run --stage preprocess first")
    problems = verify(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print(f"{folder}: {count}" if problems else f"{folder}: every shard is as it was written")
    return 1 if problems else 0


def _dry_run(request: Request, made: Plan) -> int:
    """Print the SLURM scripts, and as warnings what would keep them from being submitted; write nothing."""
    from launch.backends.slurm_chain import render

    chosen = place.choose(request)
    warnings = [*checks.problems(made, request.nodes, chosen, probe=False)]
    warnings += [plan.missing_line(made, node, job) for node, job in made.missing]
    try:
        plan.check_recipe(made.recipe, request.stage)
    except ConfigError as error:
        warnings.insert(0, str(error))
    for line in dict.fromkeys(warnings):
        print(f"warning: {line}", file=sys.stderr)
    for remark in remarks(made, request.nodes, chosen):
        print(f"note: {remark}", file=sys.stderr)
    for text in render(request, made, chosen):
        print(text, flush=True)
    return 0
