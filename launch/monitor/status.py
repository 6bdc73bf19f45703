"""A row for every job of a run, from the ledger, SLURM, the locks and the files on disk. Only reads."""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.monitor.job_state import ACTIVE, FAILED, combined_state, is_done, local_state, waits_for
from launch.monitor.logs import log_files
from launch.monitor.outcome import failure_line, requeued_for
from launch.state import progress
from launch.state import slurm_client as slurm
from launch.state.ledger import Entry, Ledger
from launch.state.locks import holder
from launch.state.progress import Progress
from pneumo_dist import chain
from pneumo_dist.chain import STAGES, Node
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run, RunFolder
from pneumo_dist.runtime.files import read_json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job of the chain and its state."""

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
    command: tuple[str, ...] = ()  # the command line of submit.py

    @property
    def failed(self) -> bool:
        """Whether the job ended without a result."""
        return self.state in FAILED

    @property
    def active(self) -> bool:
        """Whether the job is running."""
        return self.state in ACTIVE

    @property
    def cancelled_with_parent(self) -> bool:
        """Whether SLURM cancelled the job only because one that it depends on did not complete."""
        return self.state == "CANCELLED" and self.reason.startswith("Dependency")


@dataclass(frozen=True, kw_only=True)
class SlurmAnswer:
    """The state of every known job and array task, and a note where SLURM does not answer ("" otherwise)."""

    states: Mapping[str, slurm.JobState]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """The sources of all rows of a run."""

    run: Run
    config_text: str  # of config.yaml
    folds: Sequence[int]
    entries: Sequence[Entry]
    answer: SlurmAnswer


def folds_of(run: RunFolder, entries: Sequence[Entry]) -> list[int]:
    """Return the folds that a run has or that were submitted."""
    return sorted({*run.folds, *(e.fold for e in entries if e.fold is not None)}) or [0]


def query_slurm(runs: Sequence[RunFolder]) -> SlurmAnswer:
    """Return what SLURM reports of the newest job of every key of these runs, in one question."""
    entries = [entry for run in runs for entry in Ledger(run).latest().values()]
    try:
        return SlurmAnswer(states=slurm.states([e.job_id for e in entries if e.cluster == "slurm"]))
    except slurm.SlurmError as error:
        return SlurmAnswer(states={}, note=f"SLURM does not answer ({error}): states are taken from the run's files")


def job_rows(run: Run, answer: SlurmAnswer) -> list[Row]:
    """Return a row for every job of the run's chain."""
    entries = Ledger(run).entries()
    folds = [k for k in folds_of(run, entries) if k < run.config.data.folds] or [0]
    text = run.config_file.read_text()
    inputs = RowInputs(run=run, config_text=text, folds=folds, entries=entries, answer=answer)
    return [_row(inputs, node) for node in chain.jobs_of(run.config, "all", folds)]


def _as_submitted(inputs: RowInputs, node: Node) -> Run:
    """Return the run with the configuration of a job's newest submission, which the job reads; else its own."""
    path = inputs.run.job_config_file(node.key)
    try:
        if path.read_text() == inputs.config_text:  # parsing a configuration is slow
            return inputs.run
        return Run.of_job(inputs.run.folder, node.key)
    except (OSError, ConfigError):
        return inputs.run


def _row(inputs: RowInputs, node: Node) -> Row:
    run = _as_submitted(inputs, node)
    entries = [entry for entry in inputs.entries if entry.key == node.key]
    submitted = [entry for entry in entries if entry.event == "submitted"]
    has_result = is_done(run, node.stage, node.fold)
    row = Row(node=node, state="done" if has_result else "-", score=_score(run, node))
    if not submitted:  # waits in a chain on this machine, or was started by a plain script
        process = None if has_result else holder(run.lock(node.key))
        row = replace(row, progress=progress.of(run, node))
        if process is None:
            return row
        return replace(row, state="PENDING", reason=waits_for(run, node, len(inputs.folds), process))
    last = submitted[-1]
    logs = log_files(run, last)
    row = replace(
        row,
        job_id=last.job_id if last.cluster == "slurm" else "local",
        attempts=len(submitted),
        command=tuple(map(str, last.extra.get("command") or ())),
        log=logs[0] if logs else None,
        progress=progress.of(run, node, _epoch_seconds(last.time)),
    )
    if last.cluster == "slurm":
        row = _with_slurm_state(inputs.answer, row, last, logs)
    elif not has_result:
        state, reason = local_state(run, node, len(inputs.folds), entries[-1], holder(run.lock(node.key)))
        row = replace(row, state=state, reason=reason, nodes=last.host)
    return _with_error(row, logs)


def _epoch_seconds(timestamp: str) -> float:
    try:
        return float(calendar.timegm(time.strptime(timestamp, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0


def _with_slurm_state(answer: SlurmAnswer, row: Row, last: Entry, logs: Sequence[Path]) -> Row:
    """Add what SLURM reports of the newest submission; a result on disk overrides the state of an ended job."""
    tasks = [task for task in answer.states.values() if task.parent == last.job_id and task.name in (last.name, "")]
    live = any(task.live for task in tasks)
    if not tasks:
        return _forgotten(answer, row)
    restarts = max(task.restarts for task in tasks)
    nodes = ",".join(dict.fromkeys(task.nodes for task in tasks if task.nodes))
    row = replace(row, attempts=row.attempts + restarts, nodes=nodes)
    if row.state == "done" and not live:
        return row
    state, reason = combined_state(tasks, last.elements)
    if restarts and live:
        before = next((task.previous_state for task in tasks if task.previous_state), "") or requeued_for(logs)
        reason = ", ".join(filter(None, [reason, before and f"after {before}"]))
    failed = {task.job_id for task in tasks if task.state in FAILED}
    if row.log and failed and last.elements > 1:  # the log of the first failed task, in place of task 0
        row = replace(row, log=next((log for log in logs if log.name.rsplit("_", 2)[0] in failed), row.log))
    return replace(row, state=state, reason=reason)


def _forgotten(answer: SlurmAnswer, row: Row) -> Row:
    """Return the row of a job of which SLURM reports nothing.

    Without accounting the controller forgets a job some minutes after its end; then only the files tell the result.
    """
    if row.state == "done":
        return row
    # An array can be forgotten while the job that merges it still waits.
    array = STAGES[row.node.stage].shape == "array"
    if array and row.progress and row.progress.share >= 1:
        return replace(row, state="COMPLETED")
    return replace(row, state="UNKNOWN" if answer.note else "ENDED")


def _with_error(row: Row, logs: Sequence[Path]) -> Row:
    """Add the error line and its log to the row of a job that failed or whose state is unknown."""
    if not (row.failed or row.state == "UNKNOWN") or row.state in ("CANCELLED", "INTERRUPTED"):
        return row
    failure = failure_line([row.log, *logs] if row.log else logs)
    return replace(row, error=failure[0], log=failure[1]) if failure else row


def _score(run: Run, node: Node) -> str:
    """Return the scores of a training or an evaluation so far; "" where there are none."""
    epochs = progress.epochs(run, node)
    evaluated = next((epoch for epoch in reversed(epochs or []) if "dice_positive" in epoch), None)
    if evaluated:
        text = f"Dice on positives {evaluated['dice_positive']:.4f}"
        text += f", AUC {evaluated['auc']:.4f}" if evaluated.get("auc") is not None else ""
        text += f", best epoch {epochs[-1]['best_epoch']}"
        return text + ("; WARNING (see its log)" if evaluated.get("alarm") else "")
    if node.stage in ("evaluate", "pool"):
        try:
            scores = read_json(run.dir_of(node.stage, node.fold) / "scores.json")
            fixed, empty = scores["headline"]["fixed"], scores["dice_all_empty"]
            text = f"Dice {fixed['dice']:.4f} (all empty {empty:.4f}), on positives {fixed['dice_positive']:.4f}"
            return text + ("; WARNING (see summary.txt)" if scores.get("alarms") else "")
        except (OSError, KeyError, TypeError, ValueError):
            return ""
    return ""
