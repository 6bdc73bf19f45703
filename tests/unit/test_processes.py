"""The pool of processes: what crashes or hangs costs itself only, and no process outlives the pool or its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pneumo_dist.runtime import processes
from pneumo_dist.runtime.processes import Answer, Pool, thread_count

ROOT = Path(__file__).resolve().parents[2]


def work(task: str) -> str:
    if task == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hang":
        signal.pause()
    if task == "raise":
        raise ArithmeticError(task)
    time.sleep(0.01)
    return task.upper()


def send_half(_task: str) -> str:
    """Die like a process that is killed while it sends a large result."""
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals:  # a local variable of concurrent.futures.process._process_worker
        assert frame.f_back is not None
        frame = frame.f_back
    os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 1_000_000) + b"the first bytes")
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def given_up(task: str, reason: str) -> str:
    return f"{task}: {reason}"


def submit(pool: Pool, *batch: str) -> Answer[str, str]:
    return pool.submit(work, batch, given_up)


def gone(pids: list[int], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def pid_of(_task: str) -> int:
    time.sleep(0.05)  # so that no process takes two
    return os.getpid()


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(processes, "TIMEOUT_S", 0.7)
    workers = Pool(2, lambda: None)
    yield workers
    workers.close()
    assert multiprocessing.active_children() == []


def test_results_come_in_the_order_of_the_batch(pool):
    answers = [submit(pool, *(f"{i}{letter}" for letter in "abc")) for i in range(20)]
    assert [answer.results() for answer in answers] == [[f"{i}A", f"{i}B", f"{i}C"] for i in range(20)]


def test_a_crash_and_a_hang_cost_themselves_and_nothing_in_flight_beside_them(pool):
    tasks = ["a", "crash", "b", "hang", "c", "d"]
    answers = [submit(pool, task, f"{task}2") for task in tasks]
    wanted = {"crash": "crash: the decoder crashed", "hang": "hang: not decoded within 1 s"}
    assert [a.results() for a in answers] == [[wanted.get(t, t.upper()), f"{t}2".upper()] for t in tasks]
    assert submit(pool, "after").result() == "AFTER"


def test_one_bad_task_does_not_cost_the_others_of_its_batch(pool):
    assert submit(pool, "a", "crash", "b").results() == ["A", "crash: the decoder crashed", "B"]


def test_what_is_submitted_to_a_broken_pool_is_done(pool):
    crash = submit(pool, "crash")
    while not crash.future.done():
        time.sleep(0.01)
    assert submit(pool, "a").result() == "A"
    assert crash.result() == "crash: the decoder crashed"


def test_several_threads_submit_and_wait(pool):
    tasks = [f"{i}" if i % 10 else "crash" for i in range(40)]
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda task: submit(pool, task).result(), tasks))
    assert done == [given_up(t, "the decoder crashed") if t == "crash" else t for t in tasks]


def test_an_error_of_a_task_is_raised_where_its_result_is_asked_for(pool):
    wrong, crash, good = submit(pool, "raise"), submit(pool, "crash"), submit(pool, "a")
    assert good.result() == "A" and "crashed" in crash.result()
    with pytest.raises(ArithmeticError):
        wrong.result()


def test_no_process_is_left_after_close(pool):
    pids = [submit_pid.result() for submit_pid in [pool.submit(pid_of, ["x"], lambda *_: 0) for _ in range(4)]]
    hanging = submit(pool, "hang")
    pool.close()
    assert gone(pids, 0.0) and os.getpid() not in pids and hanging.lost


def test_the_processes_ignore_the_signals_of_their_owner(pool):
    pid = pool.submit(pid_of, ["x"], lambda *_: 0).result()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        os.kill(pid, signum)
    time.sleep(0.1)
    assert _alive(pid) and submit(pool, "a").result() == "A"


@pytest.mark.parametrize("state", ["idle", "busy", "replaced"])
def test_the_processes_die_with_a_parent_that_is_killed(state):
    program = """
import os, signal, sys
from pneumo_dist.runtime.processes import Pool
from tests.unit.test_processes import given_up, pid_of, work
pool = Pool(2, lambda: None)
if sys.argv[1] == "replaced":
    pool.submit(work, ["crash"], given_up).result()
answers = [pool.submit(pid_of, ["x"], lambda *_: 0) for _ in range(6)]
pids = {answer.result() for answer in answers}
if sys.argv[1] == "busy":
    answers = [pool.submit(work, ["hang"], given_up) for _ in range(2)]
print(*pids, flush=True)
signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, state], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(_alive, pids))
        parent.kill()
    assert gone(pids)


def test_a_result_that_was_sent_by_half_keeps_neither_the_others_nor_the_exit_waiting():
    program = """
from pneumo_dist.runtime import processes
from tests.unit.test_processes import given_up, send_half, work
processes.TIMEOUT_S = 0.7
pool = processes.Pool(2, lambda: None)
half, whole = pool.submit(send_half, ["half"], given_up), pool.submit(work, ["whole"], given_up)
print(half.result(), whole.result(), sep="; ")
pool.close()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout == "half: not decoded within 1 s; WHOLE\n"


def test_a_child_whose_parent_is_dead_already_leaves():
    child = multiprocessing.get_context("fork").Process(target=processes.die_with_parent, args=(os.getpid() + 1,))
    child.start()
    child.join()
    assert child.exitcode == 1


@pytest.mark.parametrize(("said", "threads"), [("8,2", 8), (" 3 ", 3), ("", 5), ("many", len(os.sched_getaffinity(0)))])
def test_a_rank_has_the_threads_that_openmp_reads(said: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert thread_count(0) == threads
