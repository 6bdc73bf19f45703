"""The alarm for a network that segments nothing: what is wrong and what to do, in words. Knows numbers only.

Mean Dice hides it: an empty mask has the full score on every negative film.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LOWEST = 0.05  # Dice on positives; all-ones masks reach 0.03, training that works passes it in its first epochs
_ADVICE = (
    "train again with loss.dice_over=positives, a higher positive_share, a lower lr or more epochs, or start from "
    "pretrained weights (README, Learning)"
)


def collapse(scores: Mapping[str, Any], highest: float | None = None, threshold: float = 0.0) -> str:
    """Return the alarm for scores at the fixed threshold (a `summary`), "" where the network segments something.

    highest: the highest probability of any pixel, if known. threshold: the fixed threshold.
    """
    dice, sensitivity = scores["dice_positive"], scores["sensitivity"]
    empty = 1 - scores["called_positive"] / scores["films"]
    collapsed = empty > 0.9 and (sensitivity or 0.0) < 0.1
    if dice is None or (dice >= _LOWEST and not collapsed):
        return ""
    kind = "the network has collapsed to empty masks" if collapsed else "the network segments nothing"
    text = f"{kind}: Dice on positives {dice:.3f}, {100 * empty:.0f} % of the films called empty"
    if highest is not None:
        text += f", highest probability {highest:.2f}"
        if threshold / 2 < highest <= threshold:
            return f"{text}; train longer, or lower evaluate.threshold={threshold:g}"
    return f"{text}; {_ADVICE}"


def no_rule(scores: Mapping[str, Any]) -> str:
    """Return the alarm for scores of tuned thresholds that call every film empty, else ""."""
    if scores["called_positive"] or not scores["positive"]:
        return ""
    return (
        "no thresholds give a better Dice than calling every film empty: the tuned thresholds do that, and inference "
        "with them predicts no mask; set infer.triplet to see masks, and rank films by their scores"
    )
