"""Notes on the films of an inference before it starts: tasks without work, training films, films without a DICOM SEG.

Reads listings and case lists only; opens no film.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from launch.planning.plan import Plan
from launch.planning.site import Site
from pneumo_dist.config import ConfigError
from pneumo_dist.data.cases import HOLDOUT, read_cases
from pneumo_dist.data.films.listing import find_films
from pneumo_dist.data.lists import read_ids
from pneumo_dist.inference.film_plan import FilmPlan, make_film_plan, read_film_plan
from pneumo_dist.run import Run


def inference_notes(plan: Plan, site: Site) -> Iterator[str]:
    """Yield the notes, one line each; a missing folder is an error elsewhere."""
    run = plan.run
    with suppress(ConfigError):
        existing = None if plan.request.redo else read_film_plan(run.infer_dir)
        films = make_film_plan(run, site.array_tasks, existing)
        idle = site.array_tasks - films.parts
        smaller = -(-len(films.films) // site.array_tasks)
        if idle > 0:
            more = f": give infer.part_size={smaller} for more" if smaller < films.part_size else ""
            yield (
                f"{idle} of the {site.array_tasks} tasks of infer have nothing to do: its {len(films.films)} films are "
                f"{films.parts} part{'s' if films.parts > 1 else ''} of up to {films.part_size}{more}"
            )
        if 0 < len(films.pictures) < len(films.films) and "dicomseg" in run.config.infer.outputs:
            yield f"{len(films.pictures)} of {len(films.films)} films are no DICOM files and get no DICOM SEG"
        trained = sum(_trained_on(model, films) for model in _model_runs(run)) if run.config.infer.dir else 0
        if trained:
            yield (
                f"{trained} of the {len(films.films)} films in infer.dir have name and size of a training film: "
                "scores on them are inflated"
            )


def _model_runs(run: Run) -> Iterator[Run]:
    """Yield the runs that trained the models, as far as they are on this machine."""
    folders = {Path(name) if Path(name).is_dir() else Path(name).parents[1] for name in run.config.infer.models}
    for folder in folders:
        with suppress(ConfigError):
            yield Run.load(folder)
    if not folders:
        yield run


def _trained_on(run: Run, films: FilmPlan) -> int:
    """Return how many of the films a run was trained on, or will be; held-out films do not count."""
    folder = run.source("dicom_dir")
    if folder is None or not folder.is_dir():
        return 0
    sizes = {name: (folder / path).stat().st_size for name, path in find_films(folder)[0]}
    held = run.source("holdout_ids")
    try:
        names = {case.id for case in read_cases(run.shard_dir) if case.fold != HOLDOUT}
    except ConfigError:  # not preprocessed yet
        names = sizes.keys() - set(read_ids(held) if held else ())
    return sum(film.id in names and sizes.get(film.id) == film.bytes for film in films.films)
