"""The whole recipe as frozen dataclasses: schema, defaults, cross-field rules, snapshot.

The defaults are the paper's final recipe (arXiv 2009.02805); a YAML file holds only what differs.
No torch in here: `submit.py` reads a configuration before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional, get_args, get_origin, get_type_hints

TRAIN_STAGES = ("1", "2")


class ConfigError(ValueError):
    """A mistake in the user's input: one line saying what, where and what to do (exit status 2)."""


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    _check(value in choices, f"{key}={value!r} is unknown: choose one of {', '.join(choices)}")


def _fraction(key: str, value: float) -> None:
    _check(0.0 <= value <= 1.0, f"{key}={value} must lie between 0 and 1")


def _at_least(low: int, section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _check(value >= low, f"{section}.{name}={value} must be at least {low}")


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """Synthetic films in place of real ones (demonstration and tests only)."""

    films: int = 0  # 0: real films from data.dicom_dir
    size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(0, "phantom", self, "films", "seed")
        _check(64 <= self.size <= 4096, f"phantom.size={self.size} must lie between 64 and 4096")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the films are, and how they become shards and folds."""

    dicom_dir: Optional[str] = None
    rle_csv: Optional[str] = None
    patient_map: Optional[str] = None
    shard_dir: Optional[str] = None  # default: <run>/shards
    holdout_ids: Optional[str] = None  # file with one id a line: kept for a final evaluation only
    stage_dir: Optional[str] = None  # node-local directory that shards are copied to before training
    shards: int = 16
    folds: int = 5
    fold_seed: int = 0
    unannotated: str = "drop"
    max_bad: float = 0.01  # share of the films that may be unreadable before preprocessing fails
    max_pixels: int = 64_000_000  # larger matrices are refused unread
    workers: int = 0  # processes of one preprocessing or inference task; 0: all cores of the task

    def __post_init__(self) -> None:
        _one_of("data.unannotated", self.unannotated, ("drop", "negative", "error"))
        _at_least(0, "data", self, "workers", "fold_seed")
        _at_least(1, "data", self, "shards", "max_pixels")
        _at_least(2, "data", self, "folds")
        _fraction("data.max_bad", self.max_bad)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The paper's four augmentations; it gives no limits or probabilities: these are this project's choice."""

    hflip: float = 0.5  # probability of a horizontal flip
    tone: float = 0.3  # probability of exactly one of contrast, gamma, brightness
    contrast: float = 0.2  # limit of the relative change
    brightness: float = 0.2  # limit of the relative change
    gamma: float = 0.2  # gamma is drawn from 1 - limit to 1 + limit

    def __post_init__(self) -> None:
        for name in ("hflip", "tone", "contrast", "brightness", "gamma"):
            _fraction(f"augment.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Model:
    """ResNet34-UNet."""

    pretrained: str = "imagenet"
    weights: Optional[str] = None  # a file with torchvision's resnet34 weights, for nodes without internet
    sync_bn: str = "auto"  # auto: on CUDA below 4 samples a rank; off: the number of ranks tells (README)

    def __post_init__(self) -> None:
        _one_of("model.pretrained", self.pretrained, ("imagenet", "none"))
        _one_of("model.sync_bn", self.sync_bn, ("auto", "on", "off"))
        _check(self.weights is None or self.pretrained == "imagenet", "model.weights is given but model.pretrained=none: drop one of the two")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Loss:
    """bce * BCEWithLogits + dice * (1 - soft Dice per image). Equal weights are this project's choice."""

    bce: float = 1.0
    dice: float = 1.0
    smooth: float = 1.0  # keeps a gradient on an empty mask

    def __post_init__(self) -> None:
        _check(self.bce >= 0 and self.dice >= 0 and 0 < self.bce + self.dice < math.inf, "loss.bce and loss.dice must not be negative, nor both 0")  # fmt: skip
        _check(self.smooth > 0, f"loss.smooth={self.smooth} must be positive: 0 gives an empty mask no gradient")


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """One pass of training at one image size. `batch_size` is the global batch: ranks split it."""

    size: int = 256
    epochs: int = 100
    batch_size: int = 64
    accumulate: int = 1  # micro-batches of one optimizer step
    lr: float = 1e-3
    schedule: str = "cosine"
    min_lr: float = 0.0
    plateau_factor: float = 0.2
    plateau_patience: int = 5
    positive_share: List[float] = field(default_factory=list)  # [first epoch, last epoch]; empty: as in the data
    init_from: Optional[str] = None  # checkpoint or run directory; stage 2 without it: this run's stage 1, best

    def check(self, key: str) -> None:
        """Raise ConfigError, naming `key`, where a value cannot work."""
        _check(self.size >= 32 and self.size % 32 == 0, f"{key}.size={self.size} must be a multiple of 32: the encoder halves five times")  # fmt: skip
        _at_least(1, key, self, "epochs", "batch_size", "accumulate")
        _at_least(0, key, self, "plateau_patience")
        _check(self.accumulate <= self.batch_size, f"{key}.accumulate={self.accumulate} is more than {key}.batch_size={self.batch_size}")  # fmt: skip
        _check(self.lr > 0 and 0 <= self.min_lr <= self.lr, f"{key}.lr={self.lr} must be positive and {key}.min_lr={self.min_lr} between 0 and it")  # fmt: skip
        _one_of(f"{key}.schedule", self.schedule, ("cosine", "plateau", "constant"))
        _check(0 < self.plateau_factor < 1, f"{key}.plateau_factor={self.plateau_factor} must lie between 0 and 1")
        _check(len(self.positive_share) in (0, 2), f"{key}.positive_share takes two values, first and last epoch, for example 0.8,0.2")  # fmt: skip
        for share in self.positive_share:
            _fraction(f"{key}.positive_share", share)


@dataclass(frozen=True, kw_only=True)
class Swa:
    """Stochastic weight averaging; the paper gives neither start nor interval: these are this project's choice."""

    stages: List[str] = field(default_factory=lambda: ["last"])  # "last" (for the stage swa), or names such as 1
    start: float = 0.75  # share of the stage's optimizer steps after which averaging begins
    interval: int = 0  # optimizer steps between two averaged models; 0: one epoch
    lr: Optional[float] = None  # constant learning rate while averaging; none: the schedule goes on
    bn_batches: int = 0  # batches of the batch-norm update; 0: the whole training fold

    def __post_init__(self) -> None:
        _fraction("swa.start", self.start)
        _at_least(0, "swa", self, "interval", "bn_batches")
        _check(self.lr is None or self.lr > 0, f"swa.lr={self.lr} must be positive")
        for name in self.stages:
            _one_of("swa.stages", name, ("last", *TRAIN_STAGES))


@dataclass(frozen=True, kw_only=True)
class Train:
    """What the training stages share."""

    seed: int = 0
    amp: str = "auto"
    clip_norm: float = 0.0  # 0: no clipping
    workers: int = 2  # loader processes per rank; no effect on the result
    threads: int = 0  # torch threads per rank on the CPU; 0: the task's cores. Part of what makes bits repeat
    eval_every: int = 1  # epochs between validations; the last epoch is always validated
    save_every_s: float = 300.0
    keep: int = 2
    log_every: int = 10
    max_nonfinite: int = 5  # steps in a row without a finite gradient before all ranks give up
    first_timeout_s: float = 1800.0  # until the first step is done
    timeout_s: float = 300.0  # between ranks afterwards
    compile: bool = False
    deterministic: bool = True

    def __post_init__(self) -> None:
        _one_of("train.amp", self.amp, ("auto", "fp16", "bf16", "off"))
        _check(self.keep >= 2, f"train.keep={self.keep} must be at least 2: the newest checkpoint may be damaged")
        _at_least(1, "train", self, "eval_every", "log_every", "max_nonfinite")
        _at_least(0, "train", self, "seed", "workers", "threads", "clip_norm", "save_every_s")
        for name in ("first_timeout_s", "timeout_s"):
            _check(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Validation: the fixed threshold is the recipe's, the search grid serves the tuned triplet."""

    batch_size: int = 16
    threshold: float = 0.55  # fixed mask threshold of the recipe (and of "best" while training)
    tta: str = "hflip"
    mask_thresholds: List[float] = field(default_factory=lambda: [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8])  # fmt: skip
    top_scores: List[float] = field(default_factory=lambda: [0.0, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])  # fmt: skip
    min_areas: List[int] = field(default_factory=lambda: [0, 250, 500, 750, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 5000])  # px of 1024x1024  # fmt: skip
    bootstrap: int = 1000  # resamples of the 95 % intervals

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, f"evaluate.batch_size={self.batch_size} must be at least 1")
        _fraction("evaluate.threshold", self.threshold)
        _one_of("evaluate.tta", self.tta, ("hflip", "none"))
        _check(bool(self.mask_thresholds and self.top_scores and self.min_areas), "evaluate.mask_thresholds, top_scores and min_areas must not be empty")  # fmt: skip
        for value in (*self.mask_thresholds, *self.top_scores):
            _fraction("evaluate.mask_thresholds and evaluate.top_scores", value)
        _check(min(self.min_areas) >= 0, "evaluate.min_areas must not be negative")
        _check(self.bootstrap >= 0, f"evaluate.bootstrap={self.bootstrap} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Infer:
    """Batch inference over a folder of films."""

    dir: Optional[str] = None
    models: List[str] = field(default_factory=list)  # default: every fold<k>/model.pt of the run
    label: Optional[str] = None  # default: the folder's name
    tta: Optional[str] = None  # default: the one stored in the model
    outputs: List[str] = field(default_factory=lambda: ["csv"])
    batch_size: int = 8
    part_size: int = 256  # films of one part: the unit that is restarted

    def __post_init__(self) -> None:
        for name in self.outputs:
            _one_of("infer.outputs", name, ("csv", "masks", "overlays", "dicomseg", "probs"))
        if self.tta is not None:
            _one_of("infer.tta", self.tta, ("hflip", "none"))
        if self.label is not None:
            _check(self.label not in ("", ".", "..") and all(c.isalnum() or c in "._-" for c in self.label), f"infer.label={self.label!r} must be a plain folder name of letters, digits, '.', '_' and '-'")  # fmt: skip
        _at_least(1, "infer", self, "batch_size", "part_size")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One recipe. `stages` lists what it trains, in order; preprocess, evaluate and infer always exist."""

    stages: List[str] = field(default_factory=lambda: ["1", "2", "swa"])
    run_root: str = "runs"
    phantom: Phantom = field(default_factory=Phantom)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    stage1: TrainStage = field(default_factory=TrainStage)
    stage2: TrainStage = field(default_factory=lambda: TrainStage(size=512, epochs=70, batch_size=16))
    swa: Swa = field(default_factory=Swa)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    infer: Infer = field(default_factory=Infer)

    def __post_init__(self) -> None:
        known = (*TRAIN_STAGES, "swa")
        for name in self.stages:
            _one_of("stages", name, known)
        order = [known.index(name) for name in self.stages]
        _check(bool(self.train_stages) and order == sorted(set(order)), f"stages={','.join(self.stages)} must list 1, 2 and swa in this order, each once, with at least one of 1 and 2")  # fmt: skip
        for name in self.train_stages:
            self.train_stage(name).check(f"stage{name}")
        if "2" in self.stages and "1" not in self.stages and not self.stage2.init_from:
            raise ConfigError(
                "this recipe has no stage 1: give its starting weights, stage2.init_from=PATH (a checkpoint or a run)"
            )
        if "swa" in self.stages and not self.averages(self.last_stage):
            raise ConfigError(
                f"stages lists swa, but swa.stages does not average stage {self.last_stage}: set swa.stages=last"
            )
        if self.phantom.films and self.data.dicom_dir:
            raise ConfigError("phantom.films and data.dicom_dir are both set: set phantom.films=0 for real films")

    @property
    def train_stages(self) -> list[str]:
        """The training stages of this recipe in order, a subset of ["1", "2"]."""
        return [name for name in self.stages if name in TRAIN_STAGES]

    @property
    def last_stage(self) -> str:
        """The name of the stage whose weights are averaged and evaluated."""
        return self.train_stages[-1]

    @property
    def sizes(self) -> list[int]:
        """The image sizes that preprocessing writes, ascending, in pixels."""
        return sorted({self.train_stage(name).size for name in self.train_stages})

    def train_stage(self, name: str) -> TrainStage:
        """Return the settings of training stage `name` ("1" or "2")."""
        return {"1": self.stage1, "2": self.stage2}[name]

    def averages(self, name: str) -> bool:
        """Tell whether training stage `name` keeps a running SWA average: it is named, or the `swa` stage reads it."""
        return name in self.swa.stages or ("last" in self.swa.stages and self.stages[-2:] == [name, "swa"])


def _nearest(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; configs/paper.yaml and pneumo_dist/config.py show every key"


@functools.cache  # asked for every word; it would be a third of the time of a dry run
def keys(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return every dotted leaf key of the schema with its type."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(hint)
        found |= keys(hint, f"{prefix}{name}.") if nested else {prefix + name: hint}  # type: ignore[arg-type]
    return found


def _override(text: str) -> tuple[str, str]:
    """Split one `key=value` word; list-typed keys take commas."""
    key, sep, value = text.partition("=")
    key = key.strip()
    _check(bool(sep and key), f"{text!r} is not key=value (for example stage1.epochs=10)")
    known = keys()
    if key not in known:
        raise ConfigError(f"unknown key {key!r}{_nearest(key, list(known))}")
    if get_origin(known[key]) is list and not value.strip().startswith("["):
        item = get_args(known[key])[0]
        parts = [p.strip() for p in value.split(",") if p.strip()]
        value = json.dumps(parts) if item is str else f"[{','.join(parts)}]"
    elif str in (known[key], *get_args(known[key])) and value not in ("null", ""):
        value = json.dumps(value)  # a path may look like YAML
    return key, value if value else "null"


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file over the defaults, then apply `key=value` words.

    Raises:
        ConfigError: one line naming the key or file, and the nearest valid key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    tree = OmegaConf.structured(Config)
    where = ""
    try:
        if path is not None:
            where = f"{path}: "
            try:
                layer = OmegaConf.load(path)
            except OSError as error:
                raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from None
            _check(OmegaConf.is_dict(layer), f"{path}: a configuration is a mapping of keys to values")
            for key in _leaves(OmegaConf.to_container(layer)):
                if not any(known == key or known.startswith(key + ".") for known in keys()):
                    raise ConfigError(f"{path}: unknown key {key!r}{_nearest(key, list(keys()))}")
            tree = OmegaConf.merge(tree, layer)
        for text in overrides or []:
            where = f"{text}: "
            key, value = _override(text)
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([f"{key}={value}"]))
        where = ""
        result = OmegaConf.to_object(tree)
    except ConfigError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError, AttributeError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
        raise ConfigError(where + " ".join(str(cause).split("\n")[0].split())) from None
    assert isinstance(result, Config)
    return result


def _leaves(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix.rstrip(".")] if prefix else []
    return [leaf for name, value in tree.items() for leaf in _leaves(value, f"{prefix}{name}.")]


def flatten(config: Config) -> dict[str, Any]:
    """Return the configuration as {dotted key: plain value}."""

    def walk(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            found |= walk(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return walk(dataclasses.asdict(config), "")


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML text that `load` reads back to an equal object."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
