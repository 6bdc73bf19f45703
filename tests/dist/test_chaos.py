"""Thirty interruptions of every kind, at random moments, and the weights are those of a quiet run."""

import subprocess
import sys

from tests.dist.spawn import ROOT


def test_thirty_random_interruptions_change_no_bit():
    done = subprocess.run(
        [sys.executable, "-m", "tests.dist.chaos", "--rounds", "30"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "bit-identical after 30 interruptions" in done.stdout
