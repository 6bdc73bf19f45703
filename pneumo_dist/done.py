"""When a stage is done: `DONE.json`, its last file, holds the settings and inputs that determine the result.

World size and versions are recorded but not compared. No torch here: submit.py reads DONE.json before it submits.
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pneumo_dist import config as configuration
from pneumo_dist.chain import OWN, STAGES, TABLES, job_key, upstream
from pneumo_dist.config import Config, ConfigError
from pneumo_dist.data.films import codecs, grey
from pneumo_dist.data.films.listing import find_films
from pneumo_dist.data.preprocess.maskfiles import masks_hash
from pneumo_dist.model.start import start_path
from pneumo_dist.run import Run, pooled_thresholds
from pneumo_dist.runtime.files import read_json, sha256_file, sha256_text, write_json
from pneumo_dist.runtime.task import Task

log = logging.getLogger(__name__)

CODECS = "codecs"  # the input of inference that is part of the installation, not of the request
# The inputs of preprocessing, and the keys of the data section that name their files.
SOURCES = {
    "rle_csv": "rle_csv", "patient_map": "patient_map", "holdout_ids": "holdout_ids", "masks": "masks",
    "films": "dicom_dir",
}  # fmt: skip
SPLIT = ("patient_map", "holdout_ids")  # none of these is a choice, too: other films count as independent


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
    dropped = {"stage1.init_from", "stage2.init_from"}  # paths: the hashes of their files are inputs
    return {k: v for k, v in configuration.flatten(config).items() if _matches(k, patterns) and k not in dropped}


def _listing_hash(folder: Path, follow_links: bool = True) -> str:
    """Hash the names and sizes of the films in a folder; reading all their bytes here would take too long."""
    films, _ = find_films(folder, follow_links)
    return sha256_text("".join(f"{name}\t{path}\t{(folder / path).stat().st_size}\n" for name, path in films))


def inputs_of(run: Run, stage: str, fold: int | None) -> dict[str, str]:
    """Return the sha256 of everything that `stage` reads, and the versions of the code that reads films.

    Raises:
        ConfigError: an input is missing; the text says which stage to run or which key to set.
    """
    if stage in ("preprocess", "finalize"):
        return _source_hashes(run)
    if stage in ("infer", "merge"):
        return _inference_hashes(run)
    hashes = _upstream_hashes(run, stage, fold)
    if stage in configuration.TRAIN_STAGES:
        hashes |= _start_hash(run.config, stage, fold)
    return hashes


def _source_hashes(run: Run) -> dict[str, str]:
    """Hash the tables, the mask files and the list of films that preprocessing reads."""
    paths = {key: run.source(name) for key, name in SOURCES.items()}
    return {key: _source_hash(key, path) for key, path in paths.items() if path} | {"grey_mapping": grey.VERSION}


def _source_hash(key: str, path: Path) -> str:
    if key == "films":
        return _listing_hash(path)
    return masks_hash(path) if key == "masks" else _file_hash(path, f"data.{SOURCES[key]}")


def _inference_hashes(run: Run) -> dict[str, str]:
    """Hash the films' list, the models and the pooled thresholds of inference; name its decoders and grey mapping."""
    folder = run.infer_source
    hashes = {CODECS: " ".join(codecs.installed()), "grey_mapping": grey.VERSION}
    hashes |= {"films": _listing_hash(folder, run.infer_follows_links)} if folder else {}
    models = run.model_paths()
    hashes |= {f"model{i}": _file_hash(path, "infer.models") for i, path in enumerate(models)}
    pooled = pooled_thresholds(models)
    return hashes | ({"pooled_thresholds": sha256_file(pooled)} if pooled else {})


def _upstream_hashes(run: Run, stage: str, fold: int | None) -> dict[str, str]:
    """Return the hashes, from their DONE.json, of the upstream outputs that `stage` reads."""
    hashes: dict[str, str] = {}
    for name, k in upstream(run.config, stage, fold, run.folds):
        done = read_done(run, name, k)
        if done is None and stage == "pool":
            continue  # pools the folds that are evaluated
        if done is None:
            raise ConfigError(
                f"{STAGES[stage].title} needs {STAGES[STAGES[name].closes or name].title}, "
                f"which is not done in {run.dir_of(name, k)}: run it first"
            )
        read = _outputs_read(run.config, stage, name)
        for output, entry in done["outputs"].items():
            if read is None or output in read:
                hashes[f"{job_key(name, k)}/{output}"] = entry["sha256"]
    return hashes


def _start_hash(config: Config, stage: str, fold: int | None) -> dict[str, str]:
    """Hash the weights file that the recipe names for the start of a training stage."""
    start = config.train_stage(stage).init_from
    if start:
        return {"init_from": _file_hash(start_path(start, fold), f"stage{stage}.init_from")}
    if config.model.weights and stage == config.train_stages[0]:
        return {"weights": _file_hash(Path(config.model.weights).expanduser(), "model.weights")}
    return {}


def _outputs_read(config: Config, stage: str, upstream_stage: str) -> set[str] | None:
    """Return the outputs of an upstream stage that `stage` reads (None: all): shards of other sizes do not count."""
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
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror}): give a readable file") from None


def read_done(run: Run, stage: str, fold: int | None) -> dict[str, Any] | None:
    """Return the stage's DONE.json, or None where there is none."""
    try:
        record = dict(read_json(run.done_file(stage, fold)))
        if not {"settings", "inputs", "outputs"} <= record.keys():
            raise ValueError
        record["settings"].pop("infer.part_size", None)  # earlier versions recorded it; it changes no answer
        return record
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        log.warning("%s is damaged: the stage is treated as not done", run.done_file(stage, fold))
        return None


def result_hash(settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Hash the settings and inputs that determine a stage's result."""
    return sha256_text(json.dumps({"settings": settings, "inputs": inputs}, sort_keys=True))


def differences(run: Run, stage: str, fold: int | None) -> list[str] | None:
    """Compare a stage's DONE.json with the current settings and inputs.

    Returns:
        None when the stage has to run: it is not done, an input is missing now, or only keys of its tables differ.
        [] when it is done with the same settings and inputs, else the keys that differ.
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
    keys = _unequal(now, before)
    if keys and set(keys) <= {*TABLES, CODECS}:
        return None  # inference reads what had no decoder; the merge writes the tables again, from the parts in place
    if not keys and stage == "finalize" and not shards_cover(run.config, done):
        return None  # preprocessing adds the new size to the existing shards
    return keys


def shards_cover(config: Config, done: dict[str, Any]) -> bool:
    """Tell whether the shards of this DONE.json include every image size that the recipe trains at."""
    return all(f"manifest-{size}" in done["outputs"] for size in config.sizes)


def contradictions(
    run: Run, stage: str, fold: int | None, typed: Collection[str] = (), films: bool = True
) -> list[str]:
    """Compare a finished stage that others stand on with what is asked now; return the keys that differ.

    Args:
        typed: keys of the command line.
        films: also compare what takes long to read: the list of films, and the mask files.

    Raises:
        ConfigError: a list or csv file cannot be read.
    """
    done = read_done(run, stage, fold)
    if done is None:
        return []
    keys = [key for key in _unequal(settings_of(run.config, stage), done["settings"]) if key not in OWN]
    if stage == "finalize":
        return keys + _changed_sources(run, done["inputs"], typed, films)
    # Of the files of the user only typed ones count: the result remains when they are replaced or removed.
    files = {key for key in ("init_from", "weights") if any(name.endswith(f".{key}") for name in typed)}
    try:
        inputs = inputs_of(run, stage, fold)
    except ConfigError:
        if files:
            raise
        return keys
    return keys + [key for key in _unequal(inputs, done["inputs"]) if "/" in key or key in files]


def _unequal(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    return sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))


def _changed_sources(run: Run, before: dict[str, str], typed: Collection[str], films: bool) -> list[str]:
    """Return the inputs of preprocessing that the configuration names and that differ from those in the shards.

    A source that is not named asks for nothing, and one that was removed after preprocessing cannot differ.
    """
    now = {"grey_mapping": grey.VERSION}
    preprocessed = _preprocessed(run)
    for key, name in SOURCES.items():
        path = run.source(name)
        slow = key in ("films", "masks") and not films
        named = (path and path.is_relative_to(run.folder)) or (preprocessed and preprocessed.source(name) == path)
        gone = named and path and not path.exists()
        if path and not slow and not gone:
            now[key] = _source_hash(key, path)
        elif key in before and not (path is None and key in SPLIT and f"data.{name}" in typed):
            now[key] = before[key]
    return _unequal(now, before)


def _preprocessed(run: Run) -> Run | None:
    """Return the run with the configuration of its last preprocessing, or its own; None before its first command."""
    try:
        return Run.of_job(run.folder, "finalize")
    except ConfigError:
        return None


def difference_line(run: Run, stage: str, fold: int | None, keys: list[str]) -> str:
    """Return the error line for a result that exists with other settings: both values, and the ways to continue."""
    record = read_done(run, stage, fold) or {"settings": {}, "inputs": {}}
    command = STAGES[stage].closes or {"pool": "evaluate", "phantom": "preprocess"}.get(stage, stage)
    again = f"--stage {command} --redo" + (f" --folds {fold}" if fold else "")
    shown = "; ".join(_both(run, stage, key, record) for key in keys)
    return (
        f"{run.dir_of(stage, fold)} is done with other settings ({shown}): "
        f"keep its settings{words_for(keys, record['settings'])}, "
        f"choose another name with --run OTHER, or repeat it with {again}"
    )


def words_for(keys: Collection[str], settings: dict[str, Any]) -> str:
    """Return the words to type for the settings of a result, in brackets; "" if none of `keys` is one."""
    known = configuration.keys().keys() & settings.keys() & set(keys)
    words = " ".join(shlex.quote(f"{key}={configuration.word(settings[key])}") for key in sorted(known))
    return f" (type {words})" if words else ""


def _both(run: Run, stage: str, key: str, record: dict[str, Any]) -> str:
    """Return one difference as text: the value of the result, and the value now."""
    now, before = settings_of(run.config, stage), record["settings"]
    if key in now.keys() | before.keys():
        return f"{key}={configuration.word(before.get(key))}, now {configuration.word(now.get(key))}"
    if stage != "finalize" or key not in SOURCES:
        return f"{key} has changed"
    name = SOURCES[key]
    path, old = run.source(name), None
    if key in record["inputs"]:  # shards outside the run may come from the files of another run
        preprocessed = None if run.config.data.shard_dir else _preprocessed(run)
        old = (preprocessed and preprocessed.source(name)) or "another file"
    same = f"the content of data.{name}={path} has changed"
    return same if path == old else f"data.{name}={old or 'null'}, now {path or 'null'}"


def _name(task: Task, path: Path) -> str:
    """Return an output's path relative to the run, or to the stage's directory where that is outside the run."""
    base = task.run.folder if path.is_relative_to(task.run.folder) else task.out
    return path.relative_to(base).as_posix()


def write_done(task: Task, outputs: dict[str, Path]) -> None:
    """Write DONE.json, the last file of a stage, without times or hosts: equal results must be equal bytes."""
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
