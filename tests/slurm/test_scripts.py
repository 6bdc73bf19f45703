"""The plain scripts slurm/*.sbatch give the same results as submit.py: same weights, same submission."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pneumo_dist import config as configuration
from tests.slurm.conftest import Chain
from tests.slurm.private import ROOT, TINY, PrivateCluster, same_weights, until

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def sbatch(cluster: PrivateCluster, logs: Path, after: str, *words: object) -> str:
    """Submit a script as its first lines say, and return the job's id."""
    waits = (f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes") if after else ()
    small = ("--cpus-per-task=1", "--mem=1G", f"--output={logs}/%x-%j-%a.log")
    return cluster.command("sbatch", "--parsable", *waits, *small, *words).stdout.strip()


def test_scripts_alone_reach_the_same_bits_as_submit(
    chain: Chain, free_cluster: PrivateCluster, tmp_path: Path
) -> None:
    run = tmp_path / "byhand"
    run.mkdir()
    phantom = chain.run / "phantom"
    data = {"dicom_dir": "dicom-images-train", "rle_csv": "train-rle.csv", "patient_map": "patients.csv"}
    words = ["phantom.films=0", "infer.label=films", *(f"data.{key}={phantom / name}" for key, name in data.items())]
    (run / "config.yaml").write_text(configuration.to_yaml(configuration.load(TINY, words)))

    last = ""
    for script, *more in (
        ("preprocess", "--array=0-1"),
        ("preprocess",),
        ("train", "1"),
        ("torchrun", "2"),
        ("swa",),
        ("evaluate",),
        ("infer", "--array=0-1"),
        ("infer",),
    ):
        options = [word for word in more if word.startswith("--")]
        rest = [word for word in more if not word.startswith("--")]
        last = sbatch(free_cluster, tmp_path, last, *options, ROOT / "slurm" / f"{script}.sbatch", run, *rest)
    state = free_cluster.wait_for(last, within_s=500)
    logs = "\n".join(path.read_text()[-800:] for path in sorted(tmp_path.glob("*.log")))
    assert state == "COMPLETED", logs

    same_weights(chain.run / "fold0/model.pt", run / "fold0/model.pt")
    assert (run / "infer/films/submission.csv").read_bytes() == (chain.run / "infer/films/submission.csv").read_bytes()


def test_script_forbidden_to_requeue_fails_at_its_time_limit_so_that_dependants_do_not_start(
    shards: Path, free_cluster: PrivateCluster, tmp_path: Path
) -> None:
    run = tmp_path / "short"
    shutil.copytree(shards, run / "shards")
    long = ["stage1.epochs=100000", "stage1.lr=0.0001"]
    (run / "config.yaml").write_text(configuration.to_yaml(configuration.load(TINY, long)))
    job = sbatch(free_cluster, tmp_path, "", "--no-requeue", "--nodes=1", ROOT / "slurm/train.sbatch", run, "1")
    child = sbatch(free_cluster, tmp_path, job, ROOT / "slurm/swa.sbatch", run)
    checkpoints = run / "fold0/stage1/checkpoints"
    until((checkpoints / "LAST").exists, 180, "a checkpoint")
    free_cluster.command("scancel", "--signal=USR2", job)
    assert free_cluster.wait_for(job, within_s=90) == "FAILED"
    assert free_cluster.wait_for(child, within_s=60) == "CANCELLED"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_without_a_run_says_how_it_is_called(script: Path, free_cluster: PrivateCluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = free_cluster.command(
        "sbatch", "--parsable", "--mem=1G", "--nodes=1", f"--output={log}", script
    ).stdout.strip()
    assert free_cluster.wait_for(job, within_s=90) == "FAILED"
    assert "usage: sbatch" in log.read_text()
