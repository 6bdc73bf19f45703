"""The output of a waiting command: progress redrawn in place on a terminal, a line once a minute elsewhere."""

from __future__ import annotations

import sys

import pytest

from launch.monitor import display
from launch.monitor.display import Display, bar


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Display:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "50")
    return Display()


def test_progress_is_redrawn_below_the_messages(terminal: Display, capfd: pytest.CaptureFixture[str]) -> None:
    terminal.progress({"stage 1": (0.1, "step 1/10")})
    terminal.pass_on(b"a line\nhalf a")
    terminal.progress({"stage 1": (0.5, "step 5/10"), "infer": (0.0, "words that are too long for this terminal")})
    terminal.pass_on(b" line\n")
    out = capfd.readouterr().out
    assert "step 1/10" in out and "a line\n" in out and "half a line\n" in out
    last = out.rsplit("\x1b[J", 1)[1].splitlines()
    assert last[0] == "half a line" and last[1] == f"{bar(0.5)} stage 1: step 5/10"
    assert len(last) == 3 and max(map(len, last)) < 50
    assert out.count("\x1b[1A") == 2 and out.count("\x1b[2A") == 1  # as many lines up as had been drawn
    terminal.close()
    assert capfd.readouterr().out == "\x1b[2A\r\x1b[J"


def test_without_a_terminal_progress_is_a_line_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    plain = Display()
    for second in range(0, 150, 10):
        now[0] = second
        plain.progress({"stage 1": (0.1, f"step {second}")})
    plain.pass_on(b"half a")
    plain.close()
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1:] for line in lines] == [["stage 1: step 60"], ["stage 1: step 120"], ["a"]]
