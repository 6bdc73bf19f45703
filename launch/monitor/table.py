"""A run's rows as text: the table of jobs, and for each failed job its error, its log and what to do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise

from launch.monitor.causes import advice
from launch.monitor.outcome import short_path
from launch.monitor.status import Row
from launch.state.ledger import Entry
from pneumo_dist.run import RunFolder

COLUMNS = ("stage", "job", "state", "nodes", "try", "progress", "score")
# States that do not come from the job's own program, so that there is no cause to correct.
EXTERNAL_ENDS = ("CANCELLED", "PREEMPTED", "NODE_FAIL", "KILLED", "INTERRUPTED", "TIMEOUT", "REVOKED", "DEADLINE")


def heading(run: RunFolder, entries: Sequence[Entry]) -> str:
    """Return the run's name and folder, and the time and the code of its newest submission."""
    last = next((entry for entry in reversed(entries) if entry.event == "submitted"), None)
    if last is None:
        return f"run {run.name} in {short_path(run.folder)}"
    git = last.extra.get("git") or {}
    changed = git.get("changed_files", 0)
    commit = f", commit {git['commit'][:10]}" if git else ""
    dirty = f" with {changed} changed file{'s' if changed > 1 else ''}" if changed else ""
    when = last.time.replace("T", " ").replace("Z", " UTC")
    code = f", code/{last.code}" if last.code else ""
    return f"run {run.name} in {short_path(run.folder)}; last submitted {when}{commit}{dirty}{code}"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table; columns without a value are left out."""
    lines = [COLUMNS, *map(_cells, rows)]
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    progress = ""
    if row.progress is not None:  # the time left means nothing once the job has ended
        progress = str(row.progress) if row.active else row.progress.text
    return (row.node.key, row.job_id, _state(row), row.nodes, str(row.attempts or ""), progress, row.score)


def _state(row: Row) -> str:
    return row.state + (f" ({row.reason})" if row.reason else "")


def trouble(rows: Sequence[Row]) -> str:
    """Return error, log and advice for every job that failed or would wait forever; "" where there is none."""
    lines: list[str] = []
    failed: list[Row] = []
    for row in rows:
        help_line = _advice(row)
        if row.cancelled_with_parent or not (row.failed or row.error or help_line):
            continue
        job = "" if row.job_id in ("", "local") else f" (job {row.job_id})"
        lines += ["", f"{row.node.key}{job}: {_state(row)}" + (f": {row.error}" if row.error else "")]
        lines += [f"  log:  {short_path(row.log)}"] if row.log else []
        lines += [f"  help: {help_line}"] if help_line else []
        failed += [row] if row.failed else []
    with_parent = [row.node.key for row in rows if row.cancelled_with_parent]
    if with_parent:
        lines += ["", f"cancelled because an earlier job did not complete: {', '.join(with_parent)}"]
    if failed:
        first = "" if all(row.state in EXTERNAL_ENDS for row in failed) else "correct the cause, then "
        commands = dict.fromkeys(_command_to_repeat(row.command) for row in failed)
        lines += ["", f"next: {first}repeat the same command to continue: {'; '.join(commands)}"]
    return "\n".join(lines).strip("\n")


def _advice(row: Row) -> str:
    # The end of an earlier attempt ("after NODE_FAIL") needs no advice: the job has recovered from it.
    reason = "" if row.active else row.reason.partition("after ")[0]
    return advice(row.error, row.state, reason)


def _command_to_repeat(command: Sequence[str]) -> str:
    """Return the command without --redo, which would start over, and without --after: those jobs have ended."""
    arguments = [
        argument
        for before, argument in pairwise(command)
        if "--after" not in (before, argument) and not argument.startswith("--after=") and argument != "--redo"
    ]
    return "python launch/submit.py " + shlex.join(arguments) if arguments else "python launch/submit.py ..."
