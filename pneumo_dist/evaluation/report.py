"""report.html of an evaluation: scores, curves and settings on one page, with the best and worst films as overlays.

It shows the scores of `scorecard` and computes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.config import Config, Evaluate, flatten
from pneumo_dist.data.cases import Case
from pneumo_dist.data.films.rle import decode_rle
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.reports import page, pictures, plots
from pneumo_dist.runtime.files import write_bytes, write_text
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.metrics import decide, dice
from pneumo_dist.scoring.records import Records

GALLERY_FILMS = 12
SUBGROUP_HEADS = ("", "films", "positive", "Dice", "Dice on positives", "sensitivity", "specificity")
SCORE_HEADS = ("", "Dice", "Dice on positives", "IoU on positives", "sensitivity", "specificity", "AUC")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The content of a report."""

    title: str
    result: Mapping[str, Any]  # scores.json
    records: Records
    tuned: scorecard.Tuned
    masks: Mapping[str, str]  # film id -> RLE at the fixed threshold, at film size
    pixels: NDArray[np.int64]  # (2, bins) pixels outside and inside the truth, by probability
    cases: Mapping[str, Case]
    shard_dir: Path
    size: int  # of the shards that the overlays are drawn on
    curves: Mapping[str, Sequence[Mapping[str, Any]]]  # stage -> rows of its metrics.jsonl


def pick(records: Records, threshold: float) -> dict[str, list[int]]:
    """Return {heading: indices} of the films to show, ordered by their errors at the fixed threshold."""
    rule = scorecard.fixed(threshold)
    film_dice, area = dice(records, rule), decide(records, rule).area
    positive = records.truth_px > 0
    by_dice = np.argsort(film_dice, kind="stable")
    by_area = np.argsort(-area / np.maximum(records.film_px, 1), kind="stable")
    return {
        "Worst films with pneumothorax": [int(i) for i in by_dice if positive[i]][:GALLERY_FILMS],
        "Largest false positives": [int(i) for i in by_area if not positive[i] and area[i] > 0][:GALLERY_FILMS],
        "Best films with pneumothorax": [int(i) for i in by_dice[::-1] if positive[i]][:GALLERY_FILMS],
    }


def draw(evaluation: Evaluation, indices: Sequence[int], threshold: float) -> dict[str, NDArray[np.uint8]]:
    """Return {film id: overlay (rows, columns, 3)} with annotation and prediction at the fixed threshold."""
    reader = ShardReader(evaluation.shard_dir, evaluation.size)
    film_dice = dice(evaluation.records, scorecard.fixed(threshold))
    overlays: dict[str, NDArray[np.uint8]] = {}
    for i in indices:
        case = evaluation.cases[str(evaluation.records.ids[i])]
        truth = decode_rle(case.rle, case.rows, case.columns)
        mask = decode_rle(evaluation.masks[case.id], case.rows, case.columns)
        grey = pictures.restore(reader.image(case.shard, case.row), case.rows, case.columns)
        caption = f"Dice {film_dice[i]:.2f}  score {evaluation.records.top[i]:.2f}"
        overlays[case.id] = pictures.overlay(grey, mask, [caption], truth)
    return overlays


def write_report(out: Path, evaluation: Evaluation, config: Config) -> dict[str, NDArray[np.uint8]]:
    """Write report.html and overlays/ into `out`; return the overlays of the worst films for TensorBoard."""
    records, threshold = evaluation.records, config.evaluate.threshold
    galleries = pick(records, threshold)
    overlays = draw(evaluation, sorted({i for indices in galleries.values() for i in indices}), threshold)
    # Numbered: a film's id may hold characters that a file name must not.
    names = {film: f"{i:03d}.png" for i, film in enumerate(sorted(overlays))}
    for film, name in names.items():
        write_bytes(out / "overlays" / name, pictures.png(overlays[film]))
    for stale in set((out / "overlays").glob("*.png")) - {out / "overlays" / name for name in names.values()}:
        stale.unlink()
    film_dice = dice(records, scorecard.fixed(threshold))
    body = [
        _heading(evaluation.title, evaluation.result, threshold),
        _tables(evaluation.result, threshold),
        _curves(evaluation, config.evaluate, film_dice),
        "<h2>Subgroups at the fixed threshold</h2>",
        page.table(SUBGROUP_HEADS, _subgroup_rows(evaluation.result)),
        *(_gallery(heading, indices, records, film_dice, names) for heading, indices in galleries.items() if indices),
        "<h2>Settings</h2>",
        page.settings_table(flatten(config)),
    ]
    write_text(out / "report.html", page.page(evaluation.title, "\n".join(body)))
    worst = [str(records.ids[i]) for i in galleries["Worst films with pneumothorax"][:4]]
    return {film: overlays[film] for film in worst}


def _heading(title: str, result: Mapping[str, Any], threshold: float) -> str:
    fixed = result["headline"]["fixed"]
    notes = [
        "Scores are at film size against the union of the annotations. The headline scores use a fixed threshold, or "
        "thresholds tuned by cross-fitting (on other patients or folds). Scores with thresholds tuned on the scored "
        "films are marked optimistic. An empty prediction on a negative film has Dice 1; "
        f"{scorecard.ALL_EMPTY} predicts every film negative.",
        *scorecard.caveats(result),
    ]
    counts = [("films", "films"), ("patients", "patients"), ("with pneumothorax", "positive")]
    scores = [
        (f"Dice at {threshold:g}", fixed["dice"], "found"),
        ("Dice on positives", fixed["dice_positive"], ""),
        (f"Dice, {scorecard.ALL_EMPTY}", result["dice_all_empty"], ""),
        ("AUC by film", fixed["auc"], ""),
    ]
    tiles = [(label, result[key], "") for label, key in counts]
    tiles += [(label, "-" if value is None else f"{value:.4f}", style) for label, value, style in scores]
    text = "".join(f'<p class="bad">{escape(alarm)}</p>' for alarm in result["alarms"])
    text += "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<h1>{escape(title)}</h1>{text}{page.tiles(tiles)}"


def _tables(result: Mapping[str, Any], threshold: float) -> str:
    html = "<h2>Scores</h2>" + page.table(SCORE_HEADS, _score_rows(result))
    if result.get("weights_side_by_side"):
        rows = [
            ("", [name, *(entry[key] for key in scorecard.SIDE_BY_SIDE)])
            for name, entry in result["weights_side_by_side"].items()
        ]
        html += f"<h2>Comparison of weights at {threshold:g}</h2>" + page.table(SCORE_HEADS, rows)
    if result.get("holdout"):
        holdout = result["holdout"]
        rows = _with_interval("fixed threshold", holdout["fixed"])
        rows += _with_interval("thresholds tuned on the validation films", holdout["triplet_tuned_on_validation"])
        heading = f"<h2>Hold-out: {holdout['films']} films, not used for training or tuning</h2>"
        html += heading + page.table(SCORE_HEADS, rows)
    return html


def _curves(evaluation: Evaluation, settings: Evaluate, film_dice: NDArray[np.float64]) -> str:
    records, tuned, headline = evaluation.records, evaluation.tuned, evaluation.result["headline"]
    positive, best = records.truth_px > 0, tuned.triplet
    sizes = {f"fixed threshold {settings.threshold:g}": headline["fixed"]["by_mask_size"]}
    if "cross_fitted" in headline:
        sizes[scorecard.CROSS_FITTED] = headline["cross_fitted"]["by_mask_size"]
    surface = plots.threshold_surface(
        tuned.surface,
        tuned.top_scores,
        tuned.min_areas,
        settings.mask_thresholds,
        (best.top_score, best.min_area, best.mask_threshold),
    )
    reliability = plots.reliability(records.top, positive, evaluation.pixels)
    figures = [
        (plots.learning_curves(evaluation.curves), "Learning curves"),
        (plots.ranking_curves(records.top, positive), "Classification of the films by their score"),
        (reliability, "Reliability diagram (diagonal: perfectly calibrated)"),
        (surface, "Threshold search on the scored films (optimistic)"),
        (plots.dice_by_size(sizes), "Dice by mask size"),
        (plots.dice_histogram(film_dice[positive]), "Dice by film"),
    ]
    return f'<h2>Curves</h2><div class="plots">{"".join(page.figure(*pair) for pair in figures)}</div>'


def _gallery(
    heading: str, indices: Sequence[int], records: Records, film_dice: NDArray[np.float64], names: Mapping[str, str]
) -> str:
    legend = (
        '<span style="color:var(--found)">orange: prediction</span>, '
        '<span style="color:var(--truth)">blue: annotation</span>'
    )
    cards = "".join(_card(str(records.ids[i]), names, f"Dice {film_dice[i]:.2f}") for i in indices)
    return f'<h2>{escape(heading)}</h2><p>{legend}</p><div class="films">{cards}</div>'


def _with_interval(label: str, entry: Mapping[str, Any], style: str = "") -> list[tuple[str, list[Any]]]:
    rows: list[tuple[str, list[Any]]] = [(style, [label, *(entry[key] for key in scorecard.SIDE_BY_SIDE)])]
    if entry["intervals"]:
        spans = (entry["intervals"].get(key) for key in scorecard.SIDE_BY_SIDE)
        cells = ["-" if span is None else f"{span[0]:.3f}-{span[1]:.3f}" for span in spans]
        rows.append(("interval", ["95 % by patient", *cells]))
    return rows


def _score_rows(result: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    rows = []
    for label, entry in scorecard.headline_lines(result):
        rows += _with_interval(label, entry, "optimistic" if "optimistic" in label else "")
    return [*rows, ("", [scorecard.ALL_EMPTY, result["dice_all_empty"], 0.0, 0.0, 0.0, 1.0, None])]


def _subgroup_rows(result: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    fixed = result["headline"]["fixed"]
    keys = ("films", "positive", "dice", "dice_positive", "sensitivity", "specificity")
    groups = [(f"view {name}", entry) for name, entry in fixed["by_view"].items()]
    groups += [(f"sex {name}", entry) for name, entry in fixed["by_sex"].items()]
    return [("", [label, *(entry[key] for key in keys)]) for label, entry in [("all", fixed), *groups]]


def _card(film: str, names: Mapping[str, str], label: str) -> str:
    link = f"overlays/{names[film]}"
    text = f'<div><b>{escape(label)}</b> <span class="id">{escape(film)}</span></div>'
    return f'<article class="film"><a href="{link}"><img loading="lazy" alt="" src="{link}"></a>{text}</article>'
