"""Batch inference: an array of parts, then one merge. Every film gets one result, whichever processes are killed.

torch is imported only when a part runs; `merge` only joins files.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pneumo_dist.config import ConfigError
from pneumo_dist.inference.film_plan import FilmPlan, ensure_film_plan, read_film_plan, signature
from pneumo_dist.inference.parts import part_folder, read_part
from pneumo_dist.runtime.failure import Failure
from pneumo_dist.runtime.files import sha256_file, write_json, write_text
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.submission_csv import IGNORED, OK, problems_of, read_rows, write_submission

log = logging.getLogger(__name__)


def infer_parts(task: Task) -> dict[str, Path]:
    """Infer the parts of array task i of N, those with j mod N == i; finished ones are kept."""
    index, count = task.part
    plan = ensure_film_plan(task.run, count)
    indices = range(index, plan.parts, count)
    if indices:
        from pneumo_dist.inference.stream import stream_parts

        stream_parts(task, plan, indices)
    return {}


def merge(task: Task) -> dict[str, Path]:
    """Join the parts into the outputs of the whole inference; return their paths.

    Raises:
        ConfigError: a part is missing or outdated, or a film has no row, has two rows, or is not in the plan.
        Failure: no film is readable; all outputs are written, since predictions.csv gives the reasons.
    """
    from pneumo_dist.inference.outputs import FOLDERS, csv_text, write_predictions
    from pneumo_dist.inference.worklist import write_worklist

    out, plan = task.out, _current_plan(task)
    read, settings = _joined(out, plan)
    if settings["models"] != [sha256_file(path) for path in task.run.model_paths()]:
        raise ConfigError(f"{out / 'parts'}: made with other models than the current ones: run --stage infer again")
    task.check_attempt()
    rows, ignored = _films_and_others(plan, read)
    policy = task.config.infer.unreadable
    _write_submission(out / "submission.csv", rows, policy)
    write_predictions(out / "predictions.csv", rows, settings)
    write_text(out / "ignored.csv", csv_text(["path", "reason"], ignored))
    current = {part_folder(out, j) for j in range(plan.parts)}
    for stale in set((out / "parts").iterdir()) - current:  # of a longer plan, or left by a killed task
        shutil.rmtree(stale, ignore_errors=True)
    _gather_files(out, plan, read, ["thumbs", *FOLDERS.values()])
    hashes = sorted((name, digest) for row in rows for name, (_, digest) in row["files"].items())
    write_text(out / "files.sha256", "".join(f"{digest}  {name}\n" for name, digest in hashes))
    counts = _counts(rows) | {"ignored_files": len(ignored)}
    inference = {"label": plan.label, **counts, **settings, "notes": _notes(counts, policy)}
    write_json(out / "inference.json", inference | {"follow_links": task.run.infer_follows_links})
    write_worklist(out / "report.html", rows, inference)
    log.info("%s: %s", out, ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()))
    if counts["unreadable"] == counts["films"]:
        first = (rows or read)[0]
        problem = f"none of {len(rows or read)} films is readable (first: {first['film']}: {first['reason']})"
        raise Failure(f"{problem}: see predictions.csv and ignored.csv in {out}")
    return {
        "submission": out / "submission.csv",
        "predictions": out / "predictions.csv",
        "ignored": out / "ignored.csv",
        "files": out / "files.sha256",
        "inference": out / "inference.json",
        "plan": out / "plan.json",
        "report": out / "report.html",
    }


def _current_plan(task: Task) -> FilmPlan:
    plan = read_film_plan(task.out)
    if plan is None:
        raise ConfigError(f"{task.out} has no plan.json: run --stage infer")
    if task.inputs.get("films", plan.listing_hash) != plan.listing_hash:
        raise ConfigError(
            f"the films in {task.run.infer_source} have changed since they were planned: run --stage infer again"
        )
    return plan


def _films_and_others(plan: FilmPlan, read: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the rows of the films, and {path, reason} of every ignored file, objects without an image included."""
    others = [
        (film.path, row["reason"]) for film, row in zip(plan.films, read, strict=True) if row["status"] == IGNORED
    ]
    ignored = [{"path": path, "reason": reason} for path, reason in sorted([*plan.ignored, *others])]
    return [row for row in read if row["status"] != IGNORED], ignored


def _notes(counts: dict[str, int], policy: str) -> list[str]:
    """Return what the last lines of the command and the report say about films without an answer and other files."""
    notes = []
    if counts["unreadable"]:
        rows = {
            "skip": "they have no row in submission.csv",
            "negative": "infer.unreadable=negative writes -1 for them in submission.csv, which is not a finding",
        }[policy]
        share = f"{counts['unreadable']} of {counts['films']} films"
        notes.append(f"no answer for {share}: unreadable (predictions.csv gives the reasons); {rows}")
    if counts["ignored_files"]:
        notes.append(f"{counts['ignored_files']} other files ignored: ignored.csv gives the reasons")
    return notes


def _write_submission(path: Path, rows: list[dict[str, Any]], policy: str) -> None:
    """Write submission.csv, with unreadable films if the policy is "negative"; validate it against the films' sizes."""
    rows = [row for row in rows if row["status"] == OK or policy == "negative"]
    write_submission(path, ((row["film"], row["rle"]) for row in rows))
    sizes = {row["film"]: (row["rows"], row["columns"]) if row["status"] == OK else None for row in rows}
    problems = problems_of(read_rows(path), sizes, sizes.get)
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise RuntimeError(f"{path} is not valid: {problems[0]}{more}")


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "films": len(rows),
        "positive": sum(row["decision"] == "positive" for row in rows),
        "negative": sum(row["decision"] == "negative" for row in rows),
        "unreadable": sum(row["status"] != OK for row in rows),
    }


def _joined(out: Path, plan: FilmPlan) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of all parts in the order of the plan, and their settings; each film has exactly one row."""
    parts = [read_part(part_folder(out, j)) for j in range(plan.parts)]
    missing = [j for j, part in enumerate(parts) if part is None]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
        raise ConfigError(
            f"{out}: {len(missing)} of {plan.parts} parts are missing ({shown}): "
            "run --stage infer again, it infers only these"
        )
    finished = [part for part in parts if part is not None]
    settings = finished[0]["settings"]
    if any(part["settings"] != settings for part in finished):
        raise ConfigError(f"{out / 'parts'}: parts have different settings or models: run --stage infer again")
    rows = [row for part in finished for row in part["rows"]]
    ids, planned = [row["film"] for row in rows], [film.id for film in plan.films]
    if ids != planned:
        raise ConfigError(f"{out / 'parts'}: {_mismatch(ids, planned)}: remove parts/ and run --stage infer again")
    if any(part["signature"] != signature(plan, j, settings) for j, part in enumerate(finished)):
        raise ConfigError(f"{out / 'parts'}: made for an earlier plan: run --stage infer again")
    return rows, settings


def _mismatch(ids: list[str], planned: list[str]) -> str:
    missing, foreign = sorted(set(planned) - set(ids)), sorted(set(ids) - set(planned))
    twice = sorted(name for name, count in Counter(ids).items() if count > 1)
    for names, problem in ((missing, "have no row"), (foreign, "are not in the plan"), (twice, "have two rows")):
        if names:
            return f"{len(names)} films {problem} (first: {names[0]})"
    return "the films are not in the order of the plan"


def _gather_files(out: Path, plan: FilmPlan, rows: list[dict[str, Any]], folders: list[str]) -> None:
    """Collect the files of the parts, replacing each folder as a whole; hard links if the file system has them."""
    for folder in folders:
        fresh, final = out / f".{folder}.new", out / folder
        shutil.rmtree(fresh, ignore_errors=True)
        for name, source in _files_of(out, plan, rows, folder):
            fresh.mkdir(exist_ok=True)
            try:
                os.link(source, fresh / name)
            except OSError:
                shutil.copyfile(source, fresh / name)
        shutil.rmtree(final, ignore_errors=True)
        if fresh.exists():
            fresh.rename(final)


def _files_of(out: Path, plan: FilmPlan, rows: list[dict[str, Any]], folder: str) -> Iterator[tuple[str, Path]]:
    for i, row in enumerate(rows):
        for name in row["files"]:
            if name.startswith(folder + "/"):
                yield name.split("/", 1)[1], part_folder(out, i // plan.part_size) / name
