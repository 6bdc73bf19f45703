"""The private cluster: what it refuses, the faults it can cause, and that it leaves nothing behind."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.private import DEVCLUSTER, PrivateCluster, devcluster, until


def traces(folder: Path) -> list[str]:
    """Return the processes and network interfaces that still belong to the cluster of `folder`."""
    left = []
    for entry in Path("/proc").iterdir():
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if state not in "ZX" and (str(folder) in words or f"DEVCLUSTER={folder}" in environment):
            left.append(words)
    links = Path("/sys/class/net").glob("pdc*/ifalias")
    return left + [path.parent.name for path in links if path.read_text().strip() == str(folder)]


@pytest.fixture
def folder(cluster: PrivateCluster) -> Iterator[Path]:
    """Return a free directory for a second cluster, on a machine where clusters can run."""
    second = Path(f"/tmp/pneumo-second-{os.getpid()}")
    yield second
    devcluster("stop", "--dir", second)
    shutil.rmtree(second, ignore_errors=True)


def test_every_node_has_its_own_name_and_answers(cluster: PrivateCluster) -> None:
    assert sorted(cluster.command("srun", "-N3", "hostname").stdout.split()) == ["node1", "node2", "node3"]


def test_second_cluster_without_accounting_counts_gpus_beside_the_first(cluster: PrivateCluster, folder: Path) -> None:
    devcluster("start", "--dir", folder, "--nodes", 1, "--gpus", 2, "--no-accounting", "--owner", os.getpid())
    second = PrivateCluster(folder)
    seen = second.command("srun", "--gpus-per-node=2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES").stdout
    assert seen.strip() == "0,1"
    listed = devcluster("list").stdout.split()
    assert {str(folder), str(cluster.folder)} <= set(listed)
    devcluster("stop", "--dir", folder)
    assert not traces(folder) and not folder.exists()
    assert "node1" in devcluster("status", "--dir", cluster.folder).stdout


def test_cluster_goes_with_its_owner_even_after_kill_9(cluster: PrivateCluster, folder: Path) -> None:
    words = ("with", "--no-accounting", "--nodes", "1", "--", "bash", "-c", "echo $$ $SLURM_CONF; exec sleep 600")
    owner = subprocess.Popen([sys.executable, str(DEVCLUSTER), *words], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, conf = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    os.kill(int(pid), signal.SIGKILL)
    started = Path(conf).parent
    until(lambda: not traces(started) and not started.exists(), 15, f"nothing left of {started}")


def test_with_passes_the_exit_status_on_and_cleans_up(cluster: PrivateCluster) -> None:
    done = devcluster(
        "with", "--no-accounting", "--nodes", 1, "--", "bash", "-c", "echo $SLURM_CONF; exit 7", check=False
    )
    started = Path(done.stdout.strip()).parent
    assert done.returncode == 7
    assert not traces(started) and not started.exists()


def test_start_killed_half_way_is_cleared_up_as_stale_and_living_clusters_stay(
    cluster: PrivateCluster, folder: Path
) -> None:
    starter = subprocess.Popen([sys.executable, str(DEVCLUSTER), "start", "--dir", str(folder)])
    until((folder / "munge" / "socket").exists, 20, "a start half way", every_s=0.01)
    starter.kill()
    starter.wait()
    assert traces(folder)
    assert str(folder) in devcluster("stop", "--stale").stdout
    assert not traces(folder) and not folder.exists()
    assert cluster.command("scontrol", "ping").stdout.count("is UP") == 1


def test_node_without_power_is_noticed_and_comes_back(free_cluster: PrivateCluster) -> None:
    free_cluster.control("node", "off", "node3")

    def state() -> str:
        return free_cluster.command("sinfo", "-h", "-n", "node3", "-p", "batch", "-o", "%T").stdout.strip()

    until(lambda: state().startswith("down"), 30, "node3 down")
    free_cluster.control("node", "on", "node3")
    until(lambda: state() == "idle", 20, "node3 idle")


def test_running_job_survives_killed_slurmd_and_killed_controller(free_cluster: PrivateCluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"sleep 8; echo ${{SLURM_RESTART_COUNT:-0}} > {out}"
    job = free_cluster.command(
        "sbatch", "--parsable", "-o", "/dev/null", "-w", "node1", "--wrap", script
    ).stdout.strip()
    free_cluster.wait_for(job, "RUNNING", 20)
    running = time.time()
    free_cluster.control("node", "slurmd-kill", "node1")
    free_cluster.control("node", "slurmd-start", "node1")
    until(lambda: free_cluster.saved(running), 15, "the controller's state on disk")
    free_cluster.control("controller", "kill")
    assert devcluster("status", "--dir", free_cluster.folder, check=False).returncode == 1
    free_cluster.control("controller", "start")
    until(out.exists, 30, "the job's end")
    assert free_cluster.wait_for(job, within_s=30) == "COMPLETED"
    assert out.read_text() == "0\n"


def refusal(*words: object) -> str:
    """Return the one line with which devcluster refuses; its exit status must be 2."""
    done = devcluster(*words, check=False)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_start_refuses_a_directory_that_is_not_its_own(cluster: PrivateCluster, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    assert "not an empty directory" in refusal("start", "--dir", tmp_path)
    assert "runs in" in refusal("start", "--dir", cluster.folder)
    assert "at most 80" in refusal("start", "--dir", "/tmp/" + "x" * 90)
    assert (tmp_path / "thesis.txt").exists()


def test_other_users_and_missing_programs_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEVCLUSTER.parent))
    machine = importlib.import_module("cluster")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(machine.ClusterError, match="only root may start"):
        machine.check_machine(True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "munged" else f"/bin/{name}")
    with pytest.raises(machine.ClusterError, match=r"not installed: munged; .*install-packages.sh"):
        machine.check_machine(True)


def test_unknown_node_and_missing_cluster_are_one_line(cluster: PrivateCluster, tmp_path: Path) -> None:
    assert "node1, node2, node3" in refusal("node", "off", "node9", "--dir", cluster.folder)
    assert "no cluster runs" in refusal("node", "off", "node1", "--dir", tmp_path)
