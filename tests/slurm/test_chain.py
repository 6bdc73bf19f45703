"""The whole chain on a real SLURM cluster of several nodes, with launch/submit.py."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import Chain
from tests.slurm.private import PROFILE, ROOT, TINY, PrivateCluster, devcluster, same_weights, until

STAGES = ("phantom", "shards", "fold0/stage1", "fold0/stage2", "fold0/swa", "fold0/evaluate", "infer/films")


def ledger(run: Path) -> list[dict[str, Any]]:
    """Return the submissions of a run, oldest first."""
    lines = (run / "jobs" / "submitted.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == "submitted"]


def test_whole_chain_on_two_nodes_ends_with_a_submission_for_every_film(chain: Chain) -> None:
    for name in STAGES:
        assert (chain.run / name / "DONE.json").is_file(), name
    done = json.loads((chain.run / "fold0/stage1/DONE.json").read_text())
    assert done["world_size"] == 2
    with (chain.run / "infer/films/submission.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ImageId", "EncodedPixels"]
    assert len({name for name, _ in rows[1:]}) == 24


def test_ranks_of_a_training_ran_on_two_different_nodes(chain: Chain, cluster: PrivateCluster) -> None:
    job_id = next(str(row["job_id"]) for row in ledger(chain.run) if row["key"] == "stage1-fold0")
    assert cluster.job(job_id)["NumNodes"] == "2"


def test_variables_of_the_calling_shell_change_nothing(free_cluster: PrivateCluster, tmp_path: Path) -> None:
    foreign = {
        "SBATCH_PARTITION": "low", "SBATCH_HOLD": "1", "SQUEUE_PARTITION": "nowhere", "SLURM_EXPORT_ENV": "NONE",
        "SLURM_MEM_PER_CPU": "9999", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "TOKEN": "secret",
    }  # fmt: skip
    (tmp_path / "omegaconf.py").write_text("raise RuntimeError('another omegaconf')")
    shell = PrivateCluster(free_cluster.folder)
    shell.env |= foreign | {"PYTHONPATH": str(tmp_path), "LC_ALL": "C"}
    profile = tmp_path / "p.yaml"
    profile.write_text(PROFILE.read_text() + f"setup: ['env > {tmp_path}/$SLURM_JOB_NAME']\nsrun: [--quiet]\n")
    words = ("--stage", "preprocess", "--config", TINY, "--run", "a", "--profile", profile, "--wait")
    shell.submit(*words, f"run_root={tmp_path}/Läufe", timeout_s=120)
    seen = {line.partition("=")[0] for line in (tmp_path / "finalize.a").read_text().splitlines()}
    assert not seen & foreign.keys() and {"HOME", "PATH", "USER"} & os.environ.keys() <= seen
    assert {free_cluster.job(str(row["job_id"]))["Partition"] for row in ledger(tmp_path / "Läufe" / "a")} == {"batch"}


def test_preprocess_and_infer_were_arrays_and_every_job_waited_for_the_one_before(chain: Chain) -> None:
    rows = {str(row["key"]): row for row in ledger(chain.run)}
    assert rows["preprocess"]["elements"] == rows["infer"]["elements"] == 2
    order = [str(row["key"]) for row in ledger(chain.run)]
    for before, key in pairwise(order):
        assert f"afterok:{rows[before]['job_id']}" in " ".join(rows[key]["after"]), (before, rows[key])


def test_same_recipe_on_this_machine_gives_the_same_bits(chain: Chain, tmp_path: Path) -> None:
    words = ("--cluster", "local", "--stage", "all", "--nodes", "2", "--config", TINY, "--run", "here")
    chain.cluster.command(
        sys.executable, ROOT / "launch/submit.py", *words, f"run_root={tmp_path}", timeout_s=400, cwd=tmp_path
    )
    same_weights(chain.run / "fold0/model.pt", tmp_path / "here/fold0/model.pt")
    ours, theirs = (folder / "infer/films/submission.csv" for folder in (chain.run, tmp_path / "here"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_repeated_command_returns_at_once_and_submits_nothing(chain: Chain) -> None:
    before = len(ledger(chain.run))
    chain.submit("--stage", "all", "--nodes", "2", "--wait")
    assert len(ledger(chain.run)) == before


def test_no_other_account_reads_what_the_jobs_wrote(chain: Chain) -> None:
    entries = [chain.run, *chain.run.rglob("*")]
    assert {path.suffix for path in entries} >= {".csv", ".jpg", ".npy", ".out", ".pt"}
    assert [str(path) for path in entries if path.stat().st_mode & 0o027] == []


def test_waiting_for_a_chain_that_has_ended_returns_its_result(chain: Chain) -> None:
    said = chain.cluster.command(sys.executable, ROOT / "launch/runs.py", "wait", chain.run).stdout
    assert said.startswith("done: ") and "submission.csv" in said


def test_changed_setting_of_a_done_stage_is_refused_with_its_key(chain: Chain) -> None:
    done = chain.submit("--stage", "1", "--nodes", "2", "stage1.lr=0.01", check=False)
    assert done.returncode == 2
    assert "stage1.lr" in done.stderr and "--redo" in done.stderr and "Traceback" not in done.stderr


def test_second_writer_is_refused_and_a_parent_that_fails_cancels_its_dependants(
    shards: Path, free_cluster: PrivateCluster, tmp_path: Path
) -> None:
    words = ("--config", TINY, "--run", "busy", f"run_root={tmp_path}", f"data.shard_dir={shards}")
    held = free_cluster.command("sbatch", "--parsable", "--hold", "-o", "/dev/null", "--wrap", "true").stdout.strip()
    free_cluster.submit("--stage", "1", "--nodes", "2", "--after", held, *words)
    first = next(row for row in ledger(tmp_path / "busy") if row["key"] == "stage1-fold0")
    assert first["after"] == [f"afterok:{held}"]

    second = free_cluster.submit("--stage", "1", "--nodes", "2", *words, check=False)
    assert second.returncode == 2
    assert str(first["job_id"]) in second.stderr and second.stderr.count("\n") <= 2

    # Stage 2 depends on the pending job without --after.
    free_cluster.submit("--stage", "2", "--nodes", "2", *words)
    child = next(row for row in ledger(tmp_path / "busy") if row["key"] == "stage2-fold0")
    assert child["after"] == [f"afterok:{first['job_id']}"]

    free_cluster.command("scancel", held)
    for row in (first, child):
        assert free_cluster.wait_for(str(row["job_id"]), within_s=60) == "CANCELLED"


def test_failed_stage_ends_the_waiting_command_with_1_and_names_itself(
    shards: Path, free_cluster: PrivateCluster, tmp_path: Path
) -> None:
    words = ("--config", TINY, "--run", "bad", f"run_root={tmp_path}", f"data.shard_dir={shards}")
    # More than the films of a training fold, which only the job can check.
    done = free_cluster.submit("--stage", "all", "--nodes", "2", "--wait", *words, "stage1.batch_size=23", check=False)
    assert done.returncode == 1
    assert "stage1-fold0" in done.stderr and "stage1.batch_size=23 is more than the 16" in done.stderr
    assert not (tmp_path / "bad/fold0/stage1/DONE.json").exists()
    last = ledger(tmp_path / "bad")[-1]
    assert free_cluster.wait_for(str(last["job_id"]), within_s=60) == "CANCELLED"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a checkout as a fresh clone has it, with this checkout's virtual environment."""
    folder = tmp_path / "clone"
    for name in ("launch", "pneumo_dist", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / ".venv").exists():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def test_literal_command_on_a_configured_cluster_submits_the_missing_upstream_too(
    clone: Path, free_cluster: PrivateCluster, tmp_path: Path
) -> None:
    submit = ("python3", clone / "launch/submit.py", "--stage", "1", "--nodes", "2")
    said = free_cluster.command(*submit, cwd=tmp_path)
    assert "no data configured: synthetic phantom films" in said.stdout + said.stderr
    run = clone / "runs/quickstart"
    keys = [row["key"] for row in ledger(run)]
    assert keys == ["phantom", "preprocess", "finalize", "stage1-fold0"]
    job_id = str(ledger(run)[-1]["job_id"])
    assert job_id in said.stdout
    free_cluster.command("python3", clone / "launch/runs.py", "cancel", "quickstart", cwd=tmp_path)
    until(free_cluster.idle, 60, "an idle cluster after runs.py cancel")
    assert free_cluster.state(job_id) == "CANCELLED"


def test_without_accounting_a_waiting_command_still_learns_how_its_jobs_ended(
    cluster: PrivateCluster, tmp_path: Path
) -> None:
    folder = Path(f"/tmp/pneumo-plain-{os.getpid()}")
    try:
        devcluster("start", "--dir", folder, "--nodes", 2, "--no-accounting", "--owner", os.getpid())
        plain = PrivateCluster(folder)
        words = ("--nodes", "2", "--config", TINY, "--wait", f"run_root={tmp_path}", "data.workers=1")
        plain.submit("--stage", "preprocess", "--run", "good", *words, timeout_s=120)
        assert (tmp_path / "good/shards/DONE.json").is_file()
        failed = plain.submit("--stage", "1", "--run", "good", *words, "stage1.batch_size=23", check=False)
        assert failed.returncode == 1, failed.stdout + failed.stderr
    finally:
        devcluster("stop", "--dir", folder)
        shutil.rmtree(folder, ignore_errors=True)
