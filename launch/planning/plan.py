"""From a request to a plan: the jobs of the chain to run, their dependencies, and conflicts with earlier results.

Reads files; writes nothing and never queries SLURM. Errors are ConfigError, one line each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.planning.arguments import Request
from launch.planning.profile import FAMILY
from launch.planning.recipe import ROOT, resolve
from pneumo_dist import done
from pneumo_dist.chain import STAGES, Node, closing, jobs_of, upstream
from pneumo_dist.config import Config, ConfigError
from pneumo_dist.run import Run

JobName = tuple[str, "int | None"]  # stage and fold of a job


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs of a request."""

    request: Request
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
    todo, conflicts, kept = _compare_with_disk(run, targets, requested, request.redo)
    if not request.redo and not any(node.stage in ("preprocess", "finalize") for node in todo):
        todo = [node for node in todo if node.stage != "phantom"]  # only preprocessing reads it
    missing, kept_upstream = _missing_upstream(run, todo, targets)
    return Plan(
        request=request,
        run=run,
        folds=tuple(folds),
        targets=tuple(targets),
        requested=requested,
        todo=tuple(todo),
        missing=tuple(missing),
        conflicts=tuple(dict.fromkeys(conflicts)),
        notes=tuple(dict.fromkeys([*recipe.notes, *kept, *kept_upstream])),
    )


def _check_run_folder(run: Run) -> None:
    for folder in (run.folder, *run.folder.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, not a folder for runs: choose another folder with run_root=DIR")


def ancestors(config: Config, job: JobName, folds: Sequence[int]) -> set[JobName]:
    """Return all jobs that a job waits for, directly or through others."""
    direct = upstream(config, *job, folds)
    return set(direct).union(*(ancestors(config, parent, folds) for parent in direct))


def _with_upstream(config: Config, targets: Sequence[Node], folds: list[int]) -> list[Node]:
    """Return the targets and all jobs that they wait for, in submission order."""
    jobs: set[JobName] = {(node.stage, node.fold) for node in targets}
    jobs = jobs.union(*(ancestors(config, job, folds) for job in jobs))
    return [node for node in jobs_of(config, "all", folds) if (node.stage, node.fold) in jobs]


def _compare_with_disk(
    run: Run, targets: Sequence[Node], requested: frozenset[str], redo: bool
) -> tuple[list[Node], list[str], list[str]]:
    """Compare each target with its DONE.json.

    Args:
        requested: keys of the jobs whose results must have the settings of the request; others are used as they are.
        redo: the requested jobs run again even if they are done.

    Returns:
        The jobs to run, the conflicts that forbid it, and notes on results with other settings.
    """
    todo: list[Node] = []
    conflicts: list[str] = []
    notes: list[str] = []
    folds = len({node.fold for node in targets} - {None})
    for node in targets:
        try:
            keys = done.differences(run, closing(node.stage), node.fold)
        except ConfigError as error:  # there is no folder of films for inference
            conflicts.append(str(error))
            keys = None
        if redo and node.key in requested:
            keys = None
        if keys and node.key not in requested:
            notes.append(_kept_note(run.dir_of(node.stage, node.fold), keys))
            continue
        repeated = [n for n in todo if n.stage in _NOT_REPEATABLE and (n.stage, n.fold) in node.after]
        if keys:
            conflicts.append(done.difference_line(run, node.stage, node.fold, keys))
        elif keys == [] and repeated and node.stage not in DERIVED:
            name = title(repeated[0].stage, repeated[0].fold, folds)
            folder = run.dir_of(node.stage, node.fold)
            conflicts.append(
                f"{folder} was computed from an earlier {name}, which has to run again: repeat both with --redo"
            )
        if keys != [] or repeated:
            todo.append(node)
    return todo, conflicts, notes


def _missing_upstream(
    run: Run, todo: Sequence[Node], targets: Sequence[Node]
) -> tuple[list[tuple[Node, JobName]], list[str]]:
    """Return the jobs outside the plan that a planned job needs and that are not done, and notes on the others."""
    planned = {(node.stage, node.fold) for node in targets}
    missing: list[tuple[Node, JobName]] = []
    notes: list[str] = []
    for node in todo:
        for job in node.after:
            if job in planned:
                continue
            keys = _settings_differ(run, *job)
            if keys is None:
                missing.append((node, job))
            elif keys:
                notes.append(_kept_note(run.dir_of(*job), keys))
    return missing, notes


def _settings_differ(run: Run, stage: str, fold: int | None) -> list[str] | None:
    """Compare the settings of an upstream stage with the recipe: None if it is not done, else the keys that differ.

    Its inputs are not compared: the user may have moved the films since.
    """
    record = done.read_done(run, stage, fold)
    if record is None or (stage == "finalize" and not done.shards_cover(run.config, record)):
        return None
    now = done.settings_of(run.config, stage)
    before = record["settings"]
    return sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))


def _kept_note(folder: Path, keys: list[str]) -> str:
    return f"note: {folder} was computed with other settings ({', '.join(keys)}) and is used as it is"


def missing_line(plan: Plan, node: Node, job: JobName) -> str:
    """Return the error line that names the missing stage and the command that runs it."""
    name = command_stage(job[0])
    fold = f" --folds {job[1]}" if job[1] not in (None, 0) else ""
    needs = plan.title(name, job[1])
    if job[0] == "pool":
        fold, needs = f" --folds {','.join(map(str, plan.folds))}", "the folds' pooled evaluation"
    return (
        f"{plan.title(node.stage, node.fold)} needs {needs}, which is not done: "
        f"run --stage {name}{fold} {plan.submit_options} first"
    )


def check_recipe(plan: Plan) -> None:
    """Raise ConfigError if the stage reads films and the recipe names none."""
    data = plan.run.config.data
    if plan.request.stage not in ("preprocess", "all") or plan.run.config.phantom.films:
        return
    if not data.dicom_dir:
        raise ConfigError(
            "no films: give data.dicom_dir=DIR and data.rle_csv=FILE (or phantom.films=100 for synthetic ones)"
        )
    if not (data.rle_csv or data.masks):
        raise ConfigError(
            "no annotations: give data.rle_csv=FILE, the csv file with the run-length encoded masks, or data.masks=DIR"
        )
