"""The audit of films and annotations, as data (audit.json) and as text (audit.txt): counts, problems, folds.

It names films by their ids only and holds no patient keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pneumo_dist.config import Config
from pneumo_dist.data.cases import HOLDOUT, Case
from pneumo_dist.data.films.rle import area_px, runs
from pneumo_dist.data.lists import Annotations
from pneumo_dist.data.preprocess.decoding import is_film
from pneumo_dist.data.preprocess.source import Source
from pneumo_dist.data.preprocess.truth import Truth, notes

SHOWN = 10  # ids or lines of one kind in the text; the JSON has all


def describe(annotations: Annotations) -> dict[str, Any]:
    """Return the counts of an annotation list: images, rows, positives, several rows per image, overlapping rows."""
    rows_per_image: Counter[int] = Counter()
    positive = overlapping = contradicting = 0
    for film_id, rows in annotations.rows.items():
        rows_per_image[len(rows)] += 1
        if film_id in annotations.broken:
            continue
        filled = [pair for pair in map(runs, annotations.texts(film_id)) if len(pair[0])]
        positive += bool(filled) or bool(annotations.labels.get(film_id))
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
    source: Source,
    films: list[dict[str, Any]],
    bad: list[dict[str, Any]],
    duplicates: list[list[dict[str, Any]]],
    patients: dict[str, str],
    cases: list[Case],
    holdout: dict[str, int],
    config: Config,
) -> dict[str, Any]:
    """Return the audit; `films` are the readable ones, `bad` the quarantined and the objects without an image."""
    objects = {film["id"]: (film["path"], film["reason"]) for film in bad if not is_film(film)}
    source = replace(
        source,
        ignored=sorted([*source.ignored, *objects.values()]),
        unannotated=[name for name in source.unannotated if name not in objects],
    )
    bad = [film for film in bad if is_film(film)]
    films_of: Counter[int] = Counter(Counter(case.group for case in cases).values())
    folds = [*range(config.data.folds), *([HOLDOUT] if holdout["films"] else [])]
    return {
        "films": _films(source, films, bad, config),
        **_truth(source.truth),
        "unannotated": {"policy": config.data.unannotated, "ids": source.unannotated},
        "notes": list(notes(source.truth, source.unannotated, config)),
        "ignored": [{"path": path, "reason": reason} for path, reason in source.ignored],
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
        "folds": {
            "level": "patient" if patients else "image",
            "seed": config.data.fold_seed,
            "folds": [_fold(fold, cases) for fold in folds],
        },
        "holdout": holdout,
    }


def _truth(truth: Truth) -> dict[str, Any]:
    """Return what the list and the folder of masks hold, those that there are."""
    listed: dict[str, Any] = {}
    if truth.annotations:
        listed["annotations"] = {"file": truth.path.name, "rle": truth.annotations.rle} | describe(truth.annotations)
    if truth.masks:
        several = sum(len(files) > 1 for files in truth.masks.of_film.values())
        listed["masks"] = {
            "folder": truth.masks.path.name,
            "sha256": truth.masks.sha256,
            "files": truth.masks.files,
            "films": len(truth.masks.of_film),
            "several_files": several,
            "unused": list(truth.masks.unused),
        }
    return listed | {"orphans": truth.orphans}


def _films(source: Source, films: list[dict[str, Any]], bad: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    dropped = len(source.unannotated) if config.data.unannotated == "drop" else 0
    return {
        "found": len(films) + len(bad) + dropped,
        "other_files": len(source.ignored),
        "in_shards": len(films),
        "positive": sum(film["label"] for film in films),
        "unreadable": len(bad),
        "sizes": _counts(f"{film['rows']} x {film['columns']}" for film in films),
        "decoders": _counts(film["decoder"] for film in films),
        "views": _counts(film["view"] or "unknown" for film in films),
        "sexes": _counts(film["sex"] or "unknown" for film in films),
        "warnings": _counts(text for film in films for text in film["warnings"]),
        "named_unlike_their_sop_uid": sum(not film["named_by_uid"] for film in films),
    }


def _fold(fold: int, cases: list[Case]) -> dict[str, int]:
    members = [case for case in cases if case.fold == fold]
    positive, groups = sum(case.label for case in members), len({case.group for case in members})
    return {"fold": fold, "films": len(members), "positive": positive, "groups": groups}


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def audit_text(audit: dict[str, Any]) -> str:
    """Return the audit as text for people (audit.txt)."""
    return "\n".join([*_summary(audit), *_problems(audit), *_split(audit)]) + "\n"


def _summary(audit: dict[str, Any]) -> list[str]:
    films = audit["films"]
    share = films["positive"] / max(films["in_shards"], 1)
    return [
        "Audit of films and annotations",
        "",
        f"Films        {films['found']} found, {films['in_shards']} in the shards, {films['unreadable']} unusable, "
        f"{len(audit['unannotated']['ids'])} without annotation ({audit['unannotated']['policy']}); "
        f"{films['other_files']} other files",
        f"Positive     {films['positive']} ({share:.1%})",
        f"Matrix       {_line(films['sizes'])}",
        f"Views        {_line(films['views'])}",
        f"Sexes        {_line(films['sexes'])}",
        f"Decoders     {_line(films['decoders'])}",
        *_annotations(audit),
    ]


def _annotations(audit: dict[str, Any]) -> list[str]:
    lines = []
    if listed := audit.get("annotations"):
        lines += [
            f"Annotations  {listed['file']}: {listed['images']} images, {listed['rows']} rows, "
            f"{listed['positive']} positive; {listed['several_rows']} images with several rows, "
            f"{listed['overlapping_rows']} with overlapping rows, "
            f"{listed['mask_and_empty_row']} with a mask and an empty row"
            + (f"; offsets: {listed['rle']}" if listed["rle"] else ""),
            f"Rows         {_line(listed['rows_per_image'])} (rows per image: images)",
        ]
    if masks := audit.get("masks"):
        lines.append(
            f"Masks        {masks['folder']}: {masks['files']} files of {masks['films']} films, "
            f"{masks['several_files']} films with several; sha256 {masks['sha256']}"
        )
    return [*lines, *(f"Note         {note}" for note in audit["notes"])]


def _problems(audit: dict[str, Any]) -> list[str]:
    films = audit["films"]
    duplicates = [
        f"{', '.join(group['ids'])} (masks {'agree' if group['masks_agree'] else 'DIFFER'})"
        for group in audit["duplicates"]
    ]
    lines = []
    for title, items in (
        ("Unusable rows", audit.get("annotations", {}).get("problems", [])),
        ("Rows without a film", audit["orphans"]),
        ("Mask files without a film", audit.get("masks", {}).get("unused", [])),
        ("Films without annotation", audit["unannotated"]["ids"]),
        ("Unusable films", [f"{film['path']}: {film['reason']}" for film in audit["unreadable"]]),
        ("Ignored files", [f"{file['path']}: {file['reason']}" for file in audit["ignored"]]),
        ("Header warnings", [f"{text}: {count} films" for text, count in films["warnings"].items()]),
        ("Films with identical pixels", duplicates),
    ):
        if items:
            lines += ["", f"{title}: {len(items)}", *(f"    {item}" for item in items[:SHOWN])]
        if len(items) > SHOWN:
            lines.append(f"    ... and {len(items) - SHOWN} more in audit.json")
    return lines


def _split(audit: dict[str, Any]) -> list[str]:
    patients, holdout = audit["patients"], audit["holdout"]
    if audit["folds"]["level"] == "patient":
        level = f"patient-level; {patients['films_without_patient']} films without a patient in data.patient_map"
    else:
        level = (
            "IMAGE-LEVEL: without data.patient_map films of one patient may be in training and validation; "
            "scores may be inflated (patient leakage)"
        )
    lines = [
        "",
        f"Patients     {patients['groups']} groups; films per group: {_line(patients['films_per_group'])}",
        f"Folds        {level}",
    ]
    for fold in audit["folds"]["folds"]:
        name = "held out" if fold["fold"] == HOLDOUT else f"fold {fold['fold']}"
        one_class = fold["positive"] in (0, fold["films"])
        lines.append(
            f"  {name:10} {fold['films']} films, {fold['positive']} positive, {fold['groups']} groups"
            + ("; of one kind only: no AUC, and no specificity or no sensitivity" if one_class else "")
        )
    if holdout["listed"]:
        lines.append(
            f"  hold-out: {holdout['listed']} ids listed, {holdout['unknown']} of them unknown, "
            f"{holdout['added_with_their_patients']} further films of the same patients added"
        )
    return lines


def _line(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"
