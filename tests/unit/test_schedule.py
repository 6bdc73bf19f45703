"""Learning rates and averaging points as pure functions; the plateau rule against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo_dist.config import Swa, TrainStage
from pneumo_dist.training.schedule import Plateau, learning_rate, swa_due, swa_start


def test_cosine_equals_torchs_annealing_step_by_step() -> None:
    stage = TrainStage(lr=1e-3, min_lr=1e-5)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=stage.lr)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=stage.min_lr)
    for step in range(50):
        assert learning_rate(step, 50, stage) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_cosine_starts_at_lr_falls_and_ends_above_min_lr() -> None:
    stage = TrainStage(lr=1e-3, min_lr=1e-6)
    rates = [learning_rate(step, 70, stage) for step in range(70)]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and rates[-1] > 1e-6
    assert learning_rate(70, 70, stage) == learning_rate(75, 70, stage) == pytest.approx(1e-6)  # steps beyond the plan


def test_constant_and_plateau_rates() -> None:
    assert {learning_rate(step, 9, TrainStage(schedule="constant", lr=0.02)) for step in range(12)} == {0.02}
    plateau = TrainStage(schedule="plateau", lr=0.01)
    assert learning_rate(5, 9, plateau) == 0.01
    assert learning_rate(5, 9, plateau, plateau_lr=0.002) == 0.002
    assert learning_rate(5, 9, TrainStage(schedule="constant", lr=0.02), plateau_lr=0.002) == 0.02


@pytest.mark.parametrize("schedule", ["cosine", "plateau", "constant"])
def test_the_averaging_rate_replaces_the_schedule_from_its_start_on(schedule: str) -> None:
    stage = TrainStage(schedule=schedule, lr=1e-3)
    swa = Swa(start=0.75, lr=5e-4)
    for step in range(100):
        plain = learning_rate(step, 100, stage, None, 1e-3)
        assert learning_rate(step, 100, stage, Swa(start=0.75), 1e-3) == plain
        assert learning_rate(step, 100, stage, swa, 1e-3) == (5e-4 if step >= 75 else plain)


def due(total: int, per_epoch: int, swa: Swa) -> list[int]:
    return [step for step in range(total + 1) if swa_due(step, total, per_epoch, swa)]


def test_averaging_takes_the_epoch_ends_of_the_last_part() -> None:
    assert due(100, 10, Swa(start=0.75)) == [80, 90, 100]
    assert due(350, 10, Swa(start=0.75)) == list(range(270, 351, 10))  # 0.75 of 35 epochs lies inside epoch 27
    assert due(100, 10, Swa(start=0.9)) == [90, 100]


def test_averaging_interval_is_in_steps() -> None:
    assert due(100, 10, Swa(start=0.9, interval=4)) == [92, 96, 100]
    assert due(7, 7, Swa(start=0.5, interval=1)) == [4, 5, 6, 7]


@given(st.integers(1, 400), st.integers(1, 50), st.floats(0, 1), st.integers(0, 60))
def test_the_last_weights_always_enter_the_average(total: int, per_epoch: int, start: float, interval: int) -> None:
    swa = Swa(start=start, interval=interval)
    steps = due(total, per_epoch, swa)
    assert steps[-1] == total and steps[0] >= max(swa_start(total, swa), 1)


losses = st.lists(st.one_of(st.floats(0.1, 0.2), st.floats(0, 2), st.just(math.nan), st.just(0.15)), max_size=60)


@settings(deadline=None, max_examples=60)
@given(losses, st.integers(0, 5), st.sampled_from([0.2, 0.5]), st.sampled_from([0.0, 1e-4]), st.integers(0, 60))
def test_plateau_equals_torchs_also_across_a_resume(
    values: list[float], patience: int, factor: float, min_lr: float, cut: int
) -> None:
    stage = TrainStage(schedule="plateau", plateau_factor=factor, plateau_patience=patience, min_lr=min_lr)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=stage.lr)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience, min_lr=min_lr)
    ours = Plateau(stage)
    for i, value in enumerate(values):
        if i == cut:
            state = ours.state_dict()
            assert all(type(v) in (int, float) for v in state.values())
            ours = Plateau(stage)
            ours.load_state_dict(state)
        theirs.step(value)
        assert ours.step(value) == ours.lr == optimizer.param_groups[0]["lr"]


def test_plateau_lowers_the_rate_to_a_fifth_after_six_epochs_without_gain() -> None:
    plateau = Plateau(TrainStage(schedule="plateau", lr=1e-3))  # the paper's factor 0.2 and patience 5
    rates = [plateau.step(loss) for loss in [1.0] + [1.0] * 6 + [0.5] + [0.6] * 6]
    assert rates == [1e-3] * 6 + [1e-3 * 0.2] * 7 + [1e-3 * 0.2 * 0.2]
