"""Search of the triplet (top score, minimum area, mask threshold), and cross-fitting of it.

Scores of `search` on the films it searched are optimistic; a headline takes scores of `cross_fit` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.scoring.metrics import Decisions, decide, dice
from pneumo_dist.scoring.records import Records, Triplet

NO_FILM = 2.0  # a top score that no film reaches: every film is called empty
_SCORES, _AREAS = 40, 15  # quantiles of the network's scores and areas in a grid


def candidates(
    records: Records, top_scores: Sequence[float], min_areas: Sequence[int], masks: Sequence[float]
) -> tuple[list[float], list[int]]:
    """Return the top scores and minimum areas to search; in place of an empty list, quantiles over `records`.

    The last top score calls every film empty, so that the best rule is never worse on these films than that.
    """
    scores, areas = list(top_scores), list(min_areas)
    if not scores:
        # Scores that occurred, with all their digits: those of a long training crowd near 0 and 1.
        levels = np.linspace(0, 1, _SCORES)
        quantiles = np.quantile(records.top, levels, method="lower") if len(records) else np.zeros(0)
        scores = np.unique([0.0, *quantiles.astype(np.float64)]).tolist()
    if not areas:
        given = np.concatenate([records.scaled_area(records.column(mask)) for mask in masks])
        given = given[given > 0]
        quantiles = np.quantile(given, np.linspace(0, 1, _AREAS)) if len(given) else np.zeros(0)
        areas = np.unique([0, *quantiles.astype(np.int64)]).tolist()
    return [*scores, NO_FILM], areas


def search(
    records: Records,
    top_scores: Sequence[float],
    min_areas: Sequence[int],
    mask_thresholds: Sequence[float] | None = None,
) -> tuple[Triplet, NDArray[np.float64]]:
    """Return the triplet of the highest mean Dice, and the mean Dice of every triplet of the grid.

    The surface is float64 (len(top_scores), len(min_areas), len(mask_thresholds)), axes in the order given;
    mask_thresholds defaults to all recorded ones. Among equal triplets the one with the most positive films wins:
    lowest top score, then smallest area, then lowest mask threshold.

    Raises:
        ValueError: there are no films, or a mask threshold was not recorded.
    """
    if len(records) == 0:
        raise ValueError("no films to tune thresholds on")
    masks = list(records.thresholds if mask_thresholds is None else mask_thresholds)
    tops, top_index = np.unique(np.asarray(top_scores, np.float32), return_inverse=True)
    areas, area_index = np.unique(np.asarray(min_areas, np.int64), return_inverse=True)
    empty = (records.truth_px == 0).astype(np.float64)  # a film's Dice when it is negative
    # A film passes the first `passed_top` top scores and the first `passed_area` areas. Its gain over "empty" counts
    # for all triplets up to that corner: a histogram of corners and a reverse cumulative sum score the whole grid.
    passed_top = np.searchsorted(tops, records.top, side="right")
    surface = np.empty((len(tops), len(areas), len(masks)))
    for k, mask_threshold in enumerate(masks):
        gain = dice(records, Triplet(0.0, 0, float(mask_threshold))) - empty
        passed_area = np.searchsorted(areas, records.scaled_area(records.column(mask_threshold)), side="right")
        corner = passed_top * (len(areas) + 1) + passed_area
        sums = np.bincount(corner, gain, (len(tops) + 1) * (len(areas) + 1)).reshape(len(tops) + 1, -1)
        sums = sums[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1]
        surface[:, :, k] = (empty.sum() + sums[1:, 1:]) / len(records)
    order = np.argsort(masks, kind="stable")
    ranked = surface[:, :, order].round(12)  # sums in another order differ in the last bits
    i, j, m = np.unravel_index(int(ranked.argmax()), ranked.shape)
    best = Triplet(_as_given(top_scores, top_index, i), int(areas[j]), float(masks[order[m]]))
    return best, surface[top_index][:, area_index]


def _as_given(values: Sequence[float], unique_index: NDArray[np.int64], index: np.intp) -> float:
    return float(values[int(np.flatnonzero(unique_index == index)[0])])  # as configured, not as float32 rounds it


@dataclass(frozen=True, eq=False)
class CrossFit:
    """Decisions on every film by triplets tuned on other patients; part (n,) is the index of the film's triplet."""

    decisions: Decisions
    triplets: list[Triplet]
    part: NDArray[np.int64]


def cross_fit(
    records: Records,
    top_scores: Sequence[float],
    min_areas: Sequence[int],
    mask_thresholds: Sequence[float] | None = None,
    *,
    by: str = "group",
    k: int = 5,
    seed: int = 0,
) -> CrossFit | None:
    """Decide each film by the triplet that is best on the films of the other parts; None if there is only one part.

    The grid is that of `candidates` on those other films.

    by: "fold" takes each training fold as a part, "group" splits the patients into k parts, positives first.
    Score the result with `dice(records, fit.decisions)` and `summary(records, fit.decisions)`.
    """
    part = records.folds if by == "fold" else _split_groups(records, k, seed)
    names, part = np.unique(part, return_inverse=True)
    if len(names) < 2:
        return None
    area, hits = np.zeros((2, len(records)), np.int64)
    triplets = []
    for p in range(len(names)):
        held_out = part == p
        others = records.select(~held_out)
        masks = others.thresholds.tolist() if mask_thresholds is None else mask_thresholds
        triplet, _ = search(others, *candidates(others, top_scores, min_areas, masks), masks)
        decisions = decide(records.select(held_out), triplet)
        area[held_out], hits[held_out] = decisions.area, decisions.hits
        triplets.append(triplet)
    return CrossFit(Decisions(area, hits), triplets, part)


def _split_groups(records: Records, k: int, seed: int) -> NDArray[np.int64]:
    """Split shuffled patients into k parts, those with a positive film first, so that each part has as many of them."""
    names, group = np.unique(records.groups, return_inverse=True)
    positive = np.bincount(group, records.truth_px > 0, len(names)) > 0
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(~positive[order], kind="stable")]
    part = np.empty(len(names), np.int64)
    part[order] = np.arange(len(names)) % k
    return part[group]
