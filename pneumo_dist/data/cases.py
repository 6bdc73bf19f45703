"""Read the lists of films: annotation lists, patient maps, cases.csv.

Standard library and numpy only, since submit.py imports this. Patient keys only form groups and are never written.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.rle import RleError, runs
from pneumo_dist.runtime.files import write_text

HOLDOUT = -1  # the fold of films kept for a final evaluation
FIELD_BYTES = 1 << 24  # of one csv cell: room for the mask of a whole film, and a bound for damaged files


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


@dataclass(frozen=True)
class Annotations:
    """An annotation list: per image id its (line number, text) rows in file order."""

    path: str
    rows: dict[str, tuple[tuple[int, str], ...]]
    broken: dict[str, str]  # id -> "file:line: reason" of its first unusable row
    problems: tuple[str, ...]  # "file:line: reason" of every unusable row

    def texts(self, film_id: str) -> list[str]:
        """Return the run-length texts of one image."""
        return [text for _, text in self.rows.get(film_id, ())]

    def where(self, film_id: str) -> list[str]:
        """Return "file:line" of each row of one image."""
        return [f"{Path(self.path).name}:{line}" for line, _ in self.rows.get(film_id, ())]

    def digest(self, film_id: str) -> str:
        """Return the sha256 of the texts of one image, from which a changed annotation is detected."""
        return hashlib.sha256("\n".join(self.texts(film_id)).encode()).hexdigest()


def _table(path: Path, columns: tuple[str, str], kind: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, stripped cells) of a csv file after checking its header."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot read the {kind} ({getattr(error, 'strerror', None) or error})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the {kind} is not UTF-8 text (byte {error.start}): save it as UTF-8 csv") from None
    csv.field_size_limit(FIELD_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""))
    expected = ",".join(columns)
    try:
        header = next(reader, None)
        if header is None:
            raise ConfigError(f"{path}: the {kind} is empty: its first line must be {expected}")
        names = [name.strip().lower() for name in header]
        if names != [name.lower() for name in columns]:
            raise ConfigError(f"{path}:1: the {kind} starts with {','.join(header)[:80]!r}, not with {expected}")
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: the {kind} cannot be read as csv ({error})") from None


def read_annotations(path: Path) -> Annotations:
    """Read an annotation list in any known dialect: BOM, spaces around names and values, `-1`, several rows per image.

    Unusable rows are reported, not raised: each quarantines its own film only. Runs past the end of a film are found
    in preprocessing, where its size is known.

    Raises:
        ConfigError: the file is missing, is not UTF-8 or csv, has another header, or has no row.
    """
    rows: dict[str, list[tuple[int, str]]] = {}
    broken: dict[str, str] = {}
    problems = []
    for line, cells in _table(path, ("ImageId", "EncodedPixels"), "annotation list"):
        where, name = f"{Path(path).name}:{line}", cells[0]
        try:
            if len(cells) != 2 or not name:
                raise RleError(f"{len(cells)} cells, expected image id and runs" if name else "no image id")
            runs(cells[1])
        except RleError as error:
            problems.append(f"{where}: {error}")
            broken.setdefault(name, problems[-1])
        rows.setdefault(name, []).append((line, cells[1] if len(cells) > 1 else ""))
    rows.pop("", None)
    broken.pop("", None)
    if not rows:
        raise ConfigError(f"{path}: the annotation list has no rows")
    return Annotations(str(path), {name: tuple(texts) for name, texts in rows.items()}, broken, tuple(problems))


def read_patient_map(path: Path) -> dict[str, str]:
    """Read `ImageId,PatientKey` rows as {image id: key}.

    Raises:
        ConfigError: the file is unreadable, has another header, a row without a key, or two keys for one image.
    """
    keys: dict[str, str] = {}
    for line, cells in _table(path, ("ImageId", "PatientKey"), "patient map"):
        if len(cells) != 2 or not all(cells):
            raise ConfigError(f"{path}:{line}: the row is not ImageId,PatientKey")
        if keys.setdefault(cells[0], cells[1]) != cells[1]:
            raise ConfigError(f"{path}:{line}: image {cells[0]} has two different patient keys: remove the wrong one")
    return keys


def read_ids(path: Path) -> list[str]:
    """Read a file with one image id per line; blank lines and `#` comments are skipped."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the list of ids ({error})") from None
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def write_cases(shard_dir: Path, cases: Iterable[Case]) -> Path:
    """Write cases.csv, sorted by id, atomically; return its path."""
    text = io.StringIO()
    names = [item.name for item in fields(Case)]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    for case in sorted(cases, key=lambda case: case.id):
        table.writerow([getattr(case, name) for name in names])
    path = Path(shard_dir) / "cases.csv"
    write_text(path, text.getvalue())
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
