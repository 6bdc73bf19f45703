"""Reading, the forward pass and writing at the same time, in order, with bounded memory.

Knows nothing of films or models; never starts a thread or process itself.
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
    """Something whose result can be waited for: a future."""

    def result(self) -> Result:
        """Wait for it; raise what the work raised."""


def film_threads(count: int | None = None) -> ThreadPoolExecutor:
    """Return threads for work on whole films: OpenCV, NumPy and zlib release the interpreter while they compute."""
    import cv2

    # OpenCV's own threads inside each of ours would only get in each other's way.
    return ThreadPoolExecutor(count or min(8, cores(0)), "film", initializer=cv2.setNumThreads, initargs=(0,))


def overlap(
    batches: Iterable[Batch],
    read: Callable[[Batch], Sequence[Pending[Read]]],
    compute: Callable[[Batch, list[Read]], Callable[[], Computed]],
    write: Callable[[Batch, list[Read], Computed], Sequence[Pending[Written]]],
    ahead: int = 2,
) -> Iterator[tuple[Batch, list[Written]]]:
    """Yield (batch, what was written) in order, while other batches are being read, computed and written.

    `read` and `write` hand work to a pool and return at once; `compute` starts a batch and returns a function that
    waits for it, which is called after the next batch was started. At most 2 * ahead + 1 batches are held.
    """
    source = iter(batches)
    reading: deque[tuple[Batch, Sequence[Pending[Read]]]] = deque()
    writing: deque[tuple[Batch, Sequence[Pending[Written]]]] = deque()
    running: tuple[Batch, list[Read], Callable[[], Computed]] | None = None
    while True:
        while len(reading) < ahead and (batch := next(source, None)) is not None:
            reading.append((batch, read(batch)))
        started = None
        if reading:
            batch, futures = reading.popleft()
            films = [future.result() for future in futures]
            started = (batch, films, compute(batch, films))
        if running is not None:
            batch, films, wait = running
            writing.append((batch, write(batch, films, wait())))
        running = started
        ended = running is None and not reading
        while writing and (ended or len(writing) > ahead):
            batch, done = writing.popleft()
            yield batch, [future.result() for future in done]
        if ended:
            return
