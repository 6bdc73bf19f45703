"""Learning on real films: out-of-fold scores of this project beside the same training with another library's network.

    python tests/benchmarks/real_films.py --dicom-dir DIR --csv FILE --patients FILE --work DIR [--folds 0,1,2,3,4]
        [--size 128 --epochs 15 ...] [--arm ours|peer] [--json FILE]

Both arms start from random weights and see the same films in the same batches with the same augmentation, loss, Adam
and cosine. "ours" is trained by the ordinary stage functions, "peer" is segmentation_models_pytorch's
Unet("resnet34") in a plain loop. The last epoch's weights count: none are chosen by looking. Both are scored by the same
functions as a pooled evaluation; triplets are tuned on other folds. Two sizes (--size 256,512 --epochs 30,10) make two
passes. Finished folds are not repeated when --work is given again; the arms may run at the same time.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from pneumo_dist import config as configuration
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import Case, read_cases
from pneumo_dist.data.loaders import FilmDataset, TrainBatches, fold_cases, make_loader
from pneumo_dist.model.pretrained import import_torchvision
from pneumo_dist.prediction.forward import Predictor, predict_records
from pneumo_dist.runtime.files import write_json, write_text
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.records import Records, record_thresholds
from pneumo_dist.stages import run_stage

ARMS = ("ours", "peer")
SHOWN = {"dice": "Dice", "dice_positive": "on positives", "auc": "AUC", "sensitivity": "sens.", "specificity": "spec."}


def recipe(options: argparse.Namespace) -> configuration.Config:
    """Return the configuration of both arms: one pass for each size."""
    passes = list(zip(options.size, options.epochs, strict=True))
    words = [
        f"stages={','.join(str(n + 1) for n in range(len(passes)))}",
        f"data.dicom_dir={options.dicom_dir.absolute()}",
        f"data.rle_csv={options.csv.absolute()}",
        f"data.patient_map={options.patients.absolute()}",
        f"data.shard_dir={options.work / 'shards'}",
        "data.shards=4",
        "data.workers=1",
        "model.pretrained=none",
        f"train.seed={options.seed}",
        f"train.threads={options.threads}",
        "train.workers=0",
        "train.amp=off",
        "train.eval_every=1000000",  # after the last epoch only, so that "best" is the last epoch
        "evaluate.threshold=0.5",
    ]
    for n, (size, epochs) in enumerate(passes, start=1):
        words += [f"stage{n}.size={size}", f"stage{n}.epochs={epochs}", f"stage{n}.batch_size={options.batch}"]
        words += [f"stage{n}.lr={options.lr}", f"stage{n}.positive_share={options.positive_share}"]
    return configuration.load(None, words)


def prepare(options: argparse.Namespace, config: configuration.Config) -> list[Case]:
    """Make the shards and folds, which both arms share, and return the films."""
    run_dir = options.work / "data"
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(options.work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other arm may be starting too
        write_text(run_dir / "config.yaml", configuration.to_yaml(config))
        for stage in ("preprocess", "finalize"):
            run_stage(stage, run_dir)
    return read_cases(options.work / "shards")


def ours(options: argparse.Namespace, config: configuration.Config, fold: int) -> Path:
    """Train and evaluate one fold through the ordinary stages; return the file of its records."""
    run_dir = options.work / "ours"
    write_text(run_dir / "config.yaml", configuration.to_yaml(config))
    for stage in (*config.train_stages, "evaluate"):
        run_stage(stage, run_dir, fold)
    return run_dir / f"fold{fold}" / "evaluate" / "records.npz"


def plain_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return binary cross-entropy plus 1 - soft Dice per image, averaged over the batch."""
    chance = torch.sigmoid(logits)
    hit, size = (chance * masks).sum((1, 2, 3)), (chance + masks).sum((1, 2, 3))
    return binary_cross_entropy_with_logits(logits, masks) + (1 - (2 * hit + 1) / (size + 1)).mean()


def fit(net: nn.Module, films: DataLoader[Any], steps: int, lr: float, device: torch.device) -> None:
    """Train one pass in a plain loop."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for image, mask, _ in films:
        image, mask = image.to(device), mask.to(device)
        loss = plain_loss(net((image.float() / 255 - mean) / std), mask.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def peer(options: argparse.Namespace, config: configuration.Config, fold: int, cases: list[Case]) -> Path:
    """Train the other library's network on one fold, score it as ours is; return the file of its records."""
    path = options.work / "peer" / f"fold{fold}" / "records.npz"
    if path.exists():
        return path
    import_torchvision()  # the library imports it
    import segmentation_models_pytorch as smp

    device = Ranks().device
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    net = smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1).to(device)
    train, validation = fold_cases(cases, fold)
    shards = options.work / "shards"
    for name in config.train_stages:
        stage = config.train_stage(name)
        batches = TrainBatches(
            len(train), stage.batch_size, options.seed, stage.epochs,
            labels=[case.label for case in train], shares=stage.positive_share,
        )  # fmt: skip
        dataset = FilmDataset(shards, stage.size, train, Augmenter(config.augment, options.seed))
        fit(net, make_loader(dataset, batches, 0, options.seed), len(batches), stage.lr, device)
    settings, size = config.evaluate, config.sizes[-1]
    predictor = Predictor([net.eval()], size, device, settings.tta, config.train.amp)
    records = predict_records(
        predictor, validation, shards, size, settings.batch_size, record_thresholds(settings)
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    records.save(path)
    return path


def cell(entry: dict[str, Any], name: str) -> str:
    """Show one score with its interval by patient."""
    low, high = entry["intervals"][name]
    return f"{entry[name]:.3f} ({low:.3f}-{high:.3f})"


def report(parts: dict[str, list[Path]], config: configuration.Config) -> dict[str, Any]:
    """Pool the folds of each arm, print the table, and return every score."""
    result: dict[str, Any] = {}
    head = f"{'arm and decision':52}" + "".join(f"{title:>22}" for title in SHOWN.values())
    for arm, files in parts.items():
        records = Records.concatenate(Records.load(path) for path in files)
        tuned = scorecard.tune(records, config.evaluate, by="fold")
        result[arm] = scores = scorecard.scores(records, tuned, config.evaluate)
        if head:
            print(
                f"{scores['films']} films of {scores['patients']} patients, {scores['positive']} positive, out of fold"
            )
            print(head)
            empty = scores["headline"]["fixed"]
            print(
                f"{scorecard.ALL_EMPTY:52}{cell(empty, 'dice_all_empty'):>22}{0:>22.3f}{0.5:>22.3f}{0:>22.3f}{1:>22.3f}"
            )
            head = ""
        for label, entry in scorecard.headline_lines(scores):
            print(f"{arm + ': ' + label:52}" + "".join(f"{cell(entry, name):>22}" for name in SHOWN))
    return result


def numbers(text: str) -> list[int]:
    """Read a list such as 0,1,2."""
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicom-dir", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True, help="RLE list")
    parser.add_argument("--patients", type=Path, required=True, help="csv of ImageId,PatientKey")
    parser.add_argument("--work", type=Path, required=True, help="folder of shards, runs and records")
    parser.add_argument(
        "--arm", choices=ARMS, help="train this arm only and print nothing; default: both, and the table"
    )
    parser.add_argument("--json", type=Path, help="where to write every score")
    parser.add_argument("--folds", type=numbers, default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", type=numbers, default=[128], help="pixels; two for two passes")
    parser.add_argument("--epochs", type=numbers, default=[15], help="of each pass")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--positive-share", default="0.8,0.4", help="of the films drawn, first and last epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    options = parser.parse_args()
    if len(options.size) != len(options.epochs) or len(options.size) > 2:
        parser.error("--size and --epochs take one number each, or two each")
    options.work = options.work.absolute()
    config = recipe(options)
    cases = prepare(options, config)
    parts: dict[str, list[Path]] = {arm: [] for arm in ARMS}
    for fold in options.folds:
        if options.arm != "peer":
            parts["ours"].append(ours(options, config, fold))
        if options.arm != "ours":
            parts["peer"].append(peer(options, config, fold, cases))
    if options.arm is None:
        result = report(parts, config)
        if options.json:
            settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
            write_json(options.json, {"options": settings, **result})


if __name__ == "__main__":
    main()
