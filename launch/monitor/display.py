"""What a waiting command shows: lines that stay, and below them the progress of what runs.

On a terminal the progress is drawn over itself; elsewhere it is a plain line now and then. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
import time

PLAIN_EVERY_S = 60.0
BAR = 20


def bar(share: float) -> str:
    """Return a share between 0 and 1 as a bar.

    >>> bar(0.5)
    '[##########----------]'
    """
    full = round(BAR * min(max(share, 0.0), 1.0))
    return "[" + "#" * full + "-" * (BAR - full) + "]"


class Display:
    """The standard output of a command that waits. A reader that has gone is no reason to stop: it is passed over."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn: list[str] = []  # the lines below, which are written over
        self._rest = b""  # of a line that is not whole yet
        self._told: dict[str, tuple[float, str]] = {}

    def say(self, text: str) -> None:
        """Print lines that stay."""
        self.pass_on(text.encode() + b"\n")

    def pass_on(self, new: bytes) -> None:
        """Print what another process has written, above the progress."""
        if not self.terminal:
            _write(new)
            return
        whole, newline, self._rest = (self._rest + new).rpartition(b"\n")
        if newline:
            drawn = self._drawn
            self._erase()
            _write(whole + newline)
            self._draw(drawn)

    def progress(self, about: dict[str, tuple[float, str]]) -> None:
        """Show how far the jobs that run are: {name: (share, words)}."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            lines = [f"{bar(share)} {name}: {words}"[:width] for name, (share, words) in about.items()]
            if lines != self._drawn:
                self._erase()
                self._draw(lines)
            return
        now = time.monotonic()
        for name, (_, words) in about.items():
            since, before = self._told.setdefault(name, (now, ""))
            if words != before and now - since >= PLAIN_EVERY_S:
                self._told[name] = (now, words)
                self.say(f"{time.strftime('%H:%M:%S')} {name}: {words}")

    def close(self) -> None:
        """Take the progress away; the lines above stay."""
        self._erase()
        _write(self._rest)
        self._rest = b""

    def _erase(self) -> None:
        if self._drawn:
            _write(f"\x1b[{len(self._drawn)}A\r\x1b[J".encode())
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
        pass  # the work goes on, and the log files have it all
