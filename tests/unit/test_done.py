"""A stage is done when its settings and inputs are unchanged, and only then."""

from dataclasses import replace
from pathlib import Path

import pytest

from pneumo_dist import config as configuration
from pneumo_dist import done
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run
from pneumo_dist.runtime.files import write_text
from pneumo_dist.runtime.task import Task

WORDS = ["phantom.films=20", "model.pretrained=none", "stage1.size=64", "stage2.size=128"]


def _finish(run_dir: Path, config, stage: str, fold: int | None, **texts: str) -> None:
    """Put a stage's outputs and DONE.json in place, as run_stage does."""
    task = Task(run=Run(run_dir, config), stage=stage, fold=fold)
    outputs = {}
    for name, text in texts.items():
        outputs[name.replace("_", "-")] = task.out / f"{name}.txt"
        write_text(task.out / f"{name}.txt", text)
    settings, inputs = done.settings_of(config, stage), done.inputs_of(Run(run_dir, config), stage, fold)
    done.write_done(replace(task, settings=settings, inputs=inputs), outputs)


@pytest.fixture
def run(tmp_path):
    """A run whose shards and stage 1 are done."""
    config = configuration.load(None, WORDS)
    films = tmp_path / "phantom" / "dicom-images-train"
    films.mkdir(parents=True)
    (films / "a.dcm").write_bytes(b"film")
    for name in ("train-rle.csv", "patients.csv"):
        (tmp_path / "phantom" / name).write_text("x")
    _finish(tmp_path, config, "finalize", None, cases="c", manifest_64="m64", manifest_128="m128")
    _finish(tmp_path, config, "1", 0, best="weights", last="l")
    return tmp_path


def _differences(run, *words, stage="1"):
    return done.differences(Run(run, configuration.load(None, [*WORDS, *words])), stage, 0)


def test_nothing_changed_is_done(run):
    assert _differences(run) == []
    assert _differences(run, stage="2") is None


@pytest.mark.parametrize("word", ["train.workers=7", "train.save_every_s=1", "stage2.epochs=3", "run_root=/elsewhere"])
def test_what_does_not_determine_the_result_is_not_compared(run, word):
    assert _differences(run, word) == []


@pytest.mark.parametrize("word", ["stage1.epochs=3", "loss.dice=0.5", "train.seed=1", "evaluate.threshold=0.5"])
def test_a_changed_setting_is_named(run, word):
    assert _differences(run, word) == [word.split("=")[0]]


def test_changed_shards_of_the_same_size_are_named_and_another_size_does_not_matter(run):
    config = configuration.load(None, WORDS)
    _finish(run, config, "finalize", None, cases="c", manifest_64="m64", manifest_128="other")
    assert _differences(run) == []
    _finish(run, config, "finalize", None, cases="c", manifest_64="other", manifest_128="m128")
    assert _differences(run) == ["finalize/manifest-64"]


def test_a_new_size_makes_preprocessing_go_on_not_start_over(run):
    assert done.differences(Run(run, configuration.load(None, [*WORDS, "stage2.size=96"])), "finalize", None) is None


def test_changed_films_are_noticed(run):
    (run / "phantom" / "dicom-images-train" / "b.dcm").write_bytes(b"another")
    assert done.differences(Run(run, configuration.load(None, WORDS)), "finalize", None) == ["films"]


def test_a_missing_upstream_says_what_to_run(run):
    config = configuration.load(None, WORDS)
    with pytest.raises(ConfigError, match=r"swa needs stage 2, which is not done in .*stage2: run it first"):
        done.inputs_of(Run(run, config), "swa", 0)


def test_a_damaged_DONE_counts_as_not_done(run, caplog):
    write_text(run / "fold0" / "stage1" / "DONE.json", '{"stage"')
    assert _differences(run) is None
    assert "is damaged" in caplog.text


def test_done_names_no_time_or_host_and_relative_files(run):
    text = (run / "fold0" / "stage1" / "DONE.json").read_text()
    assert '"file": "fold0/stage1/best.txt"' in text
    assert str(run) not in text and "seconds" not in text


def test_a_new_size_does_not_hide_another_difference(run):
    config = configuration.load(None, [*WORDS, "stage2.size=96", "data.folds=3"])
    assert done.differences(Run(run, config), "finalize", None) == ["data.folds"]
