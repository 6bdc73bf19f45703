"""Batch inference: an array of parts, then one merge. Every film is answered once, whatever is killed on the way.

Imports no torch until a part runs; `merge` only joins files.
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
from pneumo_dist.inference.film_plan import (
    FilmPlan,
    ensure_film_plan,
    read_film_plan,
    signature,
)
from pneumo_dist.inference.parts import part_folder, read_part
from pneumo_dist.runtime.files import sha256_file, write_json, write_text
from pneumo_dist.runtime.task import Task

log = logging.getLogger(__name__)


def infer_parts(task: Task) -> dict[str, Path]:
    """Run this array element's parts: part j belongs to element j mod N; finished ones are kept."""
    made = ensure_film_plan(task.run)
    index, count = task.part
    mine = [j for j in range(made.parts) if j % count == index]
    if mine:
        from pneumo_dist.inference.stream import run_parts

        run_parts(task, made, mine)
    return {}


def merge(task: Task) -> dict[str, Path]:
    """Join the parts into the answers of the whole inference.

    Raises:
        ConfigError: a part is missing or outdated, or a film has no row, two rows, or is not in the plan.
    """
    out = task.out
    made = read_film_plan(out)
    if made is None:
        raise ConfigError(f"{out} has no plan.json: run --stage infer")
    if task.inputs.get("films", made.listing_hash) != made.listing_hash:
        raise ConfigError(
            f"the films in {task.run.infer_source} have changed since they were planned: run --stage infer again"
        )
    rows, settings = _joined(out, made)
    if settings["models"] != [sha256_file(path) for path in task.run.model_paths()]:
        raise ConfigError(f"{out / 'parts'}: made with other models than the ones there now: run --stage infer again")
    from pneumo_dist.inference.outputs import FOLDERS, write_predictions
    from pneumo_dist.inference.worklist import write_worklist
    from pneumo_dist.scoring.submission_csv import problems_of, read_rows, write_submission

    task.check_attempt()
    write_submission(out / "submission.csv", ((row["film"], row["rle"]) for row in rows))
    sizes = {row["film"]: (row["rows"], row["columns"]) if row["status"] == "ok" else None for row in rows}
    problems = problems_of(read_rows(out / "submission.csv"), sizes, sizes.get)
    if problems:
        raise RuntimeError(
            f"{out / 'submission.csv'} is not valid: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
        )
    write_predictions(out / "predictions.csv", rows, settings)
    kept = {part_folder(out, j) for j in range(made.parts)}
    for stale in set((out / "parts").iterdir()) - kept:  # of a longer plan, or left by a killed task
        shutil.rmtree(stale, ignore_errors=True)
    _gather_files(out, made, rows, ["thumbs", *FOLDERS.values()])
    listed = sorted((name, digest) for row in rows for name, (_, digest) in row["files"].items())
    write_text(out / "files.sha256", "".join(f"{digest}  {name}\n" for name, digest in listed))
    counts = {
        "films": len(rows),
        "positive": sum(row["decision"] == "positive" for row in rows),
        "negative": sum(row["decision"] == "negative" for row in rows),
        "unreadable": sum(row["status"] != "ok" for row in rows),
        "ignored_files": made.ignored,
    }
    inference = {"label": made.label, **counts, **settings}
    write_json(out / "inference.json", inference)
    write_worklist(out / "report.html", rows, inference)
    log.info("%s: %s", out, ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()))
    names = {
        "submission": "submission.csv", "predictions": "predictions.csv", "files": "files.sha256",
        "inference": "inference.json", "plan": "plan.json", "report": "report.html",
    }  # fmt: skip
    return {name: out / file for name, file in names.items()}


def _joined(out: Path, made: FilmPlan) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of all parts in the plan's order, and their settings; each film has exactly one row."""
    parts = [read_part(part_folder(out, j)) for j in range(made.parts)]
    missing = [j for j, part in enumerate(parts) if part is None]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
        raise ConfigError(
            f"{out}: {len(missing)} of {made.parts} parts are not there ({shown}): "
            "run --stage infer again, it does only these"
        )
    whole = [part for part in parts if part is not None]
    settings = whole[0]["settings"]
    if any(part["settings"] != settings for part in whole):
        raise ConfigError(
            f"{out / 'parts'}: parts of different settings or models lie side by side: run --stage infer again"
        )
    rows = [row for part in whole for row in part["rows"]]
    wanted = [film.id for film in made.films]
    if [row["film"] for row in rows] != wanted:
        raise ConfigError(
            f"{out / 'parts'}: {_mismatch([row['film'] for row in rows], wanted)}: "
            "remove parts/ and run --stage infer again"
        )
    if any(part["signature"] != signature(made, j, settings) for j, part in enumerate(whole)):
        raise ConfigError(f"{out / 'parts'}: made for an earlier plan: run --stage infer again")
    return rows, settings


def _mismatch(found: list[str], wanted: list[str]) -> str:
    gaps, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    twice = sorted(name for name, count in Counter(found).items() if count > 1)
    for names, what in ((gaps, "without an answer"), (foreign, "not in the plan"), (twice, "answered twice")):
        if names:
            return f"{len(names)} films {what}, the first is {names[0]}"
    return "the films are not in the order of the plan"


def _gather_files(out: Path, made: FilmPlan, rows: list[dict[str, Any]], folders: list[str]) -> None:
    """Bring the parts' files together, each folder replaced as a whole: links where the file system has them."""
    for folder in folders:
        fresh, final = out / f".{folder}.new", out / folder
        shutil.rmtree(fresh, ignore_errors=True)
        for name, source in _files_of(out, made, rows, folder):
            fresh.mkdir(exist_ok=True)
            try:
                os.link(source, fresh / name)
            except OSError:
                shutil.copyfile(source, fresh / name)
        shutil.rmtree(final, ignore_errors=True)
        if fresh.exists():
            fresh.rename(final)


def _files_of(out: Path, made: FilmPlan, rows: list[dict[str, Any]], folder: str) -> Iterator[tuple[str, Path]]:
    for i, row in enumerate(rows):
        for name in row["files"]:
            if name.startswith(folder + "/"):
                yield name.split("/", 1)[1], part_folder(out, i // made.part_size) / name
