"""The job that SLURM runs: its pickle, and what it does when it is told to stop."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from launch.backends import slurm_job
from launch.backends.slurm_job import Job
from pneumo_dist import stages
from pneumo_dist.runtime.meeting.devices import given_gpus
from pneumo_dist.runtime.meeting.launcher import contradiction, launch_of
from pneumo_dist.runtime.stopping import SIGNALS, Stopped, StopSignal

ROOT = Path(__file__).resolve().parents[2]
JOB = Job("1", 0, (0, 1), "/runs/x")


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Put this process's handlers back afterwards."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def run_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run_stage(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(stages, "run_stage", run_stage)


def test_the_pickle_names_launch_jobs_and_carries_nothing_else() -> None:
    for data in (pickle.dumps(JOB), cloudpickle.dumps(JOB)):
        assert b"launch.jobs" in data and len(data) < 300
        assert pickle.loads(data) == JOB


def test_checkpoint_hands_back_the_same_job() -> None:
    assert JOB.checkpoint().function == JOB


def test_importing_the_job_imports_standard_library_only() -> None:
    program = "import sys, launch.backends.slurm_job; print([m for m in ('torch', 'numpy', 'omegaconf', 'submitit') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_job_hands_its_place_and_its_stop_signal_to_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(stages, "run_stage", lambda *words, stop: seen.extend([*words, stop]))
    JOB()
    assert seen[:4] == ["1", Path("/runs/x"), 0, (0, 1)] and isinstance(seen[4], StopSignal)


def test_the_job_says_how_many_ranks_and_gpus_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    said: list[str] = []
    monkeypatch.setattr(stages, "run_stage", lambda *_, **__: said.append(contradiction(launch_of())))
    with monkeypatch.context() as environ:
        environ.setenv("PNEUMO_RANKS", "")
        environ.setenv("PNEUMO_GPUS", "")
        Job("1", 0, (0, 1), "/runs/x", ranks=8, gpus=4)()
        assert "submitted for 8 ranks, but SLURM started 1" in said[0] and given_gpus() == "--gpus-per-node=4"


def test_usr2_reaches_the_flag_and_not_submitits_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, _: called.append(number))
    asked: list[bool] = []

    def run_stage(*_: object, stop: StopSignal) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        asked.append(stop.requested)

    monkeypatch.setattr(stages, "run_stage", run_stage)
    JOB()
    assert asked == [True] and called == []


def test_rank_0_requeues_with_the_handler_that_was_installed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def requeue(number: int, _: object) -> None:
        sys.exit(-1)  # as submitit's does after scontrol requeue

    signal.signal(signal.SIGUSR2, requeue)
    run_raises(monkeypatch, Stopped(signal.SIGUSR2))
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(SystemExit) as left:
        JOB()
    assert left.value.code == -1


def test_other_ranks_leave_with_0_and_do_not_requeue(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGUSR2, lambda *_: pytest.fail("only rank 0 may requeue"))
    run_raises(monkeypatch, Stopped(signal.SIGUSR2))
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(SystemExit) as left:
        JOB()
    assert left.value.code == 0


def test_a_stale_result_of_this_task_alone_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("7_0_result.pkl", "7_1_result.pkl"):
        (tmp_path / name).write_bytes(b"old")
    values = {"SUBMITIT_FOLDER": tmp_path, "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": 7, "SLURM_PROCID": 1}
    for key, value in values.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    slurm_job._remove_stale_result()
    assert [path.name for path in tmp_path.iterdir()] == ["7_0_result.pkl"]
