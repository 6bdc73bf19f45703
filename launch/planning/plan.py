"""From a request to a plan: the jobs of the chain to run, their dependencies, and conflicts with earlier results.

Reads files; writes nothing and never queries SLURM. Errors are ConfigError, one line each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.planning.arguments import Request
from launch.planning.profile import FAMILY
from launch.planning.recipe import ROOT, Recipe, resolve
from pneumo_dist import done
from pneumo_dist.chain import OWN, STAGES, Node, ancestors, closing, job_key, jobs_of
from pneumo_dist.config import Config, ConfigError, flatten, keys, word
from pneumo_dist.run import Run

JobName = tuple[str, "int | None"]  # stage and fold of a job


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs of a request."""

    request: Request
    recipe: Recipe
    run: Run
    folds: tuple[int, ...]
    targets: tuple[Node, ...]  # the jobs of --stage, and their upstream jobs where these run too
    requested: frozenset[str]  # keys of the jobs of --stage alone
    todo: tuple[Node, ...]  # the targets that are not done, in submission order
    missing: tuple[tuple[Node, JobName], ...]  # a job to run, and an upstream job that is neither done nor a target
    conflicts: tuple[str, ...]  # why results on disk forbid the request: one line each
    notes: tuple[str, ...]  # lines for the user before anything starts

    @property
    def submit_options(self) -> str:
        """The options with which submit.py finds this run."""
        root = self.run.folder.parent
        return f"--run {self.run.name}" + ("" if root == ROOT / "runs" else f" run_root={root}")

    @property
    def runs_argument(self) -> str:
        """The argument with which runs.py finds this run."""
        return self.run.name if self.run.folder.parent == ROOT / "runs" else str(self.run.folder)

    @property
    def name_hint(self) -> str:
        """A similar name, for the error line of a run that does not exist."""
        known = self.run.config_file.exists() or not self.run.like
        return "" if known else f"; did you mean --run {self.run.like}?"

    def title(self, stage: str, fold: int | None) -> str:
        """Return the display name of a job; it includes the fold if there are several."""
        return title(stage, fold, len(self.folds))


def title(stage: str, fold: int | None, folds: int = 1) -> str:
    """Return the display name of a job: "stage 1", "stage 2 of fold 3", "preprocess"."""
    name = STAGES[stage].title
    return f"{name} of fold {fold}" if fold is not None and folds > 1 else name


def command_stage(stage: str) -> str:
    """Return the value of --stage that runs `stage`."""
    return FAMILY.get(stage, stage)


def _folds(request: Request, run: Run) -> list[int]:
    if request.folds is not None:
        return list(request.folds)
    if request.stage == "infer":  # every fold that has a model, since they predict together
        evaluated = [k for k in range(run.config.data.folds) if done.read_done(run, "evaluate", k) is not None]
        return evaluated or [0]
    return [0]


# These jobs run again whenever what they read changes: they are cheap.
DERIVED = ("pool", "infer", "merge")
# A second run of preprocessing gives the same bytes. These may differ (GPU arithmetic), or may read more folds.
_NOT_REPEATABLE = ("1", "2", "swa", "evaluate", "pool", "infer")


def make_plan(request: Request) -> Plan:
    """Return the plan of a request.

    Raises:
        ConfigError: the recipe has no such stage, a fold does not exist, or a key is wrong.
    """
    recipe = resolve(request)
    run = recipe.run
    _check_run_folder(run)
    folds = _folds(request, run)
    targets = jobs_of(run.config, request.stage, folds)
    requested = frozenset(node.key for node in targets)
    if recipe.embedded:
        targets = _with_upstream(run.config, targets, folds)
    return _planned(request, recipe, folds, targets, requested)


def renewed(plan: Plan, **changes: Any) -> Plan:
    """Return a plan as it is after more jobs have ended, with `changes` of the request."""
    return _planned(replace(plan.request, **changes), plan.recipe, plan.folds, plan.targets, plan.requested)


def _planned(
    request: Request, recipe: Recipe, folds: Sequence[int], targets: Sequence[Node], requested: frozenset[str]
) -> Plan:
    run = recipe.run
    todo, conflicts, kept = _compare_with_disk(recipe, targets, requested, request)
    conflicts += [*_contradictions(recipe, targets, todo), *_other_folds(run, folds, todo)]
    if not request.redo and not any(node.stage in ("preprocess", "finalize") for node in todo):
        todo = [node for node in todo if node.stage != "phantom"]  # only preprocessing reads it
    return Plan(
        request=request,
        recipe=recipe,
        run=run,
        folds=tuple(folds),
        targets=tuple(targets),
        requested=requested,
        todo=tuple(todo),
        missing=tuple(_missing_upstream(run, todo, targets)),
        conflicts=tuple(dict.fromkeys(conflicts)),
        notes=tuple(dict.fromkeys([*recipe.notes, *kept, *_split_of_others(run)])),
    )


def _check_run_folder(run: Run) -> None:
    for folder in (run.folder, *run.folder.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, not a folder for runs: choose another folder with run_root=DIR")


def _with_upstream(config: Config, targets: Sequence[Node], folds: list[int]) -> list[Node]:
    """Return the targets and all jobs that they wait for, in submission order."""
    jobs: set[JobName] = {(node.stage, node.fold) for node in targets}
    jobs = jobs.union(*(ancestors(config, job, folds) for job in jobs))
    return [node for node in jobs_of(config, "all", folds) if (node.stage, node.fold) in jobs]


def _compare_with_disk(
    recipe: Recipe, targets: Sequence[Node], requested: frozenset[str], request: Request
) -> tuple[list[Node], list[str], list[str]]:
    """Compare each target with its DONE.json.

    Args:
        requested: keys of the jobs of --stage alone, which --redo runs again even if they are done.

    Returns:
        The jobs to run, the conflicts that forbid it, and notes on results with values of their own.
    """
    run = recipe.run
    todo: list[Node] = []
    conflicts: list[str] = []
    notes: list[str] = []
    folds = len({node.fold for node in targets} - {None})
    for node in targets:
        stage = closing(node.stage)
        try:
            differ = done.differences(run, stage, node.fold)
        except ConfigError as error:  # there is no folder of films for inference
            conflicts.append(str(error))
            differ = None
        if request.redo and node.key in requested:
            differ = None
        elif differ is None and run.checkpoints(node.stage, node.fold).is_dir():
            conflicts += filter(None, [submitted_otherwise(run, (node.stage, node.fold))])
        # Another stage of the run may have got its own value since; nobody asks for it here.
        own = [key for key in differ or () if key in OWN and key not in recipe.typed and not request.config]
        if differ and own:
            notes.append(f"note: kept: {done.difference_line(run, stage, node.fold, own).partition(': ')[0]}")
            differ = [key for key in differ if key not in own]
        repeated = [n for n in todo if n.stage in _NOT_REPEATABLE and (n.stage, n.fold) in node.after]
        if differ:
            conflicts.append(done.difference_line(run, stage, node.fold, differ))
        elif differ == [] and repeated and node.stage not in DERIVED:
            name = title(repeated[0].stage, repeated[0].fold, folds)
            folder = run.dir_of(node.stage, node.fold)
            conflicts.append(
                f"{folder} was computed from an earlier {name}, which has to run again: repeat both with --redo"
            )
        if differ != [] or repeated:
            todo.append(node)
    return todo, conflicts, notes


def _contradictions(recipe: Recipe, targets: Sequence[Node], todo: Sequence[Node]) -> Iterator[str]:
    """Compare the other results of the run with what is asked: its configuration describes all of them.

    Results that stand on a job to run are left out, and of those on which no target stands the outdated ones.
    """
    run = recipe.run
    folds = sorted({*run.folds, *(node.fold for node in targets if node.fold is not None)})
    folds = [fold for fold in folds if fold < run.config.data.folds]
    planned = {(node.stage, node.fold) for node in targets}
    below = planned.union(*(ancestors(run.config, job, folds) for job in planned))
    rerun = {(node.stage, node.fold) for node in todo}
    for node in jobs_of(run.config, "all", folds):
        job = (node.stage, node.fold)
        twice = closing(node.stage) != node.stage
        if twice or job in planned or node.stage in DERIVED or rerun & ancestors(run.config, job, folds):
            continue
        try:
            differ = done.contradictions(run, closing(node.stage), node.fold, recipe.typed)
        except ConfigError as error:
            yield str(error)
            continue
        typed = any(f"data.{done.SOURCES.get(key)}" in recipe.typed for key in differ)
        if differ and (typed or job in below or keys().keys() >= set(differ)):
            yield done.difference_line(run, closing(node.stage), node.fold, differ)


def _other_folds(run: Run, folds: Sequence[int], todo: Sequence[Node]) -> Iterator[str]:
    """Refuse to pool folds of new shards with evaluated folds of the present ones."""
    if not {"finalize", "pool"} <= {node.stage for node in todo}:
        return
    others = [k for k in run.folds if k not in folds and done.read_done(run, "evaluate", k) is not None]
    if others and done.differences(run, "finalize", None) != []:
        yield (
            f"{run.shard_dir} will change, but {', '.join(f'fold {k}' for k in others)} of this run, which would be "
            f"pooled too, is evaluated on what it holds now: repeat these folds with "
            f"--folds {','.join(map(str, sorted([*folds, *others])))} --redo, or choose another name with --run OTHER"
        )


def _split_of_others(run: Run) -> Iterator[str]:
    """Say that shards of another run are divided by lists that this run does not name."""
    record = done.read_done(run, "finalize", None)
    for name in done.SPLIT:
        if record and name in record["inputs"] and run.source(name) is None:
            yield f"note: {run.shard_dir} was written with a data.{name}, which holds for this run, too"


def submitted_otherwise(run: Run, job: JobName) -> str | None:
    """Return the error line if a job without a result was submitted with other settings than those of the request."""
    submitted = Run.of_job(run.folder, job_key(*job)).config
    now, then = done.settings_of(run.config, job[0]), done.settings_of(submitted, job[0])
    if job[0] in ("preprocess", "finalize"):
        names = [f"data.{name}" for name in done.SOURCES.values() if getattr(run.config.data, name)]
        now |= {name: flatten(run.config)[name] for name in names}
        then |= {name: flatten(submitted)[name] for name in names}
    differ = [key for key in sorted(now) if now[key] != then.get(key) and key not in OWN]
    if not differ:
        return None
    shown = "; ".join(f"{key}={word(then.get(key))}, now {word(now[key])}" for key in differ)
    return (
        f"{title(*job)} was submitted with other settings ({shown}): keep them{done.words_for(differ, then)}, choose "
        f"another name with --run OTHER, or repeat it with --stage {command_stage(job[0])} --redo"
    )


def _missing_upstream(run: Run, todo: Sequence[Node], targets: Sequence[Node]) -> Iterator[tuple[Node, JobName]]:
    """Yield the jobs outside the plan that a planned job needs and that are not done, each with that job."""
    planned = {(node.stage, node.fold) for node in targets}
    for node in todo:
        for job in node.after:
            if job not in planned and not _is_done(run, *job):
                yield node, job


def _is_done(run: Run, stage: str, fold: int | None) -> bool:
    """Tell whether an upstream stage has its result: shards in every size, derived results from what is there now."""
    record = done.read_done(run, stage, fold)
    if record is None or (stage == "finalize" and not done.shards_cover(run.config, record)):
        return False
    return stage not in DERIVED or not done.contradictions(run, stage, fold)


def missing_line(plan: Plan, node: Node, job: JobName) -> str:
    """Return the error line that names the missing stage and the command that runs it."""
    name = command_stage(job[0])
    record = done.read_done(plan.run, "finalize", None) if job[0] == "finalize" else None
    if record:
        sizes = [size for size in plan.run.config.sizes if f"manifest-{size}" not in record["outputs"]]
        words = "".join(f" stage{k}.size={plan.run.config.train_stage(k).size}" for k in plan.run.config.train_stages)
        return (
            f"{plan.run.shard_dir} lacks the image size {word(sizes)}: "
            f"run --stage preprocess {plan.submit_options}{words} first, which adds it"
        )
    fold = f" --folds {job[1]}" if job[1] not in (None, 0) else ""
    needs = plan.title(name, job[1])
    if job[0] == "pool":
        fold, needs = f" --folds {','.join(map(str, plan.folds))}", "the folds' pooled evaluation"
    return (
        f"{plan.title(node.stage, node.fold)} needs {needs}, which is not done: "
        f"run --stage {name}{fold} {plan.submit_options} first{plan.name_hint}"
    )


def check_recipe(plan: Plan) -> None:
    """Raise ConfigError if the stage reads films and the recipe names none."""
    data = plan.run.config.data
    if plan.request.stage not in ("preprocess", "all") or plan.run.config.phantom.films:
        return
    if not data.dicom_dir:
        raise ConfigError(
            "no films: give data.dicom_dir=DIR and data.rle_csv=FILE (or phantom.films=100 for synthetic ones)"
            + plan.name_hint
        )
    if not (data.rle_csv or data.masks):
        raise ConfigError(
            "no annotations: give data.rle_csv=FILE, the csv file with the run-length encoded masks, or data.masks=DIR"
        )
