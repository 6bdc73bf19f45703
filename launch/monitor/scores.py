"""Scores as text: those of an evaluation as a table, and what `runs.py validate` and `runs.py score` print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pneumo_dist.runtime.files import read_json
from pneumo_dist.scoring.scorecard import ALL_EMPTY, CROSS_FITTED, rule_label
from pneumo_dist.scoring.submission_csv import score_submission, validation_of

COLUMNS = {
    "dice": "Dice",
    "dice_positive": "on positives",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}
LABEL_WIDTH = len(CROSS_FITTED) + 1  # the longest label
SUBMISSION_SCORES = (
    "dice",
    "dice_all_empty",
    "dice_positive",
    "iou",
    "iou_positive",
    "sensitivity",
    "specificity",
    "auc",
)
NOT_SCORED = {
    "films_without_truth": "films of the submission without annotation",
    "truth_without_answer": "annotated films without prediction",
}


def score_table(folder: Path) -> list[str]:
    """Return the headline scores of an evaluation and the all-empty baseline; [] where there are no scores."""
    try:
        scores = read_json(folder / "scores.json")
    except (OSError, ValueError):
        return []
    rows = [("validation films", list(COLUMNS.values()))]
    for name, entry in scores["headline"].items():
        cells = ["-" if entry[column] is None else f"{entry[column]:.4f}" for column in COLUMNS]
        rows.append((rule_label(name, entry), cells))
    rows.append((ALL_EMPTY, [f"{scores['dice_all_empty']:.4f}", "0.0000", "0.0000", "1.0000"]))
    lines = [f"{label:{LABEL_WIDTH}}" + "".join(f"{cell:>14}" for cell in cells) for label, cells in rows]
    lines += [f"WARNING: {alarm}" for alarm in scores.get("alarms", [])]
    return [f"{scores['films']} films of {scores['patients']} patients, {scores['positive']} with pneumothorax", *lines]


def print_validation(submission: Path, against: Path) -> bool:
    """Print the problems of a submission and its films without an answer; return whether it is valid."""
    result = validation_of(submission, against)
    problems = result.problems
    for problem in problems:
        print(problem)
    for names, rows in ((result.without_row, "no row"), (result.with_row, "a row of -1, which is not a finding")):
        if names:
            print(f"no answer for {len(names)} of {result.films} films: unreadable, {rows} (first: {min(names)})")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print(f"{submission}: {count if problems else 'valid'}")
    return not problems


def print_scores(submission: Path, truth: Path, patients: Path | None, rle: str | None = None) -> None:
    """Print the scores of a submission: intervals by patient with a map of patients, else by film."""
    result = score_submission(submission, truth, patients, rle=rle)
    positive, predicted = result["positive"], result["called_positive"]
    print(f"{result['films']} films, {positive} with pneumothorax, {predicted} predicted positive")
    for name in SUBMISSION_SCORES:
        print(_score_line(name, result))
    for row in result["by_mask_size"]:
        if row["films"]:
            low, high = row["from_px"], row["below_px"]
            size = f"{low:,} to {high:,} px" if high else f"{low:,} px or more"
            print(f"dice {row['dice']:.4f} on {row['films']} films with a mask of {size} (scaled to 1024x1024)")
    for name, films in NOT_SCORED.items():
        if result[name]:
            print(f"not scored: {result[name]} {films}")
    if result["unreadable"] is None:
        print("unreadable films unknown: no predictions.csv beside the submission")
    elif result["unreadable"]:
        share = f"{result['unreadable']} annotated films ({result['unreadable_positive']} with pneumothorax)"
        print(f"not scored: {share} without an answer, because they are unreadable")
    print(f"auc from the {result['auc_from']}")


def _score_line(name: str, result: dict[str, Any]) -> str:
    value = "-" if result[name] is None else f"{result[name]:.4f}"
    interval = result["intervals"].get(name)
    if not interval:
        return f"{name:16}{value:>8}"
    low, high = interval
    return f"{name:16}{value:>8}   95 % interval by {result['intervals_by']}: {low:.4f} to {high:.4f}"
