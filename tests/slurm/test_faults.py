"""Nine faults of a cluster, each during a short training with one dependent job.

An undisturbed training is the reference: after every fault the final weights are bit-identical.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.slurm.private import PROFILE, TINY, PrivateCluster, same_weights, until

FEW_BATCHES = 3  # after this many batches a fault loses work
USR2_PENDING = 1 << (signal.SIGUSR2 - 1)


def ranks_of(job_id: str) -> list[int]:
    """Return the process ids, as this machine sees them, of the Python ranks of a job in rank order."""
    ranks = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if environment.get("SLURM_JOB_ID") == job_id and "SLURM_PROCID" in environment and "python" in words[0]:
            ranks[int(entry.name)] = (int(environment["SLURM_PROCID"]), parent)
    # Loader workers have the same environment, but their parent is a rank.
    return sorted((pid for pid in ranks if ranks[pid][1] not in ranks), key=lambda pid: ranks[pid][0])


def warned(pid: int) -> bool:
    """Tell whether a held process has received SIGUSR2; SLURM sends SIGCONT with it, so the process may have ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return True
    return "T" not in lines["State"] or bool(int(lines["ShdPnd"], 16) & USR2_PENDING)


def hold(pids: list[int], signum: int = signal.SIGSTOP) -> None:
    """Stop processes (or continue them, with SIGCONT)."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


@dataclass(frozen=True)
class Training:
    """A training of stage 1 on two nodes and the job that depends on it."""

    cluster: PrivateCluster
    run: Path
    profile: Path
    words: tuple[object, ...]

    def submit_stage(self, stage: str) -> str:
        """Submit stage 1 ("1") or the batch-norm job ("swa"); return its id."""
        nodes = {"1": 2, "swa": 1}[stage]
        self.cluster.submit("--stage", stage, "--nodes", nodes, "--profile", self.profile, *self.words)
        rows = [json.loads(line) for line in (self.run / "jobs/submitted.jsonl").read_text().splitlines()]
        return [str(row["job_id"]) for row in rows if row["stage"] == stage][-1]

    def submit(self) -> tuple[str, str]:
        """Submit the training and, after it, the batch-norm job; return their ids."""
        return self.submit_stage("1"), self.submit_stage("swa")

    def batches(self) -> int:
        """Return how many batches the newest checkpoint holds."""
        try:
            last = json.loads((self.run / "fold0/stage1/checkpoints/LAST").read_text())
        except FileNotFoundError:
            return 0
        return int(Path(last["checkpoints"][-1]["file"]).stem)

    def begin(self) -> tuple[str, str]:
        """Submit, and return when the training has a checkpoint."""
        job, child = self.submit()
        until(lambda: self.batches() >= FEW_BATCHES, 240, f"a checkpoint in {self.run}", every_s=0.05)
        assert self.cluster.state(job) == "RUNNING"
        return job, child

    def requeued(self, job: str) -> None:
        """Wait until a job has been requeued once."""
        until(lambda: self.cluster.job(job)["Restarts"] == "1", 120, f"a requeue of job {job}")

    def log(self, job: str) -> str:
        """Return what rank 0 of a job wrote."""
        return "".join(path.read_text() for path in sorted((self.run / "jobs").glob(f"{job}_0_log.*")))

    def check(self, child: str, reference: Path) -> None:
        """Wait for the dependent job; the weights must be bit-identical to the reference."""
        assert self.cluster.wait_for(child, within_s=400) == "COMPLETED"
        same_weights(reference / "fold0/swa/model.pt", self.run / "fold0/swa/model.pt")
        same_weights(reference / "fold0/stage1/last.pt", self.run / "fold0/stage1/last.pt")


def training(shards: Path, cluster: PrivateCluster, root: Path, name: str, partition: str = "batch") -> Training:
    """Describe a training of 48 steps on the shared shards, in a separate run.

    It is long enough not to end within the seconds that SLURM leaves to a job that it kills.
    """
    profile = root / f"{name}.profile.yaml"
    profile.write_text(f"{PROFILE.read_text()}\npartition: {partition}\n")
    words = ("stages=1,swa", "stage1.epochs=12", "train.eval_every=12", "train.save_every_s=3")
    fixed = ("--config", TINY, "--run", name, f"run_root={root}", f"data.shard_dir={shards}")
    return Training(cluster, root / name, profile, (*fixed, *words))


@pytest.fixture(scope="module")
def reference(shards: Path, cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the undisturbed run."""
    calm = training(shards, cluster, tmp_path_factory.mktemp("reference"), "calm")
    _, child = calm.submit()
    assert cluster.wait_for(child, within_s=400) == "COMPLETED"
    return calm.run


@pytest.fixture
def disturbed(
    shards: Path, reference: Path, free_cluster: PrivateCluster, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Training]:
    """Return a training to be disturbed; nothing of it is left in the queue afterwards."""
    yield training(shards, free_cluster, tmp_path, "shaken", getattr(request, "param", "batch"))
    free_cluster.command("scancel", "--user", "root")


def test_a_time_limit_saves_requeues_and_ends_in_the_same_bits(disturbed: Training, reference: Path) -> None:
    job, child = disturbed.begin()
    # SLURM checks time limits every 30 s only: hold the ranks until its signal arrives.
    ranks = ranks_of(job)
    assert len(ranks) == 2
    hold(ranks)
    before = disturbed.batches()
    end = (datetime.now() + timedelta(seconds=45)).strftime("%Y-%m-%dT%H:%M:%S")
    disturbed.cluster.command("scontrol", "update", f"jobid={job}", f"EndTime={end}")
    until(lambda: all(map(warned, ranks)), 40, "SLURM's warning of the time limit")
    hold(ranks, signal.SIGCONT)
    disturbed.requeued(job)
    assert disturbed.batches() > before, "the signal leaves time for one more save"
    disturbed.cluster.command("scontrol", "update", f"jobid={job}", "TimeLimit=30")
    disturbed.check(child, reference)
    assert disturbed.cluster.job(job)["Restarts"] == "1"
    assert "resuming at" in disturbed.log(job)


@pytest.mark.parametrize("disturbed", ["low"], indirect=True)
def test_b_preemption_by_a_higher_partition_ends_in_the_same_bits(disturbed: Training, reference: Path) -> None:
    job, child = disturbed.begin()
    urgent = disturbed.cluster.command(
        "sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    ).stdout.strip()
    # The grace time begins with SIGTERM: the ranks save and continue. Held, they cannot finish before it ends.
    until(lambda: "SIGTERM: state saved" in disturbed.log(job), 60, "a save in the grace time", every_s=0.05)
    hold(ranks_of(job))
    assert disturbed.cluster.wait_for(urgent, within_s=120) == "COMPLETED"
    disturbed.check(child, reference)
    assert disturbed.cluster.job(job)["Restarts"] == "1"
    assert "resuming at" in disturbed.log(job)


def test_c_requeue_by_hand_ends_in_the_same_bits(disturbed: Training, reference: Path) -> None:
    job, child = disturbed.begin()
    disturbed.cluster.command("scontrol", "requeue", job)
    disturbed.requeued(job)
    assert disturbed.cluster.state(child) == "PENDING"
    disturbed.check(child, reference)
    assert disturbed.cluster.job(job)["Restarts"] == "1"


def test_d_killed_rank_fails_the_job_and_the_repeated_command_continues(disturbed: Training, reference: Path) -> None:
    job, child = disturbed.begin()
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    assert disturbed.cluster.wait_for(job, within_s=90) == "FAILED"
    assert disturbed.cluster.wait_for(child, within_s=60) == "CANCELLED"
    assert re.search(r"node\d: task 1: Killed", disturbed.log(job)), disturbed.log(job)  # which rank, and where
    reached = disturbed.batches()
    again, child = disturbed.submit()
    assert again != job
    disturbed.check(child, reference)
    assert reached >= FEW_BATCHES and "resuming at" in disturbed.log(again)


def test_e_node_without_power_moves_the_job_and_ends_in_the_same_bits(disturbed: Training, reference: Path) -> None:
    job, child = disturbed.begin()
    nodes = disturbed.cluster.command("scontrol", "show", "hostnames", disturbed.cluster.job(job)["NodeList"])
    lost = nodes.stdout.split()[-1]
    disturbed.cluster.control("node", "off", lost)
    disturbed.requeued(job)
    disturbed.check(child, reference)
    assert (
        lost
        not in disturbed.cluster.command(
            "scontrol", "show", "hostnames", disturbed.cluster.job(job)["NodeList"]
        ).stdout.split()
    )
    assert disturbed.cluster.job(job)["Restarts"] == "1"


def test_f_cancelled_chain_continues_with_the_repeated_command(disturbed: Training, reference: Path) -> None:
    job, child = disturbed.begin()
    disturbed.cluster.command("scancel", job)
    assert disturbed.cluster.wait_for(job, within_s=90) == "CANCELLED"
    assert disturbed.cluster.wait_for(child, within_s=60) == "CANCELLED"
    again, child = disturbed.submit()
    disturbed.check(child, reference)
    assert "resuming at" in disturbed.log(again)


def test_g_killed_controller_comes_back_and_the_training_never_notices(disturbed: Training, reference: Path) -> None:
    submitted = time.time()
    job, child = disturbed.begin()
    until(lambda: disturbed.cluster.saved(submitted + 1), 30, "the controller's state on disk", every_s=0.05)
    disturbed.cluster.control("controller", "kill")
    reached = disturbed.batches()
    until(lambda: disturbed.batches() > reached, 180, "a checkpoint without a controller")
    disturbed.cluster.control("controller", "start")
    disturbed.check(child, reference)
    assert disturbed.cluster.job(job)["Restarts"] == "0"
    assert "resuming at" not in disturbed.log(job)


def test_h_site_without_requeueing_goes_on_with_the_repeated_command(disturbed: Training, reference: Path) -> None:
    disturbed.profile.write_text(f"{disturbed.profile.read_text()}requeue: false\n")
    job, child = disturbed.begin()
    disturbed.cluster.command("scancel", "--signal=USR2", job)
    assert disturbed.cluster.wait_for(job, within_s=90) == "FAILED"
    assert disturbed.cluster.wait_for(child, within_s=60) == "CANCELLED"
    assert "stopped before the time limit, but SLURM refused to requeue" in disturbed.log(job)
    again, child = disturbed.submit()
    disturbed.check(child, reference)
    assert "resuming at" in disturbed.log(again)


def test_i_warning_before_torch_is_there_is_not_lost(disturbed: Training, reference: Path) -> None:
    job = disturbed.submit_stage("1")
    until(lambda: len(ranks_of(job)) == 2, 60, "the job's processes", every_s=0.01)
    disturbed.cluster.command("scancel", "--signal=USR2", job)
    disturbed.requeued(job)
    disturbed.check(disturbed.submit_stage("swa"), reference)
    assert disturbed.cluster.job(job)["Restarts"] == "1"
