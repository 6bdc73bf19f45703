"""The alarm for a network that segments nothing: what is wrong and what to do, in words. Knows numbers only.

Mean Dice hides it: an empty mask has the full score on every negative film.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LOWEST = 0.01  # Dice on positives; training that works passes it within the first epochs
_ADVICE = (
    "train again with loss.dice_over=positives, a higher positive_share, a lower lr or more epochs, or start from "
    "pretrained weights (README, Learning)"
)


def collapse(scores: Mapping[str, Any]) -> str:
    """Return the alarm for scores at the fixed threshold (a `summary`), "" where the network segments something."""
    dice = scores["dice_positive"]
    if dice is None or dice >= _LOWEST:
        return ""
    empty = 1 - scores["called_positive"] / scores["films"]
    kind = "the network has collapsed" if empty > 0.9 else "the network segments nothing"
    return f"{kind}: Dice on positives {dice:.3f}, {100 * empty:.0f} % of the films called empty; {_ADVICE}"


def no_rule(scores: Mapping[str, Any]) -> str:
    """Return the alarm for scores of tuned thresholds that call every film empty, else ""."""
    if scores["called_positive"] or not scores["positive"]:
        return ""
    return (
        "no thresholds give a better Dice than calling every film empty: the tuned thresholds do that, and inference "
        "with them predicts no mask; set infer.triplet to see masks, and rank films by their scores"
    )
