"""The state of every job of a run, from the ledger, SLURM, the locks and the files on disk. Only reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import slurm
from launch.ledger import Entry, Ledger, holder
from launch.outcome import last_error
from launch.plan import closing
from launch.prepare import lock_path
from pneumo_dist import chain, done
from pneumo_dist import config as configuration
from pneumo_dist.chain import Node
from pneumo_dist.config import Config, ConfigError
from pneumo_dist.training import history

# SLURM's words, and for jobs of this machine KILLED and INTERRUPTED; ENDED: nobody knows how.
FAILED = (
    "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "CANCELLED", "PREEMPTED", "REVOKED",
    "KILLED", "INTERRUPTED", "ENDED",
)  # fmt: skip
HEADS = ("stage", "job", "state", "nodes", "try", "progress", "score")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job of the chain as it stands."""

    node: Node
    job_id: str = ""
    state: str = "-"
    reason: str = ""
    nodes: str = ""
    attempts: int = 0
    progress: str = ""
    score: str = ""
    error: str = ""
    log: Path | None = None

    @property
    def failed(self) -> bool:
        """Whether somebody has to look at it."""
        return self.state.split(" ")[0] in FAILED


def _epochs(run_dir: Path, key: str) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of a training job (stage1-fold0)."""
    name, _, fold = key.partition("-fold")
    if not fold:
        return []
    try:
        return history.read(run_dir / f"fold{fold}" / name / "metrics.jsonl")
    except (OSError, ValueError):
        return []


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min" if minutes else "under a minute"


def progress_text(config: Config, run_dir: Path, key: str) -> str:
    """Return how far a training is, in a few words; "" where that is not known."""
    rows = _epochs(run_dir, key)
    if not rows:
        return ""
    last = rows[-1]
    text = f"epoch {last['epoch']}/{last['epochs']}, step {last['step']}/{last['steps']}"
    speed = last["images_per_s"]
    if not speed:
        return text
    images = (last["steps"] - last["step"]) * config.train_stage(key.split("-")[0].removeprefix("stage")).batch_size
    return f"{text}, {speed} images/s" + (f", {_duration(images / speed)} left" if images else "")


def _score_text(config: Config, run_dir: Path, node: Node) -> str:
    rows = _epochs(run_dir, node.key)
    if rows and "best_dice" in rows[-1]:
        last = next((row for row in reversed(rows) if "dice" in row), rows[-1])
        best = f"best {rows[-1]['best_dice']:.4f} (epoch {rows[-1]['best_epoch']})"
        return f"Dice {last['dice']:.4f}, {best}" if "dice" in last else best
    if node.stage in ("evaluate", "pool"):
        from pneumo_dist.runtime.files import read_json
        from pneumo_dist.runtime.task import stage_dir

        try:
            scores = read_json(stage_dir(config, run_dir, node.stage, node.fold) / "scores.json")
            fixed, empty = scores["headline"]["fixed"], scores["dice_all_empty"]
            return f"Dice {fixed['dice']:.4f} (all empty {empty:.4f}), on positives {fixed['dice_positive']:.4f}"
        except (OSError, KeyError, TypeError, ValueError):
            return ""
    return ""


def folds_of(run_dir: Path, entries: list[Entry]) -> list[int]:
    """Return the folds that a run has or was asked for."""
    found = {int(p.name[4:]) for p in run_dir.glob("fold*") if p.name[4:].isdigit()}
    return sorted(found | {e.fold for e in entries if e.fold is not None}) or [0]


def logs_of(run_dir: Path, entry: Entry) -> list[Path]:
    """Return the log files of a submission, by element and rank."""
    pattern = entry.log.replace("%r", "*").replace("%a", "*")
    found = list((run_dir / "jobs").glob(pattern)) if pattern else []

    def numbers(path: Path) -> list[int]:
        return [int(word) for word in path.stem.replace("-", "_").split("_") if word.isdigit()]

    return sorted(found, key=numbers)


def _local_state(run_dir: Path, node: Node, entries: list[Entry]) -> tuple[str, str]:
    """Return state and reason of a job that last ran on this machine (or another one without SLURM)."""
    held = holder(lock_path(run_dir, node.key))
    last = [e for e in entries if e.key == node.key][-1]
    if held:
        return ("RUNNING", held) if last.event == "submitted" else ("PENDING", held)
    if last.event == "submitted":
        return "KILLED", "submit.py was killed"
    if last.status == 0:
        return "COMPLETED", ""
    return ("INTERRUPTED", f"exit {last.status}") if last.status in (130, 143) else ("FAILED", f"exit {last.status}")


def _slurm_state(mine: list[slurm.JobState]) -> tuple[str, str, str, int]:
    """Return state, reason, nodes and restarts of a job, or of an array's elements together."""
    order = ("RUNNING", "COMPLETING", "CONFIGURING", "PENDING")
    worst = min(
        mine, key=lambda row: order.index(row.state) if row.state in order else (9 if row.state == "COMPLETED" else 5)
    )
    state = worst.state
    if len(mine) > 1:
        ended = sum(row.state == "COMPLETED" for row in mine)
        state = state if ended in (0, len(mine)) else f"{state} ({ended}/{len(mine)} done)"
    nodes = ",".join(dict.fromkeys(row.nodes for row in mine if row.nodes and row.nodes != "None assigned"))
    # What SLURM once waited for says nothing about a job that has ended.
    reason = worst.reason if worst.live or worst.reason.startswith(("exit", "NonZero")) else ""
    return state, reason, nodes, max(row.restarts for row in mine)


def collect(run_dir: Path) -> tuple[list[Row], str]:
    """Return a row for every job of the run's chain, and a note where SLURM could not be asked ("" otherwise).

    Raises:
        ConfigError: this is no run directory.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: no such run (no config.yaml): python launch/runs.py list shows what there is")
    config = configuration.load(run_dir / "config.yaml")
    entries = Ledger(run_dir).entries()
    folds = [k for k in folds_of(run_dir, entries) if k < config.data.folds] or [0]
    note = ""
    slurm_ids = [e.job_id for e in entries if e.cluster == "slurm"]
    try:
        states = slurm.states(slurm_ids)
    except slurm.SlurmError as error:
        states, note = {}, f"SLURM does not answer ({error}): states are those of the files"
    # Without accounting the controller forgets a job some minutes after its end: then only the files can tell.
    lost = "UNKNOWN" if note else "ENDED"
    return [_row(config, run_dir, node, entries, states, lost) for node in chain.jobs_of(config, "all", folds)], note


def _row(
    config: Config, run_dir: Path, node: Node, entries: list[Entry], states: dict[str, slurm.JobState], lost: str
) -> Row:
    mine = [e for e in entries if e.key == node.key]
    last = next((e for e in reversed(mine) if e.event == "submitted"), None)
    try:
        record = done.read_done(config, run_dir, closing(node.stage), node.fold)
    except ConfigError:
        record = None
    state, reason, nodes, restarts = ("done", "", "", 0) if record else ("-", "", "", 0)
    if last and last.cluster == "slurm":
        found = [row for row in states.values() if row.parent == last.job_id and row.name in (last.name, "")]
        if found:
            live = any(row.live for row in found)
            word, why, nodes, restarts = _slurm_state(found)
            if live or not record:
                state, reason = word, why
        elif not record:
            state = lost
    elif last and not record:
        state, reason = _local_state(run_dir, node, mine)
        nodes = last.host
    logs = logs_of(run_dir, last) if last else []
    row = Row(
        node=node,
        job_id=last.job_id if last and last.cluster == "slurm" else "local" if last else "",
        state=state,
        reason=reason,
        nodes=nodes,
        attempts=sum(e.event == "submitted" for e in mine) + restarts,
        progress=progress_text(config, run_dir, node.key),
        score=_score_text(config, run_dir, node),
        log=logs[0] if logs else None,
    )
    if not row.failed or row.state == "CANCELLED":
        return row
    for path in sorted(logs, key=lambda p: p.stat().st_mtime, reverse=True):
        said = last_error(path)
        if said:
            return Row(**{**row.__dict__, "error": said, "log": path})
    return row


def table(rows: list[Row]) -> str:
    """Return the rows as a table for people, and below it what to do about what failed."""
    cells = [HEADS] + [
        (
            row.node.key, row.job_id, row.state + (f" ({row.reason})" if row.reason else ""), row.nodes,
            str(row.attempts or ""), row.progress, row.score,
        )
        for row in rows
    ]  # fmt: skip
    used = [i for i in range(len(HEADS)) if any(line[i] for line in cells[1:])]
    widths = {i: max(len(line[i]) for line in cells) for i in used}
    lines = ["  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in cells]
    for row in rows:
        if row.failed:
            lines += ["", f"{row.node.key}: {row.error or row.reason or row.state}"]
            lines += [f"  log: {row.log}"] if row.log else []
    stopped = {row.state.split(" ")[0] for row in rows if row.failed}
    if stopped:
        first = "" if stopped <= {"INTERRUPTED", "KILLED", "CANCELLED", "PREEMPTED"} else "correct the cause, then "
        lines += ["", f"{first}repeat the same submit command: it continues where the chain stopped"]
    return "\n".join(lines)
