"""The pool of worker processes, the guard against orphaned processes, and the number of cores to use. Quick to import.

Not pebble: all its workers share one lock. A worker that is killed while it sends a large result blocks the others for
ever (despite time-outs), and a hanging one that ignores SIGTERM blocks them for seconds. It is also LGPL.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from pneumo_dist.runtime import stopping
from pneumo_dist.runtime.meeting.launcher import is_local_worker

TIMEOUT_S = 120.0  # of a submitted batch; the decoder of a truncated JPEG-LS stream may take 10 s to fail
PR_SET_PDEATHSIG = 1  # prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
T = TypeVar("T")  # a task
R = TypeVar("R")  # its result
_libc = ctypes.CDLL(None, use_errno=True)  # loaded before any fork, since the guard also runs between fork and exec


def cores(configured: int) -> int:
    """Return the number of processes to use: `configured`, or if that is 0 this task's share of the cores."""
    if configured:
        return configured
    available = len(os.sched_getaffinity(0))
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        available = min(available, int(os.environ["SLURM_CPUS_PER_TASK"]))
    if is_local_worker():  # the local workers share the cores
        available //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, available)


def thread_count(configured: int) -> int:
    """Return the torch threads of a rank: `configured`, or if that is 0 what the environment says, or its cores."""
    said = os.environ.get("OMP_NUM_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK", "")
    first = said.partition(",")[0].strip()  # OpenMP takes a number for each level of nesting
    return configured or int(first if first.isdigit() else 0) or len(os.sched_getaffinity(0))


def keep_memory(largest: int = 64 << 20) -> None:
    """Have malloc keep freed blocks of up to `largest` bytes, so that they cause no page faults when reused.

    Measured: saves a third of the time spent outside the decoders.
    """
    mallopt = getattr(_libc, "mallopt", None)  # glibc only
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, 2 * largest)
        mallopt(M_MMAP_THRESHOLD, largest)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL; exit at once if it is dead already.

    Args:
        parent: the parent's process id. The kernel watches the thread that forked: it must not end earlier.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


class Pool:
    """`count` worker processes. Create the pool before threads and CUDA are in use, since it forks at once; close it.

    Only a task that crashes or hangs fails: the tasks of all batches in flight are repeated one by one, each alone in a
    process of its own. Several threads may submit and wait.
    """

    def __init__(self, count: int, prepare: Callable[[], None]) -> None:
        """Fork the processes; each calls `prepare` first."""
        self.count = count
        self._prepare = prepare
        self._lock = threading.Lock()
        self._answers: weakref.WeakSet[Answer[Any, Any]] = weakref.WeakSet()
        self._executor: ProcessPoolExecutor | None = self._fork(count)

    def submit(self, function: Callable[[T], R], batch: Sequence[T], given_up: Callable[[T, str], R]) -> Answer[T, R]:
        """Submit a batch of tasks to one process; `given_up` returns the result of a task that crashes or hangs."""
        answer = Answer(self, function, batch, given_up)
        with self._lock:
            if self._executor is None:
                self._executor = self._fork(self.count)
            try:
                answer.future = self._executor.submit(_run, function, batch)
            except BrokenProcessPool as error:  # `results` recovers
                answer.future.set_exception(error)
            self._answers.add(answer)
        return answer

    def recover(self, answer: Answer[T, R]) -> None:
        """End the processes and repeat their unfinished tasks one by one. The next batch forks new processes."""
        with self._lock:
            if answer.lost:  # not yet recovered by another thread
                self._end()
                for lost in [answer for answer in self._answers if answer.lost]:
                    lost.repeat(self._alone)

    def close(self) -> None:
        """Kill the processes; unfinished tasks are dropped."""
        with self._lock:
            self._end()

    def _alone(self, function: Callable[[T], R], task: T, given_up: Callable[[T, str], R]) -> R:
        executor = self._fork(1)
        try:
            return executor.submit(function, task).result(TIMEOUT_S)
        except BrokenProcessPool:
            return given_up(task, "the decoder crashed")
        except TimeoutError:
            return given_up(task, f"not decoded within {TIMEOUT_S:.0f} s")
        finally:
            _kill(executor)

    def _fork(self, count: int) -> ProcessPoolExecutor:
        # fork: the processes share anonymous memory with this one and need not import anything again.
        context = multiprocessing.get_context("fork")
        executor = ProcessPoolExecutor(count, context, _start, (os.getpid(), self._prepare))
        executor.submit(os.getpid).result(TIMEOUT_S)  # the first task forks all processes, in this thread
        return executor

    def _end(self) -> None:
        if self._executor is not None:
            _kill(self._executor)
            self._executor = None


class Answer(Generic[T, R]):
    """The future results of one batch."""

    def __init__(
        self,
        pool: Pool,
        function: Callable[[T], R],
        batch: Sequence[T],
        given_up: Callable[[T, str], R],
    ) -> None:
        self._pool, self._function, self._batch, self._given_up = pool, function, batch, given_up
        self.future: Future[list[R]] = Future()

    def results(self) -> list[R]:
        """Wait for the results, in the order of the batch; raise the error of a task."""
        try:
            return self.future.result(TIMEOUT_S)
        except (BrokenProcessPool, CancelledError, TimeoutError):
            self._pool.recover(self)
            return self.future.result()

    def result(self) -> R:
        """Wait for the result of a batch of one."""
        return self.results()[0]

    @property
    def lost(self) -> bool:
        """Return whether the results are missing: unfinished, cancelled, or lost with a process."""
        future = self.future
        return not future.done() or future.cancelled() or isinstance(future.exception(), BrokenProcessPool)

    def repeat(self, alone: Callable[..., R]) -> None:
        """Repeat the tasks one by one."""
        future: Future[list[R]] = Future()
        try:
            future.set_result([alone(self._function, task, self._given_up) for task in self._batch])
        except Exception as error:  # raised in the thread that waits for this answer
            future.set_exception(error)
        self.future = future


def _start(parent: int, prepare: Callable[[], None]) -> None:
    stopping.ignore()
    die_with_parent(parent)
    keep_memory()
    prepare()


def _run(function: Callable[[T], R], batch: Sequence[T]) -> list[R]:
    return [function(task) for task in batch]


def _kill(executor: ProcessPoolExecutor) -> None:
    """Kill the processes of an executor, since a hanging task ignores everything else, and wait for their end."""
    for process in list(executor._processes.values()):
        process.kill()
    # The executor's thread may have read half a result and would wait for the rest.
    executor._result_queue._writer.close()  # type: ignore[attr-defined]
    executor.shutdown(cancel_futures=True)  # its thread joins the processes
