"""The competition's csv: write, read strictly, validate against a folder or a list, score against annotations.

NumPy and pydicom only; no file is repaired.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import Case
from pneumo_dist.data.films.dicom import FilmError, NotAnImage, read_film
from pneumo_dist.data.films.listing import HEAD_BYTES, find_films, object_reason
from pneumo_dist.data.films.masks import dicom_header
from pneumo_dist.data.films.rle import EMPTY, RleError, decode_rle, decode_union, encode_rle
from pneumo_dist.data.lists import (
    FIELD_BYTES,
    Annotations,
    FilmNames,
    by_film,
    check_folders,
    read_annotations,
    read_patient_map,
    read_table,
)
from pneumo_dist.runtime.files import read_json, write_csv
from pneumo_dist.runtime.processes import Pool
from pneumo_dist.scoring.metrics import summary
from pneumo_dist.scoring.records import FilmRecord, Records, Triplet

HEADER = ["ImageId", "EncodedPixels"]
COMPETITION_SIZE = (1024, 1024)
# Status of a row of predictions.csv. Only "ok" is an answer; an ignored file is no film.
OK, UNREADABLE, IGNORED = "ok", "unreadable", "ignored"
# A spreadsheet computes a cell that begins so (also with the full-width signs), whatever its quotes.
FORMULA = "[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"


@dataclass(frozen=True)
class Validation:
    """The result of a validation: problems (none: the submission is valid), and films without an answer."""

    problems: list[str]
    films: int
    without_row: set[str]  # unreadable, and without a row
    with_row: set[str]  # unreadable according to predictions.csv, and with the row -1


@dataclass(frozen=True)
class Prediction:
    """A row of predictions.csv; an unreadable film has no score."""

    top_score: float | None
    size: tuple[int, int]
    sop_uid: str = ""


def as_cell(text: str) -> str:
    """Return a text that spreadsheets show and do not compute: with an apostrophe before a formula. See `from_cell`."""
    return f"'{text}" if re.match(f"'*{FORMULA}", text) else text


def from_cell(cell: str) -> str:
    """Return the text of a cell that `as_cell` wrote."""
    return cell[1:] if re.match(f"'+{FORMULA}", cell) else cell


def write_submission(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write rows of (id, RLE) in the order given, atomically."""
    write_csv(path, [HEADER, *rows])


def read_rows(path: Path) -> list[list[str]]:
    """Read a csv file's rows, header included, without stripping anything.

    Raises:
        ConfigError: the file does not exist, or is not UTF-8 or not csv.
    """
    csv.field_size_limit(FIELD_BYTES)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot read the submission ({getattr(error, 'strerror', None) or error})") from None


def problems_of(
    rows: list[list[str]], expected: Iterable[str], size_of: Callable[[str], tuple[int, int] | None]
) -> list[str]:
    """Return every problem of a submission; an empty list: it is valid.

    Args:
        rows: the csv's rows with the header.
        expected: the ids that need one row each.
        size_of: id -> (rows, columns) of the film, or None where unknown (then the row must be -1).
    """
    if not rows or rows[0] != HEADER:
        header = ",".join(rows[0])[:60] if rows else ""
        return [f"line 1: the header is {header!r}, not ImageId,EncodedPixels" if rows else "the file is empty"]
    films, seen, problems = set(expected), set[str](), []
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != 2:
            problems.append(f"line {line}: {len(row)} cells, not 2")
            continue
        name, text = row
        if name in seen:
            problems.append(f"line {line}: {name} has a second row")
        elif name not in films:
            problems.append(f"line {line}: {name} is not one of the films")
        seen.add(name)
        if text != EMPTY and name in films and (problem := _rle_problem(text, size_of(name))):
            problems.append(f"line {line}: {name}{problem}")
    missing = sorted(films - seen)
    if missing:
        problems.append(f"{len(missing)} films have no row (first: {missing[0]})")
    return problems


def _rle_problem(text: str, size: tuple[int, int] | None) -> str:
    if size is None:
        return " cannot be read, so its row must be -1"
    try:
        canonical = encode_rle(decode_rle(text, *size))
    except RleError as error:
        return f": {error}"
    return "" if canonical == text else ": the runs are not in the shortest form (touching runs, or other spacing)"


def validation_of(path: Path, against: Path) -> Validation:
    """Check a submission, and find the films without an answer.

    An unreadable film needs no row when the submission is checked against a folder: it is listed as unreadable in the
    predictions.csv beside the submission, or it is read here. A list of ids asks for a row for each of them.

    Args:
        path: the submission.
        against: a folder of films (ids as inference gives them; masks are checked at each film's size), or a csv with
            an ImageId column such as sample_submission.csv (masks are checked at 1024x1024).

    Raises:
        ConfigError: one of the files cannot be read.
    """
    path, against = Path(path), Path(against)
    rows = read_rows(path)
    answered = {row[0] for row in rows[1:] if row}
    empty = {row[0] for row in rows[1:] if row[1:] == [EMPTY]}
    predictions = _read_predictions(path.with_name("predictions.csv"))
    unreadable = {name for name, prediction in predictions.items() if prediction.top_score is None}
    if not against.is_dir():
        expected = set(_listed_ids(against))
        problems = problems_of(rows, expected, lambda _: COMPETITION_SIZE)
        if missing := (expected & unreadable) - answered:
            problems.append(f"{len(missing)} films without a row are unreadable: infer.unreadable=negative writes -1")
        return Validation(problems, len(expected), missing, expected & unreadable & empty)
    films = dict(find_films(against, _follows_links(path))[0])
    if not films:
        raise ConfigError(f"{against} holds no films")
    missing = films.keys() - answered - unreadable
    ignored = {name for name in missing if object_reason(against / films[name])}
    found = _reasons({name: against / films[name] for name in missing - ignored})
    ignored |= {name for name, reason in found.items() if reason == IGNORED}
    unreadable |= found.keys() - ignored
    expected = films.keys() - ignored
    problems = problems_of(rows, expected - (unreadable - answered), lambda name: film_size(against / films[name]))
    return Validation(problems, len(expected), (expected & unreadable) - answered, expected & unreadable & empty)


def _listed_ids(path: Path) -> list[str]:
    columns, rows = read_table(path, "folder of films or list of ids", ("ImageId",))
    column = columns.index("imageid")
    return [cells[column] for _, cells in rows if len(cells) > column]


def _follows_links(submission: Path) -> bool:
    """Return whether the inference that wrote the submission followed links out of the folder."""
    try:
        return bool(read_json(submission.with_name("inference.json")).get("follow_links", False))
    except (OSError, ValueError):
        return False


def _reasons(films: Mapping[str, Path]) -> dict[str, str]:
    """Return {film: reason} of the unreadable ones; stop at the first readable film, which needs a row anyway."""
    if not films:
        return {}
    pool, reasons = Pool(1, lambda: warnings.simplefilter("ignore")), dict[str, str]()  # a decoder may crash or hang
    try:
        for name in sorted(films):
            reason = pool.submit(_reason, [films[name]], lambda _, reason: reason).result()
            if not reason:
                break
            reasons[name] = reason
    finally:
        pool.close()
    return reasons


def _reason(path: Path) -> str:
    """Return why a film cannot be read, "" if it can."""
    try:
        read_film(path)
    except NotAnImage:
        return IGNORED
    except FilmError as error:
        return str(error)
    except Exception as error:  # the type only: the message could quote the header
        return type(error).__name__
    return ""


def film_size(path: Path) -> tuple[int, int] | None:
    """Return (rows, columns) of a film from its header, whatever its name; None if they cannot be read."""
    try:
        with path.open("rb") as handle:
            head = handle.read(HEAD_BYTES)
        if head[128:132] != b"DICM" and head.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff")):
            from PIL import Image

            with Image.open(path) as image:
                return image.height, image.width
        header = dicom_header(path, "Rows", "Columns")
        return int(header.Rows), int(header.Columns)
    except Exception:  # a damaged file can raise anything: its size is unknown
        return None


def score_submission(
    path: Path, truth: Path, patients: Path | None = None, bootstrap: int = 1000, rle: str | None = None
) -> dict[str, Any]:
    """Score a submission against an annotation list, film by film at film size, with every score of the evaluation.

    Film sizes, scores and SOP Instance UIDs come from the predictions.csv beside the submission. Without that file,
    films are 1024x1024 and ranked (AUC) by whether their mask is empty, and it is unknown which are unreadable (None).
    Films that are in only one of the two files and unreadable films (without a score) are counted, not scored.
    Intervals are by patient with a map (`ImageId,PatientKey`), else by film.

    Raises:
        ConfigError: a file cannot be read, a mask is invalid at its film's size, or no film is in both files.
    """
    path, truth = Path(path), Path(truth)
    masks = _read_masks(path)
    predictions = _read_predictions(path.with_name("predictions.csv"))
    unreadable = {name for name, prediction in predictions.items() if prediction.top_score is None}
    uids = {name: prediction.sop_uid for name, prediction in predictions.items()}
    names = FilmNames([(name, name) for name in masks.keys() | unreadable], lambda name: uids.get(name, ""))
    annotations = read_annotations(truth, rle)
    found = names.match({name: (name,) for name in annotations.rows}, str(truth))
    check_folders(found, str(truth))
    annotations = annotations.of_films(found)
    unread = annotations.rows.keys() & unreadable
    films = sorted((masks.keys() & annotations.rows.keys()) - unread)
    if not films:
        others = f" ({len(unread)} annotated films are unreadable)" if unread else ""
        raise ConfigError(f"{path} and {truth} have no film in common{others}")
    patient_keys = by_film(read_patient_map(Path(patients)), names, patients) if patients else {}
    groups: dict[str, int] = {}
    cases, records = [], []
    for name in films:
        prediction = predictions.get(name, Prediction(None, COMPETITION_SIZE))
        mask, annotated = _decoded(name, masks[name], annotations, prediction.size)
        group = groups.setdefault(patient_keys.get(name, name), len(groups))
        cases.append(Case(name, 0, 0, *prediction.size, int(annotated.any()), 0, group, "", "", EMPTY))
        area, hits = np.array([[mask.sum()], [(mask & annotated).sum()]], np.int64)
        top = float(mask.any()) if prediction.top_score is None else prediction.top_score
        records.append(FilmRecord(top, area, hits, int(annotated.sum()), mask.size))
    return {
        **summary(Records.build(cases, records, (0.5,)), Triplet(0.0, 0, 0.5), bootstrap),
        "auc_from": "film scores of predictions.csv"
        if predictions
        else "masks (no predictions.csv beside the submission)",
        "intervals_by": "patient" if patient_keys else "film",
        "films_without_truth": len(masks.keys() - annotations.rows.keys()),
        "unreadable": len(unread) if predictions else None,
        "unreadable_positive": sum(any(text != EMPTY for text in annotations.texts(name)) for name in unread),
        "truth_without_answer": len(annotations.rows.keys() - masks.keys() - unread),
    }


def _decoded(name: str, text: str, truth: Annotations, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (mask, annotated mask) of a film; raise ConfigError if one of them is invalid at this size."""
    try:
        if name in truth.broken:
            raise RleError(truth.broken[name])
        return decode_rle(text, *size), decode_union(truth.texts(name), *size)
    except RleError as error:
        raise ConfigError(f"{name}: {error} (film size taken as {size[0]} x {size[1]})") from None


def _read_masks(path: Path) -> dict[str, str]:
    """Return {film id: RLE} of a submission."""
    rows = read_rows(path)
    if not rows or rows[0] != HEADER or any(len(row) != 2 for row in rows):
        raise ConfigError(f"{path} is not a submission (ImageId,EncodedPixels): run `runs.py validate` on it")
    masks = {row[0]: row[1] for row in rows[1:]}
    if len(masks) != len(rows) - 1:
        raise ConfigError(f"{path} has several rows for one film: run `runs.py validate` on it")
    return masks


def _read_predictions(path: Path) -> dict[str, Prediction]:
    """Return {film id: prediction} of a predictions.csv, nothing where there is no such file."""
    if not path.is_file():
        return {}
    header, *rows = read_rows(path) or [[]]
    predictions: dict[str, Prediction] = {}
    for cells in rows:
        row = dict(zip(header, cells, strict=False))
        size = (int(row["rows"]), int(row["columns"])) if row.get("rows") else COMPETITION_SIZE
        top = float(row["top_score"]) if row.get("top_score") else None
        predictions[from_cell(row.get("film", ""))] = Prediction(top, size, row.get("sop_uid", ""))
    return predictions
