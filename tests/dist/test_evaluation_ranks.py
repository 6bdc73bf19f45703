"""Evaluation on 1, 2 and 3 real ranks writes the same bytes, with a number of films that no rank count divides."""

import shutil
from pathlib import Path

import pytest

from pneumo_dist.evaluation import evaluate
from pneumo_dist.runtime.stopping import Stopped
from tests.dist.spawn import on_ranks
from tests.films import make_shards, task, write_model

WORDS = [
    "phantom.films=15", "phantom.size=64", "stages=1", "stage1.size=32", "data.shards=2", "data.folds=2",
    "evaluate.bootstrap=10", "evaluate.batch_size=2", "train.threads=1",
]  # fmt: skip
NAMES = (
    "scores.json",
    "films.csv",
    "records.npz",
    "thresholds.json",
    "submission.csv",
    "reliability.json",
    "report.html",
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    run = tmp_path_factory.mktemp("template")
    make_shards(run, WORDS)
    for seed, name in enumerate(("best", "last")):
        write_model(run / "fold0" / "stage1" / f"{name}.pt", seed=seed)
    return run


def evaluated(ranks, run: str, stop_rank: int = -1) -> list[str]:
    """On a rank: evaluate fold 0; the names of the outputs it returns, or what it stopped by."""
    one = task(Path(run), "evaluate", WORDS, fold=0, ranks=ranks)
    if ranks.rank == stop_rank:
        one.stop.note(15)
    try:
        return sorted(evaluate.run(one))
    except Stopped as stopped:
        return [str(stopped)]


def test_1_2_and_3_ranks_write_the_same_bytes(template, tmp_path):
    wanted = None
    for world_size in (1, 2, 3):
        run = tmp_path / str(world_size)
        shutil.copytree(template, run)
        outputs = on_ranks(evaluated, world_size, str(run))
        assert outputs[0] and all(not other for other in outputs[1:])  # rank 0 alone writes
        found = {name: (run / "fold0" / "evaluate" / name).read_bytes() for name in NAMES}
        found["model.pt"] = (run / "fold0" / "model.pt").read_bytes()
        wanted = wanted or found
        assert [name for name in found if found[name] != wanted[name]] == []


def failing(ranks, run: str) -> str:
    """On a rank: evaluate while rank 0 cannot write; what this rank says."""

    def full(*_):
        raise OSError(28, "No space left on device")

    evaluate._write_fold = full
    try:
        evaluate.run(task(Path(run), "evaluate", WORDS, fold=0, ranks=ranks))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_an_error_of_rank_0s_files_reaches_every_rank(template, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(template, run)
    first, other = on_ranks(failing, 2, str(run))
    assert first.startswith("OSError") and "rank 0 failed" in other and "No space left" in other


def test_a_signal_on_one_rank_stops_all_of_them(template, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(template, run)
    assert on_ranks(evaluated, 2, str(run), 1) == [["stopped by SIGTERM"]] * 2
    assert not (run / "fold0" / "model.pt").exists()
