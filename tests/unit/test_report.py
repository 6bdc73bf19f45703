"""The report pages as text: self-contained, escaped, deterministic, complete. tests/e2e opens them in a browser."""

import json
import re
from html import escape

import numpy as np
import pytest

from pneumo_dist.evaluation import evaluate
from pneumo_dist.evaluation.report import pick
from pneumo_dist.inference.worklist import decision_rule, write_worklist
from pneumo_dist.reports import page, plots
from pneumo_dist.scoring.records import Records
from pneumo_dist.scoring.thresholds import NO_FILM
from tests.films import make_shards, task, write_model

OVERRIDES = [
    "phantom.films=14",
    "phantom.size=96",
    "stages=1",
    "stage1.size=32",
    "data.shards=2",
    "data.folds=2",
    "evaluate.bootstrap=20",
]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    make_shards(run, OVERRIDES)
    write_model(run / "fold0" / "stage1" / "best.pt")
    evaluate.run(task(run, "evaluate", OVERRIDES, fold=0))
    return run / "fold0" / "evaluate"


def worklist(path, rows):
    counts = {"films": len(rows), "positive": 1, "negative": 1, "unreadable": 1, "ignored_files": 3}
    rule = {"top_score": 0.5, "min_area": 10, "mask_threshold": 0.4}
    settings = {
        "label": "it<b>",
        "models": ["ab"],
        "sizes": [32],
        "tta": "none",
        "score": "image-level head",
        "triplet": rule,
        "triplet_from": "model file",
        "outputs": [],
    }
    write_worklist(path, rows, {**counts, **settings})
    return path.read_text()


def row(film, top, decision):
    return {
        "film": film, "name": film, "status": "ok" if decision else "unreadable", "decision": decision, "top_score": top,
        "share": 0.02 if decision else None, "reason": "" if decision else "empty file", "warnings": "", "files": {},
    }  # fmt: skip


ROWS = [row("low", 0.1, "negative"), row("bad", None, ""), row("</script><img src=x>", 0.9, "positive")]


def assert_self_contained(text):
    assert "default-src 'none'" in text
    # xmlns names are identifiers, not addresses; everything else that looks like one must be a file beside the page.
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert not re.findall(r"<(link|script)[^>]*(href|src)=\"(?!data:)", text)
    assert all(not link.startswith(("/", "..")) for link in re.findall(r'(?:href|src)="([^"#]*)"', text))


def test_the_worklist_is_self_contained_sorted_and_escaped(tmp_path):
    text = worklist(tmp_path / "report.html", ROWS)
    assert_self_contained(text)
    data = json.loads(re.search(r"const DATA = (.*);\n", text).group(1))
    assert [film[0] for film in data["films"]] == ["</script><img src=x>", "low", "bad"]
    assert data["films"][2][2:] == ["unreadable", None, None, "empty file"]
    assert text.count("</script>") == 1 and "it&lt;b&gt;" in text and "<img src=x>" not in text
    rule = "any pixel exceeds 0.4 and the mask has at least 10 px (scaled to 1024x1024) and the film's score is at least 0.5"
    assert escape(f"Positive if {rule} (thresholds: model file).") in text and "<svg" in text


def test_the_decision_rule_names_only_conditions_that_decide():
    assert (
        decision_rule({"top_score": 0.0, "min_area": 0, "mask_threshold": 0.7}) == "Positive if any pixel exceeds 0.7"
    )
    rule = decision_rule({"top_score": 0.0, "min_area": 1500, "mask_threshold": 0.7})
    assert rule == "Positive if any pixel exceeds 0.7 and the mask has at least 1,500 px (scaled to 1024x1024)"
    rule = decision_rule({"top_score": 0.3, "min_area": 0, "mask_threshold": 0.7})  # a score is no pixel's probability
    assert rule == "Positive if any pixel exceeds 0.7 and the film's score is at least 0.3"
    rule = decision_rule({"top_score": NO_FILM, "min_area": 0, "mask_threshold": 0.2})
    assert rule.startswith("Every film is called negative")


def test_equal_answers_make_an_equal_page(tmp_path):
    assert worklist(tmp_path / "a.html", ROWS) == worklist(tmp_path / "b.html", ROWS)
    assert "<svg" not in worklist(tmp_path / "c.html", [row("bad", None, "")])  # nothing readable, nothing to plot


def test_the_evaluation_report_has_every_part(evaluated):
    text = (evaluated / "report.html").read_text()
    assert_self_contained(text)
    for part in (
        "fixed threshold 0.55", "fixed threshold 0.5", "thresholds tuned by cross-fitting", "tuned on the scored films (optimistic)", "all empty (baseline)",
        "Comparison of weights", "ROC, by film", "precision-recall", "Reliability diagram (diagonal: perfectly calibrated)",
        "Threshold search on the scored films (optimistic)", "by size of the annotated mask",
        "Subgroups", "sex F", "Worst films with pneumothorax", "Best films with pneumothorax", "evaluate.mask_thresholds",
    ):  # fmt: skip
        assert part in text, part
    alarms = json.loads((evaluated / "scores.json").read_text())["alarms"]  # of random weights
    assert alarms and all(f'<p class="bad">{escape(alarm)}</p>' in text for alarm in alarms)
    links = set(re.findall(r'src="(overlays/[^"]+)"', text))
    assert links and links == {f"overlays/{path.name}" for path in (evaluated / "overlays").iterdir()}


def records_of(truth, predicted):
    n = len(truth)
    zeros = np.zeros(n, np.int64)
    return Records(
        ids=np.array([f"f{i}" for i in range(n)]), groups=zeros, folds=zeros, truth_px=np.array(truth), film_px=zeros + 1000,
        top=np.ones(n, np.float32), thresholds=np.array([0.5]), areas=np.array(predicted)[:, None],
        hits=np.minimum(truth, predicted)[:, None], views=np.array([""] * n), sexes=np.array([""] * n),
    )  # fmt: skip


def test_the_galleries_show_the_worst_the_best_and_the_largest_false_positives():
    chosen = pick(records_of([100, 100, 0, 0, 0, 100], [10, 90, 0, 5, 50, 100]), 0.5)
    assert chosen["Worst films with pneumothorax"] == [0, 1, 5]
    assert chosen["Best films with pneumothorax"] == [5, 1, 0]
    assert chosen["Largest false positives"] == [4, 3]


def test_plots_of_degenerate_data_do_not_fail():
    assert plots.ranking_curves(np.ones(3), np.zeros(3, bool)) == ""
    assert plots.learning_curves({"stage 1": []}) == "" and plots.dice_histogram(np.zeros(0)) == ""
    assert "<svg" in plots.reliability(np.array([0.0, 1.0]), np.array([False, True]), np.zeros((2, 20), np.int64))
    assert "<svg" in plots.threshold_surface(np.zeros((1, 1, 1)), [0.0], [0], [0.5], (0.0, 0, 0.5))
    assert "<svg" in plots.learning_curves({"stage 1": [{"epoch": 1, "train_loss": 1.0}]})
    bins = [
        {"from_px": 0, "below_px": 10, "films": 0, "dice": None},
        {"from_px": 10, "below_px": None, "films": 2, "dice": 0.5},
    ]
    assert "10+" in plots.dice_by_size({"fixed": bins})


def test_cells_are_escaped_and_rounded():
    text = page.table(("a", "b"), [("", ["<x>", 0.123456]), ("", ["y", None])])
    assert "&lt;x&gt;" in text and "0.1235" in text and "<td>-</td>" in text
