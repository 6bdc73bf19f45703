"""Checkpoints that survive crashes: written whole or not at all, hashed, in a thread beside the training.

A checkpoint is a dict of tensors, numbers and strings that `torch.load(weights_only=True)` reads; this module does
not know its keys. No collectives in here: rank 0 writes, every rank may read.
"""

from __future__ import annotations

import logging
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.files import atomic_path, read_json, sha256_file, write_json
from pneumo_dist.runtime.task import Attempt, Stale

log = logging.getLogger(__name__)
Entry = dict[str, str]  # file name and sha256 of a checkpoint
_PATIENCE_S = 60.0  # how long a shared file system may show a node an older state


class CheckpointError(Failure):
    """A checkpoint could not be written (earlier ones are untouched), or none of them can be read."""


def snapshot(value: Any) -> Any:
    """Copy a state tree to the CPU, so that training can continue while the copy is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    return value


def _whole(path: Path, sha256: str) -> bool:
    """Return whether a file is as it was written: by its hash, or without one by the checksums of the zip archive."""
    if sha256:
        return sha256_file(path) == sha256
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


class CheckpointStore:
    """The checkpoints of one stage; the file `LAST` lists those kept, oldest first, with their hashes."""

    def __init__(self, folder: Path, keep: int = 2, attempt: Attempt | None = None) -> None:
        """Use `folder`; keep the newest `keep` files; refuse to write once `attempt` is stale."""
        self.folder = folder
        self.keep = keep
        self.attempt = attempt
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._damaged: set[str] = set()

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Copy `state` now and write it as `<name>.pt` in a thread, once the previous write has ended.

        Raises nothing: only rank 0 saves, and the other ranks would wait for it. Once a write has `failed`, nothing
        more is written, and the ranks agree to stop.
        """
        self._join()
        if self.failed:
            return
        copied = snapshot(state)
        self._thread = threading.Thread(target=self._write, args=(name, copied), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in progress.

        Raises:
            CheckpointError: a write failed.
            Stale: another attempt has taken over.
        """
        self._join()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failed(self) -> bool:
        """Whether a write has failed; `wait` raises its error."""
        return self._error is not None

    def _write(self, name: str, state: dict[str, Any]) -> None:
        try:
            if self.attempt:
                self.attempt.check()
            path = self.folder / f"{name}.pt"
            before = self._listed()
            self._damaged.discard(path.name)
            with atomic_path(path) as temporary:
                with temporary.open("wb") as file:  # given a path, torch hides the error of a full disk
                    torch.save(state, file)
                digest = sha256_file(temporary)
                if self.attempt:
                    self.attempt.check()  # again: another attempt may have begun during the write
            dropped = self._damaged | {path.name}
            kept = [e for e in before if e["file"] not in dropped and (self.folder / e["file"]).exists()]
            kept = [*kept, {"file": path.name, "sha256": digest}][-self.keep :]
            write_json(self.folder / "LAST", {"checkpoints": kept})
            self._remove_all_but({entry["file"] for entry in kept})
        except Stale as error:
            self._error = error
        except Exception as error:  # the ranks learn of it at the next step boundary
            reason = error.strerror if isinstance(error, OSError) else error
            self._error = CheckpointError(
                f"cannot write {self.folder / name}.pt: {reason}; the checkpoints before it are whole: "
                "remove the cause and repeat the command to continue"
            )

    def _remove_all_but(self, names: Iterable[str]) -> None:
        """Remove old and damaged checkpoints, and half-written ones of killed attempts."""
        for path in [*self.folder.glob("*.pt"), *self.folder.glob(".*.tmp.pt")]:
            if path.name not in names:
                path.unlink(missing_ok=True)

    def _listed(self) -> list[Entry]:
        try:
            rows = read_json(self.folder / "LAST")["checkpoints"]
            return [{"file": str(row["file"]), "sha256": str(row["sha256"])} for row in rows]
        except (OSError, ValueError, KeyError, TypeError):
            # Damaged, or missing because the process was killed between its first checkpoint and LAST.
            files = sorted(self.folder.glob("*.pt"))
            if files:
                log.warning("%s cannot be read; using the checkpoints beside it", self.folder / "LAST")
            return [{"file": path.name, "sha256": ""} for path in files]

    def newest(self) -> Entry | None:
        """Return the newest whole checkpoint, None if there are none; damaged ones are skipped with a warning.

        Raises:
            CheckpointError: there are checkpoints, and none of them is whole.
        """
        listed = self._listed()
        for entry in reversed(listed):
            path = self.folder / entry["file"]
            try:
                if not _whole(path, entry["sha256"]):
                    raise ValueError("its sha256 differs from that in LAST")
                return entry
            except Exception as error:
                self._damaged.add(path.name)
                log.warning("skipping damaged checkpoint %s: %s", path, " ".join(str(error).split())[:200])
        if listed:
            raise CheckpointError(
                f"{self.folder}: none of the {len(listed)} checkpoints can be read; --redo starts this stage over"
            )
        return None

    def read(self, entry: Entry, checked: bool = False) -> tuple[dict[str, Any], str]:
        """Read a checkpoint that rank 0 has found whole; return its state and "", or {} and why this rank cannot.

        checked: this very rank has found it whole.
        """
        path, deadline = self.folder / entry["file"], time.monotonic() + _PATIENCE_S
        while True:
            try:
                if not checked and not _whole(path, entry["sha256"]):
                    raise ValueError("its sha256 differs from that which rank 0 found")
                return dict(torch.load(path, map_location="cpu", weights_only=True)), ""
            except Exception as error:
                if time.monotonic() > deadline:
                    return {}, f"{path} cannot be read: {' '.join(str(error).split())[:200]}"
            time.sleep(1)
