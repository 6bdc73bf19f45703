"""Search of (top score, minimum area, mask threshold), and its honest form: tuned on other patients.

In-sample results of `search` are optimistic; only `cross_fit` values may stand in a headline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.scoring.metrics import Decisions, decide, dice
from pneumo_dist.scoring.records import Records, Triplet


def search(
    records: Records,
    top_scores: Sequence[float],
    min_areas: Sequence[int],
    mask_thresholds: Sequence[float] | None = None,
) -> tuple[Triplet, NDArray[np.float64]]:
    """Return the triplet of highest mean Dice, and the mean Dice of all of them.

    The surface is float64 (len(top_scores), len(min_areas), len(mask_thresholds)), axes in the order given;
    mask_thresholds defaults to all recorded ones. Of equal triplets the one that empties the fewest films
    wins: lowest top score, then smallest area, then lowest mask threshold.

    Raises:
        ValueError: no films, or a mask threshold that was not recorded.
    """
    if len(records) == 0:
        raise ValueError("no films to tune thresholds on")
    masks = list(records.thresholds if mask_thresholds is None else mask_thresholds)
    tops, top_place = np.unique(np.asarray(top_scores, np.float32), return_inverse=True)
    areas, area_place = np.unique(np.asarray(min_areas, np.int64), return_inverse=True)
    empty = (records.truth_px == 0).astype(np.float64)  # a film's Dice when it is called empty
    # A film passes the first `passed_top` top scores and the first `passed_area` areas: its gain over "empty"
    # belongs to all triplets up to that corner, so a histogram of corners and a reverse cumulative sum do it.
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
    ranked = surface[:, :, order].round(12)  # sums of one value in another order differ in the last bits
    i, j, m = np.unravel_index(int(ranked.argmax()), ranked.shape)
    best = Triplet(_given(top_scores, top_place, i), int(areas[j]), float(masks[order[m]]))
    return best, surface[top_place][:, area_place]


def _given(values: Sequence[float], place: NDArray[np.int64], index: np.intp) -> float:
    return float(values[int(np.flatnonzero(place == index)[0])])  # as written, not as float32 rounds it


@dataclass(frozen=True, eq=False)
class CrossFit:
    """Decisions on every film by triplets tuned on other patients: part (n,) tells which of `triplets` was used."""

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
    """Decide each film by the triplet that is best on the films of other parts; None where there is one part only.

    by: "fold" makes each training fold a part, "group" deals whole patients, positives first, into k parts.
    Score the result with `dice(records, fit.decisions)` and `summary(records, fit.decisions)`.
    """
    part = records.folds if by == "fold" else _deal_groups(records, k, seed)
    names, part = np.unique(part, return_inverse=True)
    if len(names) < 2:
        return None
    area, hits = np.zeros((2, len(records)), np.int64)
    triplets = []
    for p in range(len(names)):
        mine = part == p
        triplet, _ = search(records.select(~mine), top_scores, min_areas, mask_thresholds)
        found = decide(records.select(mine), triplet)
        area[mine], hits[mine] = found.area, found.hits
        triplets.append(triplet)
    return CrossFit(Decisions(area, hits), triplets, part)


def _deal_groups(records: Records, k: int, seed: int) -> NDArray[np.int64]:
    """Deal shuffled patients into k parts, those with a positive film first, so that each part has its share."""
    names, group = np.unique(records.groups, return_inverse=True)
    positive = np.bincount(group, records.truth_px > 0, len(names)) > 0
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(~positive[order], kind="stable")]
    part = np.empty(len(names), np.int64)
    part[order] = np.arange(len(names)) % k
    return part[group]
