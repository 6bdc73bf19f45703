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

    def note(item: Any) -> dict[str, int]:
        if not isinstance(item, np.ndarray):
            raise TypeError(f"a {type(item).__name__} cannot be sent to other ranks")
        arrays.append(item)
        return {_ARRAY: len(arrays) - 1}

    stream = io.BytesIO()
    stream.write(json.dumps(value, default=note).encode() + b"\n")
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
