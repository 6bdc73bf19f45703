"""Checkpoints that survive crashes: whole or absent, hashed, at least two, written while training goes on.

A checkpoint is a dict of tensors, numbers and strings that `torch.load(weights_only=True)` reads. Nothing here
knows what is in it, and there are no collectives here: rank 0 writes, everyone may read.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import torch

from pneumo_dist.runtime.attempt import Attempt, Stale
from pneumo_dist.runtime.files import atomic_path, read_json, sha256_file, write_json

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


def snapshot(value: Any) -> Any:
    """Copy a state tree to the CPU, so that training may go on while the copy is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    return value


class CheckpointStore:
    """The checkpoints of one stage; `LAST` lists the kept ones, oldest first, with their hashes."""

    def __init__(self, folder: Path, keep: int = 2, attempt: Attempt | None = None) -> None:
        """Use `folder`; keep the newest `keep` files; refuse to write once `attempt` is stale."""
        self.folder = folder
        self.keep = keep
        self.attempt = attempt
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._damaged: set[str] = set()

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Copy `state` now and write it as `<name>.pt` in a thread; waits for the write before this one.

        Raises:
            CheckpointError: the write before this one failed.
            Stale: another attempt has taken over.
        """
        self.wait()
        copied = snapshot(state)
        self._thread = threading.Thread(target=self._write, args=(name, copied), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written; raise what the write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def failed(self) -> bool:
        """Whether a write has failed; `wait` raises its error."""
        return self._error is not None

    def _write(self, name: str, state: dict[str, Any]) -> None:
        try:
            if self.attempt:
                self.attempt.check()
            path = self.folder / f"{name}.pt"
            self._damaged.discard(path.name)
            with atomic_path(path) as temporary:
                torch.save(state, temporary)
                digest = sha256_file(temporary)
                if self.attempt:
                    self.attempt.check()
            gone = self._damaged | {path.name}
            kept = [e for e in self._listed() if e["file"] not in gone and (self.folder / e["file"]).exists()]
            kept.append({"file": path.name, "sha256": digest})
            write_json(self.folder / "LAST", {"checkpoints": kept[-self.keep :]})
            listed = {entry["file"] for entry in kept[-self.keep :]}
            for stray in [*self.folder.glob("*.pt"), *self.folder.glob(".*.tmp.pt")]:  # old, damaged, half-written
                if stray.name not in listed:
                    stray.unlink(missing_ok=True)
        except Stale as error:
            self._error = error
        except Exception as error:  # reaches every rank at the next step boundary
            self._error = CheckpointError(f"cannot write {self.folder / name}.pt: {error} (the one before it is whole)")

    def _listed(self) -> list[dict[str, str]]:
        try:
            return list(read_json(self.folder / "LAST")["checkpoints"])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s is damaged; looking at the files themselves", self.folder / "LAST")
            return [{"file": path.name, "sha256": ""} for path in sorted(self.folder.glob("*.pt"))]

    def newest(self) -> dict[str, Any] | None:
        """Read the newest whole checkpoint; a damaged one is skipped with a warning for the one before.

        Returns:
            the state, or None where there is no checkpoint at all.

        Raises:
            RuntimeError: there are checkpoints and none of them is whole.
        """
        listed = self._listed()
        for entry in reversed(listed):
            path = self.folder / entry["file"]
            try:
                if entry["sha256"] and sha256_file(path) != entry["sha256"]:
                    raise ValueError("its bytes are not those that were written")
                return dict(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:
                self._damaged.add(path.name)
                log.warning("skipping damaged checkpoint %s: %s", path, " ".join(str(error).split())[:200])
        if listed:
            raise RuntimeError(
                f"{self.folder}: none of the {len(listed)} checkpoints can be read; --redo starts this stage over"
            )
        return None
