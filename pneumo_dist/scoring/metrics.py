"""Scores of a decision rule on stored records, as scores.json holds them.

Plain numbers only: an undefined score (no positives, one class) is None, never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.scoring.records import REFERENCE_PX, Records, Triplet

Floats = NDArray[np.float64]

# Edges in pixels of 1024x1024. SIIM-ACR's 2,669 positive films fall into them as 10, 20, 24, 23 and 23 %.
SIZE_BINS = (0, 2_000, 5_000, 10_000, 20_000)


@dataclass(frozen=True, eq=False)
class Decisions:
    """Final masks as counts: area (n,) in pixels, 0 where the film is negative; hits (n,), those inside the truth."""

    area: NDArray[np.int64]
    hits: NDArray[np.int64]


def decide(records: Records, rule: Triplet | Decisions) -> Decisions:
    """Apply a triplet to every film, with the counts of `apply_triplet`'s masks. Decisions are returned as they are."""
    if isinstance(rule, Decisions):
        return rule
    column = records.column(rule.mask_threshold)
    predicted = records.top >= np.float32(rule.top_score)
    predicted &= records.areas[:, column] * REFERENCE_PX >= rule.min_area * records.film_px
    return Decisions(np.where(predicted, records.areas[:, column], 0), np.where(predicted, records.hits[:, column], 0))


def dice(records: Records, rule: Triplet | Decisions) -> Floats:
    """Return the competition's Dice of each film, float64 (n,): 2|X n Y| / (|X| + |Y|), 1 where both are empty."""
    decisions = decide(records, rule)
    return _ratio(2 * decisions.hits, decisions.area + records.truth_px)


def iou(records: Records, rule: Triplet | Decisions) -> Floats:
    """Return the intersection over union of each film, float64 (n,), 1 where both are empty."""
    decisions = decide(records, rule)
    return _ratio(decisions.hits, decisions.area + records.truth_px - decisions.hits)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Floats:
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)


def auc(scores: NDArray[Any], positive: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """Return the area under the ROC curve for each row of weights, float64 (B,); ties count half, NaN if undefined.

    scores, positive: (n,). weights: (B, n), how often each film occurs (bootstrap resamples); None: one row of ones.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    if len(scores) == 0:
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    ordered, weights, positive = scores[order], weights[:, order], positive[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    # One entry per distinct score: the pairs (positive, negative) in the right order, those of equal score as halves.
    positives = np.add.reduceat(weights * positive, starts, axis=1)
    negatives = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(1) * negatives.sum(1)
    return np.where(pairs > 0, (positives * below).sum(1) / np.where(pairs > 0, pairs, 1), np.nan)


def summary(records: Records, rule: Triplet | Decisions, bootstrap: int = 0, seed: int = 0) -> dict[str, Any]:
    """Return every score of a rule on these films as plain JSON values, None where undefined.

    bootstrap: number of resamples of whole patients for the 95 % intervals (0: none). Equal seeds give equal intervals.
    """
    decisions = decide(records, rule)
    result: dict[str, Any] = {"patients": len(np.unique(records.groups)), **_scores(records, decisions)}
    result["auc"] = _plain(auc(records.top, records.truth_px > 0)[0])
    result["intervals"] = _intervals(records, decisions, bootstrap, seed)
    area = records.truth_px * REFERENCE_PX / np.maximum(records.film_px, 1)
    edges = (*SIZE_BINS, np.inf)
    result["by_mask_size"] = [
        {"from_px": int(low), "below_px": None if np.isinf(high) else int(high)}
        | _positive_scores(*_subset(records, decisions, (records.truth_px > 0) & (area >= low) & (area < high)))
        for low, high in pairwise(edges)
    ]
    for name, values in (("by_view", records.views), ("by_sex", records.sexes)):
        result[name] = {
            str(value): _scores(*_subset(records, decisions, values == value)) for value in np.unique(values) if value
        }
    return result


def _subset(records: Records, decisions: Decisions, films: NDArray[np.bool_]) -> tuple[Records, Decisions]:
    return records.select(films), Decisions(decisions.area[films], decisions.hits[films])


# Every mean in a summary is the quotient of two sums over films, so that the bootstrap can weight the same sums.
def _terms(records: Records, decisions: Decisions) -> dict[str, tuple[Floats, NDArray[np.bool_]]]:
    """Return {score: (its value on each film, the films it is averaged over)}."""
    positive, predicted = records.truth_px > 0, decisions.area > 0
    all_films = np.ones(len(records), bool)
    film_dice, film_iou = dice(records, decisions), iou(records, decisions)
    return {
        "dice": (film_dice, all_films),
        "dice_positive": (film_dice, positive),
        "iou": (film_iou, all_films),
        "iou_positive": (film_iou, positive),
        "sensitivity": (predicted.astype(float), positive),
        "specificity": ((~predicted).astype(float), ~positive),
        "dice_all_empty": ((~positive).astype(float), all_films),
    }


def _scores(records: Records, decisions: Decisions) -> dict[str, Any]:
    positive, predicted = records.truth_px > 0, decisions.area > 0
    counts: dict[str, Any] = {
        "films": len(records),
        "positive": int(positive.sum()),
        "called_positive": int(predicted.sum()),
    }
    return counts | {
        name: _plain(values[over].mean()) if over.any() else None
        for name, (values, over) in _terms(records, decisions).items()
    }


def _positive_scores(records: Records, decisions: Decisions) -> dict[str, Any]:
    """Return the scores that are defined on positive films alone."""
    scores = _scores(records, decisions)
    return {name: scores[name] for name in ("films", "called_positive", "dice", "iou", "sensitivity")}


def _intervals(records: Records, decisions: Decisions, bootstrap: int, seed: int) -> dict[str, list[float] | None]:
    """Return percentile intervals over resamples of patients, without those in which a score is undefined."""
    terms = _terms(records, decisions)
    if bootstrap == 0 or len(records) == 0:
        return {}
    _, group = np.unique(records.groups, return_inverse=True)
    groups = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    values: dict[str, list[Floats]] = {name: [] for name in (*terms, "auc")}
    for start in range(0, bootstrap, 64):  # blocks: 64 resamples of 12,000 films are 6 MB
        count = min(64, bootstrap - start)
        drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=count)
        weights = drawn[:, group].astype(np.float64)
        for name, (film_values, over) in terms.items():
            total = weights @ over.astype(float)
            scored = weights @ (film_values * over)
            values[name].append(np.where(total > 0, scored / np.where(total > 0, total, 1), np.nan))
        values["auc"].append(auc(records.top, records.truth_px > 0, weights))
    result: dict[str, list[float] | None] = {}
    for name, blocks in values.items():
        finite = np.concatenate(blocks)
        finite = finite[np.isfinite(finite)]
        result[name] = [float(q) for q in np.quantile(finite, (0.025, 0.975))] if len(finite) else None
    return result


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
