"""Probability maps from model size to film size. Thresholds and areas are taken at film size only."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float32]


def film_probability(prob: Map, rows: int, columns: int) -> Map:
    """Resize one probability map to film size, bilinearly (pixel centres, the inverse of the shards' resize).

    OpenCV takes a quarter of torch's time on one core, and many threads may call it at once.

    Args:
        prob: float32 (S, S), an array or a CPU tensor.

    Returns:
        float32 (rows, columns).
    """
    array = np.asarray(prob, dtype=np.float32)
    if array.shape == (rows, columns):
        return array
    return np.asarray(cv2.resize(array, (columns, rows), interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def mean_film_probability(parts: Sequence[tuple[float, Map]], rows: int, columns: int) -> Map:
    """Return the weighted mean at film size of maps of several model sizes; a single map is only resized.

    Args:
        parts: (weight, float32 (S, S)) for each size, in ascending size; the weights sum to 1.
    """
    if len(parts) == 1:
        return film_probability(parts[0][1], rows, columns)
    total = np.zeros((rows, columns), np.float32)
    for weight, prob in parts:
        total += np.float32(weight) * film_probability(prob, rows, columns)
    return total
