"""The output of a command: without control characters; of one that waits for jobs, progress lines below the messages.

A terminal shows progress bars that are redrawn in place; other outputs get a plain line once a minute.
"""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from pneumo_dist.runtime.runlog import plain_text

PLAIN_INTERVAL_S = 60.0
BAR_WIDTH = 20


class _PlainText:
    """A text stream to which control characters are written as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(plain_text(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def plain_output() -> Iterator[None]:
    """Write any text of a file name, a configuration or a log to the terminal, but no control character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not be UTF-8
    out, error = _PlainText(sys.stdout), _PlainText(sys.stderr)
    with redirect_stdout(out), redirect_stderr(error):
        yield


def bar(share: float) -> str:
    """Return a share between 0 and 1 as a bar.

    >>> bar(0.5)
    '[##########----------]'
    """
    full = round(BAR_WIDTH * min(max(share, 0.0), 1.0))
    return "[" + "#" * full + "-" * (BAR_WIDTH - full) + "]"


class Display:
    """The standard output of a waiting command. A closed output is ignored, because the jobs need the command."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn: list[str] = []  # the progress lines on the screen
        self._partial = b""  # the start of a line whose end has not been written yet
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # output may end within a character
        self._last: dict[str, tuple[float, str]] = {}  # time and text of each job's last plain line

    def say(self, text: str) -> None:
        """Print a message."""
        self.pass_on(text.encode() + b"\n")

    def pass_on(self, output: bytes) -> None:
        """Print the output of another process above the progress."""
        output = plain_text(self._decoder.decode(output)).encode()
        if not self.terminal:
            _write(output)
            return
        complete, newline, self._partial = (self._partial + output).rpartition(b"\n")
        if newline:
            drawn = self._drawn
            self._erase()
            _write(complete + newline)
            self._draw(drawn)

    def progress(self, jobs: dict[str, tuple[float, str]]) -> None:
        """Show the progress of the running jobs: {name: (share done, text)}."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            lines = [f"{bar(share)} {name}: {text}"[:width] for name, (share, text) in jobs.items()]
            if lines != self._drawn:
                self._erase()
                self._draw(lines)
            return
        now = time.monotonic()
        for name, (_, text) in jobs.items():
            since, before = self._last.setdefault(name, (now, ""))
            if text != before and now - since >= PLAIN_INTERVAL_S:
                self._last[name] = (now, text)
                self.say(f"{time.strftime('%H:%M:%S')} {name}: {text}")

    def close(self) -> None:
        """Erase the progress lines; the messages above stay."""
        self._erase()
        _write(self._partial)
        self._partial = b""

    def _erase(self) -> None:
        if self._drawn:
            _write(f"\x1b[{len(self._drawn)}A\r\x1b[J".encode())  # up to the first progress line, clear from there
            self._drawn = []

    def _draw(self, lines: list[str]) -> None:
        _write("".join(f"{line}\n" for line in lines).encode())
        self._drawn = lines


def _write(data: bytes) -> None:
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except (OSError, ValueError):
        pass  # the reader has gone; the log files hold the output
