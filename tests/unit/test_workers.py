"""Worker processes of this machine, with trivial worker commands in place of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.backends.workers import Foreground, Outcome, Worker, job_workers
from launch.state.locks import Locked, holder, lock
from pneumo_dist.run import RunFolder

ROOT = Path(__file__).resolve().parents[2]
# Saves on a signal and leaves with the shell's status for it, as a real worker does.
SAVES = """
import signal, sys, time
def leave(number, frame):
    print("saved after", number, flush=True)
    sys.exit(128 + number)
for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, leave)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2))
print("ready", flush=True)
time.sleep(60)
"""
HANGS = "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))\ntime.sleep(60)"


def group(folder: Path, *codes: str) -> list[Worker]:
    return [Worker([sys.executable, "-c", code], {}, folder / f"{i}.out", folder) for i, code in enumerate(codes)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_all_workers_end_well_and_the_first_one_is_shown(tmp_path: Path) -> None:
    seen = bytearray()
    with Foreground(seen.extend) as foreground:
        outcome = foreground.run(group(tmp_path, "print('hello from 0')", "print('hello from 1')"))
    assert outcome == Outcome(0)
    assert b"hello from 0" in seen and b"hello from 1" not in seen
    assert "hello from 1" in (tmp_path / "1.out").read_text()


def test_a_failing_worker_takes_the_others_down_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.backends.workers.GRACE_AFTER_FAILURE_S", 0.3)
    began = time.monotonic()
    with Foreground(lambda _: None) as foreground:
        outcome = foreground.run(group(tmp_path, HANGS, "raise SystemExit(7)"))
    assert outcome == Outcome(1, (1, 7))
    assert time.monotonic() - began < 10


def test_a_killed_worker_is_reported_with_its_signal(tmp_path: Path) -> None:
    with Foreground(lambda _: None) as foreground:
        outcome = foreground.run(group(tmp_path, "import os; os.kill(os.getpid(), 9)"))
    assert outcome == Outcome(1, (0, -9))


def test_a_worker_that_saved_and_left_gives_the_others_time_to_do_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.backends.workers.GRACE_AFTER_FAILURE_S", 0.0)
    slow = SAVES.replace('print("saved', 'time.sleep(0.5); print("saved')
    with Foreground(lambda _: None) as foreground:
        outcome = foreground.run(group(tmp_path, slow, "import time; time.sleep(0.5); raise SystemExit(143)"))
    assert outcome == Outcome(1, (1, 143))
    assert "saved after 15" in (tmp_path / "0.out").read_text()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_is_passed_on_and_the_workers_save(tmp_path: Path, signum: int, status: int) -> None:
    with Foreground(lambda new: os.kill(os.getpid(), signum) if b"ready" in new else None) as foreground:
        outcome = foreground.run(group(tmp_path, SAVES, SAVES))
        assert foreground.run(group(tmp_path, "print('never')")).status == status  # the chain ends here
    assert outcome == Outcome(status)
    assert "saved after" in (tmp_path / "0.out").read_text() and "never" not in (tmp_path / "0.out").read_text()


def test_a_second_signal_kills_workers_that_do_not_listen(tmp_path: Path) -> None:
    def twice(new: bytes) -> None:
        if b"ready" in new:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    with Foreground(twice) as foreground:
        assert foreground.run(group(tmp_path, "print('ready', flush=True)\n" + HANGS)).status == 130


def test_a_signal_before_the_worker_has_handlers_is_not_lost(tmp_path: Path) -> None:
    late = "import time; time.sleep(0.5)\n" + SAVES
    with Foreground(lambda _: None) as foreground:
        signal.setitimer(signal.ITIMER_REAL, 0.25)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        outcome = foreground.run(group(tmp_path, late))
    assert outcome == Outcome(143)
    assert "saved after 15" in (tmp_path / "0.out").read_text()


def test_no_worker_outlives_a_killed_submit(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from launch.backends.workers import Foreground, Worker
hangs = Worker([sys.executable, "-c", {HANGS!r}], {{}}, Path({str(tmp_path)!r}) / "0.out", Path({str(tmp_path)!r}))
with Foreground(lambda _: None) as foreground:
    foreground.run([hangs, hangs])
"""
    parent = subprocess.Popen([sys.executable, "-c", script])

    def children() -> list[int]:
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]

    try:
        wait_for(lambda: len(children()) == 2)
        pids = children()
        time.sleep(0.2)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids), 5)


def test_a_lock_lasts_until_the_last_worker_has_ended(tmp_path: Path) -> None:
    held = lock(tmp_path / "lock")
    with pytest.raises(Locked, match=f"process {os.getpid()}"):
        lock(tmp_path / "lock")
    child = subprocess.Popen(["sleep", "30"], pass_fds=[held.descriptor])
    held.release()
    assert holder(tmp_path / "lock") == f"process {os.getpid()} on {os.uname().nodename}"
    child.kill()
    child.wait()
    assert holder(tmp_path / "lock") is None
    lock(tmp_path / "lock").release()


def test_ranks_meet_through_a_file_and_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    group = job_workers(
        key="stage1-fold3",
        stage="1",
        fold=3,
        kind="ranks",
        count=2,
        run=RunFolder(tmp_path),
        code=ROOT,
        store=tmp_path / "s",
        gpus_asked=2,
    )
    assert [w.environ["RANK"] for w in group] == ["0", "1"] and group[0].environ["PNEUMO_GPUS"] == "2"
    assert {w.environ["WORLD_SIZE"] for w in group} == {"2"} and {w.environ["OMP_NUM_THREADS"] for w in group} == {"4"}
    assert {w.environ["PNEUMO_STORE"] for w in group} == {str(tmp_path / "s")}
    assert group[1].command[-2:] == ["--fold", "3"] and group[1].log.name == "local-stage1-fold3-1.out"


def test_array_tasks_are_independent_parts(tmp_path: Path) -> None:
    group = job_workers(
        key="infer",
        stage="infer",
        fold=None,
        kind="array",
        count=3,
        run=RunFolder(tmp_path),
        code=ROOT,
        store=tmp_path / "s",
    )
    assert [w.command[-1] for w in group] == ["0/3", "1/3", "2/3"]
    assert {w.environ["WORLD_SIZE"] for w in group} == {"1"}


def test_workers_get_listed_variables_and_the_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "1", "HOME": "/home/me"}
    foreign = {"PYTHONPATH": "/foreign", "MASTER_ADDR": "x", "NCCL_DEBUG": "INFO", "TORCH_LOGS": "all", "RANK": "7"}
    for name, value in (listed | foreign).items():
        monkeypatch.setenv(name, value)
    profile = {"NCCL_P2P_DISABLE": "1", "GLOO_SOCKET_IFNAME": "ib0"}
    group = job_workers(
        key="swa", stage="swa", fold=0, kind="ranks", count=2, run=RunFolder(tmp_path), code=ROOT, store=tmp_path / "s",
        profile_env=profile,
    )  # fmt: skip
    expected = listed | {"PYTHONPATH": str(ROOT), "NCCL_P2P_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo", "RANK": "1"}
    environ = group[1].environ
    assert {name: environ.get(name) for name in expected} == expected
    assert not environ.keys() & (foreign.keys() - expected.keys())
