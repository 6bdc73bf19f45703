"""Scores against a reference that works on masks instead of counts, and invariances of the scores."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pneumo_dist.config import Evaluate
from pneumo_dist.scoring.metrics import Decisions, auc, decide, dice, iou, summary
from pneumo_dist.scoring.records import Records, Triplet, apply_triplet, film_record, record_thresholds

GRID = (0.3, 0.5, 0.55, 0.8)
TRIPLETS = [
    Triplet(0.0, 0, 0.5),
    Triplet(0.0, 0, 0.55),
    Triplet(0.9, 0, 0.3),
    Triplet(0.7, 60_000, 0.5),
    Triplet(0.95, 200_000, 0.8),
]


def make_films(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Films of several sizes: a blob of probabilities near a blob of truth, some of either missing."""
    rng = np.random.default_rng(seed)
    films = []
    for i in range(n):
        rows, columns = [(32, 32), (48, 32), (64, 64)][i % 3]
        y, x = np.mgrid[:rows, :columns]
        centre = rng.uniform(8, 24, 2)
        far = np.hypot(y - centre[0], x - centre[1])
        truth = (far < rng.uniform(2, 12)) & (rng.random() < 0.5)
        height = rng.uniform(0.1, 1.3) if truth.any() else rng.uniform(0, 0.9)
        prob = np.clip(height * np.exp(-((far / rng.uniform(3, 14)) ** 2)) + 0.02 * rng.random((rows, columns)), 0, 1)
        case = SimpleNamespace(
            id=f"film{i:04}", group=i // 2, fold=i % 5, view=["PA", "AP", ""][i % 3], sex=["F", "M"][i % 2]
        )
        films.append({"case": case, "prob": prob.astype(np.float32), "truth": truth})
    return films


def records_of(films: list[dict[str, Any]], grid: tuple[float, ...] = GRID) -> Records:
    return Records.build([f["case"] for f in films], [film_record(f["prob"], f["truth"], grid) for f in films], grid)


@pytest.fixture(scope="module")
def films() -> list[dict[str, Any]]:
    return make_films(120)


@pytest.fixture(scope="module")
def records(films: list[dict[str, Any]]) -> Records:
    return records_of(films)


def reference(film: dict[str, Any], rule: Triplet) -> tuple[float, float, bool]:
    """Dice, IoU and the decision of one film, from pixel sets."""
    prob, truth = film["prob"], {tuple(p) for p in np.argwhere(film["truth"])}
    mask = {tuple(p) for p in np.argwhere(prob > rule.mask_threshold)}
    if prob.max() < rule.top_score or len(mask) / prob.size < rule.min_area / 1024**2:
        mask = set()
    if not mask | truth:
        return 1.0, 1.0, False
    return 2 * len(mask & truth) / (len(mask) + len(truth)), len(mask & truth) / len(mask | truth), bool(mask)


@pytest.mark.parametrize("rule", TRIPLETS)
def test_every_score_equals_the_reference(films: list[dict[str, Any]], records: Records, rule: Triplet) -> None:
    rows = [reference(film, rule) for film in films]
    dices, ious = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    predicted = np.array([r[2] for r in rows])
    positive = np.array([film["truth"].any() for film in films])
    np.testing.assert_array_equal(dice(records, rule), dices)
    np.testing.assert_array_equal(iou(records, rule), ious)
    result = summary(records, rule)
    wanted = {
        "films": 120, "patients": 60, "positive": positive.sum(), "called_positive": predicted.sum(),
        "dice": dices.mean(), "dice_positive": dices[positive].mean(),
        "iou": ious.mean(), "iou_positive": ious[positive].mean(),
        "sensitivity": predicted[positive].mean(), "specificity": 1 - predicted[~positive].mean(),
        "dice_all_empty": 1 - positive.mean(),
        "auc": pairs_won(np.array([f["prob"].max() for f in films]), positive),
    }  # fmt: skip
    for name, value in wanted.items():
        assert result[name] == pytest.approx(value, rel=1e-12), name


def test_a_negative_film_scores_one_if_predicted_empty_and_zero_if_predicted_positive() -> None:
    empty = np.zeros((8, 8), bool)
    low, high = np.full((8, 8), 0.1, np.float32), np.full((8, 8), 0.9, np.float32)
    cases = [SimpleNamespace(id=i, group=0, fold=0, view="", sex="") for i in "abc"]
    rows = [film_record(low, empty, GRID), film_record(high, empty, GRID), film_record(low, ~empty, GRID)]
    records = Records.build(cases, rows, GRID)
    assert dice(records, Triplet(0.0, 0, 0.5)).tolist() == [1.0, 0.0, 0.0]
    assert dice(records, Triplet(1.0, 0, 0.5)).tolist() == [1.0, 1.0, 0.0]


def test_the_mask_threshold_is_exclusive_and_the_top_score_inclusive() -> None:
    prob = np.full((32, 32), 0.55, np.float32)
    assert not apply_triplet(prob, Triplet(0.0, 0, 0.55)).any()
    assert apply_triplet(prob, Triplet(0.55, 0, 0.5)).all()
    assert not apply_triplet(prob, Triplet(0.56, 0, 0.5)).any()


@pytest.mark.parametrize("shape", [(1024, 1024), (512, 512), (2048, 1024), (100, 333)])
def test_the_minimum_area_scales_with_the_films_pixels(shape: tuple[int, int]) -> None:
    needed = -(-3500 * shape[0] * shape[1] // 1024**2)  # the smallest count that is not below 3500 px at 1024
    for count, kept in ((needed, True), (needed - 1, False)):
        prob = np.zeros(shape, np.float32)
        prob.flat[:count] = 0.9
        assert apply_triplet(prob, Triplet(0.5, 3500, 0.5)).any() == kept


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(16, 16), (7, 23), (1, 5)]),
    st.one_of(st.floats(0, 1), st.integers(0, 100).map(lambda i: i / 100)),  # also exactly a film's top score
    st.one_of(st.integers(0, 1024**2), st.integers(0, 40).map(lambda i: i * 4096)),  # also exactly an area of 16x16
    st.sampled_from(GRID),
)
def test_counts_decide_as_the_mask_itself_does(
    seed: int, shape: tuple[int, int], top: float, area: int, mask: float
) -> None:
    rng = np.random.default_rng(seed)
    prob = np.round(rng.random(shape) * rng.random(), 2).astype(np.float32)  # rounded: many pixels lie on a threshold
    truth = rng.random(shape) < 0.3
    case = SimpleNamespace(id="a", group=0, fold=0, view="", sex="")
    records = Records.build([case], [film_record(prob, truth, GRID)], GRID)  # type: ignore[list-item]
    rule = Triplet(top, area, mask)
    decisions = decide(records, rule)
    kept = apply_triplet(prob, rule)
    assert kept.shape == prob.shape and kept.dtype == np.bool_
    assert (decisions.area[0], decisions.hits[0]) == (kept.sum(), (kept & truth).sum())


def test_scores_are_bit_equal_however_the_films_were_dealt(films: list[dict[str, Any]], records: Records) -> None:
    wanted = json.dumps([summary(records, rule, bootstrap=50, seed=1) for rule in TRIPLETS])
    for ranks in (2, 3, 7):
        parts = [records_of(films[r::ranks]) for r in range(ranks)]
        parts.append(records_of([]))  # a rank without films
        joined = Records.concatenate(reversed(parts))
        assert json.dumps([summary(joined, rule, bootstrap=50, seed=1) for rule in TRIPLETS]) == wanted


def test_joining_refuses_a_film_twice_other_thresholds_and_nothing(
    films: list[dict[str, Any]], records: Records
) -> None:
    with pytest.raises(ValueError, match="1 films occur twice, the first is film0003"):
        Records.concatenate([records, records_of(films[3:4])])
    with pytest.raises(ValueError, match="different mask thresholds"):
        Records.concatenate([records, records_of([], (0.5,))])
    with pytest.raises(ValueError, match="no records"):
        Records.concatenate([])


def test_records_return_from_their_file(records: Records, tmp_path: Path) -> None:
    for part in (records, records_of([])):
        part.save(tmp_path / "records.npz")
        again = Records.load(tmp_path / "records.npz")
        for name in (
            "ids",
            "groups",
            "folds",
            "truth_px",
            "film_px",
            "top",
            "thresholds",
            "areas",
            "hits",
            "views",
            "sexes",
        ):
            saved, loaded = getattr(part, name), getattr(again, name)
            np.testing.assert_array_equal(saved, loaded)
            assert saved.dtype == loaded.dtype
        first = (tmp_path / "records.npz").read_bytes()
        part.save(tmp_path / "other.npz")
        assert (tmp_path / "other.npz").read_bytes() == first
    assert len(again) == 0 and again.areas.shape == (0, 4)


def test_a_threshold_that_was_not_recorded_is_named(records: Records) -> None:
    with pytest.raises(ValueError, match=r"0\.6 was not recorded"):
        dice(records, Triplet(0.0, 0, 0.6))


def test_wrong_shapes_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\), truth is \(4, 5\)"):
        film_record(np.zeros((4, 4), np.float32), np.zeros((4, 5), bool), GRID)
    with pytest.raises(TypeError, match="float64"):
        film_record(np.zeros((4, 4)), np.zeros((4, 4), bool), GRID)


def test_the_recorded_thresholds_hold_the_grid_the_recipe_and_the_papers() -> None:
    thresholds = record_thresholds(Evaluate(mask_thresholds=[0.7, 0.3], threshold=0.42))
    assert thresholds == (0.3, 0.42, 0.5, 0.55, 0.7)


def pairs_won(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """AUC as what it means: the share of (positive, negative) pairs in the right order."""
    high, low = scores[positive][:, None], scores[~positive][None, :]
    return float((high > low).mean() + (high == low).mean() / 2)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30
    )
)
def test_auc_counts_pairs_with_ties_half_and_weights_as_repetitions(rows: list[tuple[float, bool, int]]) -> None:
    scores, positive = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    times = np.array([r[2] for r in rows])
    weights = np.stack([np.ones(len(rows)), times])
    wanted = []
    for repeat in (np.ones(len(rows), int), times):
        s, p = np.repeat(scores, repeat), np.repeat(positive, repeat)
        wanted.append(pairs_won(s, p) if p.any() and (~p).any() else np.nan)
    np.testing.assert_allclose(auc(scores, positive, weights), wanted, rtol=1e-12)


def test_intervals_hold_the_value_and_repeat_by_seed(records: Records) -> None:
    rule = Triplet(0.7, 60_000, 0.5)
    result = summary(records, rule, bootstrap=300, seed=5)
    assert result["intervals"] == summary(records, rule, bootstrap=300, seed=5)["intervals"]
    assert result["intervals"] != summary(records, rule, bootstrap=300, seed=6)["intervals"]
    for name, (low, high) in result["intervals"].items():
        assert low <= result[name] <= high and low < high, name
    assert set(result["intervals"]) == {
        "dice", "dice_positive", "iou", "iou_positive", "sensitivity", "specificity", "dice_all_empty", "auc",
    }  # fmt: skip


def test_intervals_resample_patients_not_films() -> None:
    """Two patients, one all right and one all wrong: a resample of patients has mean 0, 1/2 or 1."""
    n = 40
    cases = [SimpleNamespace(id=f"{i:02}", group=i // 20, fold=0, view="", sex="") for i in range(n)]
    prob = np.full((4, 4), 0.9, np.float32)
    rows = [film_record(prob, np.full((4, 4), i < 20), GRID) for i in range(n)]
    result = summary(Records.build(cases, rows, GRID), Triplet(0.0, 0, 0.5), bootstrap=400)  # type: ignore[arg-type]
    assert result["dice"] == 0.5
    assert result["intervals"]["dice"] == [0.0, 1.0]  # films drawn one by one would give about 0.35 to 0.65


def test_a_resample_draws_as_many_patients_as_there_are() -> None:
    """One of four patients all right: of four draws 3 or more hit that patient in 5.1 %, 4 in 0.4 % of the resamples."""
    cases = [SimpleNamespace(id=f"{i:02}", group=i // 5, fold=0, view="", sex="") for i in range(20)]
    rows = [film_record(np.full((4, 4), 0.9, np.float32), np.full((4, 4), i < 5), GRID) for i in range(20)]
    result = summary(Records.build(cases, rows, GRID), Triplet(0.0, 0, 0.5), bootstrap=2000)  # type: ignore[arg-type]
    assert result["intervals"]["dice"] == [0.0, 0.75]


def test_intervals_agree_with_resampling_written_out(records: Records) -> None:
    rule = Triplet(0.0, 0, 0.5)
    low, high = summary(records, rule, bootstrap=2000, seed=0)["intervals"]["dice_positive"]
    values, groups, rng = dice(records, rule), np.unique(records.groups), np.random.default_rng(9)
    drawn = []
    for _ in range(2000):
        films = np.concatenate([np.flatnonzero(records.groups == g) for g in rng.choice(groups, len(groups))])
        films = films[records.truth_px[films] > 0]
        drawn.append(values[films].mean())
    width = high - low
    np.testing.assert_allclose([low, high], np.quantile(drawn, (0.025, 0.975)), atol=0.12 * width)  # other draws


def test_groups_of_films_are_scored_apart(films: list[dict[str, Any]], records: Records) -> None:
    rule = Triplet(0.0, 0, 0.5)
    result = summary(records, rule)
    values = dice(records, rule)
    assert set(result["by_view"]) == {"AP", "PA"} and set(result["by_sex"]) == {"F", "M"}  # unknown views are left out
    assert result["by_view"]["AP"]["dice"] == pytest.approx(values[records.views == "AP"].mean())
    assert result["by_sex"]["F"]["films"] == 60
    at_1024 = np.array([f["truth"].sum() * 1024**2 / f["truth"].size for f in films])
    for row in result["by_mask_size"]:
        chosen = (at_1024 > 0) & (at_1024 >= row["from_px"]) & (at_1024 < (row["below_px"] or np.inf))
        assert row["films"] == chosen.sum()
        assert row["dice"] == (pytest.approx(values[chosen].mean()) if chosen.any() else None)
    assert sum(row["films"] for row in result["by_mask_size"]) == result["positive"]


def test_a_mask_on_the_edge_of_two_size_bins_belongs_to_the_upper_one() -> None:
    truth = np.zeros((512, 512), bool)
    truth[:5, :100] = True  # 500 px of 512x512 are 2,000 of 1024x1024
    case = SimpleNamespace(id="a", group=0, fold=0, view="", sex="")
    rows = [film_record(truth.astype(np.float32), truth, GRID)]
    result = summary(Records.build([case], rows, GRID), Triplet(0.0, 0, 0.5))["by_mask_size"]  # type: ignore[list-item]
    assert [(row["from_px"], row["films"]) for row in result[:2]] == [(0, 0), (2000, 1)]


@pytest.mark.parametrize("which", ["none", "one", "negatives", "positives"])
def test_undefined_scores_are_null_in_valid_json(records: Records, which: str) -> None:
    positive = records.truth_px > 0
    chosen = {"none": positive & False, "one": np.array([0]), "negatives": ~positive, "positives": positive}[which]
    result = summary(records.select(chosen), Triplet(0.5, 100, 0.5), bootstrap=20)
    json.dumps(result, allow_nan=False)
    assert result["auc"] is None
    if which == "none":
        assert result["dice"] is None and result["films"] == 0 and result["intervals"] == {}
    if which == "negatives":
        assert result["dice_positive"] is None and result["sensitivity"] is None and result["dice_all_empty"] == 1.0
        assert result["intervals"]["auc"] is None and result["intervals"]["dice"] is not None
    if which == "positives":
        assert result["specificity"] is None and result["dice_all_empty"] == 0.0


def test_decisions_can_be_scored_in_place_of_a_triplet(records: Records) -> None:
    rule = Triplet(0.7, 60_000, 0.5)
    decisions = decide(records, rule)
    assert isinstance(decisions, Decisions)
    assert summary(records, decisions, bootstrap=10) == summary(records, rule, bootstrap=10)


def test_counts_and_masks_agree_exactly_on_the_boundaries() -> None:
    prob = np.zeros((512, 512), np.float32)
    prob[:10, :10] = 0.7
    case = SimpleNamespace(id="a", group=0, fold=0, view="", sex="")
    records = Records.build([case], [film_record(prob, prob > 0, GRID)], GRID)  # type: ignore[list-item]
    for rule, kept in (
        (Triplet(0.7, 400, 0.5), 100),  # 100 px of 512x512 are 400 of 1024x1024
        (Triplet(0.7, 401, 0.5), 0),
        (Triplet(0.71, 400, 0.5), 0),
    ):
        assert apply_triplet(prob, rule).sum() == decide(records, rule).area[0] == kept
