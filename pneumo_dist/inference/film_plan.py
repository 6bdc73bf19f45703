"""The plan of one inference, made before its array starts: films, ids, file names, parts. No torch.

Parts depend on the plan only, never on the number of tasks. This module opens no film.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.listing import find_films, ignored_text
from pneumo_dist.run import Run
from pneumo_dist.runtime.files import read_json, sha256_text, write_bytes

FORMAT = "pneumo_dist.plan/2"
PART = 256  # films of a part, at most
MANY = 64  # parts; with more than these, a plan made for few films is made anew


@dataclass(frozen=True, slots=True)
class PlannedFilm:
    """One film: its id in the outputs, its path below the source folder, its size on disk, the stem of its files."""

    id: str
    path: str
    bytes: int
    name: str


@dataclass(frozen=True)
class FilmPlan:
    """The films of one inference, sorted by id, cut into parts of `part_size`; `created` is epoch seconds."""

    label: str
    part_size: int
    created: int
    ignored: tuple[tuple[str, str], ...]  # path and reason of each other file in the folder
    films: tuple[PlannedFilm, ...]

    @property
    def parts(self) -> int:
        """Return the number of parts."""
        return -(-len(self.films) // self.part_size)

    def part(self, index: int) -> tuple[PlannedFilm, ...]:
        """Return the films of one part."""
        return self.films[index * self.part_size : (index + 1) * self.part_size]

    @property
    def pictures(self) -> list[PlannedFilm]:
        """Return the films that are PNG or JPEG files by their names."""
        return [film for film in self.films if film.path.lower().endswith((".png", ".jpg", ".jpeg"))]

    @property
    def listing_hash(self) -> str:
        """Return the hash of the films' ids, paths and sizes, as recorded in DONE.json."""
        return sha256_text("".join(f"{film.id}\t{film.path}\t{film.bytes}\n" for film in self.films))

    @cached_property
    def hash(self) -> str:
        """Return the hash of label, part size and files, without the time of the plan."""
        return sha256_text(json.dumps([self.label, self.part_size, [_row(film) for film in self.films], self.ignored]))


def _row(film: PlannedFilm) -> list[Any]:
    return [film.id, film.path, film.bytes, film.name]


def file_name(film_id: str) -> str:
    """Return a safe, unique file stem for an id: the id itself, or a cleaned form with a hash of the id."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", film_id).lstrip(".")
    if plain == film_id and len(plain) <= 120:
        return plain
    return f"{plain[-100:]}-{hashlib.sha256(film_id.encode()).hexdigest()[:10]}"


def make_film_plan(run: Run, nodes: int = 1, existing: FilmPlan | None = None) -> FilmPlan:
    """List the films of `infer.dir` (or of the training data).

    With infer.part_size=0 the parts have at most PART films, and every node as many parts; those of an existing plan
    keep their size, so that finished ones count, unless the films that were added would make too many of them.

    `created` is the current time, or SOURCE_DATE_EPOCH if that is set (reproducible-builds.org). Outputs contain no
    other date.

    Raises:
        ConfigError: the folder does not exist or contains no film.
    """
    folder = run.infer_source
    if folder is None:
        raise ConfigError("no films for inference: give infer.dir=DIR")
    if not folder.is_dir():
        raise ConfigError(f"infer.dir={folder} is not a folder: give a folder of DICOM, PNG or JPEG films")
    listed, ignored = find_films(folder, run.infer_follows_links)
    if not listed:
        raise ConfigError(
            f"infer.dir={folder} contains no films (DICOM, or *.png, *.jpg, *.jpeg); {ignored_text(ignored)}"
        )
    films = tuple(PlannedFilm(name, path, _size(folder / path), file_name(name)) for name, path in listed)
    created = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    parts = nodes * -(-len(films) // (nodes * PART))
    size = run.config.infer.part_size or -(-len(films) // parts)
    plan = FilmPlan(run.infer_dir.name, size, created, tuple(ignored), films)
    if existing is None or run.config.infer.part_size:
        return plan
    kept = replace(plan, part_size=existing.part_size)
    return kept if kept.parts <= max(existing.parts, MANY, 4 * parts) else plan


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # the reader reports the reason


def read_film_plan(folder: Path) -> FilmPlan | None:
    """Read plan.json of an inference folder; None if there is none."""
    path = folder / "plan.json"
    try:
        tree = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{path} is damaged: remove it and submit the inference again") from None
    if tree.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a plan of this version: remove it and submit the inference again")
    films = tuple(PlannedFilm(*row) for row in tree["films"])
    ignored = tuple((path, reason) for path, reason in tree["ignored"])
    return FilmPlan(tree["label"], tree["part_size"], tree["created"], ignored, films)


def write_film_plan(run: Run, nodes: int = 1) -> FilmPlan:
    """Write and return plan.json; an equal existing plan is kept, with its date. Called once, at submission."""
    folder, existing = run.infer_dir, None
    with suppress(ConfigError):  # damaged, or of another version: the new plan replaces it
        existing = read_film_plan(folder)
    plan = make_film_plan(run, nodes, existing)
    if existing is not None and existing.hash == plan.hash:
        return existing
    write_bytes(folder / "plan.json", _encode(plan))
    return plan


def ensure_film_plan(run: Run, tasks: int = 1) -> FilmPlan:
    """Return the existing plan; if submission wrote none (plain scripts), the first of the tasks writes it for all.

    Raises:
        ConfigError: the existing plan has another infer.part_size.
    """
    folder = run.infer_dir
    plan = read_film_plan(folder)
    if plan is None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".plan.{os.getpid()}.{os.uname().nodename}.tmp"
        temporary.write_bytes(_encode(make_film_plan(run, tasks)))
        try:
            with suppress(FileExistsError):  # another task was first: its plan holds
                os.link(temporary, folder / "plan.json")
        finally:
            temporary.unlink()
        plan = read_film_plan(folder)
        assert plan is not None
    if run.config.infer.part_size not in (0, plan.part_size):
        raise ConfigError(
            f"{folder / 'plan.json'} has parts of {plan.part_size} films, but infer.part_size is "
            f"{run.config.infer.part_size}: submit again, or give another infer.label"
        )
    return plan


def _encode(plan: FilmPlan) -> bytes:
    head = {
        "format": FORMAT,
        "label": plan.label,
        "part_size": plan.part_size,
        "created": plan.created,
        "ignored": plan.ignored,
    }
    rows = ",\n".join(json.dumps(_row(film)) for film in plan.films)
    return f'{json.dumps(head)[:-1]}, "films": [\n{rows}\n]}}\n'.encode()


def signature(plan: FilmPlan, index: int, settings: dict[str, Any]) -> str:
    """Return the hash of the inputs of a part: label, its films, and the settings with the hashes of the models.

    It does not cover the whole plan: when films are added to an archive, parts without new films are kept.
    """
    films = [_row(film) for film in plan.part(index)]
    return sha256_text(json.dumps([plan.label, films, settings], sort_keys=True))


def check_films(run: Run) -> str:
    """Check before submission that films and named models exist; return their counts as one line.

    Raises:
        ConfigError: films or a named model are missing. The run's own models may come later from the same chain.
    """
    plan = make_film_plan(run)
    if "dicomseg" in run.config.infer.outputs and len(plan.pictures) == len(plan.films):
        raise ConfigError(
            f"infer.outputs lists dicomseg, but no film in {run.infer_source} is a DICOM file, and a DICOM SEG must "
            "refer to one: leave dicomseg out"
        )
    if run.config.infer.models:
        for path in run.model_paths():
            if not path.is_file():
                raise ConfigError(
                    f"infer.models: {path} does not exist: give a model.pt, or a run with fold<k>/model.pt"
                )
    return f"{len(plan.films)} films in {plan.parts} parts, {len(plan.ignored)} other files ignored"
