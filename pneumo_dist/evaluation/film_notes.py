"""What the evaluation report wants of each film beyond its counts: the mask it got, and how honest its pixels are.

Integers and texts only, so that joining ranks or folds in any order gives the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.data.cases import Case
from pneumo_dist.data.films.rle import encode_rle
from pneumo_dist.runtime.files import read_json, write_json
from pneumo_dist.scoring.metrics import apply_triplet
from pneumo_dist.scoring.scorecard import fixed
from pneumo_dist.scoring.submission_csv import read_rows, write_submission

BINS = 20


@dataclass(eq=False)
class FilmNotes:
    """Notes on films, made at one fixed mask threshold."""

    threshold: float
    masks: dict[str, str] = field(default_factory=dict)  # id -> RLE at film size
    pixels: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # id -> (2, BINS): outside and inside the truth

    def __call__(self, case: Case, prob: NDArray[np.float32], truth: NDArray[np.bool_]) -> None:
        """Note one film; called from threads, each film once. prob and truth are (rows, columns) at film size."""
        self.masks[case.id] = encode_rle(apply_triplet(prob, fixed(self.threshold)))
        place = np.minimum((prob * BINS).astype(np.uint8), np.uint8(BINS - 1))
        place += truth.view(np.uint8) * np.uint8(BINS)
        self.pixels[case.id] = np.bincount(place.ravel(), minlength=2 * BINS).reshape(2, BINS)

    def join(self, others: Iterable[FilmNotes]) -> None:
        """Add the notes of other ranks or folds."""
        for other in others:
            self.masks |= other.masks
            self.pixels |= other.pixels

    @property
    def total(self) -> NDArray[np.int64]:
        """Pixels (2, BINS) over all films: outside and inside the truth, by probability."""
        return sum(self.pixels.values(), np.zeros((2, BINS), np.int64))

    def save(self, folder: Path) -> dict[str, Path]:
        """Write submission.csv and reliability.json and return them by name."""
        write_submission(folder / "submission.csv", sorted(self.masks.items()))
        outside, inside = self.total.tolist()
        write_json(
            folder / "reliability.json",
            {"threshold": self.threshold, "pixels_outside": outside, "pixels_inside": inside},
        )
        return {"submission": folder / "submission.csv", "reliability": folder / "reliability.json"}

    @classmethod
    def load(cls, folder: Path) -> FilmNotes:
        """Read what `save` wrote; the pixels come back as one sum."""
        tree = read_json(folder / "reliability.json")
        masks = {name: text for name, text in read_rows(folder / "submission.csv")[1:]}
        counts = np.array([tree["pixels_outside"], tree["pixels_inside"]], np.int64)
        return cls(tree["threshold"], masks, {str(folder): counts})
