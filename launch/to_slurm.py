"""Hand a plan to SLURM as a chain of dependent jobs, all of it or nothing; or print the scripts of such a chain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launch import plan, slurm
from launch.arguments import Request
from launch.executor import Shape, blocks_signals, script, shape_of, submit
from launch.jobs import Job
from launch.ledger import Ledger, Locked, lock
from launch.plan import Plan
from launch.submission import Site, entry, prepare, refuse_live, say
from pneumo_dist.chain import STAGES, Node, upstream
from pneumo_dist.config import ConfigError


def _shape(request: Request, site: Site, node: Node) -> Shape:
    return shape_of(node.stage, STAGES[node.stage].shape, request.nodes, site.gpus_per_node)


def _behind(made: Plan, job: plan.Job) -> set[plan.Job]:
    """Return all that a job waits for, directly or not."""
    direct = upstream(made.recipe.config, *job, made.folds)
    return set(direct).union(*(_behind(made, one) for one in direct))


def _after(request: Request, made: Plan, node: Node, ids: dict[plan.Job, str]) -> str:
    """Return the dependency of a job: what it reads, less what that waits for itself; --after for the first ones."""
    wanted = [job for job in node.after if job in ids]
    implied = set().union(*(_behind(made, job) for job in wanted))
    found = [ids[job] for job in wanted if job not in implied]
    if request.after and not any((n.stage, n.fold) in node.after for n in made.todo):
        found.append(request.after)
    return f"afterok:{':'.join(dict.fromkeys(found))}" if found else ""


def render(request: Request, made: Plan, site: Site) -> Iterator[str]:
    """Yield the sbatch script of every job that --stage stands for, the done ones included; nothing is written."""
    run_dir = made.recipe.run_dir
    todo = {node.key for node in made.todo}
    # Jobs outside the plan that would have to run before stand in by name as well.
    waited = {(n.stage, n.fold) for n in made.targets} | {job for _, job in made.missing}
    ids = {job: f"<id of {plan.title(job[0], job[1], len(made.folds))}>" for job in waited}
    facts = {}
    for node in made.targets:
        shape = _shape(request, site, node)
        partition = site.profile.resources(node.stage).partition
        if site.slurm and partition not in facts:
            facts[partition] = slurm.partition(partition)
        text = script(
            run_dir / "jobs", site.profile, node.stage, shape, name=_name(made, node), comment=str(run_dir),
            code=run_dir / "code" / "<hash of the code>", after=_after(request, made, node, ids), facts=facts.get(partition),
        )  # fmt: skip
        kind = (
            f"array of {shape.elements}"
            if shape.elements > 1
            else f"{shape.nodes} nodes x {shape.tasks_per_node} ranks"
            if shape.kind == "ranks"
            else "one process"
        )
        state = "" if node.key in todo else "; done already, would not be submitted"
        yield f"# ---- {plan.title(node.stage, node.fold, len(made.folds))} ({kind}{state})\n{text}"
    if not blocks_signals():
        yield "# note: env cannot block signals here (coreutils 8.31): one in a job's first second would end the job"


def _name(made: Plan, node: Node) -> str:
    return f"{node.key}.{made.recipe.run}"


def submit_chain(request: Request, made: Plan, site: Site, wrong: Iterator[str]) -> int:
    """Submit the plan's jobs in order, each after those it reads from, and say where to look.

    Raises:
        ConfigError: something is to be corrected, or SLURM refused a job; then none of them stays submitted.
    """
    run_dir = made.recipe.run_dir
    ledger = Ledger(run_dir)
    ids: dict[plan.Job, str] = {}
    live = _live(ledger)
    for node, job in made.missing:
        key = Node(job[0], job[1], ()).key
        if key in live:
            ids[job] = live[key]
            say(f"{plan.title(job[0], job[1], len(made.folds))} is under way as job {live[key]}: waiting for it")
        elif not request.after:
            raise ConfigError(plan.missing_line(made, node, job))
    for line in wrong:
        raise ConfigError(line)
    (run_dir / "jobs").mkdir(parents=True, exist_ok=True)
    try:
        guard = lock(run_dir / "jobs" / ".submit.lock", wait_s=30)
    except Locked as error:
        raise ConfigError(f"{error.holder} is submitting to this run: try again") from None
    try:
        refuse_live(made, ledger)
        code = prepare(request, made)
        submitted = _submit_all(request, made, site, ledger, code, ids)
    finally:
        guard.release()
    _tell(request, made, submitted)
    if not request.wait:
        return 0
    from launch.follow import follow

    return follow(request, made, submitted)


def _live(ledger: Ledger) -> dict[str, str]:
    try:
        return ledger.live()
    except slurm.SlurmError as error:
        raise ConfigError(f"SLURM does not say which jobs of this run are live ({error}): try again later") from None


def _submit_all(
    request: Request, made: Plan, site: Site, ledger: Ledger, code: Path, ids: dict[plan.Job, str]
) -> dict[str, str]:
    run_dir = made.recipe.run_dir
    submitted: dict[str, str] = {}
    facts: dict[str | None, slurm.Partition | None] = {}
    for node in made.todo:
        shape = _shape(request, site, node)
        partition = site.profile.resources(node.stage).partition
        if partition not in facts:
            facts[partition] = slurm.partition(partition)
        jobs = [Job(node.stage, node.fold, (i, shape.elements), str(run_dir)) for i in range(shape.elements)]
        after = _after(request, made, node, ids)
        try:
            job_id = submit(
                run_dir / "jobs", site.profile, node.stage, shape, jobs,
                name=_name(made, node), comment=str(run_dir), code=code, after=after, facts=facts[partition],
            )  # fmt: skip
        except BaseException as error:
            slurm.cancel(submitted.values())
            if isinstance(error, slurm.SlurmError):
                undone = f"; the {len(submitted)} jobs submitted before are cancelled" if submitted else ""
                raise ConfigError(
                    f"SLURM refused the job of {plan.title(node.stage, node.fold, len(made.folds))}: {error}{undone}"
                ) from None
            raise
        ids[(node.stage, node.fold)] = submitted[node.key] = job_id
        log = f"{job_id}_%r_log.out" if shape.elements == 1 else f"{job_id}_%a_%r_log.out"
        ledger.append(
            entry(
                request,
                made,
                site,
                node,
                code,
                job_id=job_id,
                name=_name(made, node),
                log=log,
                processes=shape.nodes * shape.tasks_per_node,
                elements=shape.elements,
                after=[after] if after else [],
            )  # fmt: skip
        )
    return submitted


def _tell(request: Request, made: Plan, submitted: dict[str, str]) -> None:
    for key, job_id in submitted.items():
        say(f"{key:20} job {job_id}")
    word = made.recipe.word
    say(f"logs:        {made.recipe.run_dir / 'jobs'}")
    say(f"status:      python launch/runs.py status {word}")
    say(f"TensorBoard: python launch/runs.py tensorboard {word}")
