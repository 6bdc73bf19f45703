"""Overlap reading, the forward pass and writing, in order and with bounded memory.

Knows neither films nor models; `overlap` starts no thread or process itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from pneumo_dist.runtime.processes import cores

Batch = TypeVar("Batch")
Read = TypeVar("Read")
Computed = TypeVar("Computed")
Written = TypeVar("Written")
Result = TypeVar("Result", covariant=True)


class Pending(Protocol[Result]):
    """A future, or anything else with a result to wait for."""

    def result(self) -> Result:
        """Wait and return the result; raise what the work raised."""


def film_threads(count: int | None = None) -> ThreadPoolExecutor:
    """Return a pool of threads for work on whole films: OpenCV, NumPy and zlib release the GIL while they compute."""
    import cv2

    # Without OpenCV's own threads: they would compete with these for the same cores.
    return ThreadPoolExecutor(count or min(8, cores(0)), "film", initializer=cv2.setNumThreads, initargs=(0,))


def overlap(
    batches: Iterable[Batch],
    read: Callable[[Batch], Sequence[Pending[Read]]],
    compute: Callable[[Batch, list[Read]], Callable[[], Computed]],
    write: Callable[[Batch, list[Read], Computed], Sequence[Pending[Written]]],
    ahead: int = 2,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Batch, list[Written]]]:
    """Yield (batch, results of `write`) in order, while other batches are read, computed and written.

    `read` and `write` submit work to a pool and return at once. `compute` starts a batch and returns a function that
    waits for it; that function is called after the next batch has started, so a GPU always has a batch queued.
    At most 2 * ahead + 1 batches are in memory. Once `stopped`, no further batch starts; the started ones are yielded.
    """
    source = iter(batches)
    reading: deque[tuple[Batch, Sequence[Pending[Read]]]] = deque()
    writing: deque[tuple[Batch, Sequence[Pending[Written]]]] = deque()
    running: tuple[Batch, list[Read], Callable[[], Computed]] | None = None
    while True:
        if stopped():
            source = iter(())
            reading.clear()
        while len(reading) < ahead and (batch := next(source, None)) is not None:
            reading.append((batch, read(batch)))
        started = None
        if reading:
            batch, futures = reading.popleft()
            inputs = [future.result() for future in futures]
            started = (batch, inputs, compute(batch, inputs))
        if running is not None:
            batch, inputs, wait = running
            writing.append((batch, write(batch, inputs, wait())))
        running = started
        ended = running is None and not reading
        while writing and (ended or len(writing) > ahead):
            batch, written = writing.popleft()
            yield batch, [future.result() for future in written]
        if ended:
            return
