"""Who started a process, by its environment: SLURM's counts, torchrun's or the local executor's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pneumo_dist.runtime.meeting.launcher import Launch, contradiction, is_local_worker, launch_of, left_behind
from pneumo_dist.runtime.stopping import under_slurm

ROOT = Path(__file__).resolve().parents[2]
BATCH = {"SLURM_JOB_ID": "40007", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
STEP = BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip
STALE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # fmt: skip
TORCHRUN = STALE | {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu03", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
ONE_PER_NODE = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environ", "by", "place", "address"),
    [
        (STEP, "SLURM", (3, 4, 1, 2), "gpu03"),
        (STEP | STALE, "SLURM", (3, 4, 1, 2), "gpu03"),
        (STEP | {"SLURM_STEP_NUM_NODES": "1"}, "SLURM", (3, 4, 1, 1), "127.0.0.1"),
        (STEP | {"SLURM_STEP_NODELIST": "big1,gpu[03-04]"}, "SLURM", (3, 4, 1, 2), "big1"),
        (STEP | {"SLURM_STEP_NODELIST": "r[1-2]-n[07,9]-ib"}, "SLURM", (3, 4, 1, 2), "r1-n07-ib"),
        (ONE_PER_NODE | TORCHRUN, "torchrun", (5, 8, 1, 2), "gpu03"),
        (TORCHRUN, "torchrun", (5, 8, 1, 2), "gpu03"),
        (BATCH | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "torchrun", (5, 8, 1, 1), "127.0.0.1"),
        (STEP | STALE | {"PNEUMO_STORE": "/tmp/s"}, "this machine", (0, 1, 0, 1), "127.0.0.1"),
        (STALE, "", (0, 1, 0, 1), "127.0.0.1"),
        ({}, "", (0, 1, 0, 1), "127.0.0.1"),
    ],
)
def test_the_launcher_and_the_place_it_gives(environ: dict, by: str, place: tuple[int, ...], address: str) -> None:
    launch = launch_of(environ)
    assert launch.by == by and launch.address == address
    assert (launch.rank, launch.world_size, launch.local_rank, launch.nodes) == place


@pytest.mark.parametrize(
    ("environ", "submitted", "words"),
    [
        (STEP, 0, ""),
        (STEP, 4, ""),
        (STEP | STALE, 4, ""),
        (ONE_PER_NODE | TORCHRUN, 8, ""),
        (TORCHRUN, 0, ""),
        ({}, 0, ""),
        (STALE, 0, ""),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, 2, "submitted for 2 ranks, but SLURM started 1"),
        (STALE, 2, "submitted for 2 ranks, but nothing started 1"),
        (STEP | TORCHRUN, 0, "RANK=5, WORLD_SIZE=8) contradict SLURM's (4 tasks): unset RANK WORLD_SIZE"),
        (
            STEP | TORCHRUN | {"GROUP_WORLD_SIZE": "1"},
            0,
            "start it in a job step of one task per node (on one node: srun --ntasks=1)",
        ),
        (STALE | {"WORLD_SIZE": "2"}, 0, "neither torchrun nor srun started this process: unset RANK"),
        (BATCH, 0, "2 nodes and 4 tasks, but srun did not start this process"),
        (BATCH | STALE, 0, "2 nodes and 4 tasks, but srun did not start this process"),
    ],
)
def test_a_place_that_cannot_be_known_is_refused(environ: dict, submitted: int, words: str) -> None:
    environ = environ | {"PNEUMO_RANKS": str(submitted)}
    problem = contradiction(launch_of(environ), environ)
    assert words in problem and bool(problem) == bool(words)


def test_an_earlier_torchruns_variables_are_named_where_they_do_not_count() -> None:
    assert left_behind(launch_of(STEP | STALE), STEP | STALE)[0] == "RANK=0"
    assert not left_behind(launch_of(TORCHRUN), TORCHRUN) and not left_behind(launch_of(STEP), STEP)


def test_attempts_of_a_job_have_meetings_of_their_own() -> None:
    first, again = launch_of(STEP), launch_of(STEP | {"SLURM_RESTART_COUNT": "1"})
    assert first.session != again.session and first.ports == launch_of(STEP | {"SLURM_PROCID": "0"}).ports
    torchrun = BATCH | TORCHRUN
    here, restarted = launch_of(torchrun), launch_of(torchrun | {"SLURM_RESTART_COUNT": "1"})
    alias = launch_of(torchrun | {"MASTER_ADDR": "gpu03-ib", "TORCHELASTIC_RESTART_COUNT": "1"})
    assert here.session == alias.session != restarted.session
    assert len(set(first.ports)) == 16 and all(10000 <= port < 30000 for port in first.ports)


def test_the_module_prints_the_endpoint_for_torchrun() -> None:
    command = [sys.executable, "-m", "pneumo_dist.runtime.meeting.launcher"]
    around = {"SLURM_STEP_NODELIST": "login1"}  # of an interactive step that called sbatch
    environ = os.environ | around | {"SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "gpu[03-04,7],big1"}
    printed = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout
    assert printed == "gpu03:30007\n" and 30007 not in Launch(session="1").ports


def test_a_worker_of_the_local_executor_inside_a_slurm_job_is_no_slurm_task() -> None:
    job = {"SLURM_JOB_ID": "7"}
    assert under_slurm(job) and not is_local_worker(job)
    worker = job | {"PNEUMO_STORE": "/tmp/store"}
    assert is_local_worker(worker) and not under_slurm(worker)
