"""How a failed or stopped stage ends its process: same exit status and error line in a SLURM job and a plain script."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from submitit.core.utils import UncompletedJobError

from launch.backends.slurm_job import Job
from pneumo_dist import stages
from pneumo_dist.config import ConfigError
from pneumo_dist.runtime import stopping
from pneumo_dist.runtime.ending import exit_status
from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.stopping import SIGNALS, Stopped

TIME_LIMIT = Stopped(signal.SIGUSR2)
REFUSAL = subprocess.CalledProcessError(1, "scontrol")
KILLED = subprocess.CalledProcessError(-signal.SIGTERM, "scontrol")

End = Callable[..., int]


@pytest.fixture(params=["job", "script"])
def end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[End]:
    """Return a function that ends one task of a SLURM job with an error and returns its exit status.

    `refusal` is what the attempt to requeue raises; without it the requeue succeeds, and `requeued` lists it.
    """
    before = {s: signal.getsignal(s) for s in SIGNALS}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")

    def end(
        error: Exception,
        rank: int = 0,
        refusal: Exception | None = None,
        requeued: list[int] | None = None,
        suspended: bool = False,
    ) -> int:
        def run_stage(*_: object, **__: object) -> None:
            if suspended:
                signal.raise_signal(signal.SIGCONT)
            raise error

        def requeue(*_: object) -> None:
            if refusal:
                raise refusal
            (requeued if requeued is not None else []).append(rank)

        monkeypatch.setattr(stages, "run_stage", run_stage)
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        if request.param == "script":
            monkeypatch.setattr(stopping, "requeue", requeue)
            return stages.main(["--stage", "swa", "--run-dir", "/runs/x", "--fold", "0"])
        signal.signal(signal.SIGUSR2, requeue)  # submitit installs its handler before it calls the job
        with pytest.raises(SystemExit) as left:  # for submitit, a job that returns is a success
            Job("swa", 0, (0, 1), "/runs/x")()
        assert isinstance(left.value.code, int)
        return left.value.code

    yield end
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("rank", "line"), [(0, "error: stage 2 needs stage 1\n"), (1, "")])
def test_a_user_error_is_one_line_from_rank_0_and_exit_status_2(
    end: End, capsys: pytest.CaptureFixture[str], rank: int, line: str
) -> None:
    assert end(ConfigError("stage 2 needs stage 1"), rank) == 2
    assert capsys.readouterr().err == line


def test_at_the_time_limit_rank_0_alone_requeues_and_no_rank_fails(
    end: End, capsys: pytest.CaptureFixture[str]
) -> None:
    requeued: list[int] = []
    assert [end(TIME_LIMIT, rank, requeued=requeued) for rank in (1, 0)] == [0, 0]
    assert requeued == [0] and capsys.readouterr().err == ""


def test_a_job_that_was_suspended_for_longer_than_its_ranks_wait_fails_and_is_not_requeued(end: End) -> None:
    requeued: list[int] = []
    with pytest.raises(RuntimeError):
        end(RuntimeError("[gloo/x.cc:598] Application timeout caused pair closure"), requeued=requeued, suspended=True)
    assert requeued == []


def test_a_requeue_whose_scontrol_slurm_has_killed_is_no_failure(end: End, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(TIME_LIMIT, refusal=KILLED) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (REFUSAL, "SLURM refused to requeue (scontrol exited 1)"),
        (subprocess.TimeoutExpired("scontrol", 60), "scontrol requeue did not answer"),
        (UncompletedJobError("timed-out too many times."), "as often as the profile's max_timeouts allows"),
    ],
)
def test_a_requeue_that_fails_is_one_line_that_says_what_to_do(
    end: End, capsys: pytest.CaptureFixture[str], refusal: Exception, reason: str
) -> None:
    assert end(TIME_LIMIT, refusal=refusal) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: stopped before the time limit, but ") and reason in said
    assert said.endswith(": repeat the same command to continue\n") and said.count("\n") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_another_signal_exits_with_the_shells_status(
    end: End, capsys: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    assert end(Stopped(signum), 1) == 128 + signum
    assert capsys.readouterr().err == f"rank 1: stopped by {signum.name}; repeat the same command to continue\n"


def test_outside_slurm_the_time_limits_signal_requeues_nothing(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    assert end(TIME_LIMIT, refusal=AssertionError("requeued outside SLURM")) == 128 + signal.SIGUSR2


@pytest.mark.parametrize("error", [Failure("the disk\nis full"), OSError(28, "the disk is full")])
def test_a_failure_outside_the_program_is_one_line_with_rank_and_node(
    end: End, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert end(error, 1) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: rank 1 of 2 on {socket.gethostname()}: ") and said.endswith("the disk is full\n")
    assert said.count("\n") == 1


def test_a_programming_error_names_rank_and_node_and_keeps_its_traceback(
    end: End, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="one\ntwo"):
        end(ValueError("one\ntwo"), 1)
    assert capsys.readouterr().err == f"error: rank 1 of 2 on {socket.gethostname()}: ValueError: one two\n"


@pytest.mark.parametrize(
    ("scontrol", "status"),
    [("exit 0", 0), ("exit 1", 1), ("kill -TERM $$", 0)],
    ids=["requeued", "refused", "killed by the requeue itself"],
)
def test_a_plain_script_requeues_its_own_array_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: str, status: int
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{scontrol}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"JOB_ID": "8", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    def run_stage(*_: object) -> None:
        raise TIME_LIMIT

    monkeypatch.setattr(stages, "run_stage", run_stage)
    before = {s: signal.getsignal(s) for s in SIGNALS}
    try:
        assert stages.main(["--stage", "infer", "--run-dir", "/runs/x"]) == status
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert (tmp_path / "asked").read_text() == "requeue 7_1\n"


def test_a_plain_script_is_requeued_where_submitit_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setitem(sys.modules, "submitit.core", None)
    monkeypatch.setitem(sys.modules, "submitit.core.utils", None)
    asked = []
    assert exit_status(Stopped(signal.SIGUSR2), lambda: asked.append("requeue")) == 0
    assert asked == ["requeue"]
