"""The result of a run: its scores and files, or the log line that explains a failure. Only reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch import bootstrap
from launch.monitor.causes import is_root_cause
from launch.monitor.scores import score_table
from pneumo_dist.chain import Node
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run
from pneumo_dist.runtime import history
from pneumo_dist.runtime.files import read_json

TAIL_BYTES = 64 * 1024
# The last line of a traceback, this project's one-line errors, and messages of SLURM and the kernel on a killed job.
_ERROR = re.compile(
    r"^error: |^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Timeout|Stale)\b|^slurmstepd(-\S+)?: error|^srun: error|"
    r"^srun: fatal|^sbatch: (error|fatal)|\boom.kill|Out Of Memory|No space left|CUDA out of memory|"
    r": No such file or directory$|: Permission denied$|command not found$|collective operation timeout",
    re.IGNORECASE,
)
# Lines that look like errors and are none: SLURM goes on; the program's own remarks, after which it has gone on.
_HARMLESS = re.compile(r"going to /tmp|already completing|^\d\d:\d\d:\d\d( \[rank \d+\])? [DIW] ")
# Attempts append to the same file; each starts with such a line.
_ATTEMPT = re.compile(r"--- \d{4}-|.*submitit INFO .*Starting with JobEnvironment")
_OWN_PREFIX = re.compile(r"^(error: |pneumo_dist\.\S*ConfigError: )")  # the message after it is complete without it
# Lines of SLURM and of the shell: a failed line of `setup` does not end the job.
_SURROUNDINGS = re.compile(
    r"^(srun|sbatch|slurmstepd)\b|^/\S+: line \d+: |command not found$|"
    r"^[\w./-]+: .*: (No such file or directory|Permission denied)$"
)
# Consequences of the end of another rank: they explain a failure only when there is no other line.
_CONSEQUENCE = re.compile(
    r"rank [\d, ]+( and \d+ more)? did not come to|rank 0 was not found at|"
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|\bDist(Backend|Network|Store)Error\b|"
    r"waiting for job step|Job step aborted"
)
# The end of a task. After the first one, --kill-on-bad-exit ends the others: their lines say nothing of the cause.
_TASK_END = re.compile(r"^srun: error: .*: tasks? [^:]*: ")
# Among them: killed from outside the program, or an exit without an exception, which would be status 1.
_ABRUPT_END = re.compile(_TASK_END.pattern + r"(?!Exited with (exit code )?1$|Terminated)")
# The last message of slurmstepd in a log, and SLURM's state for it.
_REQUEUED = {"PREEMPTION": "PREEMPTED", "JOB REQUEUE": "REQUEUED", "NODE FAILURE": "NODE_FAIL", "TIME LIMIT": "TIMEOUT"}


def failure_line(logs: Iterable[Path]) -> tuple[str, Path] | None:
    """Return the line that explains best why a job failed, shortened, and its log; None where there is none.

    A rank's own error ranks above the consequences of another rank's end; of equal lines, that of the first log wins.
    """
    lines = [(lines[-1], path) for path in logs if (lines := _error_lines(path))]
    return max(lines, key=lambda entry: _relevance(entry[0]), default=None)


def _relevance(line: str) -> int:
    if is_root_cause(line):
        return 5
    if "CANCELLED AT" in line or _TASK_END.search(line):
        return 2 if _ABRUPT_END.search(line) else 0
    if _CONSEQUENCE.search(line):
        return 1
    return 3 if _SURROUNDINGS.search(line) else 4


def _error_lines(path: Path) -> list[str]:
    """Return the error lines of the newest attempt, the most relevant one last."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if _ATTEMPT.match(line)]
    attempt = lines[starts[-1] :] if starts else lines
    attempt = [line for line in attempt if _ERROR.search(line) and not _HARMLESS.search(line)]
    later_ends = [i for i, line in enumerate(attempt) if _TASK_END.search(line)][1:]
    errors = [_OWN_PREFIX.sub("", line)[:300] for i, line in enumerate(attempt) if i not in later_ends]
    return sorted(errors, key=_relevance)  # stable: of equal lines the newest stays last


def requeued_for(logs: Iterable[Path]) -> str:
    """Return the state in which a job's last attempt ended before it was requeued; "" where the logs do not say.

    Without accounting the logs are the only source.
    """
    for path in logs:
        try:
            causes: list[str] = re.findall(r"CANCELLED AT \S+ DUE TO ([A-Z ]+[A-Z])", path.read_text(errors="replace"))
        except OSError:
            continue
        if causes:
            return _REQUEUED.get(causes[-1], causes[-1])
    return ""


def short_path(path: Path) -> str:
    """Return a path relative to the current directory where it lies below it, else absolute."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def print_result(run: Run, targets: Sequence[Node], folds: Sequence[int]) -> None:
    """Print the folder of a finished stage, and the scores after an evaluation, an inference or the whole chain."""
    last = targets[-1]
    print(f"done: {short_path(run.dir_of(last.stage, last.fold))}", flush=True)
    for node in targets:
        rows = history.read(run.metrics(node.stage, node.fold)) if node.stage in run.config.train_stages else []
        if rows and rows[-1].get("alarm"):
            print(f"WARNING: fold {node.fold}, stage {node.stage}: {rows[-1]['alarm']}", flush=True)
    if last.stage in ("evaluate", "pool", "merge"):
        print(outcome_text(run, folds), flush=True)


def inference_notes(folder: Path) -> list[str]:
    """Return the notes of an inference on films without an answer and ignored files; [] where there are none."""
    try:
        return [str(note) for note in read_json(folder / "inference.json").get("notes", [])]
    except (OSError, ValueError):
        return []


def outcome_text(run: Run, folds: Sequence[int]) -> str:
    """Return the scores of a run (pooled, where there are several folds) and the paths of its results."""
    evaluations = [run.dir_of("pool")] if len(folds) > 1 else [run.dir_of("evaluate", k) for k in folds]
    scores = [line for folder in evaluations if (folder / "DONE.json").is_file() for line in score_table(folder)]
    results = [("model", run.model(k)) for k in folds]
    results += [("report", folder / "report.html") for folder in evaluations]
    notes: list[str] = []
    try:
        folder = run.infer_dir
        notes = inference_notes(folder)
        files = {"submission": "submission.csv", "overlays": "overlays", "masks": "masks", "films": "report.html"}
        results += [(name, folder / file) for name, file in files.items()]
    except ConfigError:
        pass  # no folder to infer on
    paths = [f"{name:14}{short_path(path)}" for name, path in results if path.exists()]
    if any(run.folder.glob("fold*/*/tensorboard")):
        program = short_path(bootstrap.ROOT / "launch" / "runs.py")
        paths.append(f"{'TensorBoard':14}python {program} tensorboard {short_path(run.folder)}")
    blocks = ["\n".join(block) for block in (scores, paths, notes) if block]
    return "\n" + "\n\n".join(blocks) if blocks else ""
