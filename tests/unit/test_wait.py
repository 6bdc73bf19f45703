"""Waiting for submitted jobs can be taken up again, by the same command and by `runs.py wait`; Ctrl-C leaves the jobs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launch import runs
from launch.backends import follow
from launch.monitor.display import Display
from launch.state.ledger import Entry, Ledger
from pneumo_dist.config import to_yaml
from pneumo_dist.run import RunFolder
from tests.unit.squeue import squeue
from tests.unit.test_slurm_chain import SMALL, submit, tools
from tests.unit.test_submit import finished, make

__all__ = ["tools"]


@pytest.fixture
def queue(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file with the answer of squeue; stages 1 and 2 wait in the queue as jobs 1 and 2."""
    monkeypatch.setattr(follow, "POLL_S", (0.01, 0.01))
    monkeypatch.setattr(follow, "SETTLE_S", 0.0)
    finished(make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL), "finalize")
    for stage in ("1", "2"):
        assert submit(tmp_path, "--stage", stage) == 0
        (tools / "queue").write_text(squeue("1|stage1-fold0.a|RUNNING|None|n1") + "\n")
    return tools / "queue"


def wait(root: Path) -> int:
    return runs.main(["wait", str(root / "a")])


def jobs(root: Path) -> list[str]:
    return [entry.job_id for entry in Ledger(RunFolder(root / "a")).entries()]


RUNNING = squeue("1|stage1-fold0.a|RUNNING|None|n1", "2|stage2-fold0.a|PENDING|Dependency|") + "\n"
FAILED = squeue("1|stage1-fold0.a|FAILED|NonZeroExitCode|n1|0|256", "2|stage2-fold0.a|CANCELLED|Dependency|") + "\n"


class Interrupted(Display):
    """A display that receives Ctrl-C when it shows progress."""

    def progress(self, jobs: dict[str, tuple[float, str]]) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("again", ["the same command", "runs.py wait"])
def test_waiting_is_taken_up_again_and_ctrl_c_names_the_jobs_that_stay(
    queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], again: str
) -> None:
    queue.write_text(RUNNING)
    with monkeypatch.context() as ctrl_c:
        ctrl_c.setattr(follow, "Display", Interrupted)
        assert (submit(tmp_path, "--stage", "1", "--wait") if again == "the same command" else wait(tmp_path)) == 130
    said = capfd.readouterr().err
    second = ", 2 (stage2-fold0)" if again == "runs.py wait" else ""
    assert f"these jobs stay in SLURM: 1 (stage1-fold0){second}\n" in said
    assert f"launch/runs.py wait {tmp_path / 'a'}\n" in said and "launch/runs.py cancel" in said
    assert jobs(tmp_path) == ["1", "2"], "nothing was submitted a second time"


def test_wait_returns_the_result_of_the_jobs(queue: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a" / "jobs" / "1_0_log.out").write_text("ValueError: broken on purpose\n")
    queue.write_text(FAILED)
    assert wait(tmp_path) == 1
    assert "stage1-fold0 (job 1): FAILED (exit 1:0): ValueError: broken on purpose" in capfd.readouterr().err
    plan = make("--stage", "2", "--run", "a", f"run_root={tmp_path}", *SMALL)
    for stage in ("1", "2"):
        finished(plan, stage, 0)
    queue.write_text(squeue("1|stage1-fold0.a|COMPLETED|None|n1", "2|stage2-fold0.a|COMPLETED|None|n1") + "\n")
    assert wait(tmp_path) == 0
    assert f"done: {plan.run.dir_of('2', 0)}\n" in capfd.readouterr().out.replace(
        str(follow.short_path(tmp_path)), str(tmp_path)
    )


def test_other_settings_and_jobs_that_are_not_queued_are_not_waited_for(
    queue: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    queue.write_text(RUNNING)
    assert submit(tmp_path, "--stage", "1", "--wait", "stage1.lr=0.5") == 2
    assert submit(tmp_path, "--stage", "1", "--wait", "--redo") == 2
    assert submit(tmp_path, "--stage", "1") == 2
    said = capfd.readouterr().err
    assert said.count("already queued or running as SLURM job 1: wait for it (launch/runs.py wait") == 3
    assert jobs(tmp_path) == ["1", "2"]


def test_an_array_is_under_way_until_the_job_that_merges_it_has_ended(
    queue: Path, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make("--stage", "preprocess", "--run", "a", f"run_root={tmp_path}", *SMALL)
    (tmp_path / "a" / "shards" / "DONE.json").unlink()
    assert submit(tmp_path, "--stage", "preprocess", "--nodes", "2") == 0
    ids = dict(zip(("phantom", "preprocess", "finalize"), jobs(tmp_path)[2:], strict=True))
    for live in ("preprocess", "finalize"):  # the array runs; then only the last job is left
        queue.write_text(squeue(f"{ids[live]}|{live}.a|RUNNING|None|n1") + "\n")
        nodes = [node for node in plan.todo if node.key == "preprocess"]
        under_way = follow.under_way(dataclasses.replace(plan, todo=tuple(nodes)))
        assert {node.key: job for node, job in under_way.items()} == {"preprocess": ids["preprocess"]}
    queue.write_text("")
    assert follow.under_way(plan) == {}


def test_jobs_for_other_folds_are_not_followed_and_other_requests_are_said(
    queue: Path, tmp_path: Path, tools: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tools / "count").write_text("10")
    words = ("--stage", "all", "--run", "a", f"run_root={tmp_path}", *SMALL, "--folds")
    queue.write_text("")
    assert submit(tmp_path, "--stage", "all", "--folds", "0,1") == 0
    entries = Ledger(RunFolder(tmp_path / "a")).entries()[2:]
    queue.write_text(squeue(*(f"{e.job_id}|{e.name}|RUNNING|None|n1" for e in entries)) + "\n")
    both = make(*words, "1,0")
    assert len(follow.under_way(both)) == len(both.todo)
    pool = tuple(node for node in both.todo if node.stage == "pool")
    assert not follow.under_way(dataclasses.replace(make(*words, "0,1,2"), todo=pool))
    with monkeypatch.context() as ctrl_c:
        ctrl_c.setattr(follow, "Display", Interrupted)
        ctrl_c.setattr(follow.codecopy, "code_hash", lambda _: "other")
        more = ("--nodes", "2", "--profile", "configs/cluster/gpu.yaml", "--after", "99")
        assert submit(tmp_path, "--stage", "all", "--folds", "0,1", "--wait", *more) == 130
    (note,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note: they were")]
    for said in ("nodes 1, now 2", "gpu.yaml", "code other than", "no --after 99"):
        assert said in note


def test_an_old_failed_job_is_not_waited_for(
    queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where others are live; those that they depend on are."""
    swa = Entry(key="swa-fold0", stage="swa", fold=0, cluster="slurm", job_id="7", name="swa-fold0.a")
    Ledger(RunFolder(tmp_path / "a")).append(swa)
    first = squeue("1|stage1-fold0.a|FAILED|NonZeroExitCode|n1|0|256", "2|stage2-fold0.a|PENDING|Dependency|")
    queue.write_text(first + "\n" + squeue("7|swa-fold0.a|FAILED|NonZeroExitCode|n1|0|256") + "\n")
    monkeypatch.setattr(follow, "Display", Interrupted)
    assert wait(tmp_path) == 130
    shown = capfd.readouterr().out
    assert "stage1-fold0" in shown and "stage2-fold0" in shown and "swa-fold0" not in shown


@pytest.mark.parametrize("local", [True, False])
def test_a_run_without_slurm_jobs_is_not_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], local: bool
) -> None:
    run = make("--stage", "1", "--run", "a", f"run_root={tmp_path}", *SMALL).run
    run.jobs_dir.mkdir(parents=True)
    run.config_file.write_text(to_yaml(run.config))
    if local:
        Ledger(run).append(Entry(key="phantom", stage="phantom", fold=None, cluster="local"))
    assert wait(tmp_path) == 2
    reason = "phantom was started without SLURM" if local else "nothing has been submitted"
    assert f"no SLURM job to wait for: {reason}" in capfd.readouterr().err
