"""A run's rows as text for people: the table, and for what has failed why, where to look and what to do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from launch.monitor.outcome import shown
from launch.monitor.status import Row
from launch.state.ledger import Entry
from pneumo_dist.run import RunFolder

HEADS = ("stage", "job", "state", "nodes", "try", "progress", "score")
# What helps, by state or by the reason for which a job waits without an end in sight.
_HELP = {
    "TIMEOUT": "the time limit came before it could be requeued; more time: time_min in the profile",
    "OUT_OF_MEMORY": "ask for more memory (mem_gb in the profile), or lower train.workers or the batch size",
    "NODE_FAIL": "a node died; keep it out with exclude in the profile",
    "DependencyNeverSatisfied": "a job before it failed: runs.py cancel takes this one out of the queue",
    "JobHeldUser": "held: scontrol release lets it go",
    "JobHeldAdmin": "held, by an administrator or after a failed start: scontrol release lets it go, or ask them",
    "launch failed requeued held": "a node could not start it: scontrol release tries again",
    "BadConstraints": "no node has what is asked for: constraint, gres and mem_gb in the profile",
    "PartitionTimeLimit": "asks for more time than the partition allows: time_min in the profile",
}
# Ended from outside: nothing is to be corrected.
_FROM_OUTSIDE = ("CANCELLED", "PREEMPTED", "NODE_FAIL", "KILLED", "INTERRUPTED", "TIMEOUT", "REVOKED", "DEADLINE")


def heading(run: RunFolder, entries: Sequence[Entry]) -> str:
    """Return what run this is and from which code its newest jobs come."""
    last = next((entry for entry in reversed(entries) if entry.event == "submitted"), None)
    if last is None:
        return f"run {run.name} in {shown(run.folder)}"
    git = last.extra.get("git") or {}
    changed = git.get("changed_files", 0)
    commit = f", commit {git['commit'][:10]}" if git else ""
    dirty = f" with changes in {changed} file{'s' if changed > 1 else ''}" if changed else ""
    when = last.time.replace("T", " ").replace("Z", " UTC")
    code = f", code/{last.code}" if last.code else ""
    return f"run {run.name} in {shown(run.folder)}; last submitted {when}{commit}{dirty}{code}"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    cells = [HEADS] + [
        (
            row.node.key, row.job_id, row.state + (f" ({row.reason})" if row.reason else ""), row.nodes,
            str(row.attempts or ""), _progress(row), row.score,
        )
        for row in rows
    ]  # fmt: skip
    used = [i for i in range(len(HEADS)) if any(line[i] for line in cells[1:])]
    widths = {i: max(len(line[i]) for line in cells) for i in used}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in cells)


def _progress(row: Row) -> str:
    if row.progress is None:
        return ""
    return str(row.progress) if row.active else row.progress.text


def trouble(rows: Sequence[Row]) -> str:
    """Return for every job that has failed, or waits in vain, why, its log and what to do; "" where all is well."""
    lines: list[str] = []
    commands: dict[str, None] = {}
    from_outside = True
    for row in rows:
        told = "" if row.active else row.reason.partition("after ")[0]  # what it has recovered from needs no help
        advice = _HELP.get(row.state) or next((text for word, text in _HELP.items() if word in told), "")
        if not (row.failed or row.error or advice) or row.swept_along:
            continue
        job = "" if row.job_id in ("", "local") else f" (job {row.job_id})"
        state = row.state + (f" ({row.reason})" if row.reason else "")
        lines += ["", f"{row.node.key}{job}: {state}" + (f": {row.error}" if row.error else "")]
        lines += [f"  log:  {shown(row.log)}"] if row.log else []
        lines += [f"  help: {advice}"] if advice else []
        if row.failed:
            commands[_again(row.command)] = None
            from_outside = from_outside and row.state in _FROM_OUTSIDE
    swept = [row.node.key for row in rows if row.swept_along]
    if swept:
        lines += ["", f"cancelled because a job before did not end well: {', '.join(swept)}"]
    if commands:
        first = "" if from_outside else "correct the cause, then "
        lines += ["", f"next: {first}repeat the same command, which continues: {'; '.join(commands)}"]
    return "\n".join(lines).strip("\n")


def _again(command: Sequence[str]) -> str:
    """Return the command to repeat: without --redo, which would start over, and the jobs that it once waited for."""
    words = [
        word
        for before, word in zip(command, command[1:], strict=False)
        if "--after" not in (before, word) and not word.startswith("--after=") and word != "--redo"
    ]
    return "python launch/submit.py " + shlex.join(words) if words else "python launch/submit.py ..."
