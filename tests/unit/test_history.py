"""The rows of `metrics.jsonl`: one an epoch, whatever was killed and repeated."""

from pathlib import Path

from pneumo_dist.runtime import history


def test_an_epoch_that_a_resumed_attempt_repeats_replaces_its_row_and_those_after_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2, 3):
        history.append(path, {"epoch": epoch, "attempt": 1})
    history.append(path, {"epoch": 2, "attempt": 2})
    assert history.read(path) == [{"epoch": 1, "attempt": 1}, {"epoch": 2, "attempt": 2}]
