"""The rendezvous of the ranks of a job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.ranks import Ranks, is_local_worker, rendezvous
from pneumo_dist.runtime.stopping import under_slurm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "40007")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[03-04,7],big1")


def test_ranks_of_a_slurm_job_meet_on_its_first_node_at_a_port_of_its_own() -> None:
    assert rendezvous() == "gpu03:10007"


def test_torchruns_address_and_port_have_priority_over_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert rendezvous() == "localhost:29500"


def test_the_module_prints_the_endpoint_for_torchrun() -> None:
    command = [sys.executable, "-m", "pneumo_dist.runtime.ranks"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "gpu03:10007\n"


def test_a_worker_of_the_local_executor_inside_a_slurm_job_is_no_slurm_task() -> None:
    job = {"SLURM_JOB_ID": "7"}
    assert under_slurm(job) and not is_local_worker(job)
    worker = job | {"PNEUMO_STORE": "/tmp/store"}
    assert is_local_worker(worker) and not under_slurm(worker)


def test_a_job_with_gpus_does_not_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Ranks().device.type == "cpu"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    with pytest.raises(Failure, match="PNEUMO_TORCH=cuda bash launch/setup_env.sh"):
        _ = Ranks().device
