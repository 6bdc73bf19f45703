"""What a stage function is given: the run, the stage, its place in the job, and the token of the one that may write."""

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

    run: Run
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
    def config(self) -> Config:
        """The run's configuration."""
        return self.run.config

    @property
    def out(self) -> Path:
        """This stage's directory."""
        return self.dir_of(self.stage)

    def dir_of(self, stage: str) -> Path:
        """Return another stage's directory, within this fold where it has folds."""
        return self.run.dir_of(stage, self.fold)

    @property
    def metrics(self) -> Path:
        """The table of this training's epochs."""
        return self.run.metrics(self.stage, self.fold)

    def check_attempt(self) -> None:
        """Raise Stale where a newer attempt has taken over this stage."""
        if self.attempt:
            self.attempt.check()
