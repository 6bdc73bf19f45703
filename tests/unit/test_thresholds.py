"""The triplet search against brute force, and cross-fitting that never sees the films it decides."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo_dist.config import load
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.metrics import decide, dice, summary
from pneumo_dist.scoring.records import Records, Triplet
from pneumo_dist.scoring.thresholds import NO_FILM, candidates, cross_fit, search

GRID = (0.3, 0.5, 0.7)
TOPS, AREAS = (0.0, 0.4, 0.6, 0.8, 0.95), (0, 500, 2000, 20_000)


def make_records(n: int, seed: int, thresholds: tuple[float, ...] = GRID, coarse: bool = True) -> Records:
    """Counts like those of a moderately good model; `coarse` puts many films exactly on grid values."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.3
    film_px = rng.choice([1024 * 1024, 512 * 512, 900 * 1100], n)
    truth = np.where(positive, rng.integers(60, film_px // 10), 0)
    top = np.clip(rng.normal(0.45 + 0.35 * positive, 0.2, n), 0.01, 1).astype(np.float32)
    if coarse:
        top = np.round(top, 1).astype(np.float32)
    share = np.clip((top[:, None] - np.array(thresholds)) / 0.7, 0, None)
    areas = (share * np.where(positive, truth, rng.integers(1, 9000, n))[:, None] * 1.4).astype(np.int64)
    if coarse:
        areas[::7] = (areas[::7] > 0) * 500
    hits = np.minimum((areas * rng.uniform(0.2, 0.9, (n, 1))).astype(np.int64), truth[:, None])
    ids = np.array([f"{i:06}" for i in range(n)])
    names = np.full(n, "")
    return Records(
        ids=ids, groups=np.arange(n) // 2, folds=np.arange(n) // 2 % 5, truth_px=truth, film_px=film_px, top=top,
        thresholds=np.array(thresholds), areas=areas, hits=hits, views=names, sexes=names,
    )  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 80))
def test_search_equals_brute_force(seed: int, n: int) -> None:
    records = make_records(n, seed)
    best, surface = search(records, TOPS, AREAS)
    assert surface.shape == (len(TOPS), len(AREAS), len(GRID))
    wanted = np.array([dice(records, Triplet(*t)).mean() for t in itertools.product(TOPS, AREAS, GRID)])
    np.testing.assert_allclose(surface.ravel(), wanted, rtol=0, atol=1e-12)  # sums in another order
    assert dice(records, best).mean() == pytest.approx(wanted.max(), abs=1e-12)


def test_axes_are_as_given_even_unsorted_and_repeated() -> None:
    records = make_records(200, seed=1)
    tops, areas, masks = (0.8, 0.0, 0.8, 0.4), (2000, 0, 2000), (0.7, 0.3)
    best, surface = search(records, tops, areas, masks)
    wanted = [dice(records, Triplet(*t)).mean() for t in itertools.product(tops, areas, masks)]
    np.testing.assert_allclose(surface.ravel(), wanted, rtol=0, atol=1e-12)
    assert (best.top_score, best.min_area, best.mask_threshold) in set(itertools.product(tops, areas, masks))
    assert type(best.top_score) is float and type(best.min_area) is int and type(best.mask_threshold) is float


def test_equal_triplets_are_decided_towards_the_fewest_emptied_films() -> None:
    records = make_records(50, seed=2)
    records = replace(records, areas=np.zeros_like(records.areas), hits=np.zeros_like(records.hits))
    best, surface = search(records, TOPS[::-1], AREAS[::-1], GRID[::-1])
    assert len(np.unique(surface)) == 1 and best == Triplet(0.0, 0, 0.3)


def test_a_tie_is_a_tie_though_its_sums_differ_in_the_last_bit() -> None:
    """Films of Dice 0.7, 0.2, 0.1 gain what a negative film predicted positive loses; in floating point 1e-16 less."""
    records = Records(
        ids=np.array(list("abcd")), groups=np.arange(4), folds=np.zeros(4, np.int64),
        truth_px=np.array([100, 100, 100, 0]), film_px=np.full(4, 1024**2), top=np.full(4, 0.5, np.float32),
        thresholds=np.array([0.5]), areas=np.full((4, 1), 100), hits=np.array([[70], [20], [10], [0]]),
        views=np.full(4, ""), sexes=np.full(4, ""),
    )  # fmt: skip
    best, surface = search(records, (0.0, 0.8), (0,))
    assert surface[0, 0, 0] < surface[1, 0, 0] < surface[0, 0, 0] + 1e-12
    assert best == Triplet(0.0, 0, 0.5)


def test_thousands_of_triplets_over_thousands_of_films_are_searched_at_once() -> None:
    records = make_records(12_047, seed=3, thresholds=tuple(np.linspace(0.2, 0.8, 13).round(2)), coarse=False)
    _, surface = search(records, np.linspace(0, 1, 101).tolist(), range(0, 5000, 100))
    assert surface.size == 65_650


def test_no_films_and_unrecorded_thresholds_are_refused() -> None:
    records = make_records(20, seed=4)
    with pytest.raises(ValueError, match="no films"):
        search(records.select(np.arange(0)), TOPS, AREAS)
    with pytest.raises(ValueError, match=r"0\.42 was not recorded"):
        search(records, TOPS, AREAS, (0.42,))


@pytest.mark.parametrize("by", ["group", "fold"])
def test_cross_fit_decides_each_film_by_the_triplet_of_the_other_parts(by: str) -> None:
    records = make_records(300, seed=5)
    fit = cross_fit(records, TOPS, AREAS, by=by, k=4)
    assert fit is not None
    assert len(fit.triplets) == (5 if by == "fold" else 4) == len(np.unique(fit.part))
    for p, triplet in enumerate(fit.triplets):
        held_out = fit.part == p
        assert triplet == search(records.select(~held_out), (*TOPS, NO_FILM), AREAS)[0]
        decisions = decide(records.select(held_out), triplet)
        np.testing.assert_array_equal(fit.decisions.area[held_out], decisions.area)
        np.testing.assert_array_equal(fit.decisions.hits[held_out], decisions.hits)


def test_cross_fit_keeps_a_patient_in_one_part_and_spreads_the_positives() -> None:
    records = make_records(301, seed=6)
    fit = cross_fit(records, TOPS, AREAS, k=5, seed=2)
    assert fit is not None
    for group in np.unique(records.groups):
        assert len(np.unique(fit.part[records.groups == group])) == 1
    positives = np.bincount(fit.part, records.truth_px > 0)
    patients = [len(np.unique(records.groups[fit.part == p])) for p in range(5)]
    assert max(patients) - min(patients) <= 1
    assert positives.min() > 0.5 * positives.mean()


def test_a_films_own_truth_does_not_reach_its_triplet() -> None:
    records = make_records(200, seed=7)
    fit = cross_fit(records, TOPS, AREAS, by="fold")
    held_out = records.folds == 2
    changed = replace(
        records, truth_px=np.where(held_out, 0, records.truth_px), hits=np.where(held_out[:, None], 0, records.hits)
    )
    again = cross_fit(changed, TOPS, AREAS, by="fold")
    assert fit is not None and again is not None
    assert fit.triplets[2] == again.triplets[2]
    np.testing.assert_array_equal(fit.decisions.area[held_out], again.decisions.area[held_out])


def test_cross_fit_is_deterministic_by_seed() -> None:
    records = make_records(200, seed=8)
    first, repeated, reseeded = (cross_fit(records, TOPS, AREAS, seed=s) for s in (1, 1, 2))
    assert first is not None and repeated is not None and reseeded is not None
    np.testing.assert_array_equal(first.part, repeated.part)
    np.testing.assert_array_equal(first.decisions.hits, repeated.decisions.hits)
    assert (first.part != reseeded.part).any()


def test_one_patient_or_one_fold_cannot_be_cross_fitted() -> None:
    records = make_records(40, seed=9)
    assert cross_fit(records.select(np.arange(2)), TOPS, AREAS) is None  # two films of one patient
    assert cross_fit(records.select(records.folds == 0), TOPS, AREAS, by="fold") is None
    assert cross_fit(records.select(np.arange(0)), TOPS, AREAS) is None


def test_tuning_on_noise_looks_good_in_sample_only() -> None:
    """The reason for cross-fitting: on films without any signal, tuning gains on the films it was tuned on alone."""
    rng = np.random.default_rng(10)
    gains = []
    for seed in range(20):
        records = make_records(60, seed)
        records = replace(records, top=rng.permutation(records.top), truth_px=rng.permutation(records.truth_px))
        records = replace(records, hits=np.minimum(records.areas // 2, records.truth_px[:, None]))
        tuned = dice(records, search(records, TOPS, AREAS)[0]).mean()
        fit = cross_fit(records, TOPS, AREAS)
        assert fit is not None
        gains.append(tuned - summary(records, fit.decisions)["dice"])
    assert np.mean(gains) > 0.005


def test_an_empty_list_becomes_quantiles_of_what_the_network_gave() -> None:
    records = make_records(500, seed=11, coarse=False)
    tops, areas = candidates(records, [], [], GRID)
    assert tops == sorted(set(tops)) and tops[0] == 0.0 and tops[-1] == NO_FILM and 35 <= len(tops) <= 42
    assert areas == sorted(set(areas)) and areas[0] == 0 and 10 <= len(areas) <= 16
    given = np.concatenate([records.scaled_area(records.column(mask)) for mask in GRID])
    assert areas[1] >= 1 and areas[-1] == given.max()
    accepted = [int((records.top >= np.float32(top)).sum()) for top in tops[1:-1]]
    # The lowest quantile keeps all films, the highest those of the highest score.
    assert (accepted[0], accepted[-1]) == (len(records), (records.top == records.top.max()).sum())
    steps = -np.diff(accepted)[:-1]
    assert steps.max() <= 2 * len(records) / 40  # as many films between two scores, wherever the scores lie
    assert all(type(top) is float for top in tops) and all(type(area) is int for area in areas)


def test_the_quantiles_follow_scores_that_a_fixed_list_would_miss() -> None:
    records = make_records(300, seed=12, coarse=False)
    low = replace(records, top=records.top * np.float32(0.05), areas=records.areas // 50, hits=records.hits // 50)
    tops, areas = candidates(low, [], [], GRID)
    assert len(tops) > 30 and 0 < tops[-2] <= np.float32(0.05) and 0 < areas[-1] < 20_000
    assert candidates(low, [0.0, 0.5], [0, 9], GRID) == ([0.0, 0.5, NO_FILM], [0, 9])  # a list is kept
    assert candidates(low, [0.0, 0.5], [], GRID) == ([0.0, 0.5, NO_FILM], areas)
    assert candidates(low, [], [0, 9], GRID) == (tops, [0, 9])


def test_few_or_empty_films_still_have_a_grid() -> None:
    records = make_records(30, seed=13)
    empty = replace(records, areas=np.zeros_like(records.areas), hits=np.zeros_like(records.hits))
    assert candidates(empty, [], [], GRID)[1] == [0]
    assert candidates(records.select(np.arange(0)), [], [], GRID) == ([0.0, NO_FILM], [0])
    assert candidates(replace(records, top=np.zeros_like(records.top)), [], [], GRID)[0] == [0.0, NO_FILM]


def all_empty(records: Records) -> float:
    return float((records.truth_px == 0).mean())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from(["good", "noise", "nothing"]), st.booleans())
def test_the_best_rule_is_never_worse_than_calling_every_film_empty(seed: int, n: int, kind: str, lists: bool) -> None:
    records = make_records(n, seed, coarse=bool(seed % 2))
    if kind == "noise":
        records = replace(records, top=np.random.default_rng(seed).permutation(records.top))
    if kind != "good":
        records = replace(records, hits=np.zeros_like(records.hits))
    tops, areas = candidates(records, TOPS if lists else [], AREAS if lists else [], GRID)
    best, surface = search(records, tops, areas)
    assert dice(records, best).mean() >= all_empty(records) - 1e-12
    np.testing.assert_allclose(surface[-1], all_empty(records), rtol=0, atol=1e-12)  # the last top score


def test_a_useless_network_is_answered_by_no_film_and_a_tie_keeps_the_films() -> None:
    records = make_records(60, seed=14)
    missed = replace(records, hits=np.zeros_like(records.hits), areas=np.maximum(records.areas, 1))
    missed = replace(missed, top=np.where(records.truth_px == 0, 0.9, 0.5).astype(np.float32))
    best, _ = search(missed, *candidates(missed, [], [0], GRID))
    assert best.top_score == NO_FILM and not decide(missed, best).area.any()
    nothing = replace(records, hits=np.zeros_like(records.hits), areas=np.zeros_like(records.areas))
    assert search(nothing, *candidates(nothing, [], [], GRID))[0] == Triplet(0.0, 0, 0.3)  # every rule scores the same


def test_cross_fitting_takes_its_quantiles_from_the_other_films() -> None:
    records = make_records(300, seed=15, coarse=False)
    fit = cross_fit(records, [], [], GRID, by="fold")
    assert fit is not None
    for p, triplet in enumerate(fit.triplets):
        others = records.select(fit.part != p)
        assert triplet == search(others, *candidates(others, [], [], GRID), GRID)[0]


@pytest.mark.parametrize("crowd", [lambda top: 1 - top * 1e-5, lambda top: top * 1e-6])
def test_scores_that_crowd_at_an_end_are_told_apart(crowd) -> None:
    """As those of long trainings do: the grid has their digits, so a rule in between is found."""
    records = make_records(300, seed=17, coarse=False)
    ranked = replace(records, top=np.where(records.truth_px > 0, 0.9, 0.1).astype(np.float32))
    top = crowd(ranked.top.astype(np.float64)).astype(np.float32)
    if top[ranked.top > 0.5].max() < top[ranked.top < 0.5].min():
        top = crowd(1 - ranked.top.astype(np.float64)).astype(np.float32)
    crowded = replace(ranked, top=top)
    best, surface = search(crowded, *candidates(crowded, [], [], GRID), GRID)
    wanted = search(ranked, *candidates(ranked, [], [], GRID), GRID)[1].max()
    assert surface.max() == pytest.approx(wanted, abs=1e-12) and 0 < best.top_score < NO_FILM


def test_the_lists_of_a_recipe_are_searched_as_they_are() -> None:
    lists = ["evaluate.top_scores=0.75,0.3", "evaluate.mask_thresholds=0.3,0.5"]
    settings = load(Path(__file__).parents[2] / "configs" / "kaggle.yaml", lists).evaluate
    records = make_records(200, seed=16, thresholds=tuple(settings.mask_thresholds))
    tuned = scorecard.tune(records, settings, by="fold")
    assert tuned.top_scores == [*settings.top_scores, NO_FILM] and tuned.min_areas == settings.min_areas
    assert tuned.surface.shape == (3, 15, 2)
