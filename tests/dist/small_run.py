"""A run small enough to train many times, with functions to prepare, copy and compare it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch

from pneumo_dist import config as configuration
from pneumo_dist import stages
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.runtime import history

OVERRIDES = [
    "phantom.films=20", "phantom.size=96", "data.folds=2", "data.shards=2", "data.workers=1", "model.pretrained=none",
    "stage1.size=64", "stage1.epochs=4", "stage1.batch_size=4", "stage2.size=64", "stage2.epochs=2",
    "stage2.batch_size=3", "swa.stages=1,2", "swa.start=0.5", "swa.interval=1", "train.workers=1", "train.threads=1",
    "data.on_device=off", "train.save_every_s=1000000", "train.timeout_s=60", "evaluate.batch_size=4",
    "evaluate.bootstrap=20",
]  # fmt: skip


def thin() -> None:
    """Make the network of this process narrow; nothing else changes."""
    ResNet34Encoder.channels = (8, 8, 8, 16, 16)  # type: ignore[assignment]
    ResNet34UNet.widths = (16, 8, 8, 8, 8)


def prepare(folder: Path, *overrides: str) -> Path:
    """Prepare a run directory with phantom films in shards, ready for stage 1."""
    run_dir = folder / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(configuration.to_yaml(configuration.load(None, [*OVERRIDES, *overrides])))
    for stage in ("phantom", "preprocess", "finalize"):
        stages.run_stage(stage, run_dir)
    return run_dir


def copy_of(run_dir: Path, folder: Path) -> Path:
    """Copy a prepared run, so that it can be trained again."""
    return Path(shutil.copytree(run_dir, folder / "run"))


def weights(path: Path) -> str:
    """Hash the bits of all weights and buffers in a model file."""
    state = torch.load(path, weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(run_dir: Path, stage: str = "1") -> dict[str, object]:
    """Return what must not depend on interruptions: the bits of all weight files, and the numbers of every epoch."""
    out = run_dir / "fold0" / f"stage{stage}"
    rows = history.read(out / "metrics.jsonl")
    kept = ("epoch", "step", "lr", "train_loss", "best", "dice", "loss", "dice_positive")
    return {name: weights(out / f"{name}.pt") for name in ("best", "last", "swa")} | {
        "epochs": [{key: row.get(key) for key in kept} for row in rows]
    }


def alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == pid:
            pids.append(int(stat.parent.name))
    return pids
