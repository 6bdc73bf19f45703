"""Scores of a decision rule on stored records: what goes into scores.json.

Plain numbers only: a score that is undefined (no positives, one class) is None, never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.scoring.records import (
    REFERENCE_PX,
    FilmRecord,
    Records,
    Triplet,
    apply_triplet,
    film_record,
    record_thresholds,
)

__all__ = [
    "Decisions", "FilmRecord", "Records", "Triplet", "apply_triplet", "auc", "decide", "dice", "film_record",
    "iou", "record_thresholds", "summary",
]  # fmt: skip

Floats = NDArray[np.float64]

# Edges in pixels of 1024x1024. SIIM-ACR's 2,669 positive films fall into them as 10, 20, 24, 23 and 23 %.
SIZE_BINS = (0, 2_000, 5_000, 10_000, 20_000)


@dataclass(frozen=True, eq=False)
class Decisions:
    """Final masks as counts: area (n,) pixels, 0 where the film is called empty; hits (n,) of them in the truth."""

    area: NDArray[np.int64]
    hits: NDArray[np.int64]


def decide(records: Records, rule: Triplet | Decisions) -> Decisions:
    """Apply a triplet to every film: the counts of `apply_triplet`'s masks. Decisions are passed through."""
    if isinstance(rule, Decisions):
        return rule
    column = records.column(rule.mask_threshold)
    called = records.top >= np.float32(rule.top_score)
    called &= records.areas[:, column] * REFERENCE_PX >= rule.min_area * records.film_px
    return Decisions(np.where(called, records.areas[:, column], 0), np.where(called, records.hits[:, column], 0))


def dice(records: Records, rule: Triplet | Decisions) -> Floats:
    """Return the competition's Dice of each film, float64 (n,): 2|X n Y| / (|X| + |Y|), 1 where both are empty."""
    found = decide(records, rule)
    return _ratio(2 * found.hits, found.area + records.truth_px)


def iou(records: Records, rule: Triplet | Decisions) -> Floats:
    """Return intersection over union of each film, float64 (n,), 1 where both are empty."""
    found = decide(records, rule)
    return _ratio(found.hits, found.area + records.truth_px - found.hits)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Floats:
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)


def auc(scores: NDArray[Any], positive: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """Return the area under the ROC curve, ties counted half, for each row of weights: float64 (B,), NaN if undefined.

    scores, positive: (n,). weights: (B, n) multiplicities of the films (bootstrap resamples); None: one row of ones.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    if len(scores) == 0:
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    ordered, weights, positive = scores[order], weights[:, order], positive[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    high = np.add.reduceat(weights * positive, starts, axis=1)
    low = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(low, axis=1) - low / 2
    pairs = high.sum(1) * low.sum(1)
    return np.where(pairs > 0, (high * below).sum(1) / np.where(pairs > 0, pairs, 1), np.nan)


def summary(records: Records, rule: Triplet | Decisions, bootstrap: int = 0, seed: int = 0) -> dict[str, Any]:
    """Return every score of a rule on these films as plain JSON values, None where undefined.

    bootstrap: resamples of whole patients for the 95 % intervals (0: none); the same seed gives the same intervals.
    """
    found = decide(records, rule)
    result: dict[str, Any] = {"patients": len(np.unique(records.groups)), **_scores(records, found)}
    result["auc"] = _plain(auc(records.top, records.truth_px > 0)[0])
    result["intervals"] = _intervals(records, found, bootstrap, seed)
    area = records.truth_px * REFERENCE_PX / np.maximum(records.film_px, 1)
    edges = (*SIZE_BINS, np.inf)
    result["by_mask_size"] = [
        {"from_px": int(low), "below_px": None if np.isinf(high) else int(high)}
        | _positive_scores(*_subset(records, found, (records.truth_px > 0) & (area >= low) & (area < high)))
        for low, high in pairwise(edges)
    ]
    for name, values in (("by_view", records.views), ("by_sex", records.sexes)):
        result[name] = {
            str(value): _scores(*_subset(records, found, values == value)) for value in np.unique(values) if value
        }
    return result


def _subset(records: Records, found: Decisions, which: NDArray[np.bool_]) -> tuple[Records, Decisions]:
    return records.select(which), Decisions(found.area[which], found.hits[which])


# Every mean in a summary is the quotient of two sums over films, so that the bootstrap can weight the same sums.
def _terms(records: Records, found: Decisions) -> dict[str, tuple[Floats, NDArray[np.bool_]]]:
    positive, called = records.truth_px > 0, found.area > 0
    every = np.ones(len(records), bool)
    film_dice = dice(records, found)
    return {
        "dice": (film_dice, every),
        "dice_positive": (film_dice, positive),
        "iou": (iou(records, found), every),
        "iou_positive": (iou(records, found), positive),
        "sensitivity": (called.astype(float), positive),
        "specificity": ((~called).astype(float), ~positive),
        "dice_all_empty": ((~positive).astype(float), every),
    }


def _scores(records: Records, found: Decisions) -> dict[str, Any]:
    positive, called = records.truth_px > 0, found.area > 0
    counts: dict[str, Any] = {
        "films": len(records),
        "positive": int(positive.sum()),
        "called_positive": int(called.sum()),
    }
    return counts | {
        name: _plain(values[over].mean()) if over.any() else None
        for name, (values, over) in _terms(records, found).items()
    }


def _positive_scores(records: Records, found: Decisions) -> dict[str, Any]:
    """The scores that mean something on films that are all positive."""
    scores = _scores(records, found)
    return {name: scores[name] for name in ("films", "called_positive", "dice", "iou", "sensitivity")}


def _intervals(records: Records, found: Decisions, bootstrap: int, seed: int) -> dict[str, list[float] | None]:
    """Percentile intervals over resamples of patients; a resample in which a score is undefined does not count."""
    terms = _terms(records, found)
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
            part = weights @ (film_values * over)
            values[name].append(np.where(total > 0, part / np.where(total > 0, total, 1), np.nan))
        values["auc"].append(auc(records.top, records.truth_px > 0, weights))
    result: dict[str, list[float] | None] = {}
    for name, blocks in values.items():
        finite = np.concatenate(blocks)
        finite = finite[np.isfinite(finite)]
        result[name] = [float(q) for q in np.quantile(finite, (0.025, 0.975))] if len(finite) else None
    return result


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
