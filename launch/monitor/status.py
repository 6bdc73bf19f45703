"""The state of every job of a run, from the ledger, SLURM, the locks and the files on disk. Only reads."""

from __future__ import annotations

import calendar
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.monitor.outcome import requeued_for, why
from launch.state import progress
from launch.state import slurm_client as slurm
from launch.state.ledger import Entry, Ledger
from launch.state.locks import holder, process_name
from launch.state.progress import Progress
from pneumo_dist import chain, done
from pneumo_dist.chain import STAGES, Node, closing
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run, RunFolder
from pneumo_dist.runtime.files import read_json

# SLURM's words, and for jobs of this machine KILLED and INTERRUPTED; ENDED: nobody knows how.
FAILED = (
    "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "CANCELLED", "PREEMPTED", "REVOKED",
    "KILLED", "INTERRUPTED", "ENDED",
)  # fmt: skip
ACTIVE = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "RESIZING")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job of the chain as it stands."""

    node: Node
    job_id: str = ""
    state: str = "-"
    reason: str = ""
    nodes: str = ""
    attempts: int = 0
    progress: Progress | None = None
    score: str = ""
    error: str = ""
    log: Path | None = None
    command: tuple[str, ...] = ()  # submit.py's words

    @property
    def failed(self) -> bool:
        """Whether somebody has to look at it."""
        return self.state in FAILED

    @property
    def active(self) -> bool:
        """Whether it is being worked on now."""
        return self.state in ACTIVE

    @property
    def swept_along(self) -> bool:
        """Whether it was cancelled only because a job before it did not end well."""
        return self.state == "CANCELLED" and self.reason.startswith("Dependency")


@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """What all rows of a run are made from."""

    run: Run
    text: str  # its configuration as it stands in config.yaml
    entries: Sequence[Entry]
    states: Mapping[str, slurm.JobState]
    unknown: str  # the state of a job of which SLURM says nothing and that has no result


def folds_of(run: RunFolder, entries: Sequence[Entry]) -> list[int]:
    """Return the folds that a run has or was asked for."""
    return sorted({*run.folds, *(e.fold for e in entries if e.fold is not None)}) or [0]


def logs_of(run: RunFolder, entry: Entry) -> list[Path]:
    """Return the log files of a submission, by element and rank."""
    pattern = entry.log.replace("%r", "*").replace("%a", "*")
    found = list(run.jobs_dir.glob(pattern)) if pattern else []

    def numbers(path: Path) -> list[int]:
        return [int(word) for word in path.stem.replace("-", "_").split("_") if word.isdigit()]

    return sorted(found, key=numbers)


def submitted_at(entry: Entry) -> float:
    """Return when a job was submitted, in epoch seconds."""
    try:
        return float(calendar.timegm(time.strptime(entry.time, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0


def ask(runs: Sequence[RunFolder]) -> tuple[dict[str, slurm.JobState], str]:
    """Return what SLURM says of all jobs of these runs, and a note where it could not be asked ("" otherwise)."""
    entries = [entry for run in runs for entry in Ledger(run).entries()]
    try:
        return slurm.states([e.job_id for e in entries if e.cluster == "slurm"]), ""
    except slurm.SlurmError as error:
        return {}, f"SLURM does not answer ({error}): states are those of the files"


def collect(run: Run, asked: tuple[dict[str, slurm.JobState], str] | None = None) -> tuple[list[Row], str]:
    """Return a row for every job of the run's chain, and a note where SLURM could not be asked ("" otherwise).

    Args:
        asked: what `ask` has returned for several runs at once.
    """
    entries = Ledger(run).entries()
    folds = [k for k in folds_of(run, entries) if k < run.config.data.folds] or [0]
    states, note = asked or ask([run])
    # Without accounting the controller forgets a job some minutes after its end: then only the files can tell.
    unknown = "UNKNOWN" if note else "ENDED"
    inputs = RowInputs(run=run, text=run.config_file.read_text(), entries=entries, states=states, unknown=unknown)
    return [_row(inputs, node) for node in chain.jobs_of(run.config, "all", folds)], note


def _as_submitted(inputs: RowInputs, node: Node) -> Run:
    """Return the run with the configuration of a job's newest submission, as the job reads it; else its own."""
    path = inputs.run.job_config_file(node.key)
    try:
        if path.read_text() == inputs.text:  # reading a configuration takes a while
            return inputs.run
        return Run.of_job(inputs.run.folder, node.key)
    except (OSError, ConfigError):
        return inputs.run


def _row(inputs: RowInputs, node: Node) -> Row:
    run = _as_submitted(inputs, node)
    mine = [e for e in inputs.entries if e.key == node.key]
    last = next((e for e in reversed(mine) if e.event == "submitted"), None)
    try:
        record = done.read_done(run, closing(node.stage), node.fold)
    except ConfigError:
        record = None
    row = Row(node=node, state="done" if record else "-", score=_score(run, node))
    if last is None:  # waits in a chain on this machine, or was started by a plain script
        held = None if record else holder(run.lock(node.key))
        row = replace(row, progress=progress.of(run, node))
        return replace(row, state="PENDING", reason=f"its turn comes; {held}") if held else row
    command = tuple(map(str, last.extra.get("command") or ()))
    attempts = sum(e.event == "submitted" for e in mine)
    row = replace(row, job_id=last.job_id if last.cluster == "slurm" else "local", attempts=attempts, command=command)
    logs = logs_of(run, last)
    at = progress.of(run, node, submitted_at(last))
    row = replace(row, log=logs[0] if logs else None, progress=at)
    if last.cluster == "slurm":
        row = _on_slurm(inputs, row, last, logs, bool(record))
    elif not record:
        state, reason = _local_state(run, node, mine)
        row = replace(row, state=state, reason=reason, nodes=last.host)
    return _with_error(row, logs)


def _on_slurm(inputs: RowInputs, row: Row, last: Entry, logs: Sequence[Path], is_done: bool) -> Row:
    """Add what SLURM says of the newest submission; of an ended job its result on disk counts more."""
    found = [s for s in inputs.states.values() if s.parent == last.job_id and s.name in (last.name, "")]
    if not found:
        # An array is forgotten while the job that joins it still waits.
        whole = STAGES[row.node.stage].shape == "array" and row.progress and row.progress.share >= 1
        return row if is_done else replace(row, state="COMPLETED" if whole else inputs.unknown)
    restarts = max(s.restarts for s in found)
    nodes = ",".join(dict.fromkeys(s.nodes for s in found if s.nodes))
    row = replace(row, attempts=row.attempts + restarts, nodes=nodes)
    if is_done and not any(s.live for s in found):
        return row
    state, reason = _together(found, last.elements)
    if restarts and any(s.live for s in found):
        before = next((s.previous_state for s in found if s.previous_state), "") or requeued_for(logs)
        reason = ", ".join(filter(None, [reason, before and f"after {before}"]))
    if row.log and (bad := {s.job_id for s in found if s.state in FAILED}) and last.elements > 1:
        row = replace(row, log=next((p for p in logs if p.name.rsplit("_", 2)[0] in bad), row.log))
    return replace(row, state=state, reason=reason)


def _together(found: Sequence[slurm.JobState], elements: int) -> tuple[str, str]:
    """Return state and reason of a job, or of an array: the state that matters most, and how many are done."""

    def weight(row: slurm.JobState) -> int:
        return 0 if row.state in ACTIVE else 1 if row.live else 3 if row.state == "COMPLETED" else 2

    most = min(found, key=weight)
    if elements < 2:
        return most.state, most.reason
    counts = Counter(row.state for row in found)
    ended = counts.pop("COMPLETED", 0)
    counts.pop(most.state if most.live else "", None)
    others = [f"{n} {state}" for state, n in counts.items()] if ended or len(counts) > 1 or most.live else []
    done_of = [f"{ended} of {elements} done"] if ended else []
    return most.state, ", ".join([*done_of, *others, *([most.reason] if most.reason else [])])


def _local_state(run: Run, node: Node, entries: Sequence[Entry]) -> tuple[str, str]:
    """Return state and reason of a job that last ran on this machine (or another one without SLURM)."""
    held = holder(run.lock(node.key))
    last = entries[-1]
    own = held == process_name(last.job_id, last.host)
    if held and not own:  # a later submit.py, which may be at another job
        return "PENDING", f"its turn comes; {held}"
    if held and last.event == "submitted":
        return "RUNNING", held
    if last.event == "submitted":
        return "KILLED", "submit.py was killed"
    if last.status == 0:
        return "COMPLETED", ""
    return ("INTERRUPTED", f"exit {last.status}") if last.status in (130, 143) else ("FAILED", f"exit {last.status}")


def _with_error(row: Row, logs: Sequence[Path]) -> Row:
    """Add to a failed job, or one of unknown state, the line that tells why, and the log in which it stands."""
    if not (row.failed or row.state == "UNKNOWN") or row.state in ("CANCELLED", "INTERRUPTED"):
        return row
    said = why([row.log, *logs] if row.log else logs)
    return replace(row, error=said[0], log=said[1]) if said else row


def _score(run: Run, node: Node) -> str:
    rows = progress.epochs(run, node)
    if rows and "best_dice" in rows[-1]:
        last = next((row for row in reversed(rows) if "dice" in row), rows[-1])
        best = f"best {rows[-1]['best_dice']:.4f} (epoch {rows[-1]['best_epoch']})"
        return f"Dice {last['dice']:.4f}, {best}" if "dice" in last else best
    if node.stage in ("evaluate", "pool"):
        try:
            scores = read_json(run.dir_of(node.stage, node.fold) / "scores.json")
            fixed, empty = scores["headline"]["fixed"], scores["dice_all_empty"]
            return f"Dice {fixed['dice']:.4f} (all empty {empty:.4f}), on positives {fixed['dice_positive']:.4f}"
        except (OSError, KeyError, TypeError, ValueError):
            return ""
    return ""
