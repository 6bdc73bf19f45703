"""Small values as bytes, to cross between ranks: JSON, with NumPy arrays as .npy. No pickles: reading runs no code."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

_ARRAY = "$array"


def pack(value: Any) -> bytes:
    """Return a tree of lists, dicts with text keys, texts, numbers, None and arrays (of no objects) as bytes.

    Tuples come back as lists.

    Raises:
        TypeError, ValueError: the value has another type in it.
    """
    arrays: list[np.ndarray] = []

    def noted(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            arrays.append(item)
            return {_ARRAY: len(arrays) - 1}
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):  # json would make texts of numbers
                raise TypeError("a dict with other keys than texts cannot be sent to other ranks")
            return {key: noted(value) for key, value in item.items()}
        return [noted(value) for value in item] if isinstance(item, (list, tuple)) else item

    stream = io.BytesIO()
    stream.write(json.dumps(noted(value)).encode() + b"\n")
    for array in arrays:
        np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def unpack(data: bytes) -> Any:
    """Return what `pack` was given.

    Raises:
        ValueError: these are not bytes of `pack`.
    """
    stream = io.BytesIO(data)
    text = stream.readline()
    arrays: list[np.ndarray] = []
    while stream.tell() < len(data):
        arrays.append(np.load(stream, allow_pickle=False))
    return json.loads(text, object_hook=lambda item: arrays[item[_ARRAY]] if item.keys() == {_ARRAY} else item)
