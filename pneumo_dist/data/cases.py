"""The films in the shards, as cases.csv lists them. Standard library only, since submit.py imports this."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from pneumo_dist.config import ConfigError
from pneumo_dist.data.lists import FIELD_BYTES
from pneumo_dist.runtime.files import write_csv

HOLDOUT = -1  # the fold of films kept for a final evaluation


@dataclass(frozen=True, slots=True)
class Case:
    """One film in the shards. `group` numbers patients (films of one patient share it), `rle` is at film size."""

    id: str
    shard: int
    row: int
    rows: int
    columns: int
    label: int  # 1: pneumothorax
    fold: int  # HOLDOUT: in no training or validation fold
    group: int
    view: str
    sex: str
    rle: str  # the union of the annotation rows, "-1" when empty


def write_cases(shard_dir: Path, cases: Iterable[Case]) -> Path:
    """Write cases.csv, sorted by id, atomically; return its path."""
    path, names = Path(shard_dir) / "cases.csv", [item.name for item in fields(Case)]
    write_csv(path, [names, *(astuple(case) for case in sorted(cases, key=lambda case: case.id))])
    return path


def read_cases(shard_dir: Path) -> list[Case]:
    """Read cases.csv of a finished shard directory, sorted by id.

    Raises:
        ConfigError: it is missing or damaged.
    """
    path = Path(shard_dir) / "cases.csv"
    csv.field_size_limit(FIELD_BYTES)
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            table = list(csv.DictReader(handle))
        numbers = [item.name for item in fields(Case) if item.type == "int"]
        rows: list[dict[str, Any]] = [row | {name: int(row[name]) for name in numbers} for row in table]
        cases = [Case(**row) for row in rows]
    except FileNotFoundError:
        raise ConfigError(f"{path}: no finished shards in this folder: run --stage preprocess first") from None
    except (OSError, TypeError, ValueError, KeyError, csv.Error) as error:
        raise ConfigError(f"{path}: damaged or not a case list ({type(error).__name__}): preprocess again") from None
    return sorted(cases, key=lambda case: case.id)
