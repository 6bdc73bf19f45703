"""The competition's csv: write, read strictly, validate against a folder or a list, score against annotations.

numpy and pydicom only; nothing here repairs a file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import FIELD_BYTES, Case, find_films, read_annotations, read_patient_map
from pneumo_dist.data.films.rle import EMPTY, RleError, decode_rle, decode_union, encode_rle
from pneumo_dist.runtime.files import write_text
from pneumo_dist.scoring.metrics import FilmRecord, Records, Triplet, summary

HEADER = ["ImageId", "EncodedPixels"]
COMPETITION_SIZE = (1024, 1024)


def write_submission(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (id, run-length text) rows in the order given, atomically."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path, what: str = "submission") -> list[list[str]]:
    """Read a csv file's rows, header included, without stripping anything; `what` names it in an error.

    Raises:
        ConfigError: no such file, not UTF-8, not csv.
    """
    csv.field_size_limit(FIELD_BYTES)
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            return list(csv.reader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot read the {what} ({getattr(error, 'strerror', None) or error})") from None


def problems_of(rows: list[list[str]], expected: Iterable[str], size_of: Any) -> list[str]:
    """Return everything wrong with a submission, an empty list when it is valid.

    Args:
        rows: the csv's rows with the header.
        expected: the ids to be answered, each once.
        size_of: id -> (rows, columns) of the film, or None where unknown (then the answer must be -1).
    """
    if not rows or rows[0] != HEADER:
        return [
            f"line 1: the header is {','.join(rows[0])[:60]!r}, not ImageId,EncodedPixels"
            if rows
            else "the file is empty"
        ]
    wanted, seen, found = set(expected), set[str](), []
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != 2:
            found.append(f"line {line}: {len(row)} cells, not 2")
            continue
        name, text = row
        if name in seen:
            found.append(f"line {line}: {name} is answered twice")
        elif name not in wanted:
            found.append(f"line {line}: {name} is not among the films")
        seen.add(name)
        if text == EMPTY or name not in wanted:
            continue
        size = size_of(name)
        if size is None:
            found.append(f"line {line}: {name} cannot be read, so its answer must be -1")
            continue
        try:
            if encode_rle(decode_rle(text, *size)) != text:
                found.append(
                    f"line {line}: {name}: the runs are not in the shortest form (touching runs, or other spacing)"
                )
        except RleError as error:
            found.append(f"line {line}: {name}: {error}")
    missing = sorted(wanted - seen)
    if missing:
        found.append(f"{len(missing)} films have no row, the first is {missing[0]}")
    return found


def validate_submission(path: Path, against: Path) -> list[str]:
    """Return everything wrong with a submission, an empty list when it is valid.

    Args:
        path: the submission.
        against: a folder of films (ids as inference gives them; runs are checked at each film's size), or a
            csv with an ImageId column such as sample_submission.csv (runs are checked at 1024x1024).

    Raises:
        ConfigError: one of the two cannot be read.
    """
    path, against = Path(path), Path(against)
    rows = read_rows(path)
    if against.is_dir():
        films = dict(find_films(against)[0])
        if not films:
            raise ConfigError(f"{against} holds no films")
        return problems_of(rows, films, lambda name: film_size(against / films[name]))
    head, *answers = read_rows(against, "folder of films or list of ids") or [[]]
    names = [cell.strip().lstrip("\ufeff") for cell in head]
    if "ImageId" not in names:
        raise ConfigError(f"{against}: neither a folder of films nor a csv with an ImageId column")
    column = names.index("ImageId")
    wanted = [row[column].strip() for row in answers if len(row) > column]
    return problems_of(rows, wanted, lambda _: COMPETITION_SIZE)


def film_size(path: Path) -> tuple[int, int] | None:
    """Return (rows, columns) of a film from its header, None where it has none."""
    try:
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            from PIL import Image

            with Image.open(path) as image:
                return image.height, image.width
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"], force=True)
        return int(header.Rows), int(header.Columns)
    except Exception:  # whatever is wrong with the file, its size is unknown
        return None


def score_submission(path: Path, truth: Path, patients: Path | None = None, bootstrap: int = 1000) -> dict[str, Any]:
    """Score a submission against an annotation list, film by film at film size, with every score of the evaluation.

    Sizes and top scores come from the predictions.csv beside the submission where there is one; without it films
    are 1024x1024 and the ranking (AUC) is that of the masks. Films only one of the two files knows are counted, not
    scored. Intervals are by patient with a map (`ImageId,PatientKey`), else by film.

    Raises:
        ConfigError: a file cannot be read, a run is broken or outside its film, or no film is in both files.
    """
    path = Path(path)
    rows = read_rows(path)
    if not rows or rows[0] != HEADER or any(len(row) != 2 for row in rows):
        raise ConfigError(f"{path} is not a submission (ImageId,EncodedPixels): run `runs.py validate` on it")
    answers: dict[str, str] = {row[0]: row[1] for row in rows[1:]}
    if len(answers) != len(rows) - 1:
        raise ConfigError(f"{path} answers films twice: run `runs.py validate` on it")
    annotations = read_annotations(Path(truth))
    both = sorted(answers.keys() & annotations.rows.keys())
    if not both:
        raise ConfigError(f"{path} and {truth} have no film in common")
    known = _predictions(path.with_name("predictions.csv"))
    keys = read_patient_map(Path(patients)) if patients else {}
    groups: dict[str, int] = {}
    cases, records = [], []
    for name in both:
        top, size = known.get(name, (None, COMPETITION_SIZE))
        try:
            mask = decode_rle(answers[name], *size)
            real = decode_union(annotations.texts(name), *size)
        except RleError as error:
            raise ConfigError(f"{name}: {error} (film size taken as {size[0]} x {size[1]})") from None
        group = groups.setdefault(keys.get(name, name), len(groups))
        cases.append(Case(name, 0, 0, *size, int(real.any()), 0, group, "", "", EMPTY))
        area, hits = np.array([[mask.sum()], [(mask & real).sum()]], np.int64)
        records.append(FilmRecord(float(mask.any()) if top is None else top, area, hits, int(real.sum()), mask.size))
    result = summary(Records.build(cases, records, (0.5,)), Triplet(0.0, 0, 0.5), bootstrap)
    return {
        **result,
        "auc_from": "top scores of predictions.csv" if known else "masks (no predictions.csv beside the submission)",
        "intervals_by": "patient" if keys else "film",
        "films_without_truth": len(answers.keys() - annotations.rows.keys()),
        "truth_without_answer": len(annotations.rows.keys() - answers.keys()),
    }


def _predictions(path: Path) -> Mapping[str, tuple[float | None, tuple[int, int]]]:
    if not path.is_file():
        return {}
    rows = read_rows(path)
    found: dict[str, tuple[float | None, tuple[int, int]]] = {}
    for cells in rows[1:]:
        row = dict(zip(rows[0], cells, strict=False))
        size = (int(row["rows"]), int(row["columns"])) if row.get("rows") else COMPETITION_SIZE
        found[row.get("film", "")] = (float(row["top_score"]) if row.get("top_score") else None, size)
    return found
