"""Signals become flags; their meaning depends on where the process runs."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from pneumo_dist.runtime import stopping


@pytest.fixture
def stop(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    kept = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield stopping.install()
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_outside_slurm_every_signal_requests_an_exit(stop, number):
    os.kill(os.getpid(), number)
    assert stop.requested and stop.leave == number and not stop.save
    with pytest.raises(stopping.Stopped) as raised:
        stop.check()
    assert raised.value.status == 128 + number


def test_under_slurm_sigterm_requests_a_save_only(stop, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("PNEUMO_STORE", raising=False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.save and not stop.requested
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.leave == signal.SIGUSR2


def test_a_signal_that_arrives_while_blocked_is_not_lost():
    program = textwrap.dedent("""
        import os, signal
        from pneumo_dist.runtime import stopping
        os.kill(os.getpid(), signal.SIGUSR2)  # blocked by the launcher: pending, harmless
        stop = stopping.install()
        print(stop.leave == signal.SIGUSR2)
    """)
    done = subprocess.run(
        ["env", "--block-signal=USR2", sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
