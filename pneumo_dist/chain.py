"""The chain as data: each stage with its function, its shape and the keys that determine its result; dependencies.

Functions are named as strings, so that this module imports no torch. It runs nothing and reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pneumo_dist import config as configuration
from pneumo_dist.config import Config, ConfigError


@dataclass(frozen=True)
class Stage:
    """One row of the chain."""

    name: str
    function: str  # "module:function", called with a Task
    shape: str  # "single" process, "array" of independent tasks, or "ranks" of one process group
    keys: tuple[str, ...]  # configuration keys, or prefixes ending in ".", that determine the result
    per_fold: bool = False
    closes: str = ""  # the array stage whose parts this stage merges; one DONE.json covers both

    @property
    def title(self) -> str:
        """The stage's name in messages."""
        return f"stage {self.name}" if self.name in configuration.TRAIN_STAGES else self.name


_TRAINING = (
    "augment.",
    "loss.",
    "model.pretrained",
    "model.sync_bn",
    "train.seed",
    "train.amp",
    "train.clip_norm",
    "train.select",
    "train.eval_every",
    "train.compile",
    "train.deterministic",
    "evaluate.threshold",  # the best epoch is chosen at this threshold
    "evaluate.batch_size",
)
_SHARDS = (
    "phantom.",
    "data.shards",
    "data.folds",
    "data.fold_seed",
    "data.rle",
    "data.unannotated",
    "data.max_bad",
    "data.max_pixels",
)
_SCORES = ("evaluate.",)
# Keys that say how a stage computes, so that each stage of a run may have its own value.
OWN = ("train.amp", "evaluate.batch_size", "evaluate.tta", "data.max_pixels")
# Keys that change the tables of an inference but not the answer to a film: the same command merges again.
TABLES = ("infer.unreadable", "infer.follow_links")
_INFER = (
    *TABLES,
    "infer.tta",
    "infer.triplet",
    "infer.outputs",
    "infer.batch_size",
    "train.amp",
    "data.max_pixels",
)


def _rows() -> Iterator[Stage]:
    preprocess, training = "pneumo_dist.data.preprocess.", "pneumo_dist.training."
    evaluation, inference = "pneumo_dist.evaluation.evaluate:", "pneumo_dist.inference.infer:"
    yield Stage("phantom", "pneumo_dist.data.phantom:run", "single", ("phantom.",))
    yield Stage("preprocess", preprocess + "preprocess:write_shards", "array", _SHARDS)
    yield Stage("finalize", preprocess + "finalize:finalize", "single", _SHARDS, closes="preprocess")
    yield Stage("1", training + "trainer:run", "ranks", (*_TRAINING, "stage1."), per_fold=True)
    yield Stage("2", training + "trainer:run", "ranks", (*_TRAINING, "stage2."), per_fold=True)
    yield Stage("swa", training + "swa:run", "ranks", ("swa.bn_batches", "train.seed", "train.amp"), per_fold=True)
    yield Stage("evaluate", evaluation + "run", "ranks", (*_SCORES, "train.amp"), per_fold=True)
    yield Stage("pool", evaluation + "pool", "single", _SCORES)
    yield Stage("infer", inference + "infer_parts", "array", _INFER)
    yield Stage("merge", inference + "merge", "single", _INFER, closes="infer")


STAGES: dict[str, Stage] = {stage.name: stage for stage in _rows()}


def closing(stage: str) -> str:
    """Return the stage whose DONE.json covers `stage`: for an array, the stage that merges its parts."""
    return next((row.name for row in STAGES.values() if row.closes == stage), stage)


def job_key(stage: str, fold: int | None) -> str:
    """Return a job's name within a run: the stage, and the fold where it has one."""
    name = f"stage{stage}" if stage in configuration.TRAIN_STAGES else stage
    return name if fold is None else f"{name}-fold{fold}"


@dataclass(frozen=True)
class Node:
    """One job of a chain; `after` lists the (stage, fold) that must succeed before it starts."""

    stage: str
    fold: int | None
    after: tuple[tuple[str, int | None], ...]

    @property
    def key(self) -> str:
        """The job's name within a run."""
        return job_key(self.stage, self.fold)


def upstream(config: Config, stage: str, fold: int | None, folds: Iterable[int] = ()) -> list[tuple[str, int | None]]:
    """Return the jobs, as (stage, fold), whose results `stage` reads, in the order of the chain."""
    trained = config.train_stages
    if stage == "preprocess":
        return [("phantom", None)] if config.phantom.films else []
    if stage == "finalize":
        return [("preprocess", None)]
    if stage in trained:
        previous = [] if config.train_stage(stage).init_from else trained[: trained.index(stage)][-1:]
        return [("finalize", None), *((name, fold) for name in previous)]
    if stage == "swa":
        return [("finalize", None), (config.last_stage, fold)]
    if stage == "evaluate":
        return [("finalize", None), ("swa" if "swa" in config.stages else config.last_stage, fold)]
    if stage == "pool":
        return [("evaluate", k) for k in folds]
    if stage == "infer":
        folds = list(folds)
        # The models of several folds use the pooled triplet: without this dependency some tasks would start before it.
        pooled = [("pool", None)] if len(folds) > 1 else []
        return [] if config.infer.models else [*(("evaluate", k) for k in folds), *pooled]
    if stage == "merge":
        return [("infer", None)]
    return []


def ancestors(config: Config, job: tuple[str, int | None], folds: Iterable[int] = ()) -> set[tuple[str, int | None]]:
    """Return all jobs, as (stage, fold), that a job reads from, directly or through others."""
    folds = list(folds)
    direct = upstream(config, *job, folds)
    return set(direct).union(*(ancestors(config, parent, folds) for parent in direct))


def jobs_of(config: Config, stage: str, folds: list[int]) -> list[Node]:
    """Return the jobs that `--stage` requests, in submission order.

    Raises:
        ConfigError: the recipe has no such stage, or a fold lies outside `data.folds`.
    """
    for fold in folds:
        if not 0 <= fold < config.data.folds:
            raise ConfigError(
                f"--folds {fold}: data.folds={config.data.folds} makes folds 0 to {config.data.folds - 1}"
            )
    if stage in (*configuration.TRAIN_STAGES, "swa") and stage not in config.stages:
        raise ConfigError(f"this recipe has no {STAGES[stage].title}: it lists stages={','.join(config.stages)}")
    pooled = ["pool"] if len(folds) > 1 else []
    names = {
        "preprocess": ["preprocess", "finalize"],
        "evaluate": ["evaluate", *pooled],
        "infer": ["infer", "merge"],
        "all": ["preprocess", "finalize", *config.stages, "evaluate", *pooled, "infer", "merge"],
    }.get(stage, [stage])
    if "preprocess" in names and config.phantom.films:
        names = ["phantom", *names]
    return [
        Node(name, fold, tuple(upstream(config, name, fold, folds)))
        for name in names
        for fold in (folds if STAGES[name].per_fold else [None])
    ]
