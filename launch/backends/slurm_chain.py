"""Hand a plan to SLURM as a chain of dependent jobs, all of it or nothing; or print the scripts of such a chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from launch.backends.prepare import entry, prepare, refuse_live
from launch.backends.sbatch import blocks_signals, script, submit
from launch.jobs import Job
from launch.planning import checks
from launch.planning.estimates import remarks
from launch.planning.plan import JobName, Plan, missing_line
from launch.planning.shape import Shape, shape_of
from launch.planning.site import Site
from launch.state import slurm_client as slurm
from launch.state.ledger import Ledger
from launch.state.locks import Locked, lock
from pneumo_dist.chain import Node, upstream
from pneumo_dist.config import ConfigError

Ids = dict[JobName, str]


def _behind(plan: Plan, job: JobName) -> set[JobName]:
    """Return all that a job waits for, directly or not."""
    direct = upstream(plan.run.config, *job, plan.folds)
    return set(direct).union(*(_behind(plan, one) for one in direct))


def _after(plan: Plan, node: Node, ids: Ids) -> str:
    """Return the dependency of a job: what it reads, less what that waits for itself; --after for the first ones."""
    wanted = [job for job in node.after if job in ids]
    implied = set().union(*(_behind(plan, job) for job in wanted))
    found = [ids[job] for job in wanted if job not in implied]
    if plan.request.after and not any((n.stage, n.fold) in node.after for n in plan.todo):
        found.append(plan.request.after)
    return f"afterok:{':'.join(dict.fromkeys(found))}" if found else ""


class _Parts:
    """What a job's script is plan of, for every job of a plan alike."""

    def __init__(self, plan: Plan, site: Site, code: Path) -> None:
        self.plan, self.site, self.code = plan, site, code
        self._facts: dict[str | None, slurm.Partition | None] = {}

    def shape(self, node: Node) -> Shape:
        return shape_of(node.stage, self.plan.request.nodes, self.site.gpus_per_node)

    def name(self, node: Node) -> str:
        return f"{node.key}.{self.plan.run.name}"

    def facts(self, node: Node) -> slurm.Partition | None:
        partition = self.site.profile.resources(node.stage).partition
        if partition not in self._facts:
            self._facts[partition] = slurm.partition(partition) if self.site.slurm else None
        return self._facts[partition]

    def words(self, node: Node, ids: Ids) -> dict[str, object]:
        return {
            "name": self.name(node),
            "comment": str(self.plan.run.folder),
            "code": self.code,
            "after": _after(self.plan, node, ids),
            "facts": self.facts(node),
        }


def render(plan: Plan, site: Site) -> Iterator[str]:
    """Yield the sbatch script of every job that --stage stands for, the done ones included; nothing is written."""
    todo = {node.key for node in plan.todo}
    # Jobs outside the plan that would have to run before stand in by name as well.
    waited = {(n.stage, n.fold) for n in plan.targets} | {job for _, job in plan.missing}
    ids = {job: f"<id of {plan.title(*job)}>" for job in waited}
    parts = _Parts(plan, site, plan.run.code_dir / "<hash of the code>")
    for node in plan.targets:
        shape = parts.shape(node)
        text = script(plan.run.jobs_dir, site.profile, node.stage, shape, **parts.words(node, ids))
        title = plan.title(node.stage, node.fold)
        state = "" if node.key in todo else "; done already, would not be submitted"
        yield f"# ---- {title} ({shape}{state})\n{text}"
    if not blocks_signals():
        yield "# note: env cannot block signals here (coreutils 8.31): one in a job's first second would end the job"


def submit_chain(plan: Plan, site: Site) -> int:
    """Submit the plan's jobs in order, each after those it reads from, and say where to look.

    Raises:
        ConfigError: something is to be corrected, or SLURM refused a job; then none of them stays submitted.
    """
    ledger = Ledger(plan.run)
    plan, ids = _under_way(plan, ledger)
    checks.refuse(plan, site)
    for remark in remarks(plan, site):
        print(f"note: {remark}", flush=True)
    try:
        guard = lock(plan.run.submit_lock, wait_s=30)
    except Locked as error:
        raise ConfigError(f"{error.holder} is submitting to this run: try again") from None
    try:
        refuse_live(plan, ledger, slurm_answers=True)
        prepared = prepare(plan)
        try:
            submitted = _submit_all(_Parts(plan, site, prepared.code), ledger, ids)
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


def _under_way(plan: Plan, ledger: Ledger) -> tuple[Plan, Ids]:
    """Return the plan without the upstream jobs that are live in this run, and the ids of those to wait for.

    Raises:
        ConfigError: something upstream is neither done nor under way, and --after does not stand for it.
    """
    upstream_todo = [node for node in plan.todo if node.key not in plan.asked]
    if not plan.missing and not upstream_todo:
        return plan, {}
    try:
        live = ledger.live()
    except slurm.SlurmError as error:
        raise ConfigError(f"SLURM does not say which jobs of this run are live ({error}): try again later") from None
    ids: Ids = {}
    for node, job in plan.missing:
        key = Node(job[0], job[1], ()).key
        if key in live:
            ids[job] = live[key]
        elif not plan.request.after:
            raise ConfigError(missing_line(plan, node, job))
    for node in upstream_todo:
        if node.key in live:
            ids[(node.stage, node.fold)] = live[node.key]
            plan = dataclasses.replace(plan, todo=tuple(n for n in plan.todo if n is not node))
    for job, job_id in ids.items():
        print(f"{plan.title(*job)} is under way as job {job_id}: waiting for it", flush=True)
    return plan, ids


def _submit_all(parts: _Parts, ledger: Ledger, ids: Ids) -> dict[str, str]:
    plan, run = parts.plan, parts.plan.run
    submitted: dict[str, str] = {}
    for node in plan.todo:
        shape, words = parts.shape(node), parts.words(node, ids)
        jobs = [Job(node.stage, node.fold, (i, shape.elements), str(run.folder)) for i in range(shape.elements)]
        try:
            job_id = submit(run.jobs_dir, parts.site.profile, node.stage, shape, jobs, **words)
            ids[(node.stage, node.fold)] = submitted[node.key] = job_id
            more = {
                "job_id": job_id,
                "name": parts.name(node),
                "log": f"{job_id}_%r_log.out" if shape.elements == 1 else f"{job_id}_%a_%r_log.out",
                "processes": shape.nodes * shape.tasks_per_node,
                "elements": shape.elements,
                "after": [str(words["after"])] if words["after"] else [],
            }
            ledger.append(entry(plan, parts.site, node, parts.code, **more))
        except BaseException as error:  # all of the chain or nothing, and nothing that the ledger does not know
            slurm.cancel(submitted.values())
            if isinstance(error, slurm.SlurmError):
                undone = f"; the {len(submitted)} jobs before it are cancelled again" if submitted else ""
                title = plan.title(node.stage, node.fold)
                raise ConfigError(f"SLURM refused the job of {title}: {error}{undone}") from None
            raise
    return submitted
