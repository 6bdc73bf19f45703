"""Records of films -> every score that is published: headline, optimistic values, weights side by side, summary text.

Numbers only; no models, files or pictures. Honest values and in-sample values never share a name in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.config import Evaluate
from pneumo_dist.scoring.metrics import Records, Triplet, decide, dice, summary
from pneumo_dist.scoring.records import PAPER_THRESHOLDS
from pneumo_dist.scoring.thresholds import CrossFit, cross_fit, search

OPTIMISTIC = "tuned and scored on the same films: optimistic, not a result"


@dataclass(frozen=True, eq=False)
class Tuned:
    """The outcome of the triplet search: the triplet to deploy, its surface, and the cross-fitted decisions."""

    triplet: Triplet
    surface: NDArray[np.float64]  # (top scores, minimum areas, mask thresholds)
    fit: CrossFit | None  # None: a single patient or fold, nothing to tune on elsewhere
    by: str  # what the cross-fit leaves out: "group" (patients) or "fold"


def fixed(threshold: float) -> Triplet:
    """Return the rule of a fixed mask threshold."""
    return Triplet(0.0, 0, threshold)


def tune(records: Records, settings: Evaluate, by: str) -> Tuned:
    """Search the triplet on all films, and cross-fit it by patient (`group`) or by `fold`."""
    grid = (settings.top_scores, settings.min_areas, settings.mask_thresholds)
    triplet, surface = search(records, *grid)
    return Tuned(triplet, surface, cross_fit(records, *grid, by=by), by)


def scores(records: Records, tuned: Tuned, settings: Evaluate, seed: int = 0) -> dict[str, Any]:
    """Return the scores of one set of films as plain JSON values."""

    def score(rule: Any) -> dict[str, Any]:
        return summary(records, rule, settings.bootstrap, seed)

    headline: dict[str, Any] = {"fixed": {"mask_threshold": settings.threshold, **score(fixed(settings.threshold))}}
    for threshold in PAPER_THRESHOLDS:
        if threshold != settings.threshold:
            headline[f"fixed_{threshold:g}"] = {"mask_threshold": threshold, **score(fixed(threshold))}
    if tuned.fit is not None:
        headline["cross_fitted"] = {
            "tuned_on": "other folds" if tuned.by == "fold" else "other patients",
            "triplets": [asdict(t) for t in tuned.fit.triplets],
            **score(tuned.fit.decisions),
        }
    empty = headline["fixed"]["dice_all_empty"]
    return {
        "films": len(records),
        "patients": headline["fixed"]["patients"],
        "positive": headline["fixed"]["positive"],
        "dice_all_empty": empty,
        "headline": headline,
        "optimistic": {
            "in_sample_triplet": {"note": OPTIMISTIC, "triplet": asdict(tuned.triplet), **score(tuned.triplet)}
        },
    }


def threshold_table(tuned: Tuned, settings: Evaluate) -> dict[str, Any]:
    """Return what goes into thresholds.json: the triplet, how it was found, and the whole surface."""
    return {
        "fixed_mask_threshold": settings.threshold,
        "triplet": asdict(tuned.triplet),
        "min_area_is_px_of": "1024x1024",
        "in_sample_dice": float(tuned.surface.max()),
        "note": OPTIMISTIC,
        "cross_fitted": None
        if tuned.fit is None
        else {"by": tuned.by, "triplets": [asdict(t) for t in tuned.fit.triplets]},
        "surface": {
            "top_scores": list(settings.top_scores),
            "min_areas": list(settings.min_areas),
            "mask_thresholds": list(settings.mask_thresholds),
            "dice": np.round(tuned.surface, 6).tolist(),
        },
    }


SIDE_BY_SIDE = ("dice", "dice_positive", "iou_positive", "sensitivity", "specificity", "auc")


def side_by_side(every: Mapping[str, Records], threshold: float) -> dict[str, Any]:
    """Return the fixed-threshold scores of several weights on the same films."""
    found: dict[str, Any] = {}
    for name, records in every.items():
        scored = summary(records, fixed(threshold))
        found[name] = {"mask_threshold": threshold} | {key: scored[key] for key in SIDE_BY_SIDE}
    return found


FILM_COLUMNS = (
    "id", "fold", "group", "truth_px", "film_px", "top_score", "area_fixed_px", "dice_fixed",
    "area_cross_fitted_px", "dice_cross_fitted", "view", "sex",
)  # fmt: skip


def film_rows(records: Records, tuned: Tuned, threshold: float) -> list[list[Any]]:
    """Return one row per film in the order of FILM_COLUMNS; cross-fitted cells are empty where there is no fit."""
    plain, plain_dice = decide(records, fixed(threshold)), dice(records, fixed(threshold))
    n = len(records)
    fitted = [""] * n if tuned.fit is None else tuned.fit.decisions.area.tolist()
    fitted_dice = [""] * n if tuned.fit is None else dice(records, tuned.fit.decisions).tolist()
    columns = (
        records.ids.tolist(), records.folds.tolist(), records.groups.tolist(), records.truth_px.tolist(),
        records.film_px.tolist(),
        [float(f"{top:.8g}") for top in records.top], plain.area.tolist(), plain_dice.tolist(), fitted, fitted_dice,
        records.views.tolist(), records.sexes.tolist(),
    )  # fmt: skip
    return [list(row) for row in zip(*columns, strict=True)]


def headline_lines(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (label, scores) of every decision rule in reading order; the optimistic one last and labelled."""
    lines = [(_label(name, entry), entry) for name, entry in result["headline"].items()]
    return [*lines, ("tuned in-sample (optimistic)", result["optimistic"]["in_sample_triplet"])]


def _label(name: str, entry: Mapping[str, Any]) -> str:
    if name == "cross_fitted":
        return f"triplet, tuned on {entry['tuned_on']}"
    return f"fixed threshold {entry['mask_threshold']:g}"


def caveats(result: Mapping[str, Any]) -> list[str]:
    """Return what makes the scores look better than they are: folds by image, weights chosen by looking."""
    found = []
    if result["patients"] == result["films"] > 1:
        found.append(
            "every film counts as a patient of its own: without data.patient_map folds and intervals are by image"
        )
    if result.get("weights") == "best":
        found.append("best weights: the epoch was chosen by its Dice on these same films, which is a little optimistic")
    return found


def summary_text(result: Mapping[str, Any], title: str) -> str:
    """Return the one-screen table of a scores.json."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4f}"

    names = ("dice", "dice_positive", "sensitivity", "specificity", "auc")
    heads = ("Dice", "on positives", "sensitivity", "specificity", "AUC")
    lines = [
        title,
        f"{result['films']} films of {result['patients']} patients, {result['positive']} with pneumothorax",
        *caveats(result),
        "",
        f"{'decision':34}" + "".join(f"{head:>14}" for head in heads),
    ]
    for label, entry in headline_lines(result):
        lines.append(f"{label:34}" + "".join(f"{cell(entry[name]):>14}" for name in names))
        low_high = entry["intervals"].get("dice")
        if low_high:
            spans = (entry["intervals"].get(name) for name in names)
            lines.append(
                f"{'  95 % by patient':34}"
                + "".join(f"{'-' if s is None else f'{s[0]:.3f}-{s[1]:.3f}':>14}" for s in spans)
            )
    lines.append(
        f"{'calling every film empty':34}{cell(result['dice_all_empty']):>14}{0:>14.4f}{0:>14.4f}{1:>14.4f}{'-':>14}"
    )
    if result.get("weights_side_by_side"):
        lines += ["", f"{'weights, at the fixed threshold':34}" + "".join(f"{head:>14}" for head in heads)]
        for name, entry in result["weights_side_by_side"].items():
            lines.append(f"{name:34}" + "".join(f"{cell(entry[key]):>14}" for key in names))
    if result.get("holdout"):
        entry = result["holdout"]["fixed"]
        lines += ["", f"{'holdout films, fixed threshold':34}" + "".join(f"{cell(entry[key]):>14}" for key in names)]
    return "\n".join(lines) + "\n"
