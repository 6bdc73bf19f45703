"""What preprocessing found, as data (audit.json) and as text (audit.txt): counts, problems, who is on which side.

Films are named by their ids only; patient keys stay out.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pneumo_dist.config import Config
from pneumo_dist.data.cases import HOLDOUT, Annotations, Case
from pneumo_dist.data.films.rle import area_px, runs
from pneumo_dist.data.preprocess.source import Source

SHOWN = 10  # ids and lines of one kind in the text; the JSON has all


def describe(annotations: Annotations) -> dict[str, Any]:
    """Return what an annotation list says by itself: images, rows, positives, several and overlapping rows."""
    rows_per_image: Counter[int] = Counter()
    positive = overlapping = contradicting = 0
    for film_id, rows in annotations.rows.items():
        rows_per_image[len(rows)] += 1
        if film_id in annotations.broken:
            continue
        filled = [pair for pair in (runs(text) for _, text in rows) if len(pair[0])]
        positive += bool(filled)
        contradicting += bool(filled) and len(filled) < len(rows)
        overlapping += len(filled) > 1 and area_px(filled)[1] > 0
    return {
        "images": len(annotations.rows),
        "rows": sum(len(rows) for rows in annotations.rows.values()),
        "positive": positive,
        "rows_per_image": {str(count): n for count, n in sorted(rows_per_image.items())},
        "several_rows": sum(n for count, n in rows_per_image.items() if count > 1),
        "overlapping_rows": overlapping,
        "mask_and_empty_row": contradicting,
        "problems": list(annotations.problems),
    }


def audit_of(
    found: Source,
    films: list[dict[str, Any]],
    bad: list[dict[str, Any]],
    duplicates: list[list[dict[str, Any]]],
    patients: dict[str, str],
    cases: list[Case],
    holdout: dict[str, int],
    config: Config,
) -> dict[str, Any]:
    """Return the audit; `films` are the readable ones, `bad` the quarantined."""
    name = Path(found.annotations.path).name
    films_of: Counter[int] = Counter(Counter(case.group for case in cases).values())
    folds = []
    for fold in [*range(config.data.folds), *([HOLDOUT] if holdout["films"] else [])]:
        mine = [case for case in cases if case.fold == fold]
        positive = sum(case.label for case in mine)
        groups = len({case.group for case in mine})
        folds.append({"fold": fold, "films": len(mine), "positive": positive, "groups": groups})
    return {
        "films": {
            "found": found.films + (len(found.unannotated) if config.data.unannotated == "drop" else 0),
            "other_files": found.ignored,
            "in_shards": len(films),
            "positive": sum(film["label"] for film in films),
            "unreadable": len(bad),
            "sizes": _counts(f"{film['rows']} x {film['columns']}" for film in films),
            "decoders": _counts(film["decoder"] for film in films),
            "views": _counts(film["view"] or "unknown" for film in films),
            "sexes": _counts(film["sex"] or "unknown" for film in films),
            "warnings": _counts(text for film in films for text in film["warnings"]),
            "blank": [film["id"] for film in films if film["blank"]],
            "named_unlike_their_sop_uid": sum(not film["named_by_uid"] for film in films),
        },
        "annotations": {"file": name} | describe(found.annotations),
        "unannotated": {"policy": config.data.unannotated, "ids": found.unannotated},
        "orphans": [f"{name}:{found.annotations.rows[orphan][0][0]}: {orphan}" for orphan in found.orphans],
        "unreadable": [{key: film[key] for key in ("id", "path", "reason")} for film in bad],
        "duplicates": [
            {"ids": [film["id"] for film in group], "masks_agree": len({film["rle"] for film in group}) == 1}
            for group in duplicates
        ],
        "patients": {
            "map": bool(patients),
            "groups": len({case.group for case in cases}),
            "films_per_group": {str(count): n for count, n in sorted(films_of.items())},
            "films_without_patient": sum(case.id not in patients for case in cases) if patients else len(cases),
        },
        "folds": {"level": "patient" if patients else "image", "seed": config.data.fold_seed, "folds": folds},
        "holdout": holdout,
    }


def _counts(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _some(items: list[str]) -> list[str]:
    more = [f"    ... and {len(items) - SHOWN} more in audit.json"] if len(items) > SHOWN else []
    return [f"    {item}" for item in items[:SHOWN]] + more


def readable(audit: dict[str, Any]) -> str:
    """Return the audit as text for a person."""
    films, notes, patients, folds = audit["films"], audit["annotations"], audit["patients"], audit["folds"]
    share = films["positive"] / max(films["in_shards"], 1)
    lines = [
        "What preprocessing found",
        "",
        f"Films        {films['found']} found, {films['in_shards']} in the shards, {films['unreadable']} unusable, "
        f"{len(audit['unannotated']['ids'])} without annotation ({audit['unannotated']['policy']}); "
        f"{films['other_files']} other files",
        f"Positive     {films['positive']} ({share:.1%})",
        f"Matrix       {_line(films['sizes'])}",
        f"Views        {_line(films['views'])}",
        f"Sexes        {_line(films['sexes'])}",
        f"Decoders     {_line(films['decoders'])}",
        f"Annotations  {notes['file']}: {notes['images']} images, {notes['rows']} rows, {notes['positive']} positive; "
        f"{notes['several_rows']} images with several rows, {notes['overlapping_rows']} with overlapping rows, "
        f"{notes['mask_and_empty_row']} with a mask and an empty row",
        f"Rows         {_line(notes['rows_per_image'])} (rows per image: images)",
    ]
    for title, items in (
        ("Unusable rows", notes["problems"]),
        ("Rows without a film", audit["orphans"]),
        ("Films without annotation", audit["unannotated"]["ids"]),
        ("Unusable films", [f"{film['path']}: {film['reason']}" for film in audit["unreadable"]]),
        ("Blank films", films["blank"]),
        ("Header warnings", [f"{text}: {count} films" for text, count in films["warnings"].items()]),
        (
            "Films with the same pixels",
            [
                f"{', '.join(group['ids'])} (masks {'agree' if group['masks_agree'] else 'DIFFER'})"
                for group in audit["duplicates"]
            ],
        ),
    ):
        if items:
            lines += ["", f"{title}: {len(items)}", *_some(items)]
    lines += ["", f"Patients     {patients['groups']} groups; films per group: {_line(patients['films_per_group'])}"]
    if folds["level"] == "image":
        lines.append(
            "Folds        IMAGE-LEVEL: without data.patient_map one patient may be on both sides; scores too good"
        )
    else:
        lines.append(
            f"Folds        patient-level; {patients['films_without_patient']} films without a patient in the map"
        )
    for fold in folds["folds"]:
        name = "held out" if fold["fold"] == HOLDOUT else f"fold {fold['fold']}"
        lines.append(f"  {name:10} {fold['films']} films, {fold['positive']} positive, {fold['groups']} groups")
    hold = audit["holdout"]
    if hold["listed"]:
        lines.append(
            f"  hold-out: {hold['listed']} ids listed, {hold['unknown']} of them unknown, "
            f"{hold['added_with_their_patients']} films added because their patients are held out"
        )
    return "\n".join(lines) + "\n"


def _line(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"
