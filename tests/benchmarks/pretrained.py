"""Training from pretrained weights, shown with phantom films: the encoder of one data set starts the network of another.

    python -m tests.benchmarks.pretrained [--films 64 --epochs 8 --lr 0.001 --work DIR ...]

The encoder is trained on other, more and smaller films, and stored as torchvision stores ImageNet weights: a bare
ResNet-34. Both arms see the same films, fold, seeds and learning rates; decoder and heads start at random. What counts
is the last epoch's validation score. ImageNet weights themselves: `python -m tests.benchmarks real_films --weights FILE`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from itertools import product
from pathlib import Path

import torch

from pneumo_dist import config as configuration
from pneumo_dist.runtime.files import write_text
from pneumo_dist.stages import run_stage

SCORES = ("dice_positive", "auc", "dice")


def train(folder: Path, words: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Make the phantom films if they are missing, train stage 1 on fold 0, and return the last epoch's scores."""
    common = [
        "stages=1",
        "stage1.batch_size=8",
        "data.shards=1",
        "data.folds=4",
        "data.workers=1",
        "model.pretrained=none",
        f"train.threads={options.threads}",
        "train.workers=0",
        "evaluate.threshold=0.5",
    ]
    config = configuration.load(None, [*common, *words])
    write_text(folder / "config.yaml", configuration.to_yaml(config))
    for stage in ("phantom", "preprocess", "finalize", "1"):
        run_stage(stage, folder, 0 if stage == "1" else None)
    lines = (folder / "fold0" / "stage1" / "metrics.jsonl").read_text().splitlines()
    return dict(json.loads(lines[-1]))


def encoder(options: argparse.Namespace, work: Path) -> Path:
    """Train on the first data set, and write the encoder under torchvision's names; return the file."""
    words = ["phantom.films=160", "phantom.size=128", "phantom.seed=1", "stage1.size=64", "stage1.epochs=10"]
    scores = train(work / "source", words, options)
    print("the encoder's own films:", ", ".join(f"{name} {scores[name]:.3f}" for name in SCORES))
    state = torch.load(work / "source" / "fold0" / "stage1" / "last.pt", map_location="cpu", weights_only=True)["model"]
    path = work / "resnet34.pth"
    torch.save({key.removeprefix("encoder."): v for key, v in state.items() if key.startswith("encoder.")}, path)
    return path


def main() -> None:
    """Train both arms with every seed and learning rate, and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=64)
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", default="0.001", help="learning rates of the whole network, for example 0.001,0.0003")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pretrained-") as temporary:
        work = (options.work or Path(temporary)).absolute()
        starts = {"random": [], "pretrained encoder": [f"stage1.init_from={encoder(options, work)}"]}
        print(f"| start, learning rate | {' | '.join(SCORES)} |   (mean, lowest to highest of {options.seeds} seeds)")
        for lr, (start, words) in product(options.lr.split(","), starts.items()):
            words = [*words, f"stage1.size={options.size}", f"stage1.epochs={options.epochs}", f"stage1.lr={lr}"]
            words += [f"phantom.films={options.films}", "phantom.size=192", f"data.shard_dir={work / 'shards'}"]
            runs = [
                train(work / f"{start.split()[0]}-{lr}-seed{seed}", [*words, f"train.seed={seed}"], options)
                for seed in range(options.seeds)
            ]
            columns = [[run[name] for run in runs] for name in SCORES]
            cells = [f"{statistics.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns]
            print(f"| {start}, {lr} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
