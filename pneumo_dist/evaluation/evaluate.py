"""Validation of one fold on all ranks, and the pooled out-of-fold scores of several folds.

Ranks score whole fixed batches and join their counts, so any number of ranks gives the same bits. Only rank 0 writes.
Scores with thresholds tuned on the scored films are labelled optimistic.
"""

from __future__ import annotations

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
from pneumo_dist.evaluation.events import log_evaluation
from pneumo_dist.evaluation.film_notes import FilmNotes
from pneumo_dist.evaluation.report import Evaluation, write_report
from pneumo_dist.model.modelfile import load_model, portable, save_model
from pneumo_dist.prediction.forward import Predictor, predict_records
from pneumo_dist.runtime import history
from pneumo_dist.runtime.files import sha256_file, write_csv, write_json, write_text
from pneumo_dist.runtime.processes import cores
from pneumo_dist.runtime.processor import set_precision
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.runtime.stopping import Stopped
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.metrics import summary
from pneumo_dist.scoring.records import Records, record_thresholds
from pneumo_dist.scoring.submission_csv import as_cell

log = logging.getLogger(__name__)


def weight_files(task: Task) -> dict[str, Path]:
    """Return {name: model file} of the weights to compare; the first is scored in full and deployed.

    Raises:
        ConfigError: training has written no weights.
    """
    last = task.dir_of(task.config.last_stage)
    files = {"swa": task.dir_of("swa") / "model.pt"} if "swa" in task.config.stages else {}
    files |= {name: path for name in ("best", "last") if (path := last / f"{name}.pt").exists()}
    if not files:
        raise ConfigError(f"{last} has no weights: run stage {task.config.last_stage} first")
    return files


def run(task: Task) -> dict[str, Path]:
    """Score the validation films of one fold and, separately, the hold-out films; write `fold<k>/model.pt`.

    Raises:
        ConfigError: there are no weights or no validation films.
        Stopped: a signal requested the stop; nothing is written.
    """
    config, ranks = task.config, task.ranks
    set_precision(config.train)
    if ranks.device.type == "cpu":
        torch.set_num_threads(cores(config.train.threads))
    assert task.fold is not None
    cases = read_cases(task.run.shard_dir)
    _, validation = fold_cases(cases, task.fold)
    holdout_cases = [case for case in cases if case.fold == HOLDOUT]
    files = weight_files(task)
    records: dict[str, Records] = {}
    notes = FilmNotes(config.evaluate.threshold)
    holdout: Records | None = None
    for name, path in files.items():
        deployed = not records
        log.info("evaluating %s on %d films", name, len(validation))
        records[name] = _score(task, path, validation, notes if deployed else None)
        if deployed and holdout_cases:
            log.info("evaluating %s on %d hold-out films", name, len(holdout_cases))
            holdout = _score(task, path, holdout_cases, None)
    notes.join(FilmNotes(**noted) for noted in (ranks.gather(vars(notes)) or [])[1:])
    return ranks.on_first(lambda: _write_fold(task, files, records, holdout, notes, cases)) or {}


def _score(task: Task, path: Path, cases: Sequence[Case], notes: FilmNotes | None) -> Records:
    """Score one model file on all ranks; return the joined records on rank 0, the rank's own records elsewhere."""
    config, ranks = task.config, task.ranks
    model, meta = load_model(path, ranks.device)
    size = int(meta["size"])
    records = predict_records(
        Predictor([model], size, ranks.device, config.evaluate.tta, config.train.amp),
        cases,
        task.run.shard_dir,
        size,
        config.evaluate.batch_size,
        record_thresholds(config.evaluate),
        ranks.rank,
        ranks.world_size,
        task.stop,
        notes,
    )
    leave = ranks.maximum([task.stop.leave])[0]  # all ranks stop, or none: `gather` waits for every rank
    if leave:
        raise Stopped(leave)
    parts = ranks.gather(vars(records))
    return records if parts is None else Records.concatenate(Records(**part) for part in parts)


def _write_fold(
    task: Task,
    files: Mapping[str, Path],
    records_by_weights: Mapping[str, Records],
    holdout: Records | None,
    notes: FilmNotes,
    cases: Sequence[Case],
) -> dict[str, Path]:
    config, settings = task.config, task.config.evaluate
    name, records = next(iter(records_by_weights.items()))
    model, meta = load_model(files[name])
    tuned = scorecard.tune(records, settings, by="group")
    result: dict[str, Any] = {
        "fold": task.fold,
        "weights": name,
        "model_sha256": sha256_file(files[name]),
        "size": meta["size"],
        "tta": settings.tta,
        **scorecard.scores(records, tuned, settings),
        "weights_side_by_side": scorecard.side_by_side(records_by_weights, settings.threshold),
    }
    if holdout is not None:
        result["holdout"] = {
            "films": len(holdout),
            "fixed": summary(holdout, scorecard.fixed(settings.threshold), settings.bootstrap),
            "triplet_tuned_on_validation": summary(holdout, tuned.triplet, settings.bootstrap),
        }
    evaluation = Evaluation(
        title=f"Fold {task.fold}: {name} weights, {meta['size']} px, TTA {settings.tta}",
        result=result,
        records=records,
        tuned=tuned,
        masks=notes.masks,
        pixels=notes.total,
        cases={case.id: case for case in cases},
        shard_dir=task.run.shard_dir,
        size=int(meta["size"]),
        curves={f"stage {k}": history.read(task.run.metrics(k, task.fold)) for k in config.train_stages},
    )
    task.check_attempt()
    outputs = _write(task, evaluation) | notes.save(task.out) | {"model": task.run.model(task.fold)}
    save_model(outputs["model"], model.state_dict(), {**meta, **_evaluated_meta(task, evaluation, meta)})
    return outputs


def _evaluated_meta(task: Task, evaluation: Evaluation, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the evaluation adds to a model file: the decision rule, and which films it was tuned on."""
    result, headline = evaluation.result, evaluation.result["headline"]
    validation = {
        "films": len(evaluation.records),
        "dice_fixed": headline["fixed"]["dice"],
        "dice_cross_fitted": headline["cross_fitted"]["dice"] if "cross_fitted" in headline else None,
    }
    return {
        "triplet": asdict(evaluation.tuned.triplet),
        "tta": task.config.evaluate.tta,
        "config": portable(task.config),
        "provenance": {
            **meta.get("provenance", {}),
            "weights": result["weights"],
            "weights_sha256": result["model_sha256"],
            "fold": task.fold,
            "validation": validation,
        },
    }


def pool(task: Task) -> dict[str, Path]:
    """Join the folds' out-of-fold records into the scores of the run; thresholds are cross-fitted by fold.

    Raises:
        ConfigError: no fold has been evaluated, or the folds were evaluated with different settings.
    """
    settings = task.config.evaluate
    files = [path for k in task.run.folds if (path := task.run.in_fold("evaluate", k) / "records.npz").exists()]
    if not files:
        raise ConfigError(f"{task.run.folder} has no evaluated fold: run --stage evaluate first")
    try:
        records = Records.concatenate(Records.load(path) for path in files)
    except ValueError as error:
        raise ConfigError(
            f"{task.run.folder}: the folds cannot be pooled ({error}): evaluate them again with one configuration"
        ) from None
    notes = FilmNotes(settings.threshold)
    notes.join(FilmNotes.load(path.parent) for path in files)
    tuned = scorecard.tune(records, settings, by="fold")
    folds = sorted(int(fold) for fold in np.unique(records.folds))
    weights = "swa" if "swa" in task.config.stages else "best"
    evaluation = Evaluation(
        title=f"Out-of-fold predictions of folds {', '.join(map(str, folds))}",
        result={"folds": folds, "weights": weights, "tta": settings.tta, **scorecard.scores(records, tuned, settings)},
        records=records,
        tuned=tuned,
        masks=notes.masks,
        pixels=notes.total,
        cases={case.id: case for case in read_cases(task.run.shard_dir)},
        shard_dir=task.run.shard_dir,
        size=task.config.train_stage(task.config.last_stage).size,
        curves={},
    )
    task.check_attempt()
    return _write(task, evaluation) | notes.save(task.out)


def _write(task: Task, evaluation: Evaluation) -> dict[str, Path]:
    """Write the files, events and log lines that both kinds of evaluation share; return {name: file}."""
    names = ("scores.json", "films.csv", "records.npz", "thresholds.json", "summary.txt", "report.html")
    files = {Path(name).stem: task.out / name for name in names}
    settings, records, tuned = task.config.evaluate, evaluation.records, evaluation.tuned
    records.save(files["records"])
    write_json(files["scores"], evaluation.result)
    write_json(files["thresholds"], scorecard.threshold_table(tuned, settings))
    films = scorecard.film_table(records, tuned, settings.threshold)
    films["id"] = [as_cell(film) for film in films["id"]]
    write_csv(files["films"], [films, *zip(*films.values(), strict=True)])
    summary_text = scorecard.summary_text(evaluation.result, evaluation.title)
    write_text(files["summary"], summary_text)
    worst = write_report(task.out, evaluation, task.config)
    # A repeated evaluation would otherwise add its events to those of the one before.
    shutil.rmtree(task.out / "tensorboard", ignore_errors=True)
    events = RunLog(task.out / "tensorboard")
    log_evaluation(events, evaluation, task.config, task.stage, task.fold, list(worst.values()))
    events.text("summary", f"```\n{summary_text}```")
    events.close()
    log.info("%s\n%s", task.out, summary_text)
    return files
