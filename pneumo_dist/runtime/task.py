"""What a stage function is given: configuration, run directory, its place in the job. Knows every path of a run."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from pneumo_dist.config import Config, ConfigError
from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.files import write_text
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal


def shard_dir(config: Config, run_dir: Path) -> Path:
    """The directory of the shards: `data.shard_dir`, else the run's own."""
    return Path(config.data.shard_dir).expanduser().absolute() if config.data.shard_dir else run_dir / "shards"


def infer_dir(config: Config, run_dir: Path) -> Path:
    """The directory of one inference; its label defaults to the folder's name."""
    folder = infer_source(config, run_dir)
    label = config.infer.label or (folder.name if folder else "")
    if not label:
        raise ConfigError("no films to infer on: give infer.dir=DIR")
    return run_dir / "infer" / label


def infer_source(config: Config, run_dir: Path) -> Path | None:
    """The folder whose films are inferred: `infer.dir`, else the training films."""
    if config.infer.dir:
        return Path(config.infer.dir).expanduser().absolute()
    return source(config, run_dir, "dicom_dir")


def source(config: Config, run_dir: Path, name: str) -> Path | None:
    """A path of the data section (`dicom_dir`, `rle_csv` or `patient_map`), or its phantom counterpart."""
    if config.phantom.films:
        phantom = {"dicom_dir": "dicom-images-train", "rle_csv": "train-rle.csv", "patient_map": "patients.csv"}
        return run_dir / "phantom" / phantom[name]
    value = getattr(config.data, name)
    return Path(value).expanduser().absolute() if value else None


def model_paths(config: Config, run_dir: Path) -> list[Path]:
    """The models to infer with: `infer.models` (files, or runs that stand for their folds' models), else this run's.

    Raises:
        ConfigError: there is none.
    """
    found: list[Path] = []
    for name in config.infer.models or [str(run_dir)]:
        path = Path(name).expanduser().absolute()
        folds = sorted(path.glob("fold*/model.pt"), key=lambda p: (len(p.parent.name), p.parent.name))
        if path.is_dir() and not folds:
            hint = (
                "run --stage evaluate first, or give infer.models=PATH"
                if not config.infer.models
                else "give a model.pt"
            )
            raise ConfigError(f"{path} has no fold<k>/model.pt: {hint}")
        found += folds or [path]
    return found


def pooled_thresholds(models: list[Path]) -> Path | None:
    """Return the pooled thresholds.json of the run that these several models are the folds of, where there is one."""
    runs = {path.parent.parent for path in models}
    if len(models) < 2 or len(runs) != 1:
        return None
    found = runs.pop() / "evaluate" / "thresholds.json"
    return found if found.is_file() else None


def stage_dir(config: Config, run_dir: Path, stage: str, fold: int | None) -> Path:
    """The directory that belongs to one stage (of one fold); `DONE.json` lies in it."""
    if stage == "phantom":
        return run_dir / "phantom"
    if stage in ("preprocess", "finalize"):
        return shard_dir(config, run_dir)
    if stage in ("infer", "merge"):
        return infer_dir(config, run_dir)
    if stage == "pool":
        return run_dir / "evaluate"
    return run_dir / f"fold{fold}" / {"1": "stage1", "2": "stage2"}.get(stage, stage)


class Stale(Failure):
    """A newer attempt has taken over this stage: leave without writing."""


@dataclass(frozen=True)
class Attempt:
    """The token that this process wrote, and where."""

    path: Path
    token: str

    @classmethod
    def begin(cls, path: Path) -> Attempt:
        """Take the stage over: write a fresh token into `path`."""
        attempt = cls(path, f"{os.environ.get('SLURM_JOB_ID', 'local')}-{uuid.uuid4().hex}")
        write_text(attempt.path, attempt.token + "\n")
        return attempt

    def check(self) -> None:
        """Raise Stale when the token on disk is no longer this attempt's."""
        try:
            found = self.path.read_text().strip()
        except FileNotFoundError:
            found = ""
        if found != self.token:
            raise Stale(f"{self.path}: a newer attempt has taken over this stage; this one leaves without writing")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One process's share of one stage."""

    config: Config
    run_dir: Path
    stage: str
    fold: int | None = None
    part: tuple[int, int] = (0, 1)  # array element: index, count
    ranks: Ranks = field(default_factory=Ranks)
    stop: StopSignal = field(default_factory=StopSignal)
    attempt: Attempt | None = None
    result_hash: str = ""
    settings: dict[str, object] = field(default_factory=dict)  # the hashed keys and their values
    inputs: dict[str, str] = field(default_factory=dict)  # upstream name -> sha256

    @property
    def out(self) -> Path:
        """This stage's directory."""
        return stage_dir(self.config, self.run_dir, self.stage, self.fold)

    def dir_of(self, stage: str) -> Path:
        """Another stage's directory, within this fold where it has folds."""
        return stage_dir(self.config, self.run_dir, stage, self.fold)

    @property
    def fold_dir(self) -> Path:
        """The directory of this fold."""
        return self.run_dir / f"fold{self.fold}"

    @property
    def shard_dir(self) -> Path:
        """Where the shards are."""
        return shard_dir(self.config, self.run_dir)

    @property
    def dicom_dir(self) -> Path | None:
        """The folder of the training films."""
        return source(self.config, self.run_dir, "dicom_dir")

    @property
    def rle_csv(self) -> Path | None:
        """The annotation list."""
        return source(self.config, self.run_dir, "rle_csv")

    @property
    def patient_map(self) -> Path | None:
        """The map from image id to patient, where there is one."""
        return source(self.config, self.run_dir, "patient_map")

    @property
    def model_paths(self) -> list[Path]:
        """The model files to infer with."""
        return model_paths(self.config, self.run_dir)

    @property
    def infer_source(self) -> Path | None:
        """The folder whose films are inferred."""
        return infer_source(self.config, self.run_dir)
