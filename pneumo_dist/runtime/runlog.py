"""What a run says: log lines, progress, TensorBoard events. Rank 0 speaks, the others only warn.

No patient name or id ever comes through here: films are named by their SOP instance UID or file name.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from pneumo_dist.runtime.failure import error_line

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
    line = error_line(failed.exc_value) if failed.exc_value else None
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
    `attempt` counts the starts of the stage that have written events, this one included.
    """

    def __init__(self, folder: Path, first: bool = True, purge_step: int | None = None) -> None:
        """Open the events in `folder`; `purge_step` hides what a lost attempt wrote from that step on."""
        self._folder = folder
        self._writer: Any = None
        self.attempt = 1 + len(list(folder.glob("events.*")))
        if first:
            from torch.utils.tensorboard import SummaryWriter

            try:
                # The queue is long so that a slow file system does not hold up the training.
                self._writer = SummaryWriter(str(folder), purge_step=purge_step, max_queue=1000, flush_secs=15)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        log.warning("no TensorBoard events from here on in %s: %s", self._folder, error.strerror or error)

    @_for_show
    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add one point per tag; what is undefined (None) is left out."""
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)

    @_for_show
    def image(self, tag: str, jpeg: bytes, shape: tuple[int, int], step: int) -> None:
        """Add an encoded colour picture of `shape` (rows, columns): a JPEG takes a tenth of what `add_image` writes."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        picture = Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=jpeg)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    @_for_show
    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Add a text (Markdown)."""
        self._writer.add_text(tag, text, step)

    @_for_show
    def pr_curve(self, tag: str, truth: np.ndarray, scores: np.ndarray, step: int) -> None:
        """Add the precision-recall curve of scores in 0..1 (n,) against boolean truth (n,)."""
        # Finer than the default: highest scores of films crowd near 1.
        self._writer.add_pr_curve(tag, truth, scores, step, num_thresholds=501)

    @_for_show
    def layout(self, pages: Mapping[str, Mapping[str, list[str]]]) -> None:
        """Set the page of custom scalars: {heading: {chart: regular expressions of tags}}."""
        charts = {page: {name: ["Multiline", tags] for name, tags in of.items()} for page, of in pages.items()}
        self._writer.add_custom_scalars(charts)

    @_for_show
    def hparams(self, values: Mapping[str, float | str]) -> None:
        """Enter the settings into the table that compares runs; TensorBoard puts every scalar's last value beside them.

        `SummaryWriter.add_hparams` would make a run of its own, apart from the curves, and fix the columns to the first
        run's; left to itself TensorBoard shows first what differs between runs.
        """
        from torch.utils.tensorboard.summary import hparams

        _, start, _ = hparams(dict(values), {})
        self._writer.file_writer.add_summary(start)

    @_for_show
    def flush(self) -> None:
        """Put everything on disk now."""
        self._writer.flush()

    @_for_show
    def close(self) -> None:
        """Write what is left and close the files."""
        self._writer.close()


def progress_bar(items: Iterable[T], total: int, what: str, unit: str = "film", every_s: float = 15.0) -> Iterator[T]:
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
