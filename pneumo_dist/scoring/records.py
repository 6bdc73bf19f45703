"""Records of films: pixel counts at a list of mask thresholds, never the pixels.

Every score (Dice, sensitivity, thousands of triplets) is computed from these integers, so scores do not depend on how
films are split over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pneumo_dist.runtime.files import atomic_path

if TYPE_CHECKING:
    from pneumo_dist.config import Evaluate
    from pneumo_dist.data.cases import Case

HEAD_SCORE, MASK_SCORE = "image-level head", "highest probability of the mask"  # the kinds of a film's score
REFERENCE_PX = 1024 * 1024  # minimum areas are stored for a film of this many pixels
PAPER_THRESHOLDS = (0.5, 0.55)


@dataclass(frozen=True)
class Triplet:
    """A decision rule: a film is positive if score >= top_score and area(mask_threshold) >= min_area.

    A film's score is the probability of the image-level head; of a network without one, the highest probability of
    the mask. min_area is in pixels of a 1024x1024 film and scales with the film's pixels. A fixed threshold t is
    Triplet(0.0, 0, t).
    """

    top_score: float
    min_area: int
    mask_threshold: float


def apply_triplet(prob: NDArray[np.float32], triplet: Triplet, score: float | None = None) -> NDArray[np.bool_]:
    """Return the mask of one film, bool of prob's shape, all False where the film is negative.

    prob: float32 (rows, columns) at film size. score: of the image-level head; None: the highest probability of
    `prob`. Evaluation and inference share this decision.
    """
    mask = prob > np.float32(triplet.mask_threshold)
    area = int(np.count_nonzero(mask))
    # Integers: no rounding can make `decide`, which has only the counts, decide otherwise.
    large_enough = area * REFERENCE_PX >= triplet.min_area * prob.size
    if not (large_enough and np.float32(film_score(prob, score)) >= np.float32(triplet.top_score)):
        mask[:] = False
    return mask


def film_score(prob: NDArray[np.float32], score: float | None) -> float:
    """Return the score of a film: that of the image-level head if there is one, else the highest probability."""
    return float(prob.max(initial=0)) if score is None else score


@dataclass(frozen=True)
class FilmRecord:
    """One film's counts: areas[i] pixels have prob > thresholds[i], hits[i] of them lie inside the truth."""

    top: float
    areas: NDArray[np.int64]
    hits: NDArray[np.int64]
    truth_px: int
    film_px: int


def record_thresholds(evaluate: Evaluate) -> tuple[float, ...]:
    """Return the mask thresholds to record, ascending: the search grid, the recipe's, and the paper's 0.5 and 0.55."""
    return tuple(sorted({*evaluate.mask_thresholds, evaluate.threshold, *PAPER_THRESHOLDS}))


def film_record(
    prob: NDArray[np.float32], truth: NDArray[np.bool_], thresholds: Sequence[float], score: float | None = None
) -> FilmRecord:
    """Count one film.

    prob: float32 (rows, columns) at film size. truth: bool of the same shape, the union of the annotations. score: as
    for `apply_triplet`.
    """
    if prob.shape != truth.shape:
        raise ValueError(f"probabilities are {prob.shape}, truth is {truth.shape}")
    if prob.dtype != np.float32:
        raise TypeError(f"probabilities are {prob.dtype}, not float32")
    # Most pixels lie below every threshold: one pass over the film, then short ones over the rest.
    candidates = prob > np.float32(min(thresholds, default=0.0))
    values, inside = prob[candidates], truth[candidates]
    areas, hits = np.zeros((2, len(thresholds)), np.int64)
    for i, threshold in enumerate(thresholds):
        above = values > np.float32(threshold)
        areas[i] = np.count_nonzero(above)
        hits[i] = np.count_nonzero(above & inside)
    return FilmRecord(film_score(prob, score), areas, hits, int(np.count_nonzero(truth)), prob.size)


@dataclass(frozen=True, eq=False)
class Records:
    """Films as arrays, sorted by id: n films, T mask thresholds. Unknown views and sexes are ""."""

    ids: NDArray[np.str_]  # (n,)
    groups: NDArray[np.int64]  # (n,) patient
    folds: NDArray[np.int64]  # (n,)
    truth_px: NDArray[np.int64]  # (n,)
    film_px: NDArray[np.int64]  # (n,)
    top: NDArray[np.float32]  # (n,) score of the film
    thresholds: NDArray[np.float64]  # (T,)
    areas: NDArray[np.int64]  # (n, T)
    hits: NDArray[np.int64]  # (n, T)
    views: NDArray[np.str_]  # (n,)
    sexes: NDArray[np.str_]  # (n,)
    scored: bool = False  # whether `top` is of the image-level head; else it is the mask's highest probability

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(
        cls, cases: Sequence[Case], rows: Sequence[FilmRecord], thresholds: Sequence[float], scored: bool = False
    ) -> Records:
        """Join cases with their counts, given in the same order; both may be empty."""
        n, t = len(cases), len(thresholds)
        if n != len(rows):
            raise ValueError(f"{n} cases but {len(rows)} records")
        unsorted = cls(
            ids=np.array([case.id for case in cases], dtype=np.str_),
            groups=np.array([case.group for case in cases], dtype=np.int64),
            folds=np.array([case.fold for case in cases], dtype=np.int64),
            truth_px=np.array([row.truth_px for row in rows], dtype=np.int64),
            film_px=np.array([row.film_px for row in rows], dtype=np.int64),
            top=np.array([row.top for row in rows], dtype=np.float32),
            thresholds=np.array(thresholds, dtype=np.float64),
            areas=np.array([row.areas for row in rows], dtype=np.int64).reshape(n, t),
            hits=np.array([row.hits for row in rows], dtype=np.int64).reshape(n, t),
            views=np.array([case.view or "" for case in cases], dtype=np.str_),
            sexes=np.array([case.sex or "" for case in cases], dtype=np.str_),
            scored=scored,
        )
        return unsorted.select(np.argsort(unsorted.ids, kind="stable"))

    @classmethod
    def concatenate(cls, parts: Iterable[Records]) -> Records:
        """Join the records of ranks or folds, sorted by id: the result does not depend on the parts or their order.

        Raises:
            ValueError: nothing to join, different thresholds or kinds of score, or a film that occurs twice.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("no records to join")
        if any(not np.array_equal(part.thresholds, parts[0].thresholds) for part in parts):
            raise ValueError("records with different mask thresholds cannot be joined")
        if any(part.scored != parts[0].scored for part in parts):
            raise ValueError("scores of image-level heads and highest probabilities of masks cannot be joined")
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in cls._per_film()
        }
        records = cls(thresholds=parts[0].thresholds, scored=parts[0].scored, **joined)
        records = records.select(np.argsort(records.ids, kind="stable"))
        repeated = records.ids[1:][records.ids[1:] == records.ids[:-1]]
        if len(repeated):
            raise ValueError(f"{len(repeated)} films occur twice, the first is {repeated[0]}")
        return records

    def select(self, films: NDArray[np.bool_] | NDArray[np.int64]) -> Records:
        """Return the films of a mask or an index array."""
        selected: dict[str, Any] = {name: getattr(self, name)[films] for name in self._per_film()}
        return replace(self, **selected)

    @classmethod
    def _per_film(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name not in ("thresholds", "scored")]

    def column(self, mask_threshold: float) -> int:
        """Return the column of a mask threshold; ValueError if it was not recorded."""
        columns = np.flatnonzero(np.isclose(self.thresholds, mask_threshold, rtol=0, atol=1e-9))
        if not len(columns):
            raise ValueError(f"mask threshold {mask_threshold} was not recorded: {self.thresholds.tolist()} were")
        return int(columns[0])

    def scaled_area(self, column: int) -> NDArray[np.int64]:
        """Return each film's area in pixels of 1024x1024, rounded down: >= m where `decide` accepts min_area m."""
        return self.areas[:, column] * REFERENCE_PX // np.maximum(self.film_px, 1)

    def save(self, path: str | Path) -> None:
        """Write an .npz file atomically."""
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Records:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            arrays = {f.name: stored[f.name] for f in fields(cls) if f.name != "scored"}
            return cls(**arrays, scored=bool(stored["scored"]) if "scored" in stored else False)  # absent in 1.0.0
