"""Patient groups and cross-validation folds: pure functions of ids, patients, labels, K and seed.

A patient must never be on both sides of a split; `check_folds` raises if one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pneumo_dist.config import ConfigError

SIZE_BINS = 3  # mask-size strata of the positive films: terciles


def group_films(ids: Sequence[str], patients: Mapping[str, str], same: Iterable[Sequence[str]] = ()) -> np.ndarray:
    """Return the group number of each film, int64 (n,), numbered in order of first appearance.

    Films of one patient share a group. Films with identical pixels (`same`: lists of ids) join the groups of their
    patients, whatever the patient map says. A film without a patient is a group of its own.
    """
    owner: dict[str, str] = {}  # union-find over films and patients: each node's parent

    def root(name: str) -> str:
        while owner.setdefault(name, name) != name:
            owner[name] = name = owner[owner[name]]
        return name

    for film in ids:
        if film in patients:
            owner[root(f"film {film}")] = root(f"patient {patients[film]}")
    for films in same:
        for copy in films[1:]:
            owner[root(f"film {copy}")] = root(f"film {films[0]}")
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(root(f"film {film}"), len(numbers)) for film in ids], dtype=np.int64)


def strata(labels: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Return the stratum of each film, int64 (n,): 0 negative, 1 to SIZE_BINS positive, by mask size."""
    numbers = np.zeros(len(labels), dtype=np.int64)
    positive = np.flatnonzero(labels)
    if len(positive):
        edges = np.quantile(areas[positive], np.linspace(0, 1, SIZE_BINS + 1)[1:-1])
        numbers[positive] = 1 + np.searchsorted(edges, areas[positive], side="right")
    return numbers


def assign_folds(groups: np.ndarray, labels: np.ndarray, areas: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Return the fold of each film, int64 (n,), 0 to k - 1; whole groups only, balanced in films and in every stratum.

    Greedy, from the heaviest group to the lightest (ties in a seeded order): each goes to the fold where the sum of
    squared loads grows least. Arguments are (n,) arrays; `areas` are mask sizes as a share of the film.

    Raises:
        ConfigError: fewer groups than folds.
    """
    names, member = np.unique(groups, return_inverse=True)
    if len(names) < k:
        raise ConfigError(f"data.folds={k} is more than the {len(names)} patients: use fewer folds")
    counts = np.zeros((len(names), SIZE_BINS + 3))  # columns: the strata, then all positives, then all films
    np.add.at(counts, (member, strata(labels, areas)), 1)
    counts[:, -2] = counts[:, 1 : SIZE_BINS + 1].sum(axis=1)
    counts[:, -1] = counts[:, : SIZE_BINS + 1].sum(axis=1)
    share = counts / np.maximum(counts.sum(axis=0), 1)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-share[order].sum(axis=1), kind="stable")]
    load = np.zeros((k, share.shape[1]))
    fold_of = np.zeros(len(names), dtype=np.int64)
    for group in order:
        growth = load @ share[group]
        best = np.flatnonzero(growth <= growth.min() + 1e-15)  # equal up to rounding: the fold with fewest films
        fold = best[load[best, -1].argmin()]
        load[fold] += share[group]
        fold_of[group] = fold
    return fold_of[member]


def check_folds(groups: Sequence[int] | np.ndarray, folds: Sequence[int] | np.ndarray) -> None:
    """Raise ConfigError if films of one group (patient) are in different folds; the hold-out counts as a fold."""
    seen: dict[int, int] = {}
    for group, fold in zip(groups, folds, strict=True):
        if seen.setdefault(int(group), int(fold)) != int(fold):
            raise ConfigError(
                f"patient group {group} is in folds {seen[int(group)]} and {fold}: scores would be inflated (patient "
                "leakage); preprocess again, and do not edit cases.csv by hand"
            )
