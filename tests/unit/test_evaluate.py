"""Evaluation of a fold: the headline, the scores beside it, the decision rule in the model file, any number of ranks."""

import csv
import json
import signal

import numpy as np
import pytest
import torch

from launch.monitor.outcome import print_result
from launch.monitor.scores import score_table
from pneumo_dist.chain import Node
from pneumo_dist.config import ConfigError, load
from pneumo_dist.data import phantom
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.films.listing import find_films
from pneumo_dist.data.lists import read_patient_map
from pneumo_dist.evaluation import evaluate
from pneumo_dist.model.modelfile import load_model
from pneumo_dist.runtime.files import sha256_file
from pneumo_dist.runtime.stopping import Stopped
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.metrics import dice, summary
from pneumo_dist.scoring.records import Records, Triplet
from pneumo_dist.scoring.submission_csv import score_submission
from tests.films import make_shards, task, write_model

OVERRIDES = [
    "phantom.films=18",
    "phantom.size=96",
    "stages=1,swa",
    "stage1.size=32",
    "data.shards=2",
    "data.folds=2",
    "evaluate.bootstrap=20",
]


def weights(run, fold):
    for i, name in enumerate(("best", "last")):
        write_model(run / f"fold{fold}" / "stage1" / f"{name}.pt", seed=i)
    write_model(run / f"fold{fold}" / "swa" / "model.pt", seed=5 + fold, provenance={"run": "test"})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    phantom.run(task(run, "phantom", OVERRIDES))
    films, _ = find_films(run / "phantom" / "dicom-images-train")
    patients = read_patient_map(run / "phantom" / "patients.csv")
    held = [name for name, _ in films if patients[name] == patients[films[0][0]]]
    (run / "holdout.txt").write_text("\n".join(held) + "\n")
    make_shards(run, [*OVERRIDES, f"data.holdout_ids={run / 'holdout.txt'}"])
    for fold in (0, 1):
        weights(run, fold)
        evaluate.run(task(run, "evaluate", OVERRIDES, fold=fold))
    evaluate.pool(task(run, "pool", OVERRIDES))
    return run


def scores_of(run_dir, fold=0):
    return json.loads((run_dir / f"fold{fold}" / "evaluate" / "scores.json").read_text())


def test_the_headline_is_fixed_and_cross_fitted_and_tuned_on_the_scored_films_is_optimistic(run_dir):
    scores = scores_of(run_dir)
    records = Records.load(run_dir / "fold0" / "evaluate" / "records.npz")
    assert set(scores["headline"]) == {"fixed", "fixed_0.5", "fixed_score", "cross_fitted"}
    fixed = scores["headline"]["fixed"]
    assert fixed["mask_threshold"] == 0.55 and fixed["dice"] == dice(records, Triplet(0.0, 0, 0.55)).mean()
    assert scores["headline"]["cross_fitted"]["tuned_on"] == "other patients"
    best = scores["optimistic"]["in_sample_triplet"]
    assert "optimistic" in best["note"] and best["dice"] >= scores["headline"]["cross_fitted"]["dice"]
    assert scores["dice_all_empty"] == pytest.approx(1 - scores["positive"] / scores["films"])
    for entry in (*scores["headline"].values(), best):
        assert {
            "dice_positive",
            "iou",
            "sensitivity",
            "specificity",
            "auc",
            "intervals",
            "by_mask_size",
            "by_view",
            "by_sex",
        } <= set(entry)
        assert entry["intervals"]["dice"][0] <= entry["dice"] <= entry["intervals"]["dice"][1]


def test_swa_best_and_last_stand_side_by_side_and_swa_is_deployed(run_dir):
    scores = scores_of(run_dir)
    assert scores["weights"] == "swa" and list(scores["weights_side_by_side"]) == ["swa", "best", "last"]
    assert scores["weights_side_by_side"]["swa"]["dice"] == scores["headline"]["fixed"]["dice"]
    assert scores["model_sha256"] == sha256_file(run_dir / "fold0" / "swa" / "model.pt")


def test_the_folds_model_is_the_same_weights_plus_the_decision(run_dir):
    swa, _ = load_model(run_dir / "fold0" / "swa" / "model.pt")
    model, meta = load_model(run_dir / "fold0" / "model.pt")
    assert all(torch.equal(a, b) for a, b in zip(swa.state_dict().values(), model.state_dict().values(), strict=True))
    thresholds = json.loads((run_dir / "fold0" / "evaluate" / "thresholds.json").read_text())
    assert meta["triplet"] == thresholds["triplet"] and meta["tta"] == "hflip" and meta["threshold"] == 0.5
    assert (
        meta["provenance"]["run"] == "test"
        and meta["provenance"]["weights"] == "swa"
        and meta["provenance"]["fold"] == 0
    )
    assert meta["config"]["stage1.size"] == 32
    surface = thresholds["surface"]
    axes = tuple(len(surface[name]) for name in ("top_scores", "min_areas", "mask_thresholds"))
    assert np.array(surface["dice"]).shape == axes and axes[2] == 13 and "optimistic" in thresholds["note"]
    assert surface["top_scores"][0] == 0.0 and surface["top_scores"][-1] == 2.0  # every film positive; all empty


def test_holdout_films_are_scored_apart(run_dir):
    scores = scores_of(run_dir)
    cases = read_cases(run_dir / "shards")
    held = {case.id for case in cases if case.fold == -1}
    assert held and scores["holdout"]["films"] == len(held)
    assert scores["films"] + scores_of(run_dir, 1)["films"] == len(cases) - len(held)
    with (run_dir / "fold0" / "evaluate" / "films.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == scores["films"] and not held & {row["id"] for row in rows}
    assert np.mean([float(row["dice_fixed"]) for row in rows]) == pytest.approx(scores["headline"]["fixed"]["dice"])


def test_the_submission_beside_it_scores_the_same_through_the_public_tool(run_dir):
    out, phantom = run_dir / "fold0" / "evaluate", run_dir / "phantom" / "train-rle.csv"
    (out / "predictions.csv").write_text(
        "film,top_score,rows,columns\n"
        + "".join(f"{case.id},0.5,{case.rows},{case.columns}\n" for case in read_cases(run_dir / "shards"))
    )
    result = score_submission(out / "submission.csv", phantom, bootstrap=0)
    (out / "predictions.csv").unlink()
    fixed = scores_of(run_dir)["headline"]["fixed"]
    for key in ("films", "dice", "dice_positive", "iou", "sensitivity", "specificity"):
        assert result[key] == fixed[key], key


def test_the_pool_is_the_folds_together_cross_fitted_by_fold(run_dir):
    scores = json.loads((run_dir / "evaluate" / "scores.json").read_text())
    parts = [Records.load(run_dir / f"fold{k}" / "evaluate" / "records.npz") for k in (0, 1)]
    joined = Records.concatenate(parts)
    assert scores["films"] == len(joined) == sum(map(len, parts)) and scores["folds"] == [0, 1]
    assert scores["weights"] == "swa"
    assert scores["headline"]["fixed"]["dice"] == summary(joined, scorecard.fixed(0.55))["dice"]
    assert scores["headline"]["cross_fitted"]["tuned_on"] == "other folds"
    assert (run_dir / "evaluate" / "report.html").exists()
    with pytest.raises(ConfigError, match="no evaluated fold"):
        evaluate.pool(task(run_dir / "empty", "pool", OVERRIDES))


def test_the_summary_fits_one_screen_and_labels_optimistic_scores(run_dir):
    text = (run_dir / "fold0" / "evaluate" / "summary.txt").read_text()
    # 24 lines and the warnings: random weights segment nothing, and no thresholds help.
    assert len(text.splitlines()) <= 29 and all(len(line) <= 110 for line in text.splitlines())
    for part in (
        "WARNING: the network segments nothing",
        "WARNING: no thresholds give a better Dice than calling every film empty",
        "fixed threshold 0.55",
        "fixed threshold 0.55, score 0.5",
        "thresholds tuned by cross-fitting",
        "tuned on the scored films (optimistic)",
        "all empty (baseline)",
        "swa",
        "hold-out",
    ):
        assert part in text


def test_the_last_lines_of_a_command_repeat_the_alarms(run_dir, capsys):
    folder = run_dir / "fold0" / "evaluate"
    assert score_table(folder)[-2:] == [f"WARNING: {alarm}" for alarm in scores_of(run_dir)["alarms"]]
    run = task(run_dir, "1", OVERRIDES).run
    rows = [{"epoch": 1, "alarm": "the network has collapsed"}, {"epoch": 2, "alarm": ""}]
    for fold, shown in ((0, rows), (1, rows[:1])):
        run.metrics("1", fold).write_text("".join(json.dumps(row) + "\n" for row in shown))
    targets = tuple(Node("1", fold, ()) for fold in (0, 1))
    print_result(run, targets, (0, 1))
    for fold in (0, 1):
        run.metrics("1", fold).unlink()
    assert capsys.readouterr().out.splitlines()[1:] == ["WARNING: fold 1, stage 1: the network has collapsed"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"weights": "best"}, ["selected by its scores on these same films"]),
        ({"patients": 9}, ["folds and intervals are by image"]),
    ],
)
def test_reasons_for_scores_that_are_too_high_are_listed(changes, expected):
    caveats = scorecard.caveats({"films": 9, "patients": 5, "weights": "swa", **changes})
    assert len(caveats) == len(expected)
    assert all(part in line for part, line in zip(expected, caveats, strict=True))


def test_evaluating_again_in_other_batches_gives_the_same_bytes(run_dir):
    out = run_dir / "fold0" / "evaluate"
    names = (
        "scores.json",
        "films.csv",
        "records.npz",
        "thresholds.json",
        "summary.txt",
        "submission.csv",
        "reliability.json",
    )
    before = {name: (out / name).read_bytes() for name in names}
    evaluate.run(task(run_dir, "evaluate", [*OVERRIDES, "evaluate.batch_size=3"], fold=0))
    assert [name for name in names if (out / name).read_bytes() != before[name]] == []


@pytest.mark.parametrize("positives", [0, 1])
def test_few_films_still_get_scores(positives):
    n = 3
    records = Records(
        ids=np.array(["a", "b", "c"]), groups=np.zeros(n, np.int64), folds=np.zeros(n, np.int64),
        truth_px=np.array([100 * positives, 0, 0]), film_px=np.full(n, 9216), top=np.array([0.9, 0.2, 0.1], np.float32),
        thresholds=np.array([0.2, 0.5, 0.55]), areas=np.full((n, 3), 7), hits=np.zeros((n, 3), np.int64),
        views=np.array([""] * n), sexes=np.array([""] * n),
    )  # fmt: skip
    settings = load(None, ["evaluate.mask_thresholds=0.2,0.5", "evaluate.bootstrap=5"]).evaluate
    tuned = scorecard.tune(records, settings, by="group")
    assert tuned.fit is None  # one patient: no others to tune on
    result = scorecard.scores(records, tuned, settings)
    assert "cross_fitted" not in result["headline"]
    assert "optimistic" in scorecard.summary_text({**result, "weights_side_by_side": {}}, "few")
    json.dumps(result, allow_nan=False)
    assert {len(column) for column in scorecard.film_table(records, tuned, 0.55).values()} == {3}


def test_a_stop_writes_nothing(run_dir, tmp_path):
    stopped_task = task(run_dir, "evaluate", OVERRIDES, fold=1)
    before = (run_dir / "fold1" / "evaluate" / "scores.json").stat().st_mtime_ns
    stopped_task.stop.note(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        evaluate.run(stopped_task)
    assert stopped.value.signum == signal.SIGTERM
    assert (run_dir / "fold1" / "evaluate" / "scores.json").stat().st_mtime_ns == before


def test_missing_weights_are_one_line(run_dir, tmp_path):
    overrides = [*OVERRIDES, "stages=1", f"data.shard_dir={run_dir / 'shards'}"]
    with pytest.raises(ConfigError, match="has no weights: run stage 1 first"):
        evaluate.run(task(tmp_path, "evaluate", overrides, fold=0))
