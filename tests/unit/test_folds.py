"""Patient-grouped, stratified folds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo_dist.config import ConfigError
from pneumo_dist.data.folds import assign_folds, check_folds, group_films, strata


def population(films: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups, labels and areas like the competition's: half as many patients as films, 22 % positive."""
    random = np.random.default_rng(seed)
    groups = random.integers(0, films // 2, films)
    labels = (random.random(films) < 0.22).astype(int)
    return groups, labels, labels * random.lognormal(-5, 1, films)


def test_folds_are_balanced_in_films_positives_and_mask_sizes():
    groups, labels, areas = population()
    folds = assign_folds(groups, labels, areas, 5, 0)
    bins = strata(labels, areas)
    for values in (np.ones_like(labels), labels, *(bins == b for b in (1, 2, 3))):
        counts = np.array([values[folds == k].sum() for k in range(5)])
        assert counts.max() - counts.min() <= max(3, 0.03 * counts.mean()), counts


def test_no_patient_is_in_two_folds():
    groups, labels, areas = population(500)
    folds = assign_folds(groups, labels, areas, 5, 0)
    check_folds(groups, folds)
    folds[0] = (folds[0] + 1) % 5
    if (groups == groups[0]).sum() == 1:
        groups[1] = groups[0]
    with pytest.raises(ConfigError, match=r"scores would be inflated \(patient leakage\)"):
        check_folds(groups, folds)


def test_folds_depend_on_the_seed_and_on_nothing_else():
    groups, labels, areas = population(400)
    one, same, other = (assign_folds(groups, labels, areas, 4, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(10, 60))
@settings(max_examples=60, deadline=None)
def test_small_sets_fill_every_fold_and_keep_patients_together(seed, k, films):
    random = np.random.default_rng(seed)
    groups = random.integers(0, films, films)
    labels = random.integers(0, 2, films)
    areas = labels * random.random(films)
    if len(np.unique(groups)) < k:
        return
    folds = assign_folds(groups, labels, areas, k, seed)
    check_folds(groups, folds)
    assert set(folds) <= set(range(k))
    assert len(set(folds)) == k


def test_more_folds_than_patients_is_refused():
    with pytest.raises(ConfigError, match="data.folds=3 is more than the 2 patients"):
        assign_folds(np.array([0, 0, 1]), np.zeros(3, int), np.zeros(3), 3, 0)


def test_films_of_one_patient_and_films_with_the_same_pixels_share_a_group():
    ids = ["a", "b", "c", "d", "e"]
    groups = group_films(ids, {"a": "P", "c": "P", "b": "Q"}, same=[["d", "b"]])
    assert groups.tolist() == [0, 1, 0, 1, 2]
    # A duplicate across patients joins the patients: either side would know the film.
    assert group_films(ids, {"a": "P", "c": "P", "b": "Q"}, same=[["a", "b"]]).tolist() == [0, 0, 0, 1, 2]


def test_without_patients_every_film_is_its_own_group():
    assert group_films(["x", "y"], {}).tolist() == [0, 1]


def test_a_patient_key_like_a_film_id_does_not_join_strangers():
    assert group_films(["a", "b"], {"a": "b"}).tolist() == [0, 1]
