"""What came out of a run: its scores, where things lie, or the line that says why a job failed. Only reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from launch import bootstrap
from launch.planning.plan import Plan
from pneumo_dist.config import ConfigError
from pneumo_dist.run import Run
from pneumo_dist.runtime.files import read_json

TAIL_BYTES = 64 * 1024
# The last line of a traceback, our own one-line errors, and what SLURM and the kernel say about a killed job.
_TELLING = re.compile(
    r"^error: |^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Timeout|Stale)\b|^slurmstepd: error|^srun: error|oom.kill|"
    r"Out Of Memory|No space left|CUDA out of memory|: No such file or directory$|: Permission denied$|"
    r"command not found$",
    re.IGNORECASE,
)
_OURS = re.compile(r"^(error: |pneumo_dist\.\S*ConfigError: )")  # what follows is a sentence of its own
# Follow-ups of another rank's end: worth telling only when nothing else was said.
_FOLLOWS = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|\bDist(Backend|Network|Store)Error\b|"
    r"^srun: error: .*: task|Terminating StepId|CANCELLED AT"
)
# Among them, of several tasks that ended together, the one that was killed from outside.
_KILLED = re.compile(r"^srun: error: .*: tasks? .*: (?!Exited|Terminated)")
# The cause itself, wherever it stands in the chain of exceptions: what came of it says less.
_CAUSES = re.compile(r"No space left|Disk quota exceeded|Read-only file system|out of memory|oom.kill", re.IGNORECASE)


def why(logs: Iterable[Path]) -> tuple[str, Path] | None:
    """Return the line that tells why a job failed, shortened, and its log; None where nothing does.

    A rank's own trouble goes before what it says of another one's end; logs that come first go before later ones.
    """
    found = [(line, path) for path in logs for line in _telling(path)[-1:]]
    return max(found, key=lambda entry: _weight(entry[0]), default=None)


def _weight(line: str) -> int:
    if _FOLLOWS.search(line):
        return 1 if _KILLED.search(line) else 0
    return 3 if _CAUSES.search(line) else 2


def _telling(path: Path) -> list[str]:
    """Return the telling lines of the newest attempt, the most telling one last."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return []
    # Attempts append to the same file.
    starts = [
        i
        for i, line in enumerate(lines)
        if re.match(r"--- \d{4}-|.*submitit INFO .*Starting with JobEnvironment", line)
    ]
    lines = lines[starts[-1] :] if starts else lines
    telling = [_OURS.sub("", line)[:300] for line in lines if _TELLING.search(line)]
    return sorted(telling, key=_weight)


# slurmstepd's last words in a log, and SLURM's state for them.
_REQUEUED = {"PREEMPTION": "PREEMPTED", "JOB REQUEUE": "REQUEUED", "NODE FAILURE": "NODE_FAIL", "TIME LIMIT": "TIMEOUT"}


def requeued_for(logs: Iterable[Path]) -> str:
    """Return why a job's last run ended before it was requeued, as its logs have it; "" where they do not say.

    Without accounting this is the only place that knows.
    """
    for path in logs:
        try:
            said = re.findall(r"CANCELLED AT \S+ DUE TO ([A-Z ]+[A-Z])", path.read_text(errors="replace"))
        except OSError:
            continue
        if said:
            return _REQUEUED.get(said[-1], said[-1])
    return ""


def shown(path: Path) -> str:
    """Return a path as short as it can be typed from here."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def score_table(folder: Path) -> list[str]:
    """Return the honest scores of an evaluation beside those of calling every film empty; [] where there are none."""
    try:
        scores = read_json(folder / "scores.json")
    except (OSError, ValueError):
        return []
    heads = ("Dice", "on positives", "sensitivity", "specificity")
    columns = ("dice", "dice_positive", "sensitivity", "specificity")
    rows = [("validation films", list(heads))]
    for name, entry in scores["headline"].items():
        label = "triplet, cross-fitted" if name == "cross_fitted" else f"fixed threshold {entry['mask_threshold']:g}"
        rows.append((label, ["-" if entry[c] is None else f"{entry[c]:.4f}" for c in columns]))
    rows.append(("every film empty", [f"{scores['dice_all_empty']:.4f}", "0.0000", "0.0000", "1.0000"]))
    text = [f"{label:24}" + "".join(f"{cell:>14}" for cell in cells) for label, cells in rows]
    return [f"{scores['films']} films of {scores['patients']} patients, {scores['positive']} with pneumothorax", *text]


def tell(plan: Plan) -> None:
    """Print where a finished stage's result lies, and the scores after an evaluation, an inference or the chain."""
    last = plan.targets[-1]
    print(f"done: {shown(plan.run.dir_of(last.stage, last.fold))}", flush=True)
    if plan.request.stage in ("evaluate", "infer", "all"):
        print(outcome_text(plan.run, plan.folds), flush=True)


def outcome_text(run: Run, folds: tuple[int, ...]) -> str:
    """Return the scores of the run (pooled, where there are several folds) and the places of all that it made."""
    scores = [run.dir_of("pool")] if len(folds) > 1 else [run.dir_of("evaluate", k) for k in folds]
    lines = [line for folder in scores if (folder / "DONE.json").is_file() for line in score_table(folder)]
    places = [("model", run.model(k)) for k in folds]
    places += [("report", folder / "report.html") for folder in scores]
    try:
        folder = run.infer_dir
        names = {"submission": "submission.csv", "overlays": "overlays", "masks": "masks", "films": "report.html"}
        places += [(name, folder / file) for name, file in names.items()]
    except ConfigError:
        pass  # nothing to infer on has been named
    found = [f"{name:14}{shown(path)}" for name, path in places if path.exists()]
    if any(run.folder.glob("fold*/*/tensorboard")):
        program = shown(Path(bootstrap.ROOT) / "launch" / "runs.py")
        found.append(f"{'TensorBoard':14}python {program} tensorboard {shown(run.folder)}")
    return "\n".join(["", *lines, "", *found] if lines else ["", *found] if found else [])
