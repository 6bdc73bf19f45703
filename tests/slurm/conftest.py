"""One private cluster for all SLURM tests of a session; without one they are skipped with the reason.

With PNEUMO_REQUIRE_SLURM=1 such a skip is a failure, so that a test machine cannot pass without SLURM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.private import TINY, PrivateCluster, devcluster, until

REQUIRED = os.environ.get("PNEUMO_REQUIRE_SLURM") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip below this folder into a failure where SLURM is required."""
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"PNEUMO_REQUIRE_SLURM=1, but {reason}"
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[PrivateCluster]:
    """Return the session's private cluster of three nodes with accounting."""
    folder = Path(tempfile.mkdtemp(prefix="pneumo-", dir="/tmp"))  # a short path: it holds unix sockets
    folder.chmod(0o755)
    try:
        started = devcluster("start", "--dir", folder, "--owner", os.getpid(), check=False)
        if started.returncode:
            pytest.skip((started.stderr.strip().splitlines() or ["devcluster start failed"])[-1])
        yield PrivateCluster(folder)
    finally:
        devcluster("stop", "--dir", folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def free_cluster(cluster: PrivateCluster) -> PrivateCluster:
    """Return the cluster with an empty queue and every node up, whatever the previous test did."""
    if cluster.command("scontrol", "ping", check=False, timeout_s=20).stdout.find("is UP") < 0:
        cluster.control("controller", "start")
    cluster.command("scancel", "--user", "root")
    for name in ("node1", "node2", "node3"):
        if f"{name} is off" in devcluster("node", "--dir", cluster.folder, "heal", name, check=False).stderr:
            cluster.control("node", "on", name)
        cluster.command("scontrol", "update", f"nodename={name}", "state=resume", check=False)
    until(cluster.idle, 60, "an idle cluster")
    return cluster


@dataclass(frozen=True)
class Chain:
    """The whole chain of the tiny recipe, run once on the cluster."""

    cluster: PrivateCluster
    run: Path
    output: str

    def submit(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Call submit.py on the chain's run again."""
        return self.cluster.submit(*words, "--run", self.run.name, f"run_root={self.run.parent}", check=check)


@pytest.fixture(scope="session")
def shards(cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shards of the tiny recipe, for runs that need nothing else of a chain."""
    root = tmp_path_factory.mktemp("runs")
    words = ("--config", TINY, "--run", "films", "--wait", f"run_root={root}")
    cluster.submit("--stage", "preprocess", *words, timeout_s=120)
    return root / "films" / "shards"


@pytest.fixture(scope="session")
def chain(cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Return the chain after `submit.py --stage all --nodes 2 --wait`."""
    root = tmp_path_factory.mktemp("runs")
    words = ("--stage", "all", "--nodes", "2", "--config", TINY, "--run", "chain", "--wait", f"run_root={root}")
    done = cluster.submit(*words)
    yield Chain(cluster, root / "chain", done.stdout + done.stderr)
    shutil.rmtree(root)
