"""What TensorBoard shows of scored films, while training and at the end alike: scores, fixed films, settings, layout.

Films are named by their id (SOP instance UID or file name) and by nothing else.
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
from pneumo_dist.scoring.metrics import Records, dice

PANEL_PX = 192  # of the longer side of one of a film's three pictures: an event file keeps many
SCORES = ("dice", "dice_positive", "iou", "iou_positive", "sensitivity", "specificity", "auc", "dice_all_empty")


def layout(cuda: bool, scaled: bool) -> dict[str, dict[str, list[str]]]:
    """Return the page of custom scalars: {heading: {chart: regular expressions, matched from a tag's start}}.

    cuda, scaled: whether there are GPU memory and a gradient scaler to show.
    """
    health = {
        "Gradient norm": ["train/grad_norm"],
        "Images per second": [r"speed/.*images_per_s"],
        "Share of the time that a step waits for data": [r"speed/.*wait_share"],
        "Attempts: a rise is a restart": ["run/attempt"],
    }
    if cuda:
        health["Highest GPU memory so far, MiB"] = ["speed/gpu_memory_mib"]
    if scaled:
        health["Scale of the mixed-precision gradients"] = ["train/amp_scale"]
    return {
        "Does it learn?": {
            "Dice: all films, with pneumothorax, all called empty": [
                f"evaluation/{name}$" for name in ("dice", "dice_positive", "dice_all_empty")
            ],
            "Loss: training and validation": ["loss/train$", "loss/validation$"],
            "Sensitivity, specificity, AUC": [f"evaluation/{name}$" for name in ("sensitivity", "specificity", "auc")],
            "Loss of single steps: sum, cross-entropy, Dice": ["loss/step"],
            "Loss on validation films: sum, cross-entropy, Dice": ["loss/validation"],
            "Learning rate": ["train/lr"],
        },
        "Does it run well?": health,
    }


def hyperparameters(config: Config, stage: str, fold: int | None) -> dict[str, float | str]:
    """Return what is worth comparing between runs: no paths, nothing unset."""
    sections = ("stage1.", "stage2.", "swa.", "loss.", "augment.", "model.")
    single = ("stages", "train.seed", "train.amp", "train.clip_norm", "evaluate.threshold", "evaluate.tta")
    paths = ("stage1.init_from", "stage2.init_from", "model.weights")
    chosen = {
        key: ",".join(map(str, value)) if isinstance(value, list) else value
        for key, value in flatten(config).items()
        if (key in single or key.startswith(sections)) and key not in paths and value is not None
    }
    return {"stage": stage, "fold": "all" if fold is None else str(fold), **chosen}


def fixed_films(cases: Sequence[Case]) -> dict[str, Case]:
    """Return {tag: film}: large, median and smallest masks and two films without one; a function of `cases` alone."""

    def share(case: Case) -> float:
        starts, ends = runs(case.rle)
        return float((ends - starts).sum()) / (case.rows * case.columns)

    masked = sorted((case for case in cases if case.label), key=lambda case: (-share(case), case.id))
    empty = sorted((case for case in cases if not case.label), key=lambda case: case.id)
    chosen: dict[str, Case] = {}
    if masked:
        named = {"1_largest": 0, "2_second": 1, "3_median": len(masked) // 2, "4_smallest": -1}
        chosen |= {f"overlay/mask_{name}": masked[i] for name, i in named.items() if i < len(masked)}
    if empty:
        chosen |= {"overlay/no_mask_1": empty[0], "overlay/no_mask_2": empty[len(empty) // 2]}
    first = {case.id: tag for tag, case in reversed(chosen.items())}
    return {tag: case for tag, case in chosen.items() if first[case.id] == tag}  # few films: each but once


def panel_shape(case: Case) -> tuple[int, int]:
    """Return rows and columns of one of the film's pictures."""
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
    """Show input, annotation and prediction of each chosen film side by side.

    masks: {film id: prediction at `threshold`, at any size of the film's shape}.
    """
    film_dice = dict(zip(records.ids.tolist(), dice(records, scorecard.fixed(threshold)).tolist(), strict=True))
    top = dict(zip(records.ids.tolist(), records.top.tolist(), strict=True))
    for tag, case in chosen.items():
        rows, columns = panel_shape(case)
        smaller = max(rows, columns) < reader.size
        way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        grey = np.asarray(cv2.resize(reader.image(case.shard, case.row), (columns, rows), interpolation=way), np.uint8)
        truth = pictures.fit_mask(decode_rle(case.rle, case.rows, case.columns), rows, columns)
        found, none = pictures.fit_mask(masks[case.id], rows, columns), np.zeros((rows, columns), bool)
        lines = [
            f"film, annotation, prediction   Dice {film_dice[case.id]:.2f}   highest score {top[case.id]:.2f}",
            case.id,
        ]
        picture = pictures.overlay(
            np.hstack([grey] * 3), np.hstack([none, none, found]), lines, np.hstack([none, truth, none])
        )
        log.image(tag, pictures.jpeg(picture), picture.shape[:2], step)


def scores(log: RunLog, step: int, entry: Mapping[str, Any], records: Records, threshold: float) -> None:
    """Show the scores of the fixed threshold (a `summary`) and the ranking of the films by their highest score."""
    log.scalars(step, {f"evaluation/{name}": entry[name] for name in SCORES} | {"threshold/fixed": threshold})
    log.pr_curve("films by highest score", records.truth_px > 0, records.top, step)
