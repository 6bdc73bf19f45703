"""The outputs of one film: its row and its files, in the folder of its part.

Only a DICOM SEG contains the name or id of a patient.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.data.films.rle import EMPTY, encode_rle
from pneumo_dist.inference.film_plan import PlannedFilm
from pneumo_dist.inference.reading import THUMB_PX, ReadFilm, fit
from pneumo_dist.reports import pictures
from pneumo_dist.runtime.files import write_text
from pneumo_dist.scoring.records import Triplet, apply_triplet, film_score
from pneumo_dist.scoring.submission_csv import OK, UNREADABLE, as_cell

# Output -> its folder. Thumbnails belong to the worklist and are always written.
FOLDERS = {"masks": "masks", "overlays": "overlays", "dicomseg": "seg", "probs": "probs"}

PREDICTION_COLUMNS = (
    "film", "status", "decision", "top_score", "area_px", "share", "reason", "rows", "columns",
    "threshold_top_score", "threshold_min_area", "threshold_mask", "tta", "models", "sha256", "sop_uid", "warnings",
)  # fmt: skip

Row = dict[str, Any]
Segment = Callable[[PlannedFilm, NDArray[np.bool_], Path], tuple[int, str] | str]


@dataclass(frozen=True)
class FilmWriter:
    """Turn the probabilities of one film into a row and files below `folder`."""

    folder: Path
    outputs: tuple[str, ...]
    triplet: Triplet
    segment: Segment | None = None  # writes a DICOM SEG and returns (bytes, sha256), or returns the reason for none

    def write(self, film: PlannedFilm, read: ReadFilm, prob: NDArray[np.float32], score: float | None) -> Row:
        """Decide, write the configured files, and return the row.

        Args:
            prob: float32 (rows, columns), the mean probability at film size.
            score: mean probability of the image-level heads; None: a model has none.
        """
        mask = apply_triplet(prob, self.triplet, score)
        area = int(np.count_nonzero(mask))
        row = empty_row(film, "", OK) | {
            "decision": "positive" if area else "negative",
            "top_score": film_score(prob, score),
            "area_px": area,
            "share": area / mask.size,
            "rows": read.rows,
            "columns": read.columns,
            "sha256": read.sha256,
            "sop_uid": read.sop_uid,
            "warnings": "; ".join(read.warnings),
            "rle": encode_rle(mask),
        }
        files: dict[str, list[Any]] = {}
        assert read.picture is not None
        thumbnail = pictures.thumbnail(fit(read.picture, THUMB_PX), mask)
        self._put(files, "thumbs", f"{film.name}.jpg", pictures.jpeg(thumbnail))
        if "masks" in self.outputs:
            self._put(files, "masks", f"{film.name}.png", pictures.png(mask.astype(np.uint8) * np.uint8(255)))
        if "probs" in self.outputs:
            self._put(files, "probs", f"{film.name}.png", pictures.png(np.rint(prob * 255).astype(np.uint8)))
        if "overlays" in self.outputs:
            drawn = pictures.overlay(read.picture, mask, caption(row))
            self._put(files, "overlays", f"{film.name}.png", pictures.png(drawn, 1))
        if self.segment is not None and area:  # a PACS has no use for an empty segmentation
            self._put_segmentation(files, row, film, mask)
        row["files"] = files
        return row

    def _put_segmentation(
        self, files: dict[str, list[Any]], row: Row, film: PlannedFilm, mask: NDArray[np.bool_]
    ) -> None:
        assert self.segment is not None
        name = f"{FOLDERS['dicomseg']}/{film.name}.dcm"
        (self.folder / name).parent.mkdir(exist_ok=True)
        written = self.segment(film, mask, self.folder / name)
        if isinstance(written, str):
            row["warnings"] = "; ".join(filter(None, [row["warnings"], f"no DICOM SEG: {written}"]))
        else:
            files[name] = list(written)

    def _put(self, files: dict[str, list[Any]], folder: str, name: str, data: bytes) -> None:
        path = self.folder / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        files[f"{folder}/{name}"] = [len(data), hashlib.sha256(data).hexdigest()]


def caption(row: Mapping[str, Any]) -> list[str]:
    """Return the two lines above an overlay."""
    verdict = f"{row['decision']}, score {row['top_score']:.2f}"
    if row["decision"] == "positive":
        percent = 100 * row["share"]
        size = "under 0.01" if percent < 0.01 else f"{percent:.{1 if percent >= 0.1 else 2}f}"
        verdict += f"; mask area {size} % of the image"
    return [verdict, str(row["film"]).encode("ascii", "replace").decode()[-72:]]


def empty_row(film: PlannedFilm, reason: str, status: str = UNREADABLE) -> Row:
    """Return the row of a film without an answer: an empty mask and the reason."""
    return {
        "film": film.id,
        "status": status,
        "decision": "",
        "top_score": None,
        "area_px": 0,
        "share": None,
        "reason": reason,
        "rows": None,
        "columns": None,
        "sha256": "",
        "sop_uid": "",
        "warnings": "",
        "rle": EMPTY,
        "name": film.name,
        "files": {},
    }


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as csv text: None is an empty cell, a float has all digits of a float32, no text is a formula."""

    def cell(value: Any) -> Any:
        if isinstance(value, float):
            return np.format_float_positional(np.float32(value), trim="0")
        return as_cell(value) if isinstance(value, str) else "" if value is None else value

    names = list(columns)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows([cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def write_predictions(path: Path, rows: Iterable[Row], settings: Mapping[str, Any]) -> None:
    """Write predictions.csv: one row per film with the decision rule; `settings` is `Ensemble.settings`."""
    triplet = settings["triplet"]
    shared = {
        "threshold_top_score": triplet["top_score"],
        "threshold_min_area": triplet["min_area"],
        "threshold_mask": triplet["mask_threshold"],
        "tta": settings["tta"],
        "models": ";".join(digest[:12] for digest in settings["models"]),
    }
    write_text(path, csv_text(PREDICTION_COLUMNS, (row | shared for row in rows)))
