"""Values of a pydicom data set as numbers and texts, whatever their VR, number or damage. No message quotes a value."""

from __future__ import annotations

from typing import Any

import numpy as np

from pneumo_dist.data.films.codecs import FilmError


def whole(dataset: Any, name: str, default: int | None = None) -> int:
    """Return a whole number of the header; raise FilmError if it is missing or not a whole number."""
    try:
        value = dataset.get(name)
        if value is None or value == "":
            value = default
        if value is not None and int(value) == float(value):
            return int(value)
    except Exception:  # the value may have any type, and its conversion may raise any error
        pass
    raise FilmError(f"header value {name} is missing or not a whole number")


def text(dataset: Any, name: str) -> str:
    """Return a text in capitals, "" if it is missing or undecodable."""
    try:
        return str(dataset.get(name) or "").strip().upper()
    except Exception:  # undecodable text counts as missing
        return ""


def decimals(dataset: Any, name: str) -> list[float]:
    """Return the numbers of an element, nan for those that are none, [] if it is empty; a decimal comma is read."""
    try:
        value = dataset.get(name)
    except Exception:  # pydicom raises various errors on texts that are no numbers
        value = _raw(dataset, name)
    values = [value] if isinstance(value, (str, bytes, int, float)) or value is None else list(value)
    return [_decimal(value) for value in values if value not in (None, "")]


def _raw(dataset: Any, name: str) -> list[str]:
    from pydicom.datadict import tag_for_keyword

    raw = getattr(dataset.get_item(tag_for_keyword(name)), "value", None)
    return raw.decode("ascii", "replace").strip(" \0").split("\\") if isinstance(raw, bytes) else []


def _decimal(value: Any) -> float:
    try:
        return float(str(value).replace(",", "."))
    except ValueError:
        return float("nan")


def integers(dataset: Any, name: str) -> np.ndarray:
    """Return the 16-bit integers of an element as int64, empty if it is missing; VR may be US, SS or OW."""
    value = dataset.get(name)
    if value in (None, "", b""):
        return np.empty(0, np.int64)
    if isinstance(value, bytes):
        order = ">" if dataset.original_encoding[1] is False else "<"
        return np.frombuffer(value[: len(value) // 2 * 2], f"{order}u2").astype(np.int64)
    return np.atleast_1d(np.asarray(value, np.int64))
