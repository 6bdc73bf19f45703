"""runs.py status on a real SLURM: a run with a job in every state, with and without accounting.

The jobs are short commands instead of stages. The table identifies them by the run's ledger.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.state.ledger import Entry, Ledger
from pneumo_dist import config as configuration
from pneumo_dist.run import RunFolder
from tests.slurm.private import ROOT, TINY, PrivateCluster, devcluster, until


@pytest.fixture(params=["accounting", "no accounting"])
def site(request: pytest.FixtureRequest) -> Iterator[PrivateCluster]:
    """Return an idle cluster, with and without accounting."""
    if request.param == "accounting":
        yield request.getfixturevalue("free_cluster")
        return
    folder = Path(f"/tmp/pneumo-bare-{os.getpid()}")
    try:
        started = devcluster("start", "--dir", folder, "--no-accounting", "--owner", os.getpid(), check=False)
        if started.returncode:
            pytest.skip((started.stderr.strip().splitlines() or ["devcluster start failed"])[-1])
        yield PrivateCluster(folder)
    finally:
        devcluster("stop", "--dir", folder)
        shutil.rmtree(folder, ignore_errors=True)


class Run:
    """A run directory and the jobs that its ledger lists."""

    def __init__(self, cluster: PrivateCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "jobs").mkdir(parents=True)
        (folder / "config.yaml").write_text(configuration.to_yaml(configuration.load(TINY)))

    def job(self, key: str, command: str, *options: str, elements: int = 1) -> str:
        """Submit a command as the job `key` of the run."""
        stage, _, fold = key.partition("-fold")
        log, name = f"{'%A_%a' if elements > 1 else '%j'}_0_log.out", f"{key}.{self.folder.name}"
        array = [f"--array=0-{elements - 1}"] if elements > 1 else []
        fixed = [
            "--parsable",
            "--mem=50M",
            "--requeue",
            "--open-mode=append",
            "-J",
            name,
            "-o",
            self.folder / "jobs" / log,
        ]
        job_id = self.cluster.command("sbatch", *fixed, *array, *options, "--wrap", command).stdout.strip()
        log = log.replace("%A", job_id).replace("%j", job_id)
        Ledger(RunFolder(self.folder)).append(
            Entry(
                key=key,
                stage=stage.removeprefix("stage"),
                fold=int(fold) if fold else None,
                cluster="slurm",
                job_id=job_id,
                name=name,
                elements=elements,
                log=log,
                extra={"command": ["launch/submit.py", "--stage", "all", "--run", self.folder.name]},
            )
        )
        return job_id

    def status(self) -> str:
        """Return the output of runs.py status."""
        return self.cluster.command(sys.executable, ROOT / "launch/runs.py", "status", self.folder).stdout

    def shows(self, *lines: str) -> bool:
        """Tell whether for each of `lines` the table has a line with all its words."""
        rows = [set(row.split()) for row in self.status().splitlines()]
        return all(any(set(line.split()) <= row for row in rows) for line in lines)


def test_status_of_every_state(site: PrivateCluster, tmp_path: Path) -> None:
    run = Run(site, tmp_path / "every")
    site.wait_for(run.job("phantom", "true"), "COMPLETED")
    (run.folder / "phantom").mkdir()
    (run.folder / "phantom" / "DONE.json").write_text(json.dumps({"settings": {}, "inputs": {}, "outputs": {}}))
    array = run.job("preprocess", "[ $SLURM_ARRAY_TASK_ID = 0 ] || sleep 600", "-w", "node1", elements=3)
    run.job("finalize", "true", f"--dependency=afterok:{array}")
    preempted = run.job("stage1-fold0", "sleep 600", "-p", "low0", "-w", "node3", "--exclusive")
    requeued = run.job("stage2-fold0", "sleep 600", "-w", "node2")
    cancelled = run.job("evaluate-fold0", "sleep 600", "-w", "node2")
    run.job("infer", "sleep 600", "-w", "node2")
    failed = run.job("swa-fold0", "echo 'error: the film is upside down'; exit 3")
    run.job("merge", "true", f"--dependency=afterok:{failed}", "--kill-on-invalid-dep=yes")
    for job_id in (preempted, requeued, cancelled):
        site.wait_for(job_id, "RUNNING")
    site.command("scancel", cancelled)
    site.command("scontrol", "requeue", requeued)
    urgent = ("-p", "high", "-w", "node3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    site.command("sbatch", *urgent)

    by_whom = " (by root)" if site.command("sacct", check=False).returncode == 0 else ""  # only accounting knows
    wanted = (
        "phantom done",
        "preprocess RUNNING (1 of 3 done) node1",
        "finalize PENDING (Dependency)",
        "stage1-fold0 PENDING after PREEMPTED) 2",
        "stage2-fold0 REQUEUED) 2",
        "swa-fold0 FAILED (exit 3:0)",
        f"evaluate-fold0 CANCELLED{by_whom} node2",
        "infer RUNNING node2",
        "merge CANCELLED",
    )
    try:
        until(lambda: run.shows(*wanted), 150, "every state in the table", every_s=2)
        text = run.status()
        assert f"swa-fold0 (job {failed}): FAILED (exit 3:0): the film is upside down" in text
        assert f"{failed}_0_log.out" in text and "--stage all --run every" in text
    except AssertionError as error:
        raise AssertionError(f"{error}\n{run.status()}") from None
    finally:
        site.command("scancel", "--user", "root")
