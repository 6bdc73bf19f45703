"""The sections of a recipe: every key with its default, its meaning and the rules within its section.

The defaults are the paper's final recipe (arXiv 2009.02805). `python -m pneumo_dist.config` prints all keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pneumo_dist.config.rules import at_least, fraction, one_of, require

TRAIN_STAGES = ("1", "2")


def key(default: Any, meaning: str) -> Any:
    """Declare a configuration key; each object gets its own copy of a list default."""
    metadata = {"meaning": meaning}
    if isinstance(default, list):
        return field(default_factory=partial(list, default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """Synthetic films in place of real ones (demonstration and tests only)."""

    films: int = key(0, "number of synthetic films; 0: real films from data.dicom_dir")
    size: int = key(512, "rows and columns of a synthetic film, pixels")
    seed: int = key(0, "seed of the synthetic films")

    def __post_init__(self) -> None:
        at_least(0, "phantom", self, "films", "seed")
        require(64 <= self.size <= 4096, f"phantom.size={self.size} must be between 64 and 4096")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The films, and how they are divided into shards and folds."""

    dicom_dir: str | None = key(None, "folder of the training films, searched recursively")
    rle_csv: str | None = key(None, "csv file of the run-length encoded masks, or (with data.masks) of the films")
    rle: str | None = key(
        None,
        "offsets in data.rle_csv: siim (from the end of the run before), absolute (positions from 1) or absolute0 "
        "(from 0); null: siim, but a list that looks absolute is refused",
    )
    masks: str | None = key(None, "folder of mask files in place of data.rle_csv's masks: PNG or DICOM SEG")
    patient_map: str | None = key(None, "csv file ImageId,PatientKey; null: folds are drawn by image")
    shard_dir: str | None = key(None, "directory of the shards; null: <run>/shards")
    holdout_ids: str | None = key(None, "file with one id per line: films that are kept for a final evaluation only")
    stage_dir: str | None = key(None, "node-local directory that shards are copied to before training; null: no copy")
    on_device: str = key(
        "auto",
        "training films in the GPU's memory, no loader processes: auto (where they take at most a quarter of its free "
        "memory), on (also in a CPU's memory) or off; with auto a CPU reads them itself; no effect on the result",
    )
    shards: int = key(16, "number of shards; a smaller data set gets one shard per film")
    folds: int = key(5, "number of cross-validation folds")
    fold_seed: int = key(0, "seed of the division into folds")
    unannotated: str = key("drop", "films without annotation: drop, negative (empty mask) or error")
    max_bad: float = key(0.01, "share of the films that may be unreadable before preprocessing fails")
    max_pixels: int = key(64_000_000, "largest image that is read, pixels; larger files are rejected")
    workers: int = key(0, "worker processes of one preprocessing or inference task; 0: one per core of the task")

    def __post_init__(self) -> None:
        one_of("data.on_device", self.on_device, ("auto", "on", "off"))
        one_of("data.unannotated", self.unannotated, ("drop", "negative", "error"))
        if self.rle is not None:
            one_of("data.rle", self.rle, ("siim", "absolute", "absolute0"))
        at_least(0, "data", self, "workers", "fold_seed")
        at_least(1, "data", self, "shards", "max_pixels")
        at_least(2, "data", self, "folds")
        fraction("data.max_bad", self.max_bad)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The paper's four augmentations, and shift, scale and rotation for small data sets (off by default)."""

    # Limits and probabilities are this project's choice (the paper gives none).
    hflip: float = key(0.5, "probability of a horizontal flip")
    tone: float = key(0.3, "probability of exactly one of contrast, gamma and brightness")
    contrast: float = key(0.2, "limit of the relative change of contrast")
    brightness: float = key(0.2, "limit of the relative change of brightness")
    gamma: float = key(0.2, "gamma is drawn from 1 - limit to 1 + limit")
    affine: float = key(0.0, "probability of a shift, scale and rotation")
    shift: float = key(0.0625, "limit of the shift, share of the image's size")
    scale: float = key(0.1, "limit of the relative change of scale")
    rotate: float = key(10.0, "limit of the rotation, degrees")

    def __post_init__(self) -> None:
        for name in ("hflip", "tone", "contrast", "brightness", "gamma", "affine", "shift"):
            fraction(f"augment.{name}", getattr(self, name))
        require(0 <= self.scale < 1, f"augment.scale={self.scale} must be at least 0 and below 1")
        require(0 <= self.rotate <= 180, f"augment.rotate={self.rotate} must be between 0 and 180 degrees")


@dataclass(frozen=True, kw_only=True)
class Model:
    """ResNet34-UNet."""

    pretrained: str = key("imagenet", "initial weights of the encoder: imagenet or none (random)")
    weights: str | None = key(None, "file of torchvision's resnet34 weights, for nodes without internet")
    # Without SyncBN each rank normalises with the statistics of its own films only.
    sync_bn: str = key(
        "auto", "batch norm over all ranks: on, off or auto (on for CUDA with fewer than 4 films per rank)"
    )

    def __post_init__(self) -> None:
        one_of("model.pretrained", self.pretrained, ("imagenet", "none"))
        one_of("model.sync_bn", self.sync_bn, ("auto", "on", "off"))
        agree = self.weights is None or self.pretrained == "imagenet"
        require(agree, "model.weights is set but model.pretrained=none: remove one of the two")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """bce * BCEWithLogits + dice * (1 - soft Dice per image) + image * BCEWithLogits of the films."""

    # The paper names BCE + Dice; the weights, the films of the Dice term and the image-level term are our choice.
    bce: float = key(1.0, "weight of the binary cross-entropy of the masks")
    dice: float = key(1.0, "weight of the Dice loss")
    dice_over: str = key(
        "positives",
        "films of the Dice loss: positives (mean over a batch's positive films), batch (their sum divided by all films "
        "of the batch) or all (with many negative films, training may end with all masks empty)",
    )
    smooth: float = key(1e-4, "added to numerator and denominator of Dice, as a share of the image's pixels")
    image: float = key(
        0.5, "weight of the cross-entropy of the films (is there a pneumothorax); 0: a network without that output"
    )

    def __post_init__(self) -> None:
        for name in ("bce", "dice", "image"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"loss.{name}={value} must be at least 0")
        require(self.bce + self.dice > 0, "loss.bce and loss.dice must not both be 0")
        one_of("loss.dice_over", self.dice_over, ("positives", "batch", "all"))
        require(self.smooth > 0, f"loss.smooth={self.smooth} must be positive: with 0 an empty mask has no gradient")

    def check(self) -> None:
        """Raise ConfigError for values that must not train; a finished run of an older version may hold them."""
        require(
            self.smooth <= 0.1,
            f"loss.smooth={self.smooth} must be at most 0.1: it is a share of the image's pixels, for example 0.0001",
        )


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """One pass of training at one image size."""

    size: int = key(256, "rows and columns of the network's input, pixels; a multiple of 32")
    epochs: int = key(100, "passes over the training films")
    batch_size: int = key(64, "films of one optimizer step over all ranks (global batch)")
    accumulate: int = key(1, "micro-batches of one optimizer step")
    lr: float = key(1e-3, "initial learning rate of Adam")
    schedule: str = key("cosine", "learning rate over time: cosine, plateau (on the validation loss) or constant")
    min_lr: float = key(0.0, "lowest learning rate of cosine and plateau")
    plateau_factor: float = key(0.2, "plateau: factor of one reduction of the learning rate")
    plateau_patience: int = key(5, "plateau: validations without improvement before a reduction")
    positive_share: list[float] = key([], "share of positive films: first epoch, last epoch; empty: as in the data")
    init_from: str | None = key(None, "initial weights: model, checkpoint or run; null in stage 2: best of stage 1")

    def check(self, prefix: str) -> None:
        """Raise ConfigError for an invalid value; `prefix` is the section's name."""
        fits = self.size >= 32 and self.size % 32 == 0
        require(fits, f"{prefix}.size={self.size} must be a multiple of 32: the encoder halves the image five times")
        at_least(1, prefix, self, "epochs", "batch_size", "accumulate")
        at_least(0, prefix, self, "plateau_patience")
        require(
            self.accumulate <= self.batch_size,
            f"{prefix}.accumulate={self.accumulate} is more than {prefix}.batch_size={self.batch_size}",
        )
        require(
            self.lr > 0 and 0 <= self.min_lr <= self.lr,
            f"{prefix}.lr={self.lr} must be positive and {prefix}.min_lr={self.min_lr} between 0 and {prefix}.lr",
        )
        one_of(f"{prefix}.schedule", self.schedule, ("cosine", "plateau", "constant"))
        inside = 0 < self.plateau_factor < 1
        require(inside, f"{prefix}.plateau_factor={self.plateau_factor} must be between 0 and 1")
        require(
            len(self.positive_share) in (0, 2),
            f"{prefix}.positive_share takes two values, first and last epoch, for example 0.8,0.2",
        )
        for share in self.positive_share:
            fraction(f"{prefix}.positive_share", share)


@dataclass(frozen=True, kw_only=True)
class Swa:
    """Stochastic weight averaging; start and interval are this project's choice (the paper gives none)."""

    stages: list[str] = key(["last"], "training stages that average weights: last (of a recipe with swa), 1, 2")
    start: float = key(0.75, "share of the stage's optimizer steps after which averaging begins")
    interval: int = key(0, "optimizer steps between two averaged models; 0: one epoch")
    lr: float | None = key(None, "constant learning rate while averaging; null: that of the schedule")
    bn_batches: int = key(0, "batches of the batch-norm update; 0: the whole training fold")

    def __post_init__(self) -> None:
        fraction("swa.start", self.start)
        at_least(0, "swa", self, "interval", "bn_batches")
        require(self.lr is None or self.lr > 0, f"swa.lr={self.lr} must be positive")
        for name in self.stages:
            one_of("swa.stages", name, ("last", *TRAIN_STAGES))


@dataclass(frozen=True, kw_only=True)
class Train:
    """Settings of all training stages."""

    seed: int = key(0, "seed of initial weights, order of the films and augmentation")
    amp: str = key("auto", "mixed precision: auto, fp16, bf16, or off (float32, on GPUs without TF32)")
    clip_norm: float = key(0.0, "largest norm of the gradient; 0: no clipping")
    workers: int = key(
        2, "loader processes per rank where data.on_device leaves the films to them; no effect on the result"
    )
    # Floating-point sums depend on the number of threads: bit-identical repetition needs the same number.
    threads: int = key(0, "torch threads per rank on the CPU; 0: the task's cores")
    select: str = key(
        "dice_and_auc",
        "score of the best epoch: dice_and_auc (Dice on positives x AUC), dice_positive, auc, or dice (all films; "
        "highest for a network that calls every film empty)",
    )
    eval_every: int = key(1, "epochs between two validations; the last epoch is always validated")
    save_every_s: float = key(300.0, "seconds between two checkpoints")
    keep: int = key(2, "checkpoints that are kept")
    log_every: int = key(10, "optimizer steps between two points of the step curves in TensorBoard")
    max_nonfinite: int = key(5, "optimizer steps in a row with a non-finite gradient before the training fails")
    meet_timeout_s: float = key(300.0, "seconds until all ranks of a job must have found one another")
    first_timeout_s: float = key(1800.0, "seconds that a rank waits for the others until the first step is done")
    timeout_s: float = key(300.0, "seconds that a rank waits for the others afterwards")
    compile: bool = key(False, "compile the network with torch.compile")
    cuda_graph: bool = key(False, "run a training step as one CUDA graph; one GPU, not yet tried on one")
    deterministic: bool = key(True, "use deterministic kernels where PyTorch has them")

    def __post_init__(self) -> None:
        one_of("train.amp", self.amp, ("auto", "fp16", "bf16", "off"))
        one_of("train.select", self.select, ("dice_and_auc", "dice_positive", "auc", "dice"))
        require(
            self.keep >= 2, f"train.keep={self.keep} must be at least 2, because the newest checkpoint may be damaged"
        )
        at_least(1, "train", self, "eval_every", "log_every", "max_nonfinite")
        at_least(0, "train", self, "seed", "workers", "threads", "clip_norm", "save_every_s")
        for name in ("meet_timeout_s", "first_timeout_s", "timeout_s"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluation: the fixed threshold of the recipe, and the grids that are searched for the tuned thresholds."""

    batch_size: int = key(16, "films of one forward pass on one rank; a GPU adds their mirror images")
    threshold: float = key(0.55, "fixed mask threshold, also of the validation during training")
    tta: str = key("hflip", "test-time augmentation: hflip or none")
    mask_thresholds: list[float] = key(
        [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8],
        "grid: a pixel belongs to the mask above this probability",
    )
    top_scores: list[float] = key(
        [], "grid: a film is positive if its score reaches this; empty: quantiles of the films' scores"
    )
    min_areas: list[int] = key(
        [], "grid: smallest mask of a positive film, pixels of 1024x1024; empty: quantiles of the masks' areas"
    )
    bootstrap: int = key(1000, "bootstrap resamples of the 95 % confidence intervals; 0: no intervals")

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"evaluate.batch_size={self.batch_size} must be at least 1")
        fraction("evaluate.threshold", self.threshold)
        one_of("evaluate.tta", self.tta, ("hflip", "none"))
        require(bool(self.mask_thresholds), "evaluate.mask_thresholds must not be empty")
        for value in (*self.mask_thresholds, *self.top_scores):
            fraction("evaluate.mask_thresholds and evaluate.top_scores", value)
        require(min(self.min_areas, default=0) >= 0, "evaluate.min_areas must not be negative")
        require(self.bootstrap >= 0, f"evaluate.bootstrap={self.bootstrap} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Infer:
    """Batch inference over a folder of films."""

    dir: str | None = key(None, "folder of the films; null: the training films")
    models: list[str] = key(
        [], "models whose probabilities are averaged: files or runs; empty: every fold<k>/model.pt of the run"
    )
    label: str | None = key(None, "name of the result, <run>/infer/<label>; null: the folder's name")
    tta: str | None = key(None, "test-time augmentation: hflip or none; null: the one stored in the model")
    triplet: list[float] = key([], "film score, min. area (pixels of 1024x1024), mask threshold; empty: the model's")
    outputs: list[str] = key(["csv"], "outputs: csv, masks, overlays, dicomseg, probs")
    unreadable: str = key("skip", "rows of unreadable films in submission.csv: skip (none) or negative (-1)")
    follow_links: bool = key(False, "follow symbolic links that lead out of infer.dir")
    batch_size: int = key(8, "films of one forward pass; a GPU adds their mirror images")
    part_size: int = key(0, "films of one part, the unit of a restart; 0: at most 256, the same number for each node")

    def __post_init__(self) -> None:
        for name in self.outputs:
            one_of("infer.outputs", name, ("csv", "masks", "overlays", "dicomseg", "probs"))
        one_of("infer.unreadable", self.unreadable, ("skip", "negative"))
        if self.tta is not None:
            one_of("infer.tta", self.tta, ("hflip", "none"))
        if self.triplet:
            good = len(self.triplet) == 3 and all(0 <= share <= 1 for share in self.triplet[::2])
            require(
                good and self.triplet[1] >= 0 and self.triplet[1].is_integer(),
                f"infer.triplet={self.triplet} must be film score, minimum area and mask threshold, "
                "for example 0.75,1500,0.3",
            )
        if self.label is not None:
            plain = self.label not in ("", ".", "..") and all(c.isalnum() or c in "._-" for c in self.label)
            require(
                plain,
                f"infer.label={self.label!r} must be a plain folder name of letters, digits, '.', '_' and '-'",
            )
        at_least(1, "infer", self, "batch_size")
        at_least(0, "infer", self, "part_size")
