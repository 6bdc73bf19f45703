"""From a request to a plan: which recipe, which run, which jobs of the chain are to run and what they wait for.

Reads files, writes nothing, asks SLURM nothing. The errors are ConfigError, one line each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import bootstrap
from launch.planning.arguments import Request
from launch.planning.profile import FAMILY
from pneumo_dist import config as configuration
from pneumo_dist import done
from pneumo_dist.chain import STAGES, Node, closing, jobs_of
from pneumo_dist.config import Config, ConfigError
from pneumo_dist.run import Run, RunFolder

ROOT = Path(bootstrap.ROOT)
RECIPES = ROOT / "configs"
EMBEDDED = RECIPES / "quickstart.yaml"
DEFAULT_RECIPE = RECIPES / "paper.yaml"

JobName = tuple[str, "int | None"]  # stage and fold of a job


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run whose configuration has absolute paths, and how it was found."""

    run: Run
    embedded: bool  # nothing was named: synthetic films, missing upstream is run as well
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs of a request."""

    request: Request
    run: Run
    folds: tuple[int, ...]
    targets: tuple[Node, ...]  # what --stage stands for, upstream included where it is run as well
    asked: frozenset[str]  # keys of what --stage itself stands for
    todo: tuple[Node, ...]  # those that are not done, in submission order
    missing: tuple[tuple[Node, JobName], ...]  # jobs of the plan whose upstream is neither done nor planned
    differing: tuple[str, ...]  # why something cannot be run as asked: one line each
    notes: tuple[str, ...]  # what the user should know before it starts

    @property
    def submit_options(self) -> str:
        """The options that name this run to submit.py."""
        root = self.run.folder.parent
        return f"--run {self.run.name}" + ("" if root == ROOT / "runs" else f" run_root={root}")

    @property
    def runs_argument(self) -> str:
        """The argument that names this run to runs.py."""
        return self.run.name if self.run.folder.parent == ROOT / "runs" else str(self.run.folder)

    def title(self, stage: str, fold: int | None) -> str:
        """Return a job's name for people; the fold is part of it where there are several."""
        return title(stage, fold, len(self.folds))


def title(stage: str, fold: int | None, folds: int = 1) -> str:
    """Return a job's name for people: "stage 1", "stage 2 of fold 3", "preprocess"."""
    name = STAGES[stage].title
    return f"{name} of fold {fold}" if fold is not None and folds > 1 else name


def command_stage(stage: str) -> str:
    """Return the word for --stage that runs `stage`."""
    return FAMILY.get(stage, stage)


def _absolute(config: Config, root: Path) -> Config:
    """Make every path absolute, as seen from the current directory."""

    def full(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    data = ("dicom_dir", "rle_csv", "patient_map", "shard_dir", "holdout_ids")
    paths: dict[str, Any] = {name: full(getattr(config.data, name)) for name in data}
    if not (config.data.stage_dir or "$").startswith("$"):  # a variable is each node's own
        paths["stage_dir"] = full(config.data.stage_dir)
    return dataclasses.replace(
        config,
        run_root=str(root),
        data=dataclasses.replace(config.data, **paths),
        model=dataclasses.replace(config.model, weights=full(config.model.weights)),
        stage1=dataclasses.replace(config.stage1, init_from=full(config.stage1.init_from)),
        stage2=dataclasses.replace(config.stage2, init_from=full(config.stage2.init_from)),
        infer=dataclasses.replace(
            config.infer, dir=full(config.infer.dir), models=[full(p) or p for p in config.infer.models]
        ),
    )


def _run_root(request: Request, recipes: str = "runs") -> Path:
    """Return where runs lie: as typed, as in the recipe, else beside launch/, so that any directory finds them."""
    words = [word.partition("=") for word in request.overrides]
    typed = [value.strip() for key, _, value in words if key.strip() == "run_root"]
    if not typed and recipes == "runs":
        return ROOT / "runs"
    return Path(typed[-1] if typed else recipes).expanduser().absolute()


def resolve(request: Request) -> Recipe:
    """Find the recipe and the run of a request.

    `--config` wins; else the run's own config.yaml; else, when nothing at all is named, the embedded default; else
    the paper's recipe. `key=value` words go over it.
    """
    words = list(request.overrides)
    embedded = request.config is None and request.run is None and not request.names("data.")
    if request.config is not None:
        source = Path(request.config).expanduser()
        run = request.run or source.stem
        config = configuration.load(source, words)
        root = _run_root(request, config.run_root)
    else:
        source = EMBEDDED if embedded else DEFAULT_RECIPE
        run = request.run or source.stem
        root = _run_root(request)
        own = RunFolder(root / run).config_file
        config = configuration.load(own if own.is_file() else source, words)
    notes = []
    if embedded and config.phantom.films:
        notes.append("no data configured: synthetic phantom films")
    own_upstream = embedded and not request.names("infer.dir=", "infer.models=")
    return Recipe(run=Run(root / run, _absolute(config, root)), embedded=own_upstream, notes=tuple(notes))


def _folds(request: Request, run: Run) -> list[int]:
    if request.folds is not None:
        return list(request.folds)
    if request.stage == "infer":  # every fold that has a model
        evaluated = [k for k in range(run.config.data.folds) if done.read_done(run, "evaluate", k) is not None]
        return evaluated or [0]
    return [0]


# Cheap to make again from what they read, so they follow it without being asked to.
DERIVED = ("pool", "infer", "merge")
# Preprocessing gives the same bytes again; these may not (GPUs), or read more folds than before.
_NOT_REPEATABLE = ("1", "2", "swa", "evaluate", "pool", "infer")


def _settings_differ(run: Run, stage: str, fold: int | None) -> list[str] | None:
    """Compare an upstream stage's settings with the recipe's: None when it is not done, else the keys that differ.

    What it read is not looked at: the films may have been moved away since.
    """
    record = done.read_done(run, stage, fold)
    if record is None or (stage == "finalize" and not done.shards_cover(run.config, record)):
        return None
    now = done.settings_of(run.config, stage)
    before = record["settings"]
    return sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))


def make_plan(request: Request) -> Plan:
    """Return the plan of a request.

    Raises:
        ConfigError: the recipe has no such stage, a fold does not exist, or a key is wrong.
    """
    recipe = resolve(request)
    run, config = recipe.run, recipe.run.config
    for folder in (run.folder, *run.folder.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, no folder for runs: choose another place with run_root=DIR")
    folds = _folds(request, run)
    targets = jobs_of(config, request.stage, folds)
    if recipe.embedded and request.stage != "all":
        chain = {(n.stage, n.fold): n for n in jobs_of(config, "all", folds)}
        wanted = {(n.stage, n.fold) for n in targets}
        open_ = list(wanted)
        while open_:
            node = chain.get(open_.pop())
            for job in node.after if node else ():
                if job not in wanted:
                    wanted.add(job)
                    open_.append(job)
        targets = [node for job, node in chain.items() if job in wanted] + [
            n for n in targets if (n.stage, n.fold) not in chain
        ]
    planned = {(n.stage, n.fold) for n in targets}
    asked = frozenset(n.key for n in jobs_of(config, request.stage, folds))
    todo: list[Node] = []
    differing: list[str] = []
    notes = list(recipe.notes)
    for node in targets:
        try:
            keys = done.differences(run, closing(node.stage), node.fold)
        except ConfigError as error:  # no folder of films to infer on
            differing.append(str(error))
            keys = None
        redo = request.redo and node.key in asked
        if keys and not redo:
            if node.key in asked:
                differing.append(done.difference_line(run, node.stage, node.fold, keys))
            else:
                notes.append(_taken_as_it_is(run.dir_of(node.stage, node.fold), keys))
                continue
        again = [job for job in node.after if job in {(n.stage, n.fold) for n in todo} and job[0] in _NOT_REPEATABLE]
        if keys == [] and not redo and again and node.stage not in DERIVED:
            name = title(*again[0], len(folds))
            where = run.dir_of(node.stage, node.fold)
            differing.append(f"{where} is done from an earlier {name}, which is to run again: --redo runs both again")
        if keys != [] or redo or again:
            todo.append(node)
    if not request.redo and not any(node.stage in ("preprocess", "finalize") for node in todo):
        todo = [node for node in todo if node.stage != "phantom"]  # only preprocessing reads it
    missing = []
    for node in todo:
        for job in node.after:
            if job in planned:
                continue
            keys = _settings_differ(run, *job)
            if keys is None:
                missing.append((node, job))
            elif keys:
                notes.append(_taken_as_it_is(run.dir_of(*job), keys))
    return Plan(
        request=request,
        run=run,
        folds=tuple(folds),
        targets=tuple(targets),
        asked=asked,
        todo=tuple(todo),
        missing=tuple(missing),
        differing=tuple(dict.fromkeys(differing)),
        notes=tuple(dict.fromkeys(notes)),
    )


def _taken_as_it_is(where: Path, keys: list[str]) -> str:
    return f"note: {where} was made with other settings ({', '.join(keys)}) and is taken as it is"


def missing_line(plan: Plan, node: Node, job: JobName) -> str:
    """Say which stage is missing and how to run it."""
    name = command_stage(job[0])
    fold = f" --folds {job[1]}" if job[1] not in (None, 0) else ""
    needs = plan.title(command_stage(job[0]), job[1])
    if job[0] == "pool":
        fold, needs = f" --folds {','.join(map(str, plan.folds))}", "the folds' pooled evaluation"
    return (
        f"{plan.title(node.stage, node.fold)} needs {needs}, which is not done: "
        f"run --stage {name}{fold} {plan.submit_options} first"
    )


def check_recipe(plan: Plan) -> None:
    """Raise ConfigError where the recipe names no films although the stage reads them."""
    data = plan.run.config.data
    if plan.request.stage not in ("preprocess", "all") or plan.run.config.phantom.films:
        return
    if not data.dicom_dir:
        raise ConfigError(
            "no films: give data.dicom_dir=DIR and data.rle_csv=FILE (or phantom.films=100 for synthetic ones)"
        )
    if not data.rle_csv:
        raise ConfigError("no annotations: give data.rle_csv=FILE, the list of run-length encoded masks")
