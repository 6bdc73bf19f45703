"""What a run says: log lines, progress, TensorBoard events. Rank 0 speaks, the others only warn.

No patient name or id ever comes through here: films are named by their SOP instance UID or file name.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from pneumo_dist.runtime.failure import told

if TYPE_CHECKING:
    import numpy as np

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)


def setup(rank: int = 0) -> None:
    """Send log records of this process to its standard output, marked with the rank."""
    mark = f" [rank {rank}]" if rank else ""
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.WARNING if rank else logging.INFO,
        format=f"%(asctime)s{mark} %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for chatty in ("pydicom", "highdicom", "matplotlib", "PIL"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    threading.excepthook = _thread_failed


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Say in one line that a helper thread met a full disk (TensorBoard's writer does); its owner is told as well."""
    line = told(failed.exc_value) if failed.exc_value else None
    if line is None:
        threading.__excepthook__(failed)
    else:
        log.warning("thread %s: %s", failed.thread.name if failed.thread else "?", line)


def _for_show(method: Callable[Concatenate[RunLog, P], None]) -> Callable[Concatenate[RunLog, P], None]:
    """Make a method do nothing where there is no writer, and give the writer up when it cannot write."""

    @functools.wraps(method)
    def tried(self: RunLog, *arguments: P.args, **named: P.kwargs) -> None:
        if self._writer:
            try:
                method(self, *arguments, **named)
            except OSError as error:  # the writer's thread may have met it long before
                self._give_up(error)

    return tried


class RunLog:
    """TensorBoard events of one stage, written by rank 0; on other ranks every call does nothing.

    Events are for looking at: where they cannot be written (disk full), that is said once and the work goes on.
    """

    def __init__(self, folder: Path, first: bool = True, purge_step: int | None = None) -> None:
        """Open the events in `folder`; `purge_step` hides what a lost attempt wrote from that step on."""
        self._folder = folder
        self._writer: Any = None
        if first:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=15)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        log.warning("no TensorBoard events from here on in %s: %s", self._folder, error.strerror or error)

    @_for_show
    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add one point per tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    @_for_show
    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Add a uint8 image of shape (rows, columns, 3)."""
        self._writer.add_image(tag, image, step, dataformats="HWC")

    @_for_show
    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Add a text (Markdown)."""
        self._writer.add_text(tag, text, step)

    @_for_show
    def flush(self) -> None:
        """Put everything on disk now."""
        self._writer.flush()

    @_for_show
    def close(self) -> None:
        """Write what is left and close the files."""
        self._writer.close()


def progress(items: Iterable[T], total: int, what: str, unit: str = "film", every_s: float = 15.0) -> Iterator[T]:
    """Yield from `items`, showing how many of `total` are done: a bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, unit=unit)
        return
    begin = said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - said >= every_s and done < total:
            rate = done / (now - begin)
            log.info(
                "%s: %d of %d %ss, %.1f %ss/s, %.0f s left", what, done, total, unit, rate, unit, (total - done) / rate
            )
            said = now
