"""TensorBoard events of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.config import Config
from pneumo_dist.data.films.rle import decode_rle
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.evaluation.report import Evaluation
from pneumo_dist.reports import pictures, tensorboard
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.scoring import scorecard


def log_evaluation(
    log: RunLog,
    evaluation: Evaluation,
    config: Config,
    stage: str,
    fold: int | None,
    worst: Sequence[NDArray[np.uint8]],
) -> None:
    """Show the scores of every decision rule, the fixed and the worst films, and the settings.

    worst: overlays (rows, columns, 3) of the films with the lowest Dice.
    """
    result, records, threshold = evaluation.result, evaluation.records, config.evaluate.threshold
    tensorboard.scores(log, 0, result["headline"]["fixed"], records, threshold)
    rules = {name: entry for name, entry in result["headline"].items() if name != "fixed"}
    rules["in_sample_optimistic"] = result["optimistic"]["in_sample_triplet"]
    for rule, entry in rules.items():
        log.scalars(0, {f"rule/{rule}/{name}": entry[name] for name in scorecard.SIDE_BY_SIDE})
    log.scalars(0, {f"threshold/tuned_{name}": value for name, value in asdict(evaluation.tuned.triplet).items()})
    chosen = tensorboard.fixed_films([evaluation.cases[name] for name in records.ids.tolist()])
    masks = {case.id: decode_rle(evaluation.masks[case.id], case.rows, case.columns) for case in chosen.values()}
    reader = ShardReader(evaluation.shard_dir, evaluation.size)
    tensorboard.films(log, 0, chosen, masks, records, reader, threshold)
    for i, picture in enumerate(worst):
        log.image(f"worst/{i}", pictures.jpeg(picture), picture.shape[:2], 0)
    log.hparams(tensorboard.hyperparameters(config, stage, fold))
