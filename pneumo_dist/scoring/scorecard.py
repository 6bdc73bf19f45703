"""Records of films -> every score that is published: headline, optimistic values, comparison of weights, summary text.

Numbers only; no models, files or pictures. A score tuned on the scored films never goes into the headline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.config import Evaluate
from pneumo_dist.scoring.alarm import collapse, no_rule
from pneumo_dist.scoring.metrics import Decisions, decide, dice, summary
from pneumo_dist.scoring.records import HEAD_SCORE, MASK_SCORE, PAPER_THRESHOLDS, Records, Triplet
from pneumo_dist.scoring.thresholds import CrossFit, candidates, cross_fit, search

OPTIMISTIC = "tuned and scored on the same films: optimistic, not a result"
CROSS_FITTED = "thresholds tuned by cross-fitting"
ALL_EMPTY = "all empty (baseline)"
FIXED_SCORE = 0.5  # of the film, in a rule that is not tuned: as likely as not, at the share of positives in training
SUMMARY_COLUMNS = {
    "dice": "Dice",
    "dice_positive": "on positives",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "auc": "AUC",
}


@dataclass(frozen=True, eq=False)
class Tuned:
    """Result of the triplet search: the triplet to deploy, the search surface, and the cross-fitted decisions."""

    triplet: Triplet
    surface: NDArray[np.float64]  # (top scores, minimum areas, mask thresholds)
    scored: bool  # see Records
    top_scores: list[float]
    min_areas: list[int]
    fit: CrossFit | None  # None: a single patient or fold, so no other films to tune on
    by: str  # the parts of the cross-fit: "group" (patients) or "fold"


def fixed(threshold: float) -> Triplet:
    """Return the rule of a fixed mask threshold."""
    return Triplet(0.0, 0, threshold)


def tune(records: Records, settings: Evaluate, by: str) -> Tuned:
    """Search the triplet on all films, and cross-fit it by patient ("group") or by "fold"."""
    given, masks = (settings.top_scores, settings.min_areas), settings.mask_thresholds
    top_scores, min_areas = candidates(records, *given, masks)
    triplet, surface = search(records, top_scores, min_areas, masks)
    return Tuned(triplet, surface, records.scored, top_scores, min_areas, cross_fit(records, *given, masks, by=by), by)


def scores(records: Records, tuned: Tuned, settings: Evaluate, seed: int = 0) -> dict[str, Any]:
    """Return the scores of one set of films as plain JSON values."""

    def score(rule: Triplet | Decisions) -> dict[str, Any]:
        return summary(records, rule, settings.bootstrap, seed)

    headline: dict[str, Any] = {"fixed": {"mask_threshold": settings.threshold, **score(fixed(settings.threshold))}}
    for threshold in PAPER_THRESHOLDS:
        if threshold != settings.threshold:
            headline[f"fixed_{threshold:g}"] = {"mask_threshold": threshold, **score(fixed(threshold))}
    gated = Triplet(FIXED_SCORE, 0, settings.threshold)
    headline["fixed_score"] = {"mask_threshold": settings.threshold, "top_score": FIXED_SCORE, **score(gated)}
    if tuned.fit is not None:
        headline["cross_fitted"] = {
            "tuned_on": "other folds" if tuned.by == "fold" else "other patients",
            "triplets": [asdict(t) for t in tuned.fit.triplets],
            **score(tuned.fit.decisions),
        }
    in_sample = score(tuned.triplet)
    return {
        "films": len(records),
        "patients": headline["fixed"]["patients"],
        "positive": headline["fixed"]["positive"],
        "dice_all_empty": headline["fixed"]["dice_all_empty"],
        "alarms": [text for text in (collapse(headline["fixed"]), no_rule(in_sample)) if text],
        "headline": headline,
        "optimistic": {"in_sample_triplet": {"note": OPTIMISTIC, "triplet": asdict(tuned.triplet), **in_sample}},
    }


def threshold_table(tuned: Tuned, settings: Evaluate) -> dict[str, Any]:
    """Return the content of thresholds.json: the triplet, its search surface, and the cross-fitted triplets."""
    return {
        "fixed_mask_threshold": settings.threshold,
        "triplet": asdict(tuned.triplet),
        "score": HEAD_SCORE if tuned.scored else MASK_SCORE,
        "min_area_is_px_of": "1024x1024",
        "in_sample_dice": float(tuned.surface.max()),
        "note": OPTIMISTIC,
        "cross_fitted": None
        if tuned.fit is None
        else {"by": tuned.by, "triplets": [asdict(t) for t in tuned.fit.triplets]},
        "surface": {
            "top_scores": tuned.top_scores,
            "min_areas": tuned.min_areas,
            "mask_thresholds": list(settings.mask_thresholds),
            "dice": np.round(tuned.surface, 6).tolist(),
        },
    }


SIDE_BY_SIDE = ("dice", "dice_positive", "iou_positive", "sensitivity", "specificity", "auc")


def side_by_side(records_by_weights: Mapping[str, Records], threshold: float) -> dict[str, Any]:
    """Return {weights: fixed-threshold scores} of several weights on the same films."""
    comparison: dict[str, Any] = {}
    for name, records in records_by_weights.items():
        entry = summary(records, fixed(threshold))
        comparison[name] = {"mask_threshold": threshold} | {key: entry[key] for key in SIDE_BY_SIDE}
    return comparison


def film_table(records: Records, tuned: Tuned, threshold: float) -> dict[str, list[Any]]:
    """Return the columns of films.csv, a row per film; cross-fitted cells are empty where there is no fit."""
    area, film_dice = decide(records, fixed(threshold)).area, dice(records, fixed(threshold))
    fitted_area = fitted_dice = [""] * len(records)
    if tuned.fit is not None:
        fitted_area, fitted_dice = tuned.fit.decisions.area.tolist(), dice(records, tuned.fit.decisions).tolist()
    return {
        "id": records.ids.tolist(),
        "fold": records.folds.tolist(),
        "group": records.groups.tolist(),
        "truth_px": records.truth_px.tolist(),
        "film_px": records.film_px.tolist(),
        "top_score": [float(f"{top:.8g}") for top in records.top],
        "area_fixed_px": area.tolist(),
        "dice_fixed": film_dice.tolist(),
        "area_cross_fitted_px": fitted_area,
        "dice_cross_fitted": fitted_dice,
        "view": records.views.tolist(),
        "sex": records.sexes.tolist(),
    }


def headline_lines(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (label, scores) of every decision rule; the last one is tuned on the scored films and labelled so."""
    lines = [(rule_label(name, entry), entry) for name, entry in result["headline"].items()]
    return [*lines, ("tuned on the scored films (optimistic)", result["optimistic"]["in_sample_triplet"])]


def rule_label(name: str, entry: Mapping[str, Any]) -> str:
    if name == "cross_fitted":
        return CROSS_FITTED
    score = f", score {entry['top_score']:g}" if "top_score" in entry else ""
    return f"fixed threshold {entry['mask_threshold']:g}{score}"


def caveats(result: Mapping[str, Any]) -> list[str]:
    """Return the reasons why the scores may be too high: folds by image, weights selected on the scored films."""
    notes = []
    if result["patients"] == result["films"] > 1:
        notes.append(
            "every film counts as a patient of its own: without data.patient_map folds and intervals are by image"
        )
    if result.get("weights") == "best":
        notes.append("best weights: the epoch was selected by its scores on these same films (slightly optimistic)")
    return notes


def summary_text(result: Mapping[str, Any], title: str) -> str:
    """Return the scores of a scores.json as a table of at most one screen."""
    lines = [
        title,
        f"{result['films']} films of {result['patients']} patients, {result['positive']} with pneumothorax",
        *caveats(result),
        *(line for alarm in result["alarms"] for line in wrap(f"WARNING: {alarm}", 110)),
        "",
        _row("decision", SUMMARY_COLUMNS.values()),
    ]
    for label, entry in headline_lines(result):
        lines.append(_score_row(label, entry))
        if entry["intervals"].get("dice"):
            spans = (entry["intervals"].get(name) for name in SUMMARY_COLUMNS)
            lines.append(_row("  95 % by patient", ["-" if s is None else f"{s[0]:.3f}-{s[1]:.3f}" for s in spans]))
    empty = {"dice": result["dice_all_empty"], "dice_positive": 0.0, "sensitivity": 0.0, "specificity": 1.0}
    lines.append(_score_row(ALL_EMPTY, {**empty, "auc": None}))
    if result.get("weights_side_by_side"):
        lines += ["", _row("weights, at the fixed threshold", SUMMARY_COLUMNS.values())]
        lines += [_score_row(name, entry) for name, entry in result["weights_side_by_side"].items()]
    if result.get("holdout"):
        lines += ["", _score_row("hold-out films, fixed threshold", result["holdout"]["fixed"])]
    return "\n".join(lines) + "\n"


def _score_row(label: str, entry: Mapping[str, Any]) -> str:
    return _row(label, ["-" if entry[name] is None else f"{entry[name]:.4f}" for name in SUMMARY_COLUMNS])


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:40}" + "".join(f"{cell:>14}" for cell in cells)
