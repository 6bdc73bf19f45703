"""The submissions of a run (jobs/submitted.jsonl). Lines are only appended."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.state import slurm_client as slurm
from pneumo_dist.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One submission of one job, or the end of a local one. The field names are the keys in the file."""

    key: str  # stage1-fold0, finalize, ...
    stage: str
    fold: int | None
    cluster: str  # "slurm" or "local"
    event: str = "submitted"  # or "ended" (local jobs only: SLURM records the end of its jobs)
    job_id: str = ""  # SLURM's (parent) id, or the process id of submit.py
    name: str = ""  # SLURM's job name
    processes: int = 1
    elements: int = 1  # tasks of an array
    after: list[str] = field(default_factory=list)
    status: int | None = None  # exit status, of "ended"
    code: str = ""  # hash of the code copy
    log: str = ""  # file name pattern in jobs/
    extra: dict[str, Any] = field(default_factory=dict)
    time: str = ""
    host: str = ""


class Ledger:
    """The list of submissions of one run."""

    def __init__(self, run: RunFolder) -> None:
        self.path = run.ledger_file

    def append(self, entry: Entry) -> None:
        """Add one line in one write, so that a reader never sees a part of it."""
        stamped = {
            **asdict(entry),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, (json.dumps(stamped) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first, without damaged lines (full disk)."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return []
        entries = []
        for line in text.splitlines():
            try:
                entries.append(Entry(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return entries

    def latest(self) -> dict[str, Entry]:
        """Return the newest submission of each job key."""
        return {e.key: e for e in self.entries() if e.event == "submitted"}

    def live(self, keys: Iterable[str] | None = None) -> dict[str, str]:
        """Return {key: SLURM job id} of the submissions that are pending or running.

        Job names are compared too: another cluster, or a reinstalled one, reuses the same ids.

        Raises:
            slurm.SlurmError: there are recorded jobs and SLURM does not answer.
        """
        entries = [
            e
            for e in self.entries()
            if e.event == "submitted" and e.cluster == "slurm" and (keys is None or e.key in keys)
        ]
        rows = {(row.parent, row.name): row for row in slurm.queued(e.job_id for e in entries) if row.live}
        return {e.key: e.job_id for e in entries if (e.job_id, e.name) in rows}
