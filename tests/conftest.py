"""What every test stands on: an environment without traces of a SLURM job, and no look-ups in the network."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
# A test that runs inside somebody's SLURM job (or after `export SLURM_CONF=...`) must not take itself for a rank of
# that job, nor talk to that cluster: tests/slurm hands its private cluster to those who ask.
for _name in list(os.environ):
    if _name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")) or _name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PNEUMO_STORE",
        "PNEUMO_GPUS",
        "PNEUMO_RANKS",
    ):
        del os.environ[_name]


@pytest.fixture(autouse=True)
def umask_of_the_shell() -> Iterator[None]:
    """Undo what a submission in this process does to the files of later tests."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
