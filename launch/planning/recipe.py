"""The recipe and the run of a request: which configuration file, which folder, with absolute paths. Writes nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import bootstrap
from launch.planning.arguments import Request
from pneumo_dist import config as configuration
from pneumo_dist.config import Config, ConfigError, word
from pneumo_dist.run import Run, RunFolder

ROOT = bootstrap.ROOT.resolve()
RECIPES = ROOT / "configs"
EMBEDDED = RECIPES / "quickstart.yaml"
DEFAULT_RECIPE = RECIPES / "paper.yaml"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The run of a request, its configuration with absolute paths."""

    run: Run
    embedded: bool  # the embedded default: synthetic films, and missing upstream jobs run too
    typed: frozenset[str] = frozenset()  # keys of the command line
    notes: tuple[str, ...] = ()


def _absolute(config: Config, root: Path) -> Config:
    """Make every path absolute, relative to the current directory."""

    def full(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    data = ("dicom_dir", "rle_csv", "masks", "patient_map", "shard_dir", "holdout_ids")
    paths: dict[str, Any] = {name: full(getattr(config.data, name)) for name in data}
    if not (config.data.stage_dir or "$").startswith("$"):  # each node expands a variable for itself
        paths["stage_dir"] = full(config.data.stage_dir)
    return dataclasses.replace(
        config,
        run_root=str(root),
        data=dataclasses.replace(config.data, **paths),
        model=dataclasses.replace(config.model, weights=full(config.model.weights)),
        stage1=dataclasses.replace(config.stage1, init_from=full(config.stage1.init_from)),
        stage2=dataclasses.replace(config.stage2, init_from=full(config.stage2.init_from)),
        infer=dataclasses.replace(
            config.infer, dir=full(config.infer.dir), models=[full(p) or p for p in config.infer.models]
        ),
    )


def _run_root(request: Request, recipes: str = "runs") -> Path:
    """Return the folder of all runs: from the command line, else from the recipe, else runs/ beside launch/."""
    typed = _typed(request).get("run_root")
    if not typed and recipes == "runs":  # the default must not depend on the current directory
        return ROOT / "runs"
    return Path(typed or recipes).expanduser().absolute()


def _typed(request: Request) -> dict[str, str]:
    """Return the `key=value` arguments."""
    settings = [override.partition("=") for override in request.overrides]
    return {key.strip(): value.strip() for key, _, value in settings}


def resolve(request: Request) -> Recipe:
    """Return the recipe and the run of a request.

    The configuration is that of `--config`, with the films of the run where the file names none; else config.yaml of
    the run; else the embedded default if the request names neither data nor run; else configs/paper.yaml. `key=value`
    arguments override it.
    """
    overrides, typed = list(request.overrides), _typed(request)
    embedded = request.config is None and request.run is None and not request.sets("data.")
    source = _recipe_file(request.config) if request.config else EMBEDDED if embedded else DEFAULT_RECIPE
    name = request.run or source.stem
    root = _run_root(request, configuration.load(source, overrides).run_root if request.config else "runs")
    saved_file = RunFolder(root / name).config_file
    saved = configuration.load(saved_file) if saved_file.is_file() else None
    other = "infer.dir" in typed and "infer.label" not in typed
    if saved and other and saved.infer.dir != str(Path(typed["infer.dir"]).expanduser().absolute()):
        overrides.append("infer.label=null")  # it names the results of another folder
    if request.config:
        films = {"data": saved.data, "phantom": saved.phantom} if saved else None
        config = configuration.load(source, overrides, films)
    else:
        config = configuration.load(saved_file if saved else source, overrides)
    notes = ["no data configured: synthetic phantom films"] if embedded and config.phantom.films else []
    if saved and request.stage in ("infer", "all"):
        notes += _kept_answers(config, typed)
    # Films or models of the user need no synthetic upstream.
    embedded = embedded and not request.sets("infer.dir=", "infer.models=")
    run = Run(root / name, _absolute(config, root))
    return Recipe(run=run, embedded=embedded, typed=frozenset(typed), notes=tuple(notes))


def _recipe_file(name: str) -> Path:
    """Return the file of a recipe: a path, or a name in configs/."""
    for path in (Path(name).expanduser(), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    if Path(name).suffix or os.sep in name:
        return Path(name).expanduser()  # reading it says why that is not possible
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise ConfigError(f"--config {name}: no such file; configs/ has: {known}")


def _kept_answers(config: Config, typed: Mapping[str, str]) -> Iterator[str]:
    """Say which settings of an earlier command change the answers of an inference."""
    names = {"infer.models", "infer.triplet", "infer.tta", "infer.unreadable", "infer.follow_links"} - typed.keys()
    values, default = configuration.flatten(config), configuration.keys()
    kept = [f"{name}={word(values[name])}" for name in sorted(names) if values[name] != default[name].default]
    if kept:
        yield f"note: settings of the run's earlier commands: {', '.join(kept)}"
