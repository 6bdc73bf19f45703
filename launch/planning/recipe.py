"""The recipe and the run of a request: which configuration file, which folder, with absolute paths. Writes nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import bootstrap
from launch.planning.arguments import Request
from pneumo_dist import config as configuration
from pneumo_dist.config import Config
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
    settings = [override.partition("=") for override in request.overrides]
    typed = [value.strip() for key, _, value in settings if key.strip() == "run_root"]
    if not typed and recipes == "runs":  # the default must not depend on the current directory
        return ROOT / "runs"
    return Path(typed[-1] if typed else recipes).expanduser().absolute()


def resolve(request: Request) -> Recipe:
    """Return the recipe and the run of a request.

    The configuration is that of `--config`; else config.yaml of the run; else the embedded default if the request
    names neither data nor run; else configs/paper.yaml. `key=value` arguments override it.
    """
    overrides = list(request.overrides)
    embedded = request.config is None and request.run is None and not request.sets("data.")
    if request.config is not None:
        source = Path(request.config).expanduser()
        name = request.run or source.stem
        config = configuration.load(source, overrides)
        root = _run_root(request, config.run_root)
    else:
        source = EMBEDDED if embedded else DEFAULT_RECIPE
        name = request.run or source.stem
        root = _run_root(request)
        saved = RunFolder(root / name).config_file
        config = configuration.load(saved if saved.is_file() else source, overrides)
    notes = ("no data configured: synthetic phantom films",) if embedded and config.phantom.films else ()
    # Films or models of the user need no synthetic upstream.
    embedded = embedded and not request.sets("infer.dir=", "infer.models=")
    return Recipe(run=Run(root / name, _absolute(config, root)), embedded=embedded, notes=notes)
