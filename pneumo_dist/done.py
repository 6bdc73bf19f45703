"""When a stage is done: `DONE.json`, written last, carries the settings and inputs that determine the result.

Nodes, workers, paths and versions are recorded there, not compared. No torch in here: submit.py asks before it submits.
"""

from __future__ import annotations

import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pneumo_dist import config as configuration
from pneumo_dist.chain import STAGES, Node, upstream
from pneumo_dist.config import Config, ConfigError
from pneumo_dist.data.cases import find_films
from pneumo_dist.run import Run, pooled_thresholds
from pneumo_dist.runtime.files import read_json, sha256_file, sha256_text, write_json
from pneumo_dist.runtime.task import Task

log = logging.getLogger(__name__)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key == p or (p.endswith(".") and key.startswith(p)) for p in patterns)


def settings_of(config: Config, stage: str) -> dict[str, Any]:
    """Return the configuration keys, with values, that determine this stage's result."""
    patterns = STAGES[stage].keys
    if stage in configuration.TRAIN_STAGES and config.averages(stage):
        patterns = (*patterns, "swa.start", "swa.interval", "swa.lr")
    if stage == "swa":
        last = f"stage{config.last_stage}"
        patterns = (*patterns, f"{last}.size", f"{last}.batch_size", "evaluate.threshold", "evaluate.tta")
    dropped = {"stage1.init_from", "stage2.init_from"}  # paths: their files are inputs
    return {k: v for k, v in configuration.flatten(config).items() if _matches(k, patterns) and k not in dropped}


def _listing_hash(folder: Path) -> str:
    """Hash the names and sizes of the films in a folder; their bytes are hashed while they are read."""

    films, _ = find_films(folder)
    return sha256_text("".join(f"{name}\t{path}\t{(folder / path).stat().st_size}\n" for name, path in films))


def inputs_of(run: Run, stage: str, fold: int | None) -> dict[str, str]:
    """Return the sha256 of everything that `stage` reads.

    Raises:
        ConfigError: something upstream is missing: which stage to run.
    """
    config = run.config
    found: dict[str, str] = {}
    if stage in ("preprocess", "finalize"):
        for name in ("rle_csv", "patient_map"):
            path = run.source(name)
            if path is not None:
                found[name] = _file_hash(path, f"data.{name}")
        if config.data.holdout_ids:
            found["holdout_ids"] = _file_hash(Path(config.data.holdout_ids).expanduser(), "data.holdout_ids")
        folder = run.source("dicom_dir")
        if folder is not None:
            found["films"] = _listing_hash(folder)
        return found
    if stage in ("infer", "merge"):
        folder = run.infer_source
        if folder is not None:
            found["films"] = _listing_hash(folder)
        for i, path in enumerate(run.model_paths()):
            found[f"model{i}"] = _file_hash(path, "infer.models")
        pooled = pooled_thresholds(run.model_paths())
        if pooled:
            found["pooled_thresholds"] = sha256_file(pooled)
        return found
    for name, k in upstream(run.config, stage, fold, run.folds):
        outputs = _outputs_read(config, stage, name)
        done = read_done(run, name, k)
        if done is None:
            if stage == "pool":
                continue
            where = run.dir_of(name, k)
            raise ConfigError(
                f"{STAGES[stage].title} needs {STAGES[STAGES[name].closes or name].title}, "
                f"which is not done in {where}: run it first"
            )
        for output, entry in done["outputs"].items():
            if outputs is None or output in outputs:
                found[f"{Node(name, k, ()).key}/{output}"] = entry["sha256"]
    if stage in configuration.TRAIN_STAGES:
        start = config.train_stage(stage).init_from
        if start:
            from pneumo_dist.model.start import start_path

            found["init_from"] = _file_hash(start_path(start, fold), f"stage{stage}.init_from")
        elif config.model.weights and stage == config.train_stages[0]:
            found["weights"] = _file_hash(Path(config.model.weights).expanduser(), "model.weights")
    return found


def _outputs_read(config: Config, stage: str, upstream_stage: str) -> set[str] | None:
    """Which outputs of an upstream stage are read; None: all. Another size of the shards must not matter."""
    if upstream_stage == "finalize":
        size = config.train_stage(stage if stage in configuration.TRAIN_STAGES else config.last_stage).size
        return {"cases", f"manifest-{size}"}
    if upstream_stage in configuration.TRAIN_STAGES:
        return {"swa"} if stage == "swa" else {"best"}
    if upstream_stage == "evaluate":
        return {"records"}
    return None


def _file_hash(path: Path, key: str) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise ConfigError(f"{key}={path}: {error.strerror}: give a file that can be read") from None


def read_done(run: Run, stage: str, fold: int | None) -> dict[str, Any] | None:
    """Return the stage's DONE.json, or None where there is none."""
    try:
        record = dict(read_json(run.done_file(stage, fold)))
        if not {"settings", "inputs", "outputs"} <= record.keys():
            raise ValueError
        return record
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        log.warning("%s is damaged: the stage counts as not done", run.done_file(stage, fold))
        return None


def result_hash(settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Hash what determines a stage's result."""
    return sha256_text(json.dumps({"settings": settings, "inputs": inputs}, sort_keys=True))


def differences(run: Run, stage: str, fold: int | None) -> list[str] | None:
    """Compare a stage's DONE.json with what would be run now.

    Returns:
        None when the stage has not been done (or something it reads is missing now), [] when it is done with the
        same settings and inputs, else the keys that differ.
    """
    done = read_done(run, stage, fold)
    if done is None:
        return None
    try:
        inputs = inputs_of(run, stage, fold)
    except ConfigError:
        return None
    now = settings_of(run.config, stage) | inputs
    before = done["settings"] | done["inputs"]
    keys = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if not keys and stage == "finalize" and not shards_cover(run.config, done):
        return None  # a new size is added to the shards that are there
    return keys


def shards_cover(config: Config, done: dict[str, Any]) -> bool:
    """Whether shards that are done (their DONE.json) have every size that the recipe trains at."""
    return {f"manifest-{size}" for size in config.sizes} <= done["outputs"].keys()


def refuse_difference(run: Run, stage: str, fold: int | None, keys: list[str]) -> None:
    """Raise ConfigError saying what differs from the result that is there, and the two ways on."""
    where = run.dir_of(stage, fold)
    raise ConfigError(
        f"{where} is done with other settings ({', '.join(keys)}): "
        "take another name with --run OTHER, or start it over with --redo"
    )


def _name(task: Task, path: Path) -> str:
    """Return an output's path relative to the run, or to the stage's directory where that lies outside."""
    base = task.run.folder if path.is_relative_to(task.run.folder) else task.out
    return path.relative_to(base).as_posix()


def write_done(task: Task, outputs: dict[str, Path]) -> None:
    """Write DONE.json, the last file of a stage. No times or hosts: shards with theirs are compared byte for byte."""
    task.check_attempt()
    write_json(
        task.run.done_file(task.stage, task.fold),
        {
            "stage": task.stage,
            "fold": task.fold,
            "result_hash": task.result_hash,
            "settings": task.settings,
            "inputs": task.inputs,
            "outputs": {
                name: {"file": _name(task, Path(path)), "sha256": sha256_file(path)} for name, path in outputs.items()
            },
            "world_size": task.ranks.world_size,
            "versions": {
                "python": platform.python_version(),
                "torch": version("torch"),
                "machine": platform.machine(),
            },
        },
    )
