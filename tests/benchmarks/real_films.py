"""Learning on real films: out-of-fold scores of this project's recipe, of its former loss, and of a peer.

    python -m tests.benchmarks real_films --dicom-dir DIR --csv FILE... --patients FILE... --work DIR [--seeds 0,1]
        [--size 96 --epochs 20 ...] [--arms ours,before,peer] [--films 200,400,0] [--weights FILE --device cuda]

Every arm sees the same films and patient folds, for as many epochs of the same size. "ours" is configs/small.yaml;
"before" is the same with Dice over all films, best Dice over all films, the data's share of positives, and without the
image-level term and the affine augmentation; "peer" is segmentation_models_pytorch's
Unet("resnet34") with its own DiceLoss and BCE in a plain loop over shuffled films. All start from random weights, or
with the encoder of --weights: torchvision's ImageNet weights, or any ResNet-34 of its names. --films trains on about
so many films of each training fold, whole patients; the validation folds stay. No epoch is chosen by looking.
Thresholds are tuned on other folds. Finished folds are not repeated, and an unfinished one of ours resumes, when --work
is given again; processes with other seeds, arms or folds may run at the same time.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pneumo_dist import config as configuration
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import read_cases, write_cases
from pneumo_dist.data.loaders import FilmDataset, TrainBatches, fold_cases, make_loader
from pneumo_dist.model.pretrained import import_torchvision
from pneumo_dist.model.unet import normalise
from pneumo_dist.prediction.forward import Predictor, predict_records
from pneumo_dist.runtime.files import write_json, write_text
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.scoring import scorecard
from pneumo_dist.scoring.metrics import auc, dice
from pneumo_dist.scoring.records import Records, record_thresholds
from pneumo_dist.stages import run_stage
from tests.benchmarks.environment import ROOT

BEFORE = ("loss.dice_over=all", "loss.image=0", "train.select=dice", "stage1.positive_share=", "augment.affine=0")
COLUMNS = ("Dice on positives", "AUC", "sens. at 0.9 spec.", "Dice, cross-fitted", "spec. at the threshold")
Floats = NDArray[np.float64]


def recipe(options: argparse.Namespace, arm: str, seed: int, shards: Path) -> configuration.Config:
    """Return the configuration of one arm; the peer takes films, start, size and length from it."""
    words = [
        f"data.dicom_dir={options.dicom_dir.absolute()}",
        f"data.rle_csv={options.work / 'rle.csv'}",
        f"data.patient_map={options.work / 'patients.csv'}",
        f"data.shard_dir={shards}",
        "data.shards=4",
        "data.workers=1",
        "model.pretrained=none",
        f"train.seed={seed}",
        f"train.threads={options.threads}",
        "train.workers=0",
        f"train.amp={options.amp}",
        "train.eval_every=5",
        "train.save_every_s=60",
        f"stage1.size={options.size}",
        f"stage1.epochs={options.epochs}",
    ]
    words += [f"stage1.init_from={options.weights.absolute()}"] if options.weights else []
    words += BEFORE if arm != "ours" else ()
    return configuration.load(ROOT / "configs" / "small.yaml", words)


def join_lists(paths: list[Path], target: Path) -> None:
    """Join csv files of equal heads into one."""
    texts = [path.read_text(encoding="utf-8-sig").splitlines() for path in paths]
    write_text(target, "\n".join([texts[0][0], *(line for text in texts for line in text[1:])]) + "\n")


def prepare(options: argparse.Namespace) -> Path:
    """Make the shards and folds that all arms share, and return their folder."""
    shards: Path = options.work / "shards"
    options.work.mkdir(parents=True, exist_ok=True)
    with open(options.work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be starting too
        join_lists(options.csv, options.work / "rle.csv")
        join_lists(options.patients, options.work / "patients.csv")
        folder = options.work / f"data-{options.size}"
        write_text(folder / "config.yaml", configuration.to_yaml(recipe(options, "ours", 0, shards)))
        for stage in ("preprocess", "finalize"):
            run_stage(stage, folder)
    return shards


def part_of(shards: Path, films: int, seed: int, fold: int) -> Path:
    """Return a view of the shards that lists the fold's validation films and about so many of its training films.

    Patients are drawn in one order for every number of films: fewer films are a part of more.
    """
    cases = read_cases(shards)
    counts = Counter(case.group for case in fold_cases(cases, fold)[0])
    order = np.random.default_rng([seed, fold]).permutation(sorted(counts))
    before = np.cumsum([counts[group] for group in order]) - [counts[group] for group in order]
    kept = set(order[before < films].tolist())
    view = shards.with_name(f"{shards.name}-{films}-seed{seed}-fold{fold}")
    view.mkdir(exist_ok=True)
    for path in shards.iterdir():
        if path.name != "cases.csv" and not (view / path.name).exists():
            (view / path.name).symlink_to(path)
    write_cases(view, (case for case in cases if case.fold == fold or case.group in kept))
    return view


def records_of(options: argparse.Namespace, shards: Path, arm: str, films: int, seed: int, fold: int) -> Path:
    """Train and evaluate one fold of one arm where that is not done; return the file of its records."""
    name = f"{arm}-{options.size}-{options.epochs}-{options.amp}"
    name += f"-{options.weights.stem}" if options.weights else ""
    name += f"-{films}films-of-fold{fold}" if films else ""
    shards = part_of(shards, films, seed, fold) if films else shards
    train = peer if arm == "peer" else ours
    return train(recipe(options, arm, seed, shards), options.work / f"{name}-seed{seed}", fold)


def ours(config: configuration.Config, run_dir: Path, fold: int) -> Path:
    """Train and evaluate one fold through the ordinary stages."""
    write_text(run_dir / "config.yaml", configuration.to_yaml(config))
    for stage in (*config.stages, "evaluate"):
        run_stage(stage, run_dir, fold)
    return run_dir / f"fold{fold}" / "evaluate" / "records.npz"


class PeerNet(nn.Module):
    """The other library's network, called as this project's predictor calls its own."""

    film_head = None

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        import_torchvision()  # the library imports it
        import segmentation_models_pytorch as smp

        self.net = smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1)
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            self.net.encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.net(x), None


def peer(config: configuration.Config, run_dir: Path, fold: int) -> Path:
    """Train the other library's network on one fold, and score it as ours is."""
    path = run_dir / f"fold{fold}" / "records.npz"
    if path.exists():
        return path
    device, seed, shards = Ranks().device, config.train.seed, Path(str(config.data.shard_dir))
    torch.set_num_threads(config.train.threads)
    torch.manual_seed(seed)
    net = PeerNet(config.stage1.init_from).to(device)
    import segmentation_models_pytorch as smp

    train, validation = fold_cases(read_cases(shards), fold)
    stage, half = config.stage1, config.train.amp == "bf16"
    batches = TrainBatches(len(train), stage.batch_size, seed, stage.epochs)
    films = make_loader(FilmDataset(shards, stage.size, train, Augmenter(config.augment, seed)), batches, 0, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=stage.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    dice_loss = smp.losses.DiceLoss("binary")
    for image, mask, _ in films:
        image, mask = image.to(device), mask.to(device).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = net(normalise(image))[0]
        logits = logits.float()
        loss = dice_loss(logits, mask) + binary_cross_entropy_with_logits(logits, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    settings = config.evaluate
    predictor = Predictor([net.eval()], stage.size, device, settings.tta, config.train.amp)
    records = predict_records(
        predictor, validation, shards, stage.size, settings.batch_size, record_thresholds(settings)
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    records.save(path)
    return path


def sensitivity_at(scores: NDArray[Any], positive: NDArray[np.bool_], weights: Floats, specificity: float) -> Floats:
    """Return the sensitivity at the lowest threshold of at least that specificity, for each row of weights, (B,)."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # films of equal score pass together
    called = np.cumsum(weights[:, order] * ~positive[order], 1)[:, last]
    found = np.cumsum(weights[:, order] * positive[order], 1)[:, last]
    allowed = called <= (1 - specificity) * (weights @ ~positive)[:, None] + 1e-9  # 1 - 0.9 is below 0.1
    return np.where(allowed, found, 0).max(1) / np.maximum(weights @ positive, 1)


def of_arm(files: list[Path], settings: configuration.Evaluate, weights: Floats) -> dict[str, Floats]:
    """Return every column over the films of all folds, for each row of weights: those of one arm and seed."""
    records = Records.concatenate(Records.load(path) for path in files)
    tuned = scorecard.tune(records, settings, by="fold")
    positive, rule = records.truth_px > 0, scorecard.fixed(settings.threshold)
    empty = dice(records, rule) * 0 + ~positive

    def mean(values: Floats, over: NDArray[np.bool_]) -> Floats:
        return (weights @ (values * over)) / np.maximum(weights @ over, 1)

    every = np.ones(len(records), bool)
    called = records.areas[:, records.column(settings.threshold)] > 0
    values = (
        mean(dice(records, rule), positive),
        auc(records.top, positive, weights),
        sensitivity_at(records.top, positive, weights, 0.9),
        mean(dice(records, tuned.fit.decisions), every) if tuned.fit else np.full(len(weights), np.nan),
        mean((~called).astype(float), ~positive),
    )
    return dict(zip(COLUMNS, values, strict=True)) | {"all empty": mean(empty, every)}


def resamples(files: list[Path], count: int = 1000) -> Floats:
    """Return how often each film occurs, (count + 1, n): first once each, then in resamples of whole patients."""
    groups = np.unique(Records.concatenate(Records.load(path) for path in files).groups, return_inverse=True)[1]
    patients = int(groups.max()) + 1
    drawn = np.random.default_rng(0).multinomial(patients, np.full(patients, 1 / patients), size=count)
    return np.vstack([np.ones((1, len(groups))), drawn[:, groups]]).astype(np.float64)


def interval(values: Floats) -> list[float] | None:
    """Return a score, or a difference of two, and its 95 % interval by patient; None where one fold cannot give it."""
    return None if np.isnan(values[0]) else [float(values[0]), *map(float, np.nanquantile(values[1:], (0.025, 0.975)))]


def cell(values: Floats) -> str:
    """Show what `interval` returns."""
    found = interval(values)
    return "{:.3f} ({:.3f} to {:.3f})".format(*found) if found else "-"


def report(parts: dict[tuple[str, int], list[Path]], settings: configuration.Evaluate) -> dict[str, Any]:
    """Pool the folds of each arm and seed, print scores and paired differences, and return them."""
    weights = resamples(next(iter(parts.values())))
    scores = {key: of_arm(files, settings, weights) for key, files in parts.items()}
    first = next(iter(scores.values()))
    print(f"\n{weights.shape[1]} films out of fold; calling every film empty: Dice {cell(first['all empty'])}")
    print(f"| {'arm, seed':28} | " + " | ".join(f"{name:24}" for name in COLUMNS) + " |")
    print("|" + "|".join(["-" * 30, *["-" * 26] * len(COLUMNS)]) + "|")
    rows = {f"{arm}, {seed}": score for (arm, seed), score in scores.items()}
    rows |= {
        f"ours - {arm}, {seed}": {name: scores["ours", seed][name] - score[name] for name in COLUMNS}
        for (arm, seed), score in scores.items()
        if arm != "ours" and ("ours", seed) in scores
    }
    for label, row in rows.items():
        print(f"| {label:28} | " + " | ".join(f"{cell(row[name]):24}" for name in COLUMNS) + " |")
    return {label: {name: interval(values) for name, values in row.items()} for label, row in rows.items()}


def arguments() -> argparse.Namespace:
    """Read the command line."""

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicom-dir", type=Path, required=True, help="searched recursively")
    parser.add_argument("--csv", type=Path, nargs="+", required=True, help="RLE lists")
    parser.add_argument("--patients", type=Path, nargs="+", required=True, help="csv files of ImageId,PatientKey")
    parser.add_argument("--work", type=Path, required=True, help="folder of shards, runs and records")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=["ours", "before", "peer"])
    parser.add_argument("--seeds", type=numbers, default=[0, 1])
    parser.add_argument("--folds", type=numbers, default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--films", type=numbers, default=[0], help="training films of a fold, a learning curve; 0: all")
    parser.add_argument(
        "--weights", type=Path, help="state dict of a resnet34, torchvision's names; default: random start"
    )
    parser.add_argument("--amp", default="bf16", help="train.amp: bf16, or off where the processor has no bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the GPU that torch sees")
    parser.add_argument("--json", type=Path, help="where to write every score")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.weights and not options.weights.is_file():
        parser.error(f"--weights {options.weights}: no such file")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.work = options.work.absolute()
    return options


def main() -> None:
    """Train what is missing, and print the tables."""
    options = arguments()
    shards = prepare(options)
    parts: dict[tuple[str, int], list[Path]] = {}
    for seed, arm, films in product(options.seeds, options.arms, options.films):
        label = f"{arm}, {films} films" if films else arm
        parts[label, seed] = [records_of(options, shards, arm, films, seed, fold) for fold in options.folds]
    result = report(parts, recipe(options, "ours", 0, shards).evaluate)
    if options.json:
        settings = {k: str(v) for k, v in vars(options).items()}
        write_json(options.json, {"options": settings, "scores": result})


if __name__ == "__main__":
    try:
        main()
    except configuration.ConfigError as error:
        sys.exit(f"error: {error}")
