"""The argument of a stage function: the run, the stage, the position in the job, and the token of the attempt."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from pneumo_dist.config import Config
from pneumo_dist.run import Run
from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.files import write_text
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal


class Stale(Failure):
    """A newer attempt has taken over this stage: this one must not write."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage: only the attempt whose token is in the file may write results."""

    path: Path
    token: str

    @classmethod
    def begin(cls, path: Path) -> Attempt:
        """Take over the stage: write a new token to `path`."""
        attempt = cls(path, f"{os.environ.get('SLURM_JOB_ID', 'local')}-{uuid.uuid4().hex}")
        write_text(attempt.path, attempt.token + "\n")
        return attempt

    def check(self) -> None:
        """Raise Stale when the token on disk is that of another attempt."""
        try:
            newest = self.path.read_text().strip()
        except FileNotFoundError:
            newest = ""
        if newest != self.token:
            raise Stale(f"{self.path}: a newer attempt has taken over this stage; this one exits without writing")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One process's share of one stage."""

    run: Run
    stage: str
    fold: int | None = None
    part: tuple[int, int] = (0, 1)  # task of an array: index from 0, count
    ranks: Ranks = field(default_factory=Ranks)
    stop: StopSignal = field(default_factory=StopSignal)
    attempt: Attempt | None = None
    result_hash: str = ""
    settings: dict[str, object] = field(default_factory=dict)  # the configuration keys that determine the result
    inputs: dict[str, str] = field(default_factory=dict)  # upstream name -> sha256

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.run.config

    @property
    def out(self) -> Path:
        """This stage's directory."""
        return self.dir_of(self.stage)

    def dir_of(self, stage: str) -> Path:
        """Return another stage's directory, of this fold where the stage has folds."""
        return self.run.dir_of(stage, self.fold)

    @property
    def metrics(self) -> Path:
        """The table of epochs of this training stage."""
        return self.run.metrics(self.stage, self.fold)

    def check_attempt(self) -> None:
        """Raise Stale when a newer attempt has taken over this stage."""
        if self.attempt:
            self.attempt.check()
