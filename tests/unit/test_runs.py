"""runs.py: the table of a run, its logs, and what is said about what failed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch import status
from launch.ledger import Entry, Ledger, lock
from launch.outcome import last_error, score_table
from launch.prepare import lock_path
from launch.runs import main
from pneumo_dist import config as configuration


class Shown:
    """What a command printed, and its exit status."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *words: object) -> None:
        self.status = main([str(word) for word in words])
        self.out, self.errors = capfd.readouterr()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "chest"
    folder.mkdir(parents=True)
    config = configuration.load(None, ["phantom.films=9", f"run_root={tmp_path}/runs"])
    (folder / "config.yaml").write_text(configuration.to_yaml(config))
    return folder


def add(run_dir: Path, key: str, **more: object) -> None:
    stage, _, fold = key.partition("-fold")
    same = {"key": key, "stage": stage.removeprefix("stage"), "fold": int(fold) if fold else None, "cluster": "slurm"}
    Ledger(run_dir).append(Entry(**(same | more)))  # type: ignore[arg-type]


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, sacct: str = "") -> None:
    for name, text in (("squeue", squeue), ("sacct", sacct)):
        (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def row(run_dir: Path, key: str) -> status.Row:
    rows, _ = status.collect(run_dir)
    return next(row for row in rows if row.node.key == key)


def test_every_job_of_the_chain_has_a_row(run_dir: Path) -> None:
    rows, note = status.collect(run_dir)
    assert [r.node.key for r in rows][:5] == ["phantom", "preprocess", "finalize", "stage1-fold0", "stage2-fold0"]
    assert {r.state for r in rows} == {"-"} and note == ""


def test_states_are_slurms_own_words(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    add(run_dir, "stage2-fold0", job_id="5", name="stage2-fold0.chest")
    fake(
        tmp_path, monkeypatch,
        "4|stage1-fold0.chest|RUNNING|None|node[1-2]|5:00\n5|stage2-fold0.chest|PENDING|Dependency||0:00",
        "4|stage1-fold0.chest|REQUEUED|0:0|node1|00:01\n4|stage1-fold0.chest|RUNNING|0:0|node[1-2]|00:01",
    )  # fmt: skip
    first, second = row(run_dir, "stage1-fold0"), row(run_dir, "stage2-fold0")
    assert (first.state, first.nodes, first.attempts) == ("RUNNING", "node[1-2]", 2)
    assert (second.state, second.reason) == ("PENDING", "Dependency")


def test_a_partly_done_array_is_counted(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(run_dir, "infer", job_id="8", name="infer.chest", elements=3, log="8_%a_%r_log.out")
    lines = ["8_0|infer.chest|COMPLETED|None|n1|1", "8_1|infer.chest|RUNNING|None|n2|1", "8_2|infer.chest|PENDING|x||0"]
    fake(tmp_path, monkeypatch, "\n".join(lines))
    assert row(run_dir, "infer").state == "RUNNING (1/3 done)"


def test_a_failed_job_is_shown_with_its_last_error_and_its_log(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    fake(tmp_path, monkeypatch, "", "4|stage1-fold0.chest|FAILED|1:0|node[1-2]|00:01")
    (run_dir / "jobs" / "4_0_log.out").write_text(
        "12:00:00 I starts\nRuntimeError: Connection closed by peer [1.2.3.4]\n"
    )
    (run_dir / "jobs" / "4_1_log.out").write_text("Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory.\n")
    found = row(run_dir, "stage1-fold0")
    assert found.failed and found.reason == "exit 1:0"
    shown = Shown(capfd, "status", run_dir).out
    assert "FAILED" in shown and "repeat the same submit command" in shown


def test_slurm_that_does_not_answer_is_said(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest")
    fake(tmp_path, monkeypatch, "", "")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    rows, note = status.collect(run_dir)
    assert "does not answer" in note and any(r.state == "UNKNOWN" for r in rows)


def test_a_job_that_slurm_has_forgotten_is_told_by_its_files(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a site without accounting."""
    add(run_dir, "stage1-fold0", job_id="4", name="stage1-fold0.chest", log="4_%r_log.out")
    fake(tmp_path, monkeypatch, "", "")
    (run_dir / "jobs" / "4_0_log.out").write_text("slurmstepd: error: *** JOB 4 CANCELLED DUE TO TIME LIMIT ***\n")
    found = row(run_dir, "stage1-fold0")
    assert found.state == "ENDED" and found.failed and "TIME LIMIT" in found.error


@pytest.mark.parametrize(
    ("exit_status", "state"), [(0, "COMPLETED"), (1, "FAILED"), (130, "INTERRUPTED"), (None, "KILLED")]
)
def test_how_a_local_job_ended(run_dir: Path, exit_status: int | None, state: str) -> None:
    add(run_dir, "swa-fold0", cluster="local", log="local-swa-fold0-%r.out")
    if exit_status is not None:
        add(run_dir, "swa-fold0", cluster="local", event="ended", status=exit_status)
    assert row(run_dir, "swa-fold0").state == state


def test_a_local_job_that_runs(run_dir: Path) -> None:
    add(run_dir, "swa-fold0", cluster="local")
    held = lock(lock_path(run_dir, "swa-fold0"))
    assert row(run_dir, "swa-fold0").state == "RUNNING"
    held.release()


def test_progress_and_time_left(run_dir: Path) -> None:
    config = configuration.load(run_dir / "config.yaml", ["stage1.batch_size=10"])
    (run_dir / "fold0" / "stage1").mkdir(parents=True)
    line = {
        "epoch": 2,
        "epochs": 10,
        "step": 200,
        "steps": 1000,
        "images_per_s": 10.0,
        "best_dice": 0.5,
        "best_epoch": 1,
    }
    (run_dir / "fold0" / "stage1" / "metrics.jsonl").write_text(json.dumps(line | {"dice": 0.4}) + "\n")
    text = status.progress_text(config, run_dir, "stage1-fold0")
    assert text == "epoch 2/10, step 200/1000, 10.0 images/s, 13 min left"
    assert row(run_dir, "stage1-fold0").score == "Dice 0.4000, best 0.5000 (epoch 1)"


def test_the_line_that_tells_why_is_the_newest_attempts_first_hand_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "--- 2025-01-01 00:00:00 -m x\nerror: an old mistake\n--- 2025-01-01 00:01:00 -m x\n"
        "Traceback (most recent call last):\n  File x\nValueError: the real reason\n"
        "RuntimeError: [x] Connection closed by peer [127.0.0.1]:4\nsrun: error: node2: task 1: Exited with 1\n"
    )
    assert last_error(log) == "ValueError: the real reason"
    log.write_text("all is well\n")
    assert last_error(log) is None and last_error(tmp_path / "none") is None


def test_logs_prints_a_ranks_newest_log(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    add(run_dir, "stage1-fold0", job_id="4", log="4_%r_log.out")
    for rank in range(11):
        (run_dir / "jobs" / f"4_{rank}_log.out").write_text(f"rank {rank}\n")
    assert Shown(capfd, "logs", run_dir, "1", "--rank", 10).out == "rank 10\n"
    assert Shown(capfd, "logs", run_dir).out == "rank 0\n"
    wrong = Shown(capfd, "logs", run_dir, "1", "--rank", 11)
    assert wrong.status == 2 and "0 to 10" in wrong.errors
    assert Shown(capfd, "logs", run_dir, "swa").status == 2


def test_list_and_wrong_names(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = Shown(capfd, "list", "--run-root", run_dir.parent)
    assert shown.status == 0 and "chest" in shown.out and "0/9 done" in shown.out
    for words in (("status", "nope"), ("logs", "nope"), ("cancel", "nope"), ("tensorboard", "nope"), ("stats",), ()):
        wrong = Shown(capfd, *words)
        assert wrong.status == 2 and len(wrong.errors.splitlines()) == 1, wrong.errors


def test_scores_stand_beside_those_of_calling_every_film_empty(tmp_path: Path) -> None:
    entry = {"dice": 0.8, "dice_positive": 0.4, "sensitivity": 0.9, "specificity": None, "mask_threshold": 0.5}
    scores = {"films": 20, "patients": 9, "positive": 5, "dice_all_empty": 0.75, "headline": {"fixed": entry}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    text = "\n".join(score_table(tmp_path))
    assert "every film empty" in text and "0.7500" in text and "fixed threshold 0.5" in text and "0.8000" in text
    assert score_table(tmp_path / "none") == []
