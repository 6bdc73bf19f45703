"""Log lines, progress bars and TensorBoard events. Rank 0 logs everything, the other ranks only warnings.

Never log a patient name or id: films are named by their SOP instance UID or file name.
"""

from __future__ import annotations

import functools
import logging
import re
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
# All but tab and line feed, the marks that reverse the direction of text, and bytes of a file name that are no text.
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain_text(text: str) -> str:
    r"""Return a text with its control characters as escapes: a file name or a log must not control a terminal.

    >>> plain_text("\x1b[2Jfilm")
    '\\x1b[2Jfilm'
    """
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain_text(super().format(record))


def setup(rank: int = 0) -> None:
    """Send this process's log records to standard output, marked with the rank."""
    mark = f" [rank {rank}]" if rank else ""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines(f"%(asctime)s{mark} %(levelname).1s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING if rank else logging.INFO, force=True)
    for name in ("pydicom", "highdicom", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.ERROR)
    threading.excepthook = _thread_failed


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Log a disk error in a thread (TensorBoard's writer) as one line; the thread's owner handles the error as well."""
    line = error_line(failed.exc_value) if failed.exc_value else None
    if line is None:
        threading.__excepthook__(failed)
    else:
        log.warning("thread %s: %s", failed.thread.name if failed.thread else "?", line)


def _best_effort(method: Callable[Concatenate[RunLog, P], None]) -> Callable[Concatenate[RunLog, P], None]:
    """Make a method do nothing where there is no writer, and close the writer when it cannot write."""

    @functools.wraps(method)
    def wrapper(self: RunLog, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._writer:
            try:
                method(self, *args, **kwargs)
            except OSError as error:  # possibly of an earlier call: the writer's thread reports it late
                self._give_up(error)

    return wrapper


class RunLog:
    """TensorBoard events of one stage, written by rank 0; on other ranks every call does nothing.

    Events are not needed for the result: when they cannot be written (disk full), one warning is logged and the stage
    goes on.
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
                # A long queue, so that a slow file system does not delay the training.
                self._writer = SummaryWriter(str(folder), purge_step=purge_step, max_queue=1000, flush_secs=15)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        log.warning("no more TensorBoard events in %s: %s", self._folder, error.strerror or error)

    @_best_effort
    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add one point per tag; undefined values (None) are left out."""
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)

    @_best_effort
    def image(self, tag: str, jpeg: bytes, shape: tuple[int, int], step: int) -> None:
        """Add an encoded colour picture of `shape` (rows, columns): a JPEG takes a tenth of what `add_image` writes."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        picture = Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=jpeg)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    @_best_effort
    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Add a text (Markdown)."""
        self._writer.add_text(tag, text, step)

    @_best_effort
    def pr_curve(self, tag: str, truth: np.ndarray, scores: np.ndarray, step: int) -> None:
        """Add the precision-recall curve of scores in 0..1 (n,) against boolean truth (n,)."""
        # Finer than the default: highest scores of films crowd near 1.
        self._writer.add_pr_curve(tag, truth, scores, step, num_thresholds=501)

    @_best_effort
    def layout(self, pages: Mapping[str, Mapping[str, list[str]]]) -> None:
        """Set the page of custom scalars: {heading: {chart: regular expressions of tags}}."""
        charts = {page: {name: ["Multiline", tags] for name, tags in of.items()} for page, of in pages.items()}
        self._writer.add_custom_scalars(charts)

    @_best_effort
    def hparams(self, values: Mapping[str, float | str]) -> None:
        """Add the settings to the table that compares runs; TensorBoard adds the last value of every scalar.

        `SummaryWriter.add_hparams` would create a separate run without the curves and fix the columns to those of the
        first run; this way TensorBoard lists the settings that differ between runs first.
        """
        from torch.utils.tensorboard.summary import hparams

        _, start, _ = hparams(dict(values), {})
        self._writer.file_writer.add_summary(start)

    @_best_effort
    def flush(self) -> None:
        """Write everything to disk now."""
        self._writer.flush()

    @_best_effort
    def close(self) -> None:
        """Write the remaining events and close the files."""
        self._writer.close()


def progress_bar(items: Iterable[T], total: int, title: str, unit: str = "film", every_s: float = 15.0) -> Iterator[T]:
    """Yield from `items` and show how many of `total` are done: a bar on a terminal, else a line every `every_s`."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=title, unit=unit)
        return
    begin = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= every_s and done < total:
            rate = done / (now - begin)
            left_s = (total - done) / rate
            log.info("%s: %d/%d %ss, %.1f %ss/s, %.0f s left", title, done, total, unit, rate, unit, left_s)
            shown = now
