"""A network that calls every film empty is named as such; one that segments is left in peace."""

from __future__ import annotations

import numpy as np
import pytest

from pneumo_dist.config import load
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.alarm import collapse, no_rule
from pneumo_dist.scoring.metrics import summary
from pneumo_dist.scoring.records import Records, Triplet
from pneumo_dist.scoring.thresholds import NO_FILM

N, THRESHOLDS = 40, (0.3, 0.5, 0.55)


def records(found: float, called: float, positives: int = 10) -> Records:
    """Films of which the masks find a share `found` of each positive one; a share `called` of the negatives has a mask."""
    positive = np.arange(N) < positives
    truth = np.where(positive, 1000, 0)
    masked = np.where(positive, found > 0, np.arange(N) >= N - called * (N - positives))
    areas = np.where(masked, 1000, 0)
    hits = np.where(positive, np.round(found * 1000), 0).astype(np.int64)
    names = np.full(N, "")
    return Records(
        ids=np.array([f"{i:02}" for i in range(N)]), groups=np.arange(N), folds=np.arange(N) % 2, truth_px=truth,
        film_px=np.full(N, 1024**2), top=np.where(positive, 0.9, 0.4).astype(np.float32),
        thresholds=np.array(THRESHOLDS), areas=np.repeat(areas[:, None], 3, 1), hits=np.repeat(hits[:, None], 3, 1),
        views=names, sexes=names,
    )  # fmt: skip


def alarm(films: Records) -> str:
    return collapse(summary(films, Triplet(0.0, 0, 0.5)))


def test_a_network_that_calls_every_film_empty_has_collapsed() -> None:
    text = alarm(records(0.0, 0.0))
    assert "the network has collapsed to empty masks: Dice on positives 0.000, 100 % of the films called empty" in text
    for advice in ("loss.dice_over=positives", "positive_share", "lower lr", "more epochs", "pretrained weights"):
        assert advice in text
    assert "\n" not in text and len(text) < 300


def test_masks_in_the_wrong_place_segment_nothing() -> None:
    text = alarm(records(0.0, 1.0))
    assert text.startswith("the network segments nothing: Dice on positives 0.000, 25 % of the films called empty")


def test_few_masks_and_masks_everywhere_raise_the_alarm_too() -> None:
    few = {"dice_positive": 0.06, "sensitivity": 0.08, "called_positive": 5, "films": 100}
    assert collapse(few).startswith("the network has collapsed to empty masks")
    everywhere = {"dice_positive": 0.03, "sensitivity": 1.0, "called_positive": 100, "films": 100}
    assert collapse(everywhere).startswith("the network segments nothing")


def test_masks_just_below_the_threshold_ask_for_a_lower_one() -> None:
    empty = {"dice_positive": 0.0, "sensitivity": 0.0, "called_positive": 0, "films": 100}
    assert collapse(empty, 0.45, 0.55).endswith(
        "highest probability 0.45; train longer, or lower evaluate.threshold=0.55"
    )
    assert "loss.dice_over=positives" in collapse(empty, 0.14, 0.55)


@pytest.mark.parametrize(("found", "called"), [(0.12, 0.0), (0.3, 0.9), (1.0, 0.0)])
def test_a_network_that_segments_raises_no_alarm(found: float, called: float) -> None:
    assert alarm(records(found, called)) == ""


def test_films_without_a_positive_one_raise_no_alarm() -> None:
    films = records(0.0, 0.0, positives=0)
    assert alarm(films) == "" and no_rule(summary(films, Triplet(NO_FILM, 0, 0.5))) == ""


def test_thresholds_that_call_every_film_empty_are_named() -> None:
    films = records(0.5, 0.5)
    assert no_rule(summary(films, Triplet(0.0, 0, 0.5))) == ""
    text = no_rule(summary(films, Triplet(NO_FILM, 0, 0.5)))
    assert "calling every film empty" in text and "infer.triplet" in text and "\n" not in text


@pytest.mark.parametrize(
    ("found", "called", "wanted"),
    [(0.6, 0.1, []), (0.0, 0.0, ["collapsed", "no thresholds"]), (0.0, 0.7, ["segments nothing", "no thresholds"])],
)
def test_the_scores_and_their_summary_carry_the_alarms(found: float, called: float, wanted: list[str]) -> None:
    films, settings = records(found, called), load(None, ["evaluate.mask_thresholds=0.3,0.5", "evaluate.bootstrap=0"])
    result = scorecard.scores(films, scorecard.tune(films, settings.evaluate, by="group"), settings.evaluate)
    assert len(result["alarms"]) == len(wanted)
    text = " ".join(scorecard.summary_text(result, "title").split())
    for part, line in zip(wanted, result["alarms"], strict=True):
        assert part in line and f"WARNING: {line}" in text
    assert ("WARNING" in text) == bool(wanted)
