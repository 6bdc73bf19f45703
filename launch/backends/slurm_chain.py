"""Submit a plan to SLURM as a chain of dependent jobs, all of them or none; or print the scripts of such a chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from launch.backends.prepare import ledger_entry, prepare, refuse_live
from launch.backends.sbatch import JobSpec, blocks_signals, script, submit
from launch.jobs import Job
from launch.planning import checks
from launch.planning.estimates import estimates
from launch.planning.plan import JobName, Plan, ancestors, missing_line
from launch.planning.shape import shape_of
from launch.planning.site import Site
from launch.state import slurm_client as slurm
from launch.state.ledger import Ledger
from launch.state.locks import Locked, lock
from pneumo_dist.chain import Node, job_key
from pneumo_dist.config import ConfigError

JobIds = dict[JobName, str]


def _dependency(plan: Plan, node: Node, job_ids: JobIds) -> str:
    """Return the dependency of a job: the jobs it reads from; --after for jobs that need none of the plan.

    A job that another dependency waits for anyway is left out, so that the script stays readable.
    """
    direct = [job for job in node.after if job in job_ids]
    implied = set().union(*(ancestors(plan.run.config, job, plan.folds) for job in direct))
    needed = [job_ids[job] for job in direct if job not in implied]
    if plan.request.after and not any((n.stage, n.fold) in node.after for n in plan.todo):
        needed.append(plan.request.after)
    return f"afterok:{':'.join(dict.fromkeys(needed))}" if needed else ""


def _job_spec(plan: Plan, site: Site, code: Path, node: Node, job_ids: JobIds) -> JobSpec:
    return JobSpec(
        folder=plan.run.jobs_dir,
        profile=site.profile,
        stage=node.stage,
        shape=shape_of(node.stage, plan.request.nodes, site.gpus_per_node),
        name=f"{node.key}.{plan.run.name}",
        comment=str(plan.run.folder),
        code=code,
        after=_dependency(plan, node, job_ids),
        partition=site.partition(node.stage),
    )


def render(plan: Plan, site: Site) -> Iterator[str]:
    """Yield the sbatch script of every target, finished ones included; write nothing."""
    todo = {node.key for node in plan.todo}
    # Placeholders for the ids; missing upstream jobs would have to be submitted first.
    jobs = {(node.stage, node.fold) for node in plan.targets} | {job for _, job in plan.missing}
    job_ids = {job: f"<id of {plan.title(*job)}>" for job in jobs}
    for node in plan.targets:
        spec = _job_spec(plan, site, plan.run.code_dir / "<hash of the code>", node, job_ids)
        title = plan.title(node.stage, node.fold)
        state = "" if node.key in todo else "; already done, not submitted"
        yield f"# ---- {title} ({spec.shape}{state})\n{script(spec)}"
    if not blocks_signals():
        yield (
            "# note: `env` on this machine cannot block signals (it needs coreutils 8.31): "
            "a signal in the first second of a job would end the job"
        )


def submit_chain(plan: Plan, site: Site) -> int:
    """Submit the jobs of a plan in order with their dependencies, and print ids and where to look.

    Raises:
        ConfigError: something must be corrected, or SLURM refused a job; then no job stays submitted.
    """
    ledger = Ledger(plan.run)
    plan, job_ids = _live_upstream(plan, ledger)
    checks.refuse(plan, site)
    for line in estimates(plan, site):
        print(f"note: {line}", flush=True)
    try:
        guard = lock(plan.run.submit_lock, wait_s=30)
    except Locked as error:
        raise ConfigError(f"{error.holder} is submitting to this run: try again later") from None
    try:
        refuse_live(plan, ledger, slurm_answers=True)
        prepared = prepare(plan)
        try:
            submitted = _submit_all(plan, site, prepared.code, ledger, job_ids)
        except ConfigError:
            prepared.undo()
            raise
    finally:
        guard.release()
    for key, job_id in submitted.items():
        print(f"{key:20} job {job_id}")
    print(f"logs:        {plan.run.jobs_dir}")
    print(f"status:      python launch/runs.py status {plan.runs_argument}")
    print(f"TensorBoard: python launch/runs.py tensorboard {plan.runs_argument}", flush=True)
    if not plan.request.wait:
        return 0
    from launch.backends.follow import follow

    return follow(plan, submitted)


def _live_upstream(plan: Plan, ledger: Ledger) -> tuple[Plan, JobIds]:
    """Return the plan without upstream jobs that are queued or running, and the ids of the jobs to wait for.

    Raises:
        ConfigError: an upstream job is neither done nor live, and there is no --after.
    """
    upstream_todo = [node for node in plan.todo if node.key not in plan.requested]
    if not plan.missing and not upstream_todo:
        return plan, {}
    try:
        live = ledger.live()
    except slurm.SlurmError as error:
        raise ConfigError(f"SLURM does not report the live jobs of this run ({error}): try again later") from None
    job_ids: JobIds = {}
    for node, job in plan.missing:
        key = job_key(*job)
        if key in live:
            job_ids[job] = live[key]
        elif not plan.request.after:
            raise ConfigError(missing_line(plan, node, job))
    for node in upstream_todo:
        if node.key in live:
            job_ids[(node.stage, node.fold)] = live[node.key]
            plan = dataclasses.replace(plan, todo=tuple(n for n in plan.todo if n is not node))
    for job, job_id in job_ids.items():
        print(f"{plan.title(*job)} is queued or running as job {job_id}: waiting for it", flush=True)
    return plan, job_ids


def _submit_all(plan: Plan, site: Site, code: Path, ledger: Ledger, job_ids: JobIds) -> dict[str, str]:
    """Submit the jobs and record each in the ledger; return {key: job id}. After an error, cancel them all."""
    submitted: dict[str, str] = {}
    for node in plan.todo:
        spec = _job_spec(plan, site, code, node, job_ids)
        count = spec.shape.array_tasks
        jobs = [Job(node.stage, node.fold, (i, count), str(plan.run.folder)) for i in range(count)]
        try:
            job_id = submit(spec, jobs)
            job_ids[(node.stage, node.fold)] = submitted[node.key] = job_id
            entry = ledger_entry(
                plan,
                site,
                node,
                code,
                job_id=job_id,
                name=spec.name,
                log=f"{job_id}_%r_log.out" if count == 1 else f"{job_id}_%a_%r_log.out",
                processes=spec.shape.nodes * spec.shape.tasks_per_node,
                elements=count,
                after=[spec.after] if spec.after else [],
            )
            ledger.append(entry)
        except BaseException as error:  # also Ctrl-C: no part of a chain, and no job that the ledger lacks, may stay
            slurm.cancel(submitted.values())
            if isinstance(error, slurm.SlurmError):
                cancelled = f"; the {len(submitted)} jobs submitted before it are cancelled" if submitted else ""
                title = plan.title(node.stage, node.fold)
                raise ConfigError(f"SLURM refused the job of {title}: {error}{cancelled}") from None
            raise
    return submitted
