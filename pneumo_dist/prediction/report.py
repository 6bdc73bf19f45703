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

from pneumo_dist.config import Config, flatten
from pneumo_dist.data.cases import Case
from pneumo_dist.data.rle import decode_rle
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.prediction import page, pictures, plots, scorecard
from pneumo_dist.runtime.files import write_bytes, write_text
from pneumo_dist.scoring.metrics import Records, decide, dice

SHOWN = 12  # films of each kind
NAMES = ("dice", "dice_positive", "iou_positive", "sensitivity", "specificity", "auc")
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
    settings, records, result = config.evaluate, evaluation.records, evaluation.result
    chosen = pick(records, settings.threshold)
    drawn = draw(evaluation, sorted({i for indices in chosen.values() for i in indices}), settings.threshold)
    names = {film: f"{i:03d}.png" for i, film in enumerate(sorted(drawn))}
    for film, name in names.items():
        write_bytes(out / "overlays" / name, pictures.png(drawn[film]))
    for stale in set((out / "overlays").glob("*.png")) - {out / "overlays" / name for name in names.values()}:
        stale.unlink()
    positive = records.truth_px > 0
    film_dice = dice(records, scorecard.fixed(settings.threshold))
    triplet, empty = evaluation.tuned.triplet, result["dice_all_empty"]
    honest = result["headline"].get("cross_fitted")
    body = [
        f"<h1>{escape(evaluation.title)}</h1>",
        "<p>Scores are at film size against the union of the annotations. The headline is the fixed threshold and, for "
        "tuned triplets, values tuned on other patients or folds; what was tuned on these same films is marked "
        "optimistic.</p>",
        *(f"<p>{escape(note)}</p>" for note in scorecard.grouping_note(result)),
        page.tiles(
            [
                ("films", result["films"], ""),
                ("patients", result["patients"], ""),
                ("with pneumothorax", result["positive"], ""),
                (f"Dice at {settings.threshold:g}", _digits(result["headline"]["fixed"]["dice"]), "found"),
                ("Dice on positives", _digits(result["headline"]["fixed"]["dice_positive"]), ""),
                ("Dice, all called empty", _digits(empty), ""),
                ("AUC by film", _digits(result["headline"]["fixed"]["auc"]), ""),
            ]
        ),
        "<h2>Scores</h2>",
        page.table(HEADS, _score_rows(result)),
    ]
    if result.get("weights_side_by_side"):
        rows = [("", [name, *(entry[key] for key in NAMES)]) for name, entry in result["weights_side_by_side"].items()]
        body += [f"<h2>Weights side by side, at {settings.threshold:g}</h2>", page.table(HEADS, rows)]
    if result.get("holdout"):
        held = result["holdout"]
        rows = [
            (kind, cells)
            for label, name in (
                ("fixed threshold", "fixed"),
                ("triplet tuned on validation", "triplet_tuned_on_validation"),
            )
            for kind, cells in _with_interval(label, held[name])
        ]
        body += [f"<h2>Holdout, {held['films']} films that nothing was tuned on</h2>", page.table(HEADS, rows)]
    sizes = {f"fixed {settings.threshold:g}": result["headline"]["fixed"]["by_mask_size"]}
    if honest:
        sizes["cross-fitted triplet"] = honest["by_mask_size"]
    body += [
        "<h2>Curves</h2>",
        '<div class="plots">',
        page.figure(plots.learning_curves(evaluation.curves), "Learning"),
        page.figure(plots.ranking_curves(records.top, positive), "Ranking of the films by their highest probability"),
        page.figure(
            plots.reliability(records.top, positive, evaluation.pixels),
            "Calibration: on the diagonal a probability means what it says",
        ),
        page.figure(
            plots.threshold_surface(
                evaluation.tuned.surface,
                settings.top_scores,
                settings.min_areas,
                settings.mask_thresholds,
                (triplet.top_score, triplet.min_area, triplet.mask_threshold),
            ),
            "Threshold search on these films (in-sample: optimistic)",
        ),  # fmt: skip
        page.figure(plots.dice_by_size(sizes), "Dice by mask size"),
        page.figure(plots.dice_histogram(film_dice[positive]), "Dice by film"),
        "</div>",
        "<h2>Subgroups, at the fixed threshold</h2>",
        page.table(
            ("", "films", "positive", "Dice", "Dice on positives", "sensitivity", "specificity"), _subgroup_rows(result)
        ),
    ]
    colours = (
        '<span style="color:var(--found)">orange: prediction</span>, '
        '<span style="color:var(--truth)">blue: annotation</span>'
    )
    for heading, indices in chosen.items():
        cards = "".join(_card(str(records.ids[i]), names, f"Dice {film_dice[i]:.2f}") for i in indices)
        body.append(f'<h2>{heading}</h2><p>{colours}</p><div class="films">{cards}</div>' if cards else "")
    body += ["<h2>Settings</h2>", page.settings_table(flatten(config))]
    write_text(out / "report.html", page.page(evaluation.title, "\n".join(body)))
    return {str(records.ids[i]): drawn[str(records.ids[i])] for i in chosen["Worst films with pneumothorax"][:4]}


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


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
