"""What one inference will do, decided before its array starts: films, ids, file names, parts, models. No torch.

Parts are a function of the plan alone, never of the number of tasks; nothing in here opens a film.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import find_films
from pneumo_dist.run import Run
from pneumo_dist.runtime.files import read_json, sha256_text, write_bytes

FORMAT = "pneumo_dist.plan/1"


@dataclass(frozen=True, slots=True)
class PlannedFilm:
    """One film: its id in the answers, its path below the source folder, its size on disk, the stem of its files."""

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
    ignored: int  # files in the folder that are no films
    films: tuple[PlannedFilm, ...]

    @property
    def parts(self) -> int:
        """The number of parts."""
        return -(-len(self.films) // self.part_size)

    def part(self, index: int) -> tuple[PlannedFilm, ...]:
        """The films of one part."""
        return self.films[index * self.part_size : (index + 1) * self.part_size]

    @property
    def listing_hash(self) -> str:
        """The hash of the films' ids, paths and sizes, as DONE.json records it."""
        return sha256_text("".join(f"{film.id}\t{film.path}\t{film.bytes}\n" for film in self.films))

    @cached_property
    def hash(self) -> str:
        """What the answers depend on: label, part size and films, not the time of the plan."""
        return sha256_text(json.dumps([self.label, self.part_size, [_row(film) for film in self.films]]))


def _row(film: PlannedFilm) -> list[Any]:
    return [film.id, film.path, film.bytes, film.name]


def file_name(film_id: str) -> str:
    """Return a safe, unique file stem for an id: the id itself, or with a hash where it holds other characters."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", film_id).lstrip(".")
    if plain == film_id and len(plain) <= 120:
        return plain
    return f"{plain[-100:]}-{hashlib.sha256(film_id.encode()).hexdigest()[:10]}"


def make_film_plan(run: Run) -> FilmPlan:
    """List the films of `infer.dir` (or of the training data).

    `created` is the current time, or SOURCE_DATE_EPOCH where that is set (reproducible-builds.org): it is the only
    date that reaches an output.

    Raises:
        ConfigError: no such folder, or not one film in it.
    """
    folder = run.infer_source
    if folder is None:
        raise ConfigError("no films to infer on: give infer.dir=DIR")
    if not folder.is_dir():
        raise ConfigError(f"infer.dir={folder} is not a folder: give a folder of DICOM, PNG or JPEG films")
    found, ignored = find_films(folder)
    if not found:
        raise ConfigError(
            f"infer.dir={folder} holds no films (*.dcm, *.dicom, *.png, *.jpg, *.jpeg, or DICM at byte 128)"
        )
    films = tuple(PlannedFilm(name, path, _size(folder / path), file_name(name)) for name, path in found)
    created = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return FilmPlan(run.infer_dir.name, run.config.infer.part_size, created, ignored, films)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # reading it will give the reason


def read_film_plan(folder: Path) -> FilmPlan | None:
    """Read plan.json of an inference folder; None where there is none."""
    path = folder / "plan.json"
    try:
        tree = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{path} is damaged: remove it and submit the inference again") from None
    if tree.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a plan of this program: remove it and submit the inference again")
    films = tuple(PlannedFilm(*row) for row in tree["films"])
    return FilmPlan(tree["label"], tree["part_size"], tree["created"], tree["ignored"], films)


def write_film_plan(run: Run) -> FilmPlan:
    """Decide and write plan.json; an equal plan in place is kept, with its date. Called once, at submission."""
    folder = run.infer_dir
    made, there = make_film_plan(run), read_film_plan(folder)
    if there is not None and there.hash == made.hash:
        return there
    write_bytes(folder / "plan.json", _encode(made))
    return made


def ensure_film_plan(run: Run) -> FilmPlan:
    """Return the plan in place; where none was made at submission, the first task to come writes it for all.

    Raises:
        ConfigError: the plan in place was cut with another infer.part_size.
    """
    folder = run.infer_dir
    there = read_film_plan(folder)
    if there is None:
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f".plan.{os.getpid()}.{os.uname().nodename}.tmp"
        own.write_bytes(_encode(make_film_plan(run)))
        try:
            os.link(own, folder / "plan.json")  # fails where another task was first: then theirs holds
        except FileExistsError:
            pass
        finally:
            own.unlink()
        there = read_film_plan(folder)
        assert there is not None
    if there.part_size != run.config.infer.part_size:
        raise ConfigError(
            f"{folder / 'plan.json'} was cut into parts of {there.part_size} films, infer.part_size is "
            f"{run.config.infer.part_size}: submit again, or give another infer.label"
        )
    return there


def _encode(made: FilmPlan) -> bytes:
    head = {
        "format": FORMAT,
        "label": made.label,
        "part_size": made.part_size,
        "created": made.created,
        "ignored": made.ignored,
    }
    rows = ",\n".join(json.dumps(_row(film)) for film in made.films)
    return f'{json.dumps(head)[:-1]}, "films": [\n{rows}\n]}}\n'.encode()


def signature(made: FilmPlan, index: int, settings: dict[str, Any]) -> str:
    """Return the hash of what determines a part: label, its films, and the settings with the models' hashes in them.

    Not the whole plan: where a few films have come to an archive, parts without them are kept.
    """
    films = [_row(film) for film in made.part(index)]
    return sha256_text(json.dumps([made.label, films, settings], sort_keys=True))


def check_films(run: Run) -> str:
    """Check before submission that there are films, and the models that are named; return what was found, one line.

    Raises:
        ConfigError: what is missing. This run's own models may still be to come, from the same chain.
    """
    made = make_film_plan(run)
    if run.config.infer.models:
        for path in run.model_paths():
            if not path.is_file():
                raise ConfigError(f"infer.models: {path} is not there: give a model.pt, or a run with fold<k>/model.pt")
    return f"{len(made.films)} films in {made.parts} parts, {made.ignored} other files ignored"
