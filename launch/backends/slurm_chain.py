"""Submit a plan to SLURM as a chain of dependent jobs; or print the scripts of such a chain.

All jobs are submitted or none, unless the site limits their number: then those that fit, in the order of the chain.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path

from launch.backends.follow import changed_request, follow, under_way
from launch.backends.prepare import close_folders, ledger_entry, prepare, refuse_live
from launch.backends.sbatch import JobSpec, blocks_signals, script, submit
from launch.jobs import Job
from launch.planning import checks
from launch.planning.estimates import estimates
from launch.planning.plan import DERIVED, JobName, Plan, missing_line, renewed, submitted_otherwise
from launch.planning.shape import shape_of
from launch.planning.site import Site
from launch.state import slurm_client as slurm
from launch.state.ledger import Ledger
from launch.state.locks import Locked, lock
from pneumo_dist.chain import Node, ancestors, job_key
from pneumo_dist.config import ConfigError, to_yaml

# MaxSubmitJobs and the like: AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, AssocGrpSubmitJobsLimit, ...
SUBMIT_LIMIT = re.compile(r"\w*Submit\w*Limit")
ROOM_POLL_S = 30.0  # pause between two queries whether jobs of the user have ended
JobIds = dict[JobName, str]


class LimitReached(ConfigError):
    """The site's limit on submitted jobs leaves no room for a single one now."""


def _dependency(plan: Plan, node: Node, job_ids: JobIds) -> str:
    """Return the dependency of a job: the jobs it reads from; --after for jobs that wait for none of the plan.

    A job that another dependency waits for anyway is left out, so that the script stays readable.
    """
    direct = [job for job in node.after if job in job_ids]
    implied = set().union(*(ancestors(plan.run.config, job, plan.folds) for job in direct))
    needed = [job_ids[job] for job in direct if job not in implied]
    if plan.request.after and not any((n.stage, n.fold) in direct for n in plan.targets):
        needed.append(plan.request.after)
    return f"afterok:{':'.join(dict.fromkeys(needed))}" if needed else ""


def _job_spec(plan: Plan, site: Site, code: Path, node: Node, job_ids: JobIds) -> JobSpec:
    return JobSpec(
        folder=plan.run.jobs_dir,
        profile=site.profile,
        stage=node.stage,
        shape=shape_of(node.stage, site.nodes, site.gpus_per_node),
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
    jobs = {(node.stage, node.fold) for node in plan.todo} | {job for _, job in plan.missing}
    job_ids = {job: f"<id of {plan.title(*job)}>" for job in jobs}
    for node in plan.targets:
        spec = _job_spec(plan, site, plan.run.code_dir / "<hash of the code>", node, job_ids)
        title = plan.title(node.stage, node.fold)
        state = "" if node.key in todo else "; already done, not submitted"
        yield f"# ---- {title} ({spec.shape}{state})\n{script(spec)}"
    if note := site.environment_note:
        yield f"# {note}"
    if not blocks_signals():
        yield (
            "# note: `env` on this machine cannot block signals (it needs coreutils 8.31): "
            "a signal in the first second of a job would end the job"
        )


def submit_chain(plan: Plan, site: Site) -> int:
    """Submit the jobs of a plan in order with their dependencies, and print ids and where to look.

    Returns:
        0 all submitted, 1 the site's limit left some out; with --wait, 0 all done, 1 a job failed, 130 Ctrl-C.

    Raises:
        ConfigError: something must be corrected, or SLURM refused a job; then no job stays submitted.
    """
    while plan.todo or plan.conflicts:
        if plan.request.wait and not plan.request.redo and not plan.conflicts and (jobs := under_way(plan)):
            print("queued or running already: following these jobs", flush=True)
            if changed := changed_request(plan, site):
                print(f"note: they were submitted with {changed}: to change that, cancel them first", flush=True)
            return follow(plan.run, jobs, plan.targets, plan.folds)
        try:
            job_ids, limit = _submit(plan, site)
        except LimitReached as error:
            if not plan.request.wait or not _wait_for_room(error):
                raise
            plan = renewed(plan)
            continue
        jobs = {node: job_ids[node.stage, node.fold] for node in plan.todo if (node.stage, node.fold) in job_ids}
        if not plan.request.wait:
            if limit:
                again = "without --redo, " if plan.request.redo else ""
                print(
                    f"note: SLURM accepts no more jobs of yours now ({limit}): {len(jobs)} of {len(plan.todo)} are "
                    f"submitted. Repeat the command when some have ended, {again}or with --wait: it submits the rest"
                )
            return 1 if limit else 0
        status = follow(plan.run, jobs, list(jobs) if limit else plan.targets, plan.folds)
        if status or not limit:
            return status
        plan = renewed(plan, redo=False, after=None)  # the old results are renamed, and those jobs have ended
        if plan.todo:
            print(f"submitting more jobs, which the limit ({limit}) left out", flush=True)
    return 0


def _wait_for_room(error: LimitReached) -> bool:
    """Wait until this user has fewer jobs in SLURM than now; return False if there are none to wait for."""
    before = left = slurm.jobs_of_user()
    if not before:
        return False
    print(f"{error}; waiting until one of your {before} jobs has ended", flush=True)
    while left is None or left >= before:
        time.sleep(ROOM_POLL_S)
        left = slurm.jobs_of_user()
    return True


def _submit(plan: Plan, site: Site) -> tuple[JobIds, str | None]:
    """Submit what is not queued or running, and print ids and where to look.

    Returns:
        The ids of the plan's jobs and of those that they wait for, and the limit that left the rest out, or None.
    """
    ledger = Ledger(plan.run)
    plan, job_ids = _live_jobs(plan, ledger)
    checks.refuse(plan, site)
    close_folders(plan.run, site.profile.file_mask)
    if note := site.environment_note:
        print(note, flush=True)
    for line in estimates(plan, site):
        print(f"note: {line}", flush=True)
    try:
        guard = lock(plan.run.submit_lock, wait_s=30)
    except Locked as error:
        raise ConfigError(f"{error.holder} is submitting to this run: try again later") from None
    try:
        refuse_live(plan, ledger, slurm_answers=True)
        code, changes = prepare(plan, site.array_tasks)
        try:
            submitted, limit = _submit_all(plan, site, code, ledger, job_ids)
        except BaseException:  # no job stays submitted
            changes.undo()
            raise
    finally:
        guard.release()
    for key, job_id in submitted.items():
        print(f"{key:20} job {job_id}")
    print(f"logs:        {plan.run.jobs_dir}")
    print(f"status:      python launch/runs.py status {plan.runs_argument}")
    print(f"TensorBoard: python launch/runs.py tensorboard {plan.runs_argument}", flush=True)
    return job_ids, limit


def _live_jobs(plan: Plan, ledger: Ledger) -> tuple[Plan, JobIds]:
    """Return the plan without jobs that are queued or running, and the ids of the jobs to wait for.

    Of the requested jobs, those count that an earlier call with this configuration has submitted, if others are left.
    Those that pool or merge what there is count for the same folds only.

    Raises:
        ConfigError: an upstream job is neither done nor live, and there is no --after.
    """
    try:
        live = ledger.live()
    except slurm.SlurmError as error:
        raise ConfigError(f"SLURM does not report the live jobs of this run ({error}): try again later") from None
    newest = ledger.latest()
    other_folds = [k for k in live if newest[k].stage in DERIVED and newest[k].extra.get("folds") != sorted(plan.folds)]
    live = {key: job_id for key, job_id in live.items() if key not in other_folds}
    job_ids: JobIds = {}
    for node, job in plan.missing:
        key = job_key(*job)
        if key in live:
            if line := submitted_otherwise(plan.run, job):
                raise ConfigError(line)
            job_ids[job] = live[key]
        elif not plan.request.after:
            raise ConfigError(missing_line(plan, node, job))
    queued: JobIds = {}
    new = {(node.stage, node.fold): node for node in plan.todo}
    for job, node in list(new.items()):
        # What waits for a new job here waited for one that has failed: it will never start, and refuse_live says so.
        if node.key in live and _continues(plan, node) and new.keys().isdisjoint(node.after):
            queued[job] = live[node.key]
            del new[job]
    if new:  # else there is nothing to submit, and refuse_live says so
        job_ids |= queued
        plan = dataclasses.replace(plan, todo=tuple(new.values()))
    for job, job_id in job_ids.items():
        print(f"{plan.title(*job)} is queued or running as job {job_id}: waiting for it", flush=True)
    return plan, job_ids


def _continues(plan: Plan, node: Node) -> bool:
    """Tell whether the live job of a node can stand for the planned one."""
    if node.key not in plan.requested:
        return True
    config = plan.run.job_config_file(node.key)
    return not plan.request.redo and config.is_file() and config.read_text() == to_yaml(plan.run.config)


def _submit_all(
    plan: Plan, site: Site, code: Path, ledger: Ledger, job_ids: JobIds
) -> tuple[dict[str, str], str | None]:
    """Submit the jobs and record each in the ledger. After an error, cancel them all.

    Returns:
        {key: job id}, and the site's limit that kept the rest from being submitted, or None.
    """
    submitted: dict[str, str] = {}
    for node in plan.todo:
        spec = _job_spec(plan, site, code, node, job_ids)
        shape = spec.shape
        count = shape.array_tasks
        ranks = shape.nodes * shape.tasks_per_node if shape.kind == "ranks" else 0
        folder = str(plan.run.folder)
        jobs = [Job(node.stage, node.fold, (i, count), folder, ranks, shape.gpus_per_node) for i in range(count)]
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
        except slurm.SlurmError as error:
            limit = SUBMIT_LIMIT.search(str(error))
            if limit and submitted:
                return submitted, limit[0]
            slurm.cancel(submitted.values())
            refusal = f"SLURM refused the job of {plan.title(node.stage, node.fold)}: {error}"
            if limit:
                fewer = f", or use fewer --nodes: it counts as {count} jobs" if count > 1 else ""
                raise LimitReached(f"{refusal}; repeat the command when some of your jobs have ended{fewer}") from None
            cancelled = f"; the {len(submitted)} jobs submitted before it are cancelled" if submitted else ""
            raise ConfigError(refusal + cancelled) from None
        except BaseException:  # also Ctrl-C: no part of a chain, and no job that the ledger lacks, may stay
            slurm.cancel(submitted.values())
            raise
    return submitted, None
