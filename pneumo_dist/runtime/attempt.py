"""One writer per stage: the newest attempt holds the token, an older one (a node that was cut off) must not write."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.files import write_text


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
