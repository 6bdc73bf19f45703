"""Validation of one fold on all ranks, and the pooled out-of-fold scores of several folds.

Whole fixed batches are dealt to ranks and counts are joined, so that any number of ranks gives the same bits.
Rank 0 writes; nothing here tunes and scores on the same films without saying so.
"""

from __future__ import annotations

import csv
import io
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import HOLDOUT, Case, read_cases
from pneumo_dist.data.loaders import fold_cases
from pneumo_dist.evaluation.events import evaluated
from pneumo_dist.evaluation.film_notes import FilmNotes
from pneumo_dist.evaluation.report import Evaluation, read_curves, write_report
from pneumo_dist.model.modelfile import load_model, portable, save_model
from pneumo_dist.prediction.forward import Predictor, predict_records
from pneumo_dist.runtime.files import sha256_file, write_json, write_text
from pneumo_dist.runtime.processes import cores
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.runtime.stopping import Stopped
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.metrics import Records, record_thresholds, summary

log = logging.getLogger(__name__)


def weight_files(task: Task) -> dict[str, Path]:
    """Return {name: model file} of the weights to compare; the first is the one that is scored in full and deployed.

    Raises:
        ConfigError: training has left none.
    """
    last = task.dir_of(task.config.last_stage)
    found = {"swa": task.dir_of("swa") / "model.pt"} if "swa" in task.config.stages else {}
    found |= {name: path for name in ("best", "last") if (path := last / f"{name}.pt").exists()}
    if not found:
        raise ConfigError(f"{last} has no weights: run stage {task.config.last_stage} first")
    return found


def run(task: Task) -> dict[str, Path]:
    """Score the validation films of one fold (and, apart, the holdout films) and write `fold<k>/model.pt`.

    Raises:
        ConfigError: no weights, or no validation films.
        Stopped: a signal asked to leave; nothing is written.
    """
    config, ranks = task.config, task.ranks
    if ranks.device.type == "cpu":
        torch.set_num_threads(cores(config.train.threads))
    assert task.fold is not None
    cases = read_cases(task.run.shard_dir)
    _, validation = fold_cases(cases, task.fold)
    holdout = [case for case in cases if case.fold == HOLDOUT]
    files = weight_files(task)
    every: dict[str, Records] = {}
    notes = FilmNotes(config.evaluate.threshold)
    held: Records | None = None
    for name, path in files.items():
        chosen = not every
        log.info("evaluating %s on %d films", name, len(validation))
        every[name] = _score(task, path, validation, notes if chosen else None)
        if chosen and holdout:
            log.info("evaluating %s on %d holdout films", name, len(holdout))
            held = _score(task, path, holdout, None)
    notes.join((ranks.gather(notes) or [])[1:])
    return ranks.on_first(lambda: _write_fold(task, files, every, held, notes, cases)) or {}


def _score(task: Task, path: Path, cases: Sequence[Case], notes: FilmNotes | None) -> Records:
    """Score one model file on all ranks; the joined records on rank 0, this rank's own elsewhere."""
    config, ranks = task.config, task.ranks
    model, meta = load_model(path, ranks.device)
    size = int(meta["size"])
    predictor = Predictor([model], size, ranks.device, config.evaluate.tta, config.train.amp)
    mine = predict_records(
        predictor, cases, task.run.shard_dir, size, config.evaluate.batch_size, record_thresholds(config.evaluate),
        ranks.rank, ranks.world_size, task.stop, notes,
    )  # fmt: skip
    leave = ranks.maximum([task.stop.leave])[0]  # all ranks leave together, or none does
    if leave:
        raise Stopped(leave)
    parts = ranks.gather(mine)
    return mine if parts is None else Records.concatenate(parts)


def _write_fold(
    task: Task,
    files: Mapping[str, Path],
    every: Mapping[str, Records],
    held: Records | None,
    notes: FilmNotes,
    cases: Sequence[Case],
) -> dict[str, Path]:
    config, settings, out = task.config, task.config.evaluate, task.out
    name, records = next(iter(every.items()))
    model, meta = load_model(files[name])
    tuned = scorecard.tune(records, settings, by="group")
    result: dict[str, Any] = {
        "fold": task.fold,
        "weights": name,
        "model_sha256": sha256_file(files[name]),
        "size": meta["size"],
        "tta": settings.tta,
        **scorecard.scores(records, tuned, settings),
        "weights_side_by_side": scorecard.side_by_side(every, settings.threshold),
    }
    if held is not None:
        result["holdout"] = {
            "films": len(held),
            "fixed": summary(held, scorecard.fixed(settings.threshold), settings.bootstrap),
            "triplet_tuned_on_validation": summary(held, tuned.triplet, settings.bootstrap),
        }
    trained = {f"stage {stage}": task.dir_of(stage) for stage in config.train_stages}
    evaluation = Evaluation(
        f"Fold {task.fold}: {name} weights, {meta['size']} px, flips {settings.tta}",
        result, records, tuned, notes.masks, notes.total, {case.id: case for case in cases}, task.run.shard_dir,
        int(meta["size"]), read_curves(trained),
    )  # fmt: skip
    task.check_attempt()
    outputs = _write(task, evaluation) | notes.save(out) | {"model": task.run.model(task.fold)}
    headline = result["headline"]
    validation = {
        "films": len(records),
        "dice_fixed": headline["fixed"]["dice"],
        "dice_cross_fitted": headline["cross_fitted"]["dice"] if "cross_fitted" in headline else None,
    }
    provenance = {
        **meta.get("provenance", {}), "weights": name, "weights_sha256": result["model_sha256"], "fold": task.fold,
        "validation": validation,
    }  # fmt: skip
    learned = {
        "triplet": asdict(tuned.triplet),
        "tta": settings.tta,
        "config": portable(config),
        "provenance": provenance,
    }
    save_model(outputs["model"], model.state_dict(), {**meta, **learned})
    return outputs


def pool(task: Task) -> dict[str, Path]:
    """Join the folds' out-of-fold records into the run's scores; triplets are cross-fitted by fold.

    Raises:
        ConfigError: no evaluated fold, or folds that do not belong together.
    """
    settings = task.config.evaluate
    found = [path for k in task.run.folds if (path := task.run.in_fold("evaluate", k) / "records.npz").exists()]
    if not found:
        raise ConfigError(f"{task.run.folder} has no evaluated fold: run --stage evaluate first")
    try:
        records = Records.concatenate(Records.load(path) for path in found)
    except ValueError as error:
        raise ConfigError(
            f"{task.run.folder}: the folds do not belong together ({error}): evaluate them again with one configuration"
        ) from None
    notes = FilmNotes(settings.threshold)
    notes.join(FilmNotes.load(path.parent) for path in found)
    tuned = scorecard.tune(records, settings, by="fold")
    folds = sorted(int(fold) for fold in np.unique(records.folds))
    weights = "swa" if "swa" in task.config.stages else "best"
    result = {"folds": folds, "weights": weights, "tta": settings.tta, **scorecard.scores(records, tuned, settings)}
    evaluation = Evaluation(
        f"Out-of-fold predictions of folds {', '.join(map(str, folds))}",
        result, records, tuned, notes.masks, notes.total, {case.id: case for case in read_cases(task.run.shard_dir)},
        task.run.shard_dir, task.config.train_stage(task.config.last_stage).size, {},
    )  # fmt: skip
    task.check_attempt()
    return _write(task, evaluation) | notes.save(task.out)


def _write(task: Task, evaluation: Evaluation) -> dict[str, Path]:
    """Write what both evaluations share, tell TensorBoard and the log, and return {name: file}."""
    out, settings, result = task.out, task.config.evaluate, evaluation.result
    records, tuned = evaluation.records, evaluation.tuned
    records.save(out / "records.npz")
    write_json(out / "scores.json", result)
    write_json(out / "thresholds.json", scorecard.threshold_table(tuned, settings))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(scorecard.FILM_COLUMNS)
    table.writerows(scorecard.film_rows(records, tuned, settings.threshold))
    write_text(out / "films.csv", text.getvalue())
    shown = scorecard.summary_text(result, evaluation.title)
    write_text(out / "summary.txt", shown)
    overlays = write_report(out, evaluation, task.config)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)  # one evaluation, one set of events
    events = RunLog(out / "tensorboard")
    evaluated(events, evaluation, task.config, task.stage, task.fold, list(overlays.values()))
    events.text("summary", f"```\n{shown}```")
    events.close()
    log.info("%s\n%s", out, shown)
    names = {
        "scores": "scores.json", "films": "films.csv", "records": "records.npz", "thresholds": "thresholds.json",
        "summary": "summary.txt", "report": "report.html",
    }  # fmt: skip
    return {name: out / file for name, file in names.items()}
