"""After interruptions of every kind at random moments, the weights are those of an uninterrupted run."""

import subprocess
import sys

import pytest

from tests.dist.spawn import ROOT


# Three ranks: the order of sums depends on the buckets of DDP.
@pytest.mark.parametrize(("ranks", "rounds"), [(2, 30), (3, 3)])
def test_random_interruptions_change_no_bit(ranks, rounds):
    command = [sys.executable, "-m", "tests.dist.chaos", "--ranks", str(ranks), "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert f"bit-identical after {rounds} interruptions" in done.stdout
