"""Validation during training: losses by hand, and a best epoch that a collapsed network cannot win."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pneumo_dist.config import ConfigError, Loss, load
from pneumo_dist.prediction.film_scores import FilmLoss, Share, film_loss
from pneumo_dist.scoring.metrics import Records, Triplet, summary
from pneumo_dist.training.trainer import Trainer, TrainingState
from pneumo_dist.training.validation import Validation, _merged

RULE = Triplet(0.0, 0, 0.5)
SELECT = ("dice_and_auc", "dice_positive", "auc", "dice")


def records(truth: list[int], areas: list[int], hits: list[int], top: list[float]) -> Records:
    n = len(truth)
    names = np.full(n, "")
    return Records(
        ids=np.array([f"{i:03}" for i in range(n)]), groups=np.arange(n), folds=np.zeros(n, np.int64),
        truth_px=np.array(truth), film_px=np.full(n, 1000), top=np.array(top, np.float32), thresholds=np.array([0.5]),
        areas=np.array(areas)[:, None], hits=np.array(hits)[:, None], views=names, sexes=names,
    )  # fmt: skip


TRUTH, SCORES = [100, 50, 0, 0, 0], [0.9, 0.3, 0.2, 0.05, 0.6]
FILMS = [FilmLoss(0.5, 0.2, 0.99), FilmLoss(0.7, 0.6, 0.4), *(FilmLoss(b, 0.9, 0.3) for b in (0.1, 0.05, 0.3))]


def merged(loss: Loss, truth: list[int] = TRUTH, scored: bool = True, cut: int = 2) -> Validation:
    """The validation of five films whose losses two ranks have measured."""
    whole = records(truth, [80, 0, 0, 0, 10], [60, 0, 0, 0, 0], SCORES)
    parts = [np.arange(5) < cut, np.arange(5) >= cut]
    shares = [
        Share(whole.select(part), {str(name): FILMS[int(name)] for name in whole.ids[part]}, {}) for part in parts
    ]
    return _merged(shares, RULE, loss, scored)


def test_a_films_losses_equal_float64_by_hand() -> None:
    rng = np.random.default_rng(0)
    prob, truth = rng.random((40, 30), np.float32), rng.random((40, 30)) < 0.2
    p, t = prob.astype(np.float64), truth.astype(np.float64)
    found = film_loss(prob, truth, smooth=0.01)
    bce = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    dice = 1 - (2 * (p * t).sum() + 12) / (p.sum() + t.sum() + 12)  # 1 % of 1200 px
    assert (found.bce, found.dice) == (pytest.approx(bce, rel=1e-6), pytest.approx(dice, rel=1e-6))
    assert found.highest == prob.max()
    wide = film_loss(prob.repeat(2, 0).repeat(2, 1), truth.repeat(2, 0).repeat(2, 1), smooth=0.01)
    assert (wide.bce, wide.dice) == (pytest.approx(found.bce, rel=1e-6), pytest.approx(found.dice, rel=1e-6))
    certain = film_loss(np.zeros((8, 8), np.float32), np.ones((8, 8), bool), smooth=1e-4)
    assert math.isfinite(certain.bce) and certain.dice > 0.99


@pytest.mark.parametrize(
    ("over", "dice_term", "above"), [("positives", 0.4, 1.0), ("batch", 0.16, 0.4), ("all", (0.8 + 2.7) / 5, 0.4)]
)
def test_the_losses_are_those_of_training_over_all_films(over: str, dice_term: float, above: float) -> None:
    loss = Loss(bce=2.0, dice=3.0, image=0.5, dice_over=over)
    found = merged(loss)
    image = [-math.log(s if t else 1 - s) for s, t in zip(SCORES, TRUTH, strict=True)]
    bce = [film.bce for film in FILMS]
    whole = 2 * np.mean(bce) + 3 * dice_term + 0.5 * np.mean(image)
    # One film: the Dice term counts once, or not at all.
    of_film = [2 * b + 0.5 * i for b, i in zip(bce, image, strict=True)]
    positive = np.mean([of_film[0] + 3 * 0.2, of_film[1] + 3 * 0.6])
    negative = np.mean(of_film[2:]) + (3 * 0.9 if over == "all" else 0)
    wanted = {
        "loss": whole, "loss_bce": np.mean(bce), "loss_dice": dice_term, "loss_image": np.mean(image),
        "loss_positive": positive, "loss_negative": negative,
        "loss_above_empty": whole - 0.5 * np.mean(image) - 3 * above,
        "highest_probability": 0.99,
    }  # fmt: skip
    assert found.losses == pytest.approx(wanted, rel=1e-6) and found.loss == found.losses["loss"]
    row = found.row()
    assert row["called_empty"] == pytest.approx(3 / 5) and row.items() >= found.losses.items()


@pytest.mark.parametrize("over", ["positives", "batch", "all"])
def test_an_empty_answer_on_every_film_stands_at_its_own_cost(over: str) -> None:
    """Without cross-entropies, what stays above an empty answer is 0."""
    truth = [100, 50, 0, 0, 0]
    whole = records(truth, [0] * 5, [0] * 5, [0.1] * 5)
    films = {str(name): FilmLoss(0.0, float(t > 0), 0.1) for name, t in zip(whole.ids, truth, strict=True)}
    found = _merged([Share(whole, films, {})], RULE, Loss(dice_over=over, image=0.0), scored=False)
    assert found.losses["loss_above_empty"] == pytest.approx(0.0, abs=1e-12)
    assert found.row()["called_empty"] == 1.0


def test_a_network_without_image_level_head_has_no_loss_of_the_films() -> None:
    found = merged(Loss(), scored=False)
    assert found.losses["loss_image"] is None
    assert found.losses["loss"] == pytest.approx(np.mean([film.bce for film in FILMS]) + 0.4)


@pytest.mark.parametrize(("truth", "missing"), [([0] * 5, "loss_positive"), ([9] * 5, "loss_negative")])
def test_films_of_one_kind_have_no_loss_of_the_other(truth: list[int], missing: str) -> None:
    found = merged(Loss(), truth)
    assert [name for name, value in found.losses.items() if value is None] == [missing]
    assert all(math.isfinite(found.selection(select)) for select in SELECT)


def test_the_ranks_shares_change_no_bit() -> None:
    wanted = merged(Loss(), cut=0)
    for cut in range(1, 6):
        found = merged(Loss(), cut=cut)
        assert found.losses == wanted.losses and found.scores == wanted.scores


# --- the best epoch


def outcome(rng: np.random.Generator, collapsed: bool) -> Validation:
    """A validation of 50 films, 11 with pneumothorax: all called empty, or most over-called with a Dice of 0.3."""
    truth = np.where(np.arange(50) < 11, 100, 0)
    areas = np.where(rng.random(50) < 0.9, 100, 0) * (not collapsed)
    areas[0] = 0 if collapsed else 100  # it segments at least one
    top = np.clip(rng.normal(0.4 + 0.3 * (truth > 0), 0.15), 0.01, 0.99)  # a collapsed network still ranks films
    hits = np.where(truth > 0, areas * 3 // 10, 0)
    scores = summary(records(truth.tolist(), areas.tolist(), hits.tolist(), top.tolist()), RULE)
    return Validation(scores, {"loss": 1.0, "highest_probability": 1.0})


def test_the_score_of_each_choice() -> None:
    scores = {"dice": 0.7, "dice_positive": 0.4, "auc": 0.8}
    found = {select: Validation(scores, {}).selection(select) for select in SELECT}
    assert found == {"dice_and_auc": pytest.approx(0.32, rel=1e-5), "dice_positive": 0.4, "auc": 0.8, "dice": 0.7}
    with pytest.raises(ConfigError, match="train.select"):
        load(None, ["train.select=iou"])


@pytest.mark.parametrize("select", ["dice_and_auc", "dice_positive"])
@pytest.mark.parametrize("order", [*itertools.permutations([True, True, False]), (True, False, True, False)])
def test_a_collapsed_epoch_is_never_the_best_one(select: str, order: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(3)
    results = [outcome(rng, collapsed) for collapsed in order]
    assert results[order.index(True)].scores["dice"] > results[order.index(False)].scores["dice"]
    chosen = best_epoch(results, select)
    assert not order[chosen - 1]
    assert order[best_epoch(results, "dice") - 1]  # what the competition's score alone would choose


def test_among_epochs_without_any_overlap_the_auc_decides() -> None:
    empty = outcome(np.random.default_rng(5), collapsed=True)
    results = [Validation({**empty.scores, "auc": auc}, empty.losses) for auc in (0.51, 0.78, 0.7)]
    assert best_epoch(results, "dice_and_auc") == 2


def test_of_equal_epochs_the_first_is_the_best() -> None:
    result = outcome(np.random.default_rng(4), collapsed=False)
    assert best_epoch([result, result], "dice_and_auc") == 1


def best_epoch(results: list[Validation], select: str) -> int:
    """The best epoch as `Trainer._end_epoch` records it, without a training."""
    written: list[int] = []
    stage = SimpleNamespace(epochs=len(results), schedule="cosine")
    ranks = SimpleNamespace(gather=lambda value: [value], on_first=lambda function: function())
    trainer: Any = Trainer.__new__(Trainer)
    trainer.__dict__.update(
        stage=stage, ranks=ranks, state=TrainingState(), steps_per_epoch=1, total_steps=1, _loss_sum=0.0,
        config=SimpleNamespace(
            train=SimpleNamespace(eval_every=1, select=select), evaluate=SimpleNamespace(threshold=0.5)
        ),
        stepper=SimpleNamespace(steps=0, rate=0.1),
        _note_epoch=lambda row, validation, better: written.append(row["epoch"]) if better else None,
    )  # fmt: skip
    for result in results:
        trainer._validate = lambda result=result: result
        trainer._end_epoch({})
    assert written and written[-1] == trainer.state.best_epoch
    return trainer.state.best_epoch
