"""TensorBoard content shared by training and evaluation: scores, fixed films, settings, layout of the charts.

A film is named by its id only (SOP instance UID or file name).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pneumo_dist.config import Config, flatten
from pneumo_dist.data.cases import Case
from pneumo_dist.data.films.rle import decode_rle, runs
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.reports import pictures
from pneumo_dist.runtime.runlog import RunLog
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.metrics import dice
from pneumo_dist.scoring.records import Records

PANEL_PX = 192  # longer side of each of a film's three pictures; small, because an event file holds many
SCORES = ("dice", "dice_positive", "iou", "iou_positive", "sensitivity", "specificity", "auc", "dice_all_empty")


def layout(cuda: bool, scaled: bool) -> dict[str, dict[str, list[str]]]:
    """Return the layout of the custom scalars: {heading: {chart: regular expressions, matched from a tag's start}}.

    cuda, scaled: whether to show GPU memory and the gradient scaler.
    """
    health = {
        "Gradient norm": ["train/grad_norm"],
        "Images per second": [r"speed/.*images_per_s"],
        "Share of step time spent waiting for data": [r"speed/.*wait_share"],
        "Attempt (increases at each restart)": ["run/attempt"],
    }
    if cuda:
        health["Peak GPU memory, MiB"] = ["speed/gpu_memory_mib"]
    if scaled:
        health["Gradient scale (mixed precision)"] = ["train/amp_scale"]
    return {
        "Learning": {
            "Dice: all films, films with pneumothorax, all empty (baseline)": [
                f"evaluation/{name}$" for name in ("dice", "dice_positive", "dice_all_empty")
            ],
            "Loss by epoch: training and validation": ["loss/train$", "loss/validation$"],
            "Validation loss: films with and without pneumothorax, above an empty answer": [
                f"loss/validation_{name}$" for name in ("positive", "negative", "above_empty")
            ],
            "Share of films called empty, highest probability": [
                "evaluation/called_empty$",
                "evaluation/highest_probability$",
            ],
            "Sensitivity, specificity, AUC": [f"evaluation/{name}$" for name in ("sensitivity", "specificity", "auc")],
            "Training loss by step: sum, cross-entropy, Dice, image-level": ["loss/step"],
            "Validation loss: sum, cross-entropy, Dice, image-level": [
                f"loss/validation{name}$" for name in ("", "_bce", "_dice", "_image")
            ],
            "Learning rate": ["train/lr"],
        },
        "Throughput and stability": health,
    }


def hyperparameters(config: Config, stage: str, fold: int | None) -> dict[str, float | str]:
    """Return the settings to compare between runs, without paths and unset keys."""
    sections = ("stage1.", "stage2.", "swa.", "loss.", "augment.", "model.")
    single = ("stages", "train.seed", "train.amp", "train.clip_norm", "evaluate.threshold", "evaluate.tta")
    paths = ("stage1.init_from", "stage2.init_from", "model.weights")
    settings = {
        key: ",".join(map(str, value)) if isinstance(value, list) else value
        for key, value in flatten(config).items()
        if (key in single or key.startswith(sections)) and key not in paths and value is not None
    }
    return {"stage": stage, "fold": "all" if fold is None else str(fold), **settings}


def fixed_films(cases: Sequence[Case]) -> dict[str, Case]:
    """Return {tag: film}: films with the largest, median and smallest mask, and two without a mask.

    It depends on `cases` only: every epoch and the evaluation show the same films.
    """

    def share(case: Case) -> float:
        starts, ends = runs(case.rle)
        return float((ends - starts).sum()) / (case.rows * case.columns)

    masked = sorted((case for case in cases if case.label), key=lambda case: (-share(case), case.id))
    empty = sorted((case for case in cases if not case.label), key=lambda case: case.id)
    chosen: dict[str, Case] = {}
    if masked:
        indices = {"1_largest": 0, "2_second": 1, "3_median": len(masked) // 2, "4_smallest": -1}
        chosen |= {f"overlay/mask_{name}": masked[i] for name, i in indices.items() if i < len(masked)}
    if empty:
        chosen |= {"overlay/no_mask_1": empty[0], "overlay/no_mask_2": empty[len(empty) // 2]}
    # Of few films, one can be both the largest and the smallest: it keeps its first tag.
    first_tag = {case.id: tag for tag, case in reversed(chosen.items())}
    return {tag: case for tag, case in chosen.items() if first_tag[case.id] == tag}


def panel_shape(case: Case) -> tuple[int, int]:
    """Return the rows and columns of each of a film's three pictures."""
    longest = max(case.rows, case.columns)
    return max(1, round(case.rows * PANEL_PX / longest)), max(1, round(case.columns * PANEL_PX / longest))


def films(
    log: RunLog,
    step: int,
    chosen: Mapping[str, Case],
    masks: Mapping[str, NDArray[np.bool_]],
    records: Records,
    reader: ShardReader,
    threshold: float,
) -> None:
    """Show film, annotation and prediction of each chosen film side by side.

    masks: {film id: prediction at `threshold`}, at any size.
    """
    film_dice = dict(zip(records.ids.tolist(), dice(records, scorecard.fixed(threshold)).tolist(), strict=True))
    top = dict(zip(records.ids.tolist(), records.top.tolist(), strict=True))
    for tag, case in chosen.items():
        rows, columns = panel_shape(case)
        method = cv2.INTER_AREA if max(rows, columns) < reader.size else cv2.INTER_LINEAR
        image = reader.image(case.shard, case.row)
        grey = np.asarray(cv2.resize(image, (columns, rows), interpolation=method), np.uint8)
        truth = pictures.fit_mask(decode_rle(case.rle, case.rows, case.columns), rows, columns)
        prediction = pictures.fit_mask(masks[case.id], rows, columns)
        empty = np.zeros((rows, columns), bool)
        lines = [
            f"film, annotation, prediction   Dice {film_dice[case.id]:.2f}   score {top[case.id]:.2f}",
            case.id,
        ]
        picture = pictures.overlay(
            np.hstack([grey] * 3), np.hstack([empty, empty, prediction]), lines, np.hstack([empty, truth, empty])
        )
        log.image(tag, pictures.jpeg(picture), picture.shape[:2], step)


def scores(log: RunLog, step: int, entry: Mapping[str, Any], records: Records, threshold: float) -> None:
    """Show the scores at the fixed threshold (`entry`, a `summary`) and the precision-recall curve of the films."""
    log.scalars(step, {f"evaluation/{name}": entry[name] for name in SCORES} | {"threshold/fixed": threshold})
    log.pr_curve("films by highest score", records.truth_px > 0, records.top, step)
