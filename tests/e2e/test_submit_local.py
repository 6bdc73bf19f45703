"""The chain on this machine as a user runs it: start, repeat, Ctrl-C, kill -9, continue. Few, small synthetic films."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "phantom.films=16", "phantom.size=96", "stage1.size=32", "stage1.batch_size=4", "stage2.size=64", "stage2.epochs=1",
    "stage2.batch_size=4", "train.workers=1", "train.threads=1", "evaluate.bootstrap=20", "infer.part_size=5",
]  # fmt: skip


def command(root: Path, *words: str) -> list[str]:
    submit = [sys.executable, str(ROOT / "launch" / "submit.py"), "--cluster", "local", "--nodes", "2"]
    return [*submit, *words, f"run_root={root}", *TINY]


def run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root, *words), cwd="/", capture_output=True, text=True, timeout=300, check=False)


def workers_of(root: Path) -> list[int]:
    """The processes of this machine that work in a run root."""
    pids = []
    for entry in os.listdir("/proc"):
        try:
            arguments = Path(f"/proc/{entry}/cmdline").read_bytes().decode().split("\0") if entry.isdigit() else []
            state = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[0] if arguments else "Z"
        except OSError:
            continue
        if "pneumo_dist.stages" in arguments and any(a.startswith(str(root)) for a in arguments) and state != "Z":
            pids.append(int(entry))
    return pids


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The whole chain, run once."""
    root = tmp_path_factory.mktemp("chain")
    return root, run(root, "--stage", "all", "stage1.epochs=2")


def test_the_chain_ends_with_scores_and_places(chain: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _root, done = chain
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no data configured: synthetic phantom films\n")
    for word in ("all empty (baseline)", "on positives", "submission", "overlays", "TensorBoard"):
        assert word in done.stdout


def test_the_chain_leaves_the_promised_files(chain: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir = chain[0] / "quickstart"
    for stage in ("phantom", "shards", "fold0/stage1", "fold0/stage2", "fold0/swa", "fold0/evaluate", "infer/phantom"):
        assert json.loads((run_dir / stage / "DONE.json").read_text())["result_hash"]
    assert torch.load(run_dir / "fold0" / "model.pt", weights_only=True)["meta"]["triplet"]
    with open(run_dir / "infer" / "phantom" / "submission.csv", newline="") as lines:
        rows = list(csv.reader(lines))
    assert rows[0] == ["ImageId", "EncodedPixels"] and len(rows) == 17
    assert list((run_dir / "fold0" / "stage1" / "tensorboard").glob("events.*"))
    assert (run_dir / "config.yaml").exists() and (run_dir / "jobs" / "stage2-fold0.yaml").exists()
    (code,) = (run_dir / "code").iterdir()
    assert (code / "pneumo_dist" / "stages.py").exists()


def test_a_second_call_returns_at_once(chain: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root, _ = chain
    again = run(root, "--stage", "1", "stage1.epochs=2")
    assert again.returncode == 0 and "done already" in again.stdout
    other = run(root, "--stage", "1", "stage1.epochs=3")
    assert other.returncode == 2 and "stage1.epochs=2, now 3" in other.stderr and "--redo" in other.stderr
    words = [sys.executable, str(ROOT / "launch" / "submit.py"), "--cluster", "local", f"run_root={root}"]
    again = subprocess.run([*words, "--stage", "all"], capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0 and "the whole chain is done already" in again.stdout, again.stderr


def test_verify_finds_a_changed_shard(chain: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    root, _ = chain
    assert run(root, "--stage", "preprocess", "--verify").returncode == 0
    shard = next((root / "quickstart" / "shards").glob("images-32-*.npy"))
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        verified = run(root, "--stage", "preprocess", "--verify")
    finally:
        shard.write_bytes(kept)
    assert verified.returncode == 1 and shard.name in verified.stderr


def test_the_table_of_the_run(chain: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    words = [sys.executable, str(ROOT / "launch" / "runs.py"), "status", str(chain[0] / "quickstart")]
    shown = subprocess.run(words, capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and shown.stdout.count(" done ") == 9 and "epoch 2/2" in shown.stdout


def test_ctrl_c_and_kill_lose_nothing(chain: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    words = ("--stage", "1", "stage1.epochs=10")
    metrics = tmp_path / "quickstart" / "fold0" / "stage1" / "metrics.jsonl"
    for folder in ("phantom", "shards"):  # to begin with the training
        shutil.copytree(chain[0] / "quickstart" / folder, tmp_path / "quickstart" / folder)

    def started(after_epoch: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(tmp_path, *words), cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > after_epoch):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)
        return process

    process = started(0)
    busy = run(tmp_path, *words)
    assert busy.returncode == 2 and f"process {process.pid} on" in busy.stderr
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "the same command continues" in out
    epochs = len(metrics.read_text().splitlines())
    assert 0 < epochs < 10
    process = started(epochs)  # it goes on where it was
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while workers_of(tmp_path):
        assert time.monotonic() < deadline, "a worker outlives submit.py"
        time.sleep(0.1)
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == list(range(1, 11))
    assert "resuming" in (tmp_path / "quickstart" / "jobs" / "local-stage1-fold0-0.out").read_text()
