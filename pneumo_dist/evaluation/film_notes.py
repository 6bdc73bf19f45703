"""Notes on films beside their records: the mask at the fixed threshold, and pixel counts for the reliability diagram.

Integers and texts only, so joining ranks or folds in any order gives the same result.
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
from pneumo_dist.scoring.records import apply_triplet
from pneumo_dist.scoring.scorecard import fixed
from pneumo_dist.scoring.submission_csv import read_rows, write_submission

BINS = 20


@dataclass(eq=False)
class FilmNotes:
    """Notes on films at one fixed mask threshold."""

    threshold: float
    masks: dict[str, str] = field(default_factory=dict)  # id -> RLE at film size
    pixels: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # id -> (2, BINS)

    def __call__(self, case: Case, prob: NDArray[np.float32], truth: NDArray[np.bool_]) -> None:
        """Note one film; called once per film, from threads. prob and truth are (rows, columns) at film size."""
        self.masks[case.id] = encode_rle(apply_triplet(prob, fixed(self.threshold)))
        bins = np.minimum((prob * BINS).astype(np.uint8), np.uint8(BINS - 1))
        bins += truth.view(np.uint8) * np.uint8(BINS)  # the second row counts the pixels inside the truth
        self.pixels[case.id] = np.bincount(bins.ravel(), minlength=2 * BINS).reshape(2, BINS)

    def join(self, others: Iterable[FilmNotes]) -> None:
        """Add the notes of other ranks or folds."""
        for other in others:
            self.masks |= other.masks
            self.pixels |= other.pixels

    @property
    def total(self) -> NDArray[np.int64]:
        """Return the pixels of all films, (2, BINS): outside and inside the truth, by probability."""
        return sum(self.pixels.values(), np.zeros((2, BINS), np.int64))

    def save(self, folder: Path) -> dict[str, Path]:
        """Write submission.csv and reliability.json, and return {name: file}."""
        write_submission(folder / "submission.csv", sorted(self.masks.items()))
        outside, inside = self.total.tolist()
        write_json(
            folder / "reliability.json",
            {"threshold": self.threshold, "pixels_outside": outside, "pixels_inside": inside},
        )
        return {"submission": folder / "submission.csv", "reliability": folder / "reliability.json"}

    @classmethod
    def load(cls, folder: Path) -> FilmNotes:
        """Read what `save` wrote; the pixels of all films come back as one entry."""
        stored = read_json(folder / "reliability.json")
        masks = dict(read_rows(folder / "submission.csv")[1:])
        counts = np.array([stored["pixels_outside"], stored["pixels_inside"]], np.int64)
        return cls(stored["threshold"], masks, {str(folder): counts})
