"""evaluate/report.html: everything about one validation on one page, with the best and worst films as overlays.

Shows numbers that `scorecard` made; the only thing computed here is where to draw them.
"""

from __future__ import annotations

import json
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
from pneumo_dist.scoring.metrics import Records, decide, dice

SHOWN = 12  # films of each kind
NAMES = ("dice", "dice_positive", "iou_positive", "sensitivity", "specificity", "auc")
SUBGROUP_HEADS = ("", "films", "positive", "Dice", "Dice on positives", "sensitivity", "specificity")
HEADS = ("", "Dice", "Dice on positives", "IoU on positives", "sensitivity", "specificity", "AUC")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a report is made of."""

    title: str
    result: Mapping[str, Any]  # scores.json
    records: Records
    tuned: scorecard.Tuned
    masks: Mapping[str, str]  # film id -> RLE at the fixed threshold, at film size
    pixels: NDArray[np.int64]  # (2, bins) pixels outside and inside the truth by probability
    cases: Mapping[str, Case]
    shard_dir: Path
    size: int  # of the shards to draw on
    curves: Mapping[str, Sequence[Mapping[str, Any]]]  # stage -> rows of its metrics.jsonl


def read_curves(stages: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Read {label: rows} of the stages' metrics.jsonl files; a stage without one has no rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for label, folder in stages.items():
        path = folder / "metrics.jsonl"
        found[label] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return found


def pick(records: Records, threshold: float) -> dict[str, list[int]]:
    """Return {heading: indices} of the films worth looking at, at the fixed threshold; most telling first."""
    film_dice, found = dice(records, scorecard.fixed(threshold)), decide(records, scorecard.fixed(threshold))
    positive = records.truth_px > 0
    order = np.argsort(film_dice, kind="stable")
    alarms = np.argsort(-found.area / np.maximum(records.film_px, 1), kind="stable")
    return {
        "Worst films with pneumothorax": [int(i) for i in order if positive[i]][:SHOWN],
        "Largest false alarms": [int(i) for i in alarms if not positive[i] and found.area[i] > 0][:SHOWN],
        "Best films with pneumothorax": [int(i) for i in order[::-1] if positive[i]][:SHOWN],
    }


def draw(evaluation: Evaluation, indices: Sequence[int], threshold: float) -> dict[str, NDArray[np.uint8]]:
    """Return {film id: overlay (rows, columns, 3)} with truth and prediction at the fixed threshold."""
    reader = ShardReader(evaluation.shard_dir, evaluation.size)
    film_dice = dice(evaluation.records, scorecard.fixed(threshold))
    drawn: dict[str, NDArray[np.uint8]] = {}
    for i in indices:
        case = evaluation.cases[str(evaluation.records.ids[i])]
        truth = decode_rle(case.rle, case.rows, case.columns)
        mask = decode_rle(evaluation.masks[case.id], case.rows, case.columns)
        grey = pictures.restore(reader.image(case.shard, case.row), case.rows, case.columns)
        line = f"Dice {film_dice[i]:.2f}  score {evaluation.records.top[i]:.2f}"
        drawn[case.id] = pictures.overlay(grey, mask, [line], truth)
    return drawn


def write_report(out: Path, evaluation: Evaluation, config: Config) -> dict[str, NDArray[np.uint8]]:
    """Write report.html and overlays/ into `out`; return the overlays of the worst films for TensorBoard."""
    records, threshold = evaluation.records, config.evaluate.threshold
    chosen = pick(records, threshold)
    drawn = draw(evaluation, sorted({i for indices in chosen.values() for i in indices}), threshold)
    names = {film: f"{i:03d}.png" for i, film in enumerate(sorted(drawn))}
    for film, name in names.items():
        write_bytes(out / "overlays" / name, pictures.png(drawn[film]))
    for stale in set((out / "overlays").glob("*.png")) - {out / "overlays" / name for name in names.values()}:
        stale.unlink()
    film_dice = dice(records, scorecard.fixed(threshold))
    body = [
        _heading(evaluation.title, evaluation.result, threshold),
        _tables(evaluation.result, threshold),
        _curves(evaluation, config.evaluate, film_dice),
        "<h2>Subgroups, at the fixed threshold</h2>",
        page.table(SUBGROUP_HEADS, _subgroup_rows(evaluation.result)),
        *(_gallery(heading, indices, records, film_dice, names) for heading, indices in chosen.items() if indices),
        "<h2>Settings</h2>",
        page.settings_table(flatten(config)),
    ]
    write_text(out / "report.html", page.page(evaluation.title, "\n".join(body)))
    return {str(records.ids[i]): drawn[str(records.ids[i])] for i in chosen["Worst films with pneumothorax"][:4]}


def _heading(title: str, result: Mapping[str, Any], threshold: float) -> str:
    fixed = result["headline"]["fixed"]
    notes = [
        "Scores are at film size against the union of the annotations. The headline is the fixed threshold and, for "
        "tuned triplets, values tuned on other patients or folds; what was tuned on these same films is marked "
        "optimistic.",
        *scorecard.caveats(result),
    ]
    counts = [("films", "films"), ("patients", "patients"), ("with pneumothorax", "positive")]
    values = [
        (f"Dice at {threshold:g}", fixed["dice"], "found"),
        ("Dice on positives", fixed["dice_positive"], ""),
        ("Dice, all called empty", result["dice_all_empty"], ""),
        ("AUC by film", fixed["auc"], ""),
    ]
    tiles = [(label, result[key], "") for label, key in counts]
    tiles += [(label, "–" if value is None else f"{value:.4f}", kind) for label, value, kind in values]
    text = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<h1>{escape(title)}</h1>{text}{page.tiles(tiles)}"


def _tables(result: Mapping[str, Any], threshold: float) -> str:
    found = "<h2>Scores</h2>" + page.table(HEADS, _score_rows(result))
    if result.get("weights_side_by_side"):
        rows = [("", [name, *(entry[key] for key in NAMES)]) for name, entry in result["weights_side_by_side"].items()]
        found += f"<h2>Weights side by side, at {threshold:g}</h2>" + page.table(HEADS, rows)
    if result.get("holdout"):
        held = result["holdout"]
        rows = _with_interval("fixed threshold", held["fixed"])
        rows += _with_interval("triplet tuned on validation", held["triplet_tuned_on_validation"])
        found += f"<h2>Holdout, {held['films']} films that nothing was tuned on</h2>" + page.table(HEADS, rows)
    return found


def _curves(evaluation: Evaluation, settings: Evaluate, film_dice: NDArray[np.float64]) -> str:
    records, tuned, headline = evaluation.records, evaluation.tuned, evaluation.result["headline"]
    positive, best = records.truth_px > 0, tuned.triplet
    sizes = {f"fixed {settings.threshold:g}": headline["fixed"]["by_mask_size"]}
    if "cross_fitted" in headline:
        sizes["cross-fitted triplet"] = headline["cross_fitted"]["by_mask_size"]
    surface = plots.threshold_surface(
        tuned.surface, settings.top_scores, settings.min_areas, settings.mask_thresholds,
        (best.top_score, best.min_area, best.mask_threshold),
    )  # fmt: skip
    figures = [
        (plots.learning_curves(evaluation.curves), "Learning"),
        (plots.ranking_curves(records.top, positive), "Ranking of the films by their highest probability"),
        (
            plots.reliability(records.top, positive, evaluation.pixels),
            "Calibration: on the diagonal it means what it says",
        ),
        (surface, "Threshold search on these films (in-sample: optimistic)"),
        (plots.dice_by_size(sizes), "Dice by mask size"),
        (plots.dice_histogram(film_dice[positive]), "Dice by film"),
    ]
    return f'<h2>Curves</h2><div class="plots">{"".join(page.figure(*pair) for pair in figures)}</div>'


def _gallery(
    heading: str, indices: Sequence[int], records: Records, film_dice: NDArray[np.float64], names: Mapping[str, str]
) -> str:
    colours = (
        '<span style="color:var(--found)">orange: prediction</span>, '
        '<span style="color:var(--truth)">blue: annotation</span>'
    )
    cards = "".join(_card(str(records.ids[i]), names, f"Dice {film_dice[i]:.2f}") for i in indices)
    return f'<h2>{escape(heading)}</h2><p>{colours}</p><div class="films">{cards}</div>'


def _with_interval(label: str, entry: Mapping[str, Any], kind: str = "") -> list[tuple[str, list[Any]]]:
    rows: list[tuple[str, list[Any]]] = [(kind, [label, *(entry[key] for key in NAMES)])]
    if entry["intervals"]:
        spans = (entry["intervals"].get(key) for key in NAMES)
        rows.append(
            ("interval", ["95 % by patient", *("–" if s is None else f"{s[0]:.3f} – {s[1]:.3f}" for s in spans)])
        )
    return rows


def _score_rows(result: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    rows = []
    for label, entry in scorecard.headline_lines(result):
        rows += _with_interval(label, entry, "optimistic" if "optimistic" in label else "")
    return [*rows, ("", ["every film called empty", result["dice_all_empty"], 0.0, 0.0, 0.0, 1.0, None])]


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
