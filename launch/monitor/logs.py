"""The submissions of a run and their log files: select them, print or follow one log. Only reads."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.planning.plan import command_stage
from launch.state.ledger import Entry, Ledger
from pneumo_dist.config import ConfigError
from pneumo_dist.run import RunFolder

WAIT_FOR_LOG_S = 2.0
WAIT_FOR_LINE_S = 0.5
CHUNK_BYTES = 1 << 16


def log_files(run: RunFolder, entry: Entry) -> list[Path]:
    """Return the log files of a submission, ordered by array task and rank."""
    pattern = entry.log.replace("%r", "*").replace("%a", "*")
    paths = list(run.jobs_dir.glob(pattern)) if pattern else []

    def numbers(path: Path) -> list[int]:
        return [int(part) for part in path.stem.replace("-", "_").split("_") if part.isdigit()]

    return sorted(paths, key=numbers)  # rank 10 after rank 9


def submissions(
    run: RunFolder, stage: str | None, fold: int | None = None, *, prefer_exact: bool = False
) -> list[Entry]:
    """Return the submissions of a stage and fold (None: of all), oldest first.

    Args:
        stage: a job's key, or a value of --stage, which stands for all its jobs: preprocess for phantom, preprocess
            and finalize.
        prefer_exact: take the jobs of the very stage where there are any: of preprocess the array only.

    Raises:
        ConfigError: there is none.
    """
    entries = [entry for entry in Ledger(run).entries() if entry.event == "submitted"]
    of_fold = [entry for entry in entries if fold in (None, entry.fold)]
    exact = [entry for entry in of_fold if stage in (None, entry.stage, entry.key)] if prefer_exact else []
    chosen = exact or [entry for entry in of_fold if stage in (None, entry.key, command_stage(entry.stage))]
    if not chosen:
        known = ", ".join(dict.fromkeys(entry.key for entry in entries)) or "none"
        raise ConfigError(f"{run.name}: no job of {stage or 'any stage'} has been submitted; submitted jobs: {known}")
    return chosen


def print_log(run: RunFolder, stage: str | None, fold: int | None, rank: int, *, follow: bool) -> None:
    """Print the newest log of a stage; with `follow`, wait for it and go on printing until Ctrl-C.

    Raises:
        ConfigError: no such job has been submitted, it has no log yet, or it has no such rank.
    """
    entry, logs = _newest_with_log(run, stage, fold, follow)
    if not 0 <= rank < len(logs):
        raise ConfigError(f"--rank {rank}: {entry.key} has logs 0 to {len(logs) - 1}")
    print(f"==> {logs[rank]} <==", file=sys.stderr)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a chunk may end within a character
    with logs[rank].open("rb") as log:
        while True:
            data = log.read(CHUNK_BYTES)
            if data:
                print(decoder.decode(data), end="", flush=True)
            elif not follow:
                return
            else:
                time.sleep(WAIT_FOR_LINE_S)


def _newest_with_log(run: RunFolder, stage: str | None, fold: int | None, follow: bool) -> tuple[Entry, list[Path]]:
    while True:
        entries = submissions(run, stage, fold, prefer_exact=True)
        candidates: Iterable[Entry] = _newest_submission(entries) if follow else reversed(entries)
        for entry in candidates:
            if logs := log_files(run, entry):
                return entry, logs
        if not follow:
            raise ConfigError(
                f"{run.name}: no log yet, because the job has not started: "
                f"python launch/runs.py status {run.name} shows its state"
            )
        time.sleep(WAIT_FOR_LOG_S)


def _newest_submission(entries: Sequence[Entry]) -> list[Entry]:
    """Return the jobs of the newest submission, newest first.

    The ledger has no mark between submissions, but each holds a job once: the second entry of a key is an older one.
    """
    newest: dict[str, Entry] = {}
    for entry in reversed(entries):
        if entry.key in newest:
            break
        newest[entry.key] = entry
    return list(newest.values())
