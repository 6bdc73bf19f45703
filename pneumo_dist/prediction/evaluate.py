"""Validation of one fold on all ranks, and the pooled out-of-fold scores of several folds.

Whole fixed batches are dealt to ranks and counts are joined, so that any number of ranks gives the same bits.
Rank 0 writes; nothing here tunes and scores on the same films without saying so.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pneumo_dist.config import ConfigError, Evaluate, flatten
from pneumo_dist.data.cases import HOLDOUT, Case, read_cases
from pneumo_dist.data.decoding import cores
from pneumo_dist.data.loaders import fold_cases
from pneumo_dist.data.rle import encode_rle
from pneumo_dist.model.modelfile import load_model, save_model
from pneumo_dist.prediction import scorecard
from pneumo_dist.prediction.forward import Predictor, predict_records
from pneumo_dist.prediction.submission import write_submission
from pneumo_dist.runtime.files import sha256_file, write_json, write_text
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.runtime.stopping import Stopped
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.metrics import Records, apply_triplet, record_thresholds, summary

log = logging.getLogger(__name__)

RELIABILITY_BINS = 20


@dataclass
class FilmNotes:
    """What the report wants of each film beyond its counts: the mask at the fixed threshold, and pixel reliability."""

    threshold: float
    masks: dict[str, str] = field(default_factory=dict)  # id -> RLE at film size
    pixels: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # id -> (2, bins) counts by truth and probability

    def __call__(self, case: Case, prob: NDArray[np.float32], truth: NDArray[np.bool_]) -> None:
        """Note one film; called from threads, each film once."""
        self.masks[case.id] = encode_rle(apply_triplet(prob, scorecard.fixed(self.threshold)))
        place = np.minimum((prob * RELIABILITY_BINS).astype(np.uint8), RELIABILITY_BINS - 1)
        place += truth.view(np.uint8) * np.uint8(RELIABILITY_BINS)
        self.pixels[case.id] = np.bincount(place.ravel(), minlength=2 * RELIABILITY_BINS).reshape(2, -1)


def weight_files(task: Task) -> dict[str, Path]:
    """Return {name: model file} of the weights to compare; the first one is the one that is evaluated and deployed."""
    last = task.dir_of(task.config.last_stage)
    found = {"swa": task.dir_of("swa") / "model.pt"} if "swa" in task.config.stages else {}
    return found | {name: path for name in ("best", "last") if (path := last / f"{name}.pt").exists()}


def run(task: Task) -> dict[str, Path]:
    """Score the validation films of one fold (and, apart, the holdout films) and write `fold<k>/model.pt`."""
    config, ranks = task.config, task.ranks
    if ranks.device.type == "cpu":
        torch.set_num_threads(cores(config.train.threads))
    cases = read_cases(task.shard_dir)
    _, validation = fold_cases(cases, task.fold)
    holdout = [case for case in cases if case.fold == HOLDOUT]
    if not validation:
        raise ConfigError(f"fold {task.fold} has no validation films: use fewer folds (data.folds) or more films")
    files = weight_files(task)
    if not files:
        raise ConfigError(f"no weights in {task.dir_of(config.last_stage)}: run stage {config.last_stage} first")
    every: dict[str, Records] = {}
    notes = FilmNotes(config.evaluate.threshold)
    apart: Records | None = None
    for name, path in files.items():
        chosen = not every
        log.info("evaluating %s on %d films", name, len(validation))
        joined = _score(task, path, validation, notes if chosen else None)
        if chosen and holdout:
            apart = _score(task, path, holdout, None)
        every[name] = joined
    shares = ranks.gather(notes)
    if shares is None:
        return {}
    for share in shares[1:]:
        notes.masks |= share.masks
        notes.pixels |= share.pixels
    return _write_fold(task, files, every, apart, notes, validation)


def _score(task: Task, path: Path, cases: Sequence[Case], notes: FilmNotes | None) -> Records:
    """Score one model file on all ranks; the joined records on rank 0, this rank's own elsewhere."""
    config, ranks = task.config, task.ranks
    model, meta = load_model(path, ranks.device)
    if ranks.device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = int(meta["size"])
    predictor = Predictor([model], size, ranks.device, config.evaluate.tta, config.train.amp)
    mine = predict_records(
        predictor, cases, task.shard_dir, size, config.evaluate.batch_size, record_thresholds(config.evaluate),
        ranks.rank, ranks.world_size, task.stop, notes,
    )  # fmt: skip
    leave = ranks.maximum([task.stop.leave])[0]  # all ranks leave together, or none does
    if leave:
        raise Stopped(leave)
    parts = ranks.gather(mine)
    return mine if parts is None else Records.concatenate(parts)


def _write_fold(
    task: Task, files: Mapping[str, Path], every: Mapping[str, Records], apart: Records | None, notes: FilmNotes, cases: Sequence[Case]
) -> dict[str, Path]:
    settings, out = task.config.evaluate, task.out
    name, records = next(iter(every.items()))
    tuned = scorecard.tune(records, settings, by="group")
    state, meta = load_model(files[name])
    result: dict[str, Any] = {
        "fold": task.fold,
        "weights": name,
        "model_sha256": sha256_file(files[name]),
        "size": meta["size"],
        "tta": settings.tta,
        **scorecard.scores(records, tuned, settings),
        "weights_side_by_side": scorecard.side_by_side(every, settings.threshold),
    }
    if apart is not None:
        result["holdout"] = {
            "films": len(apart),
            "fixed": summary(apart, scorecard.fixed(settings.threshold), settings.bootstrap),
            "triplet_tuned_on_validation": summary(apart, tuned.triplet, settings.bootstrap),
        }
    if task.attempt:
        task.attempt.check()
    outputs = _write_scores(out, result, records, tuned, settings, f"fold {task.fold}, weights {name}, {meta['size']} px, tta {settings.tta}")
    pixels = sum((notes.pixels[key] for key in sorted(notes.pixels)), np.zeros((2, RELIABILITY_BINS), np.int64))
    write_json(out / "reliability.json", {"bins": RELIABILITY_BINS, "pixels_outside": pixels[0].tolist(), "pixels_inside": pixels[1].tolist()})
    write_submission(out / "submission.csv", sorted(notes.masks.items()))
    provenance = {**meta.get("provenance", {}), "weights": name, "weights_sha256": result["model_sha256"], "fold": task.fold}
    provenance["validation"] = {
        "films": len(records),
        "dice_fixed": result["headline"]["fixed"]["dice"],
        "dice_cross_fitted": result["headline"].get("cross_fitted", {}).get("dice"),
    }
    save_model(
        task.fold_dir / "model.pt",
        state.state_dict(),
        {**meta, "triplet": asdict(tuned.triplet), "tta": settings.tta, "config": flatten(task.config), "provenance": provenance},
    )
    events = RunLog(out / "tensorboard", first=True, purge_step=0)
    for label, entry in scorecard.headline_lines(result):
        events.scalars(0, {f"{key}/{label}": entry[key] for key in scorecard.SIDE_BY_SIDE if entry[key] is not None})
    events.text("summary", "```\n" + (out / "summary.txt").read_text() + "```")
    events.close()
    log.info("%s", (out / "summary.txt").read_text())
    return outputs | {"submission": out / "submission.csv", "reliability": out / "reliability.json", "model": task.fold_dir / "model.pt"}


def pool(task: Task) -> dict[str, Path]:
    """Join the folds' out-of-fold records into the run's scores; triplets are cross-fitted by fold."""
    settings, out = task.config.evaluate, task.out
    found = sorted(task.run_dir.glob("fold*/evaluate/records.npz"))
    if not found:
        raise ConfigError(f"{task.run_dir}: no evaluated fold to pool: run --stage evaluate first")
    try:
        records = Records.concatenate(Records.load(path) for path in found)
    except ValueError as error:
        raise ConfigError(f"{task.run_dir}: the folds do not belong together ({error}): evaluate them again with one configuration") from None
    tuned = scorecard.tune(records, settings, by="fold")
    result = {
        "folds": sorted(int(fold) for fold in np.unique(records.folds)),
        "tta": settings.tta,
        **scorecard.scores(records, tuned, settings),
    }
    outputs = _write_scores(out, result, records, tuned, settings, f"out-of-fold, folds {', '.join(map(str, result['folds']))}")
    log.info("%s", (out / "summary.txt").read_text())
    return outputs


def _write_scores(
    out: Path, result: Mapping[str, Any], records: Records, tuned: scorecard.Tuned, settings: Evaluate, title: str
) -> dict[str, Path]:
    """Write what both evaluations share and return {name: file}."""
    records.save(out / "records.npz")
    write_json(out / "scores.json", result)
    write_json(out / "thresholds.json", scorecard.threshold_table(tuned, settings))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(scorecard.FILM_COLUMNS)
    table.writerows(scorecard.film_rows(records, tuned, settings.threshold))
    write_text(out / "films.csv", text.getvalue())
    write_text(out / "summary.txt", scorecard.summary_text(result, title))
    names = {"scores": "scores.json", "films": "films.csv", "records": "records.npz", "thresholds": "thresholds.json", "summary": "summary.txt"}
    return {name: out / file for name, file in names.items()}
