"""A run: its configuration, its folder, and every path in it. No other module builds these paths.

It reads only configurations and folder listings, writes nothing and imports no torch.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pneumo_dist import config as configuration
from pneumo_dist.config import TRAIN_STAGES, Config, ConfigError

# The data section's paths in a run on synthetic films, below <run>/phantom.
PHANTOM_SOURCES = {"dicom_dir": "dicom-images-train", "rle_csv": "train-rle.csv", "patient_map": "patients.csv"}


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the paths in it that do not depend on the configuration."""

    folder: Path

    @property
    def name(self) -> str:
        """The run's name, which is its folder's name."""
        return self.folder.name

    def existing(self) -> Self:
        """Return this folder if it holds a run, readable or not.

        Raises:
            ConfigError: this is no run directory.
        """
        if not self.config_file.is_file():
            hint = f"did you mean {self.like}? " if self.like else ""
            raise ConfigError(
                f"{self.folder}: no such run (no config.yaml): {hint}python launch/runs.py list shows all runs"
            )
        return self

    @property
    def like(self) -> str:
        """The run beside this folder with the most similar name, "" without one."""
        names = [path.parent.name for path in self.folder.parent.glob("*/config.yaml")]
        return next(iter(difflib.get_close_matches(self.name, names, n=1)), "")

    @property
    def config_file(self) -> Path:
        """The run's configuration: that of its last accepted command."""
        return self.folder / "config.yaml"

    @property
    def config_history(self) -> Path:
        """The run's earlier configurations, numbered."""
        return self.folder / "config.history"

    @property
    def code_dir(self) -> Path:
        """The copies of the code that jobs use, by hash."""
        return self.folder / "code"

    @property
    def jobs_dir(self) -> Path:
        """Logs, submissions, locks and attempt tokens of the run's jobs."""
        return self.folder / "jobs"

    @property
    def ledger_file(self) -> Path:
        """The list of submissions."""
        return self.jobs_dir / "submitted.jsonl"

    @property
    def submit_lock(self) -> Path:
        """The lock that a process holds while it submits to this run."""
        return self.jobs_dir / ".submit.lock"

    def lock(self, key: str) -> Path:
        """Return the lock of one job."""
        return self.jobs_dir / f".{key}.lock"

    def job_config_file(self, key: str) -> Path:
        """Return the configuration of a job's last submission."""
        return self.jobs_dir / f"{key}.yaml"

    @property
    def secret_file(self) -> Path:
        """Return the file by which ranks of the run know one another; only its owner may read it."""
        return self.jobs_dir / ".secret"

    def attempt_file(self, key: str) -> Path:
        """Return the file that holds the token of a job's newest attempt."""
        return self.jobs_dir / f"{key}.attempt"

    @property
    def folds(self) -> list[int]:
        """The folds that have a directory, ascending."""
        return sorted(int(path.name[4:]) for path in self.folder.glob("fold*") if path.name[4:].isdigit())

    def fold_dir(self, fold: int | None) -> Path:
        """Return the directory of one fold."""
        return self.folder / f"fold{fold}"

    def in_fold(self, stage: str, fold: int | None) -> Path:
        """Return the directory of a stage that runs per fold."""
        return self.fold_dir(fold) / (f"stage{stage}" if stage in TRAIN_STAGES else stage)

    def model(self, fold: int | None) -> Path:
        """Return the model file that the evaluation of a fold writes."""
        return self.fold_dir(fold) / "model.pt"

    def metrics(self, stage: str, fold: int | None) -> Path:
        """Return the table of epochs of a training stage."""
        return self.in_fold(stage, fold) / "metrics.jsonl"

    def checkpoints(self, stage: str, fold: int | None) -> Path:
        """Return the checkpoints of an unfinished training stage."""
        return self.in_fold(stage, fold) / "checkpoints"

    @property
    def pooled_dir(self) -> Path:
        """The evaluation of all folds together."""
        return self.folder / "evaluate"


@dataclass(frozen=True)
class Run(RunFolder):
    """A run with its configuration."""

    config: Config

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Return the run in a folder with its own configuration.

        Raises:
            ConfigError: the folder is not a run directory.
        """
        return cls(folder, configuration.load(RunFolder(folder).existing().config_file))

    @classmethod
    def of_job(cls, folder: Path, key: str) -> Run:
        """Return the run with the configuration of a job's last submission, else with its own.

        Raises:
            ConfigError: the run has no configuration.
        """
        run = RunFolder(Path(folder).absolute())
        for path in (run.job_config_file(key), run.config_file):
            if path.exists():
                return cls(run.folder, configuration.load(path))
        raise ConfigError(f"{run.folder}: not a run directory (no config.yaml): launch/submit.py creates one")

    def source(self, name: str) -> Path | None:
        """Return a path of the data section (`dicom_dir`, `rle_csv`, ...), or its synthetic counterpart."""
        if self.config.phantom.films and name != "holdout_ids":
            below = PHANTOM_SOURCES.get(name)
            return self.dir_of("phantom") / below if below else None
        value = getattr(self.config.data, name)
        return Path(value).expanduser().absolute() if value else None

    @property
    def infer_source(self) -> Path | None:
        """The folder of the films to predict: `infer.dir`, else the training films."""
        if self.config.infer.dir:
            return Path(self.config.infer.dir).expanduser().absolute()
        return self.source("dicom_dir")

    @property
    def infer_follows_links(self) -> bool:
        """Whether inference reads films outside its folder through symbolic links, as training does."""
        return self.config.infer.follow_links or not self.config.infer.dir

    @property
    def shard_dir(self) -> Path:
        """The directory of the shards: `data.shard_dir`, else the run's own."""
        shared = self.config.data.shard_dir
        return Path(shared).expanduser().absolute() if shared else self.folder / "shards"

    @property
    def infer_dir(self) -> Path:
        """The directory of one inference; its label defaults to the folder's name.

        Raises:
            ConfigError: no folder of films is configured.
        """
        films = self.infer_source
        label = self.config.infer.label or (films.name if films else "")
        if not label:
            raise ConfigError("no films for inference: give infer.dir=DIR")
        return self.folder / "infer" / label

    def dir_of(self, stage: str, fold: int | None = None) -> Path:
        """Return the directory of a stage (of one fold)."""
        if stage == "phantom":
            return self.folder / "phantom"
        if stage in ("preprocess", "finalize"):
            return self.shard_dir
        if stage in ("infer", "merge"):
            return self.infer_dir
        return self.pooled_dir if stage == "pool" else self.in_fold(stage, fold)

    def done_file(self, stage: str, fold: int | None = None) -> Path:
        """Return the file that a stage writes last, when it is done."""
        return self.dir_of(stage, fold) / "DONE.json"

    def model_paths(self) -> list[Path]:
        """Return the models to predict with: `infer.models` (files, or runs with one model per fold), else this run's.

        Raises:
            ConfigError: a run has no model yet.
        """
        models: list[Path] = []
        for name in self.config.infer.models or [str(self.folder)]:
            source = RunFolder(Path(name).expanduser().absolute())
            fold_models = [model for k in source.folds if (model := source.model(k)).exists()]
            if source.folder.is_dir() and not fold_models:
                evaluate = "run --stage evaluate first, or set infer.models=PATH"
                advice = "name a model file" if self.config.infer.models else evaluate
                raise ConfigError(f"{source.folder} has no fold<k>/model.pt: {advice}")
            models += fold_models or [source.folder]
        return models


def pooled_thresholds(models: list[Path]) -> Path | None:
    """Return the pooled thresholds.json where `models` are several folds of one run that has it, else None."""
    runs = {path.parent.parent for path in models}
    if len(models) < 2 or len(runs) != 1:
        return None
    pooled = RunFolder(runs.pop()).pooled_dir / "thresholds.json"
    return pooled if pooled.is_file() else None
