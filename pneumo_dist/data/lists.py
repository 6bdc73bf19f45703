"""Lists that people write: annotation lists, patient maps, ids; and which film each name in them means.

Standard library and numpy only, since submit.py imports this. Patient keys only form groups and are never written.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import posixpath
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.listing import EXTENSIONS
from pneumo_dist.data.films.rle import EMPTY, FIRST_PIXEL, RleError, ascending_steps, relative_text, runs

FIELD_BYTES = 1 << 24  # of one csv cell: room for the mask of a whole film, and a bound for damaged files
SPREADSHEET_CELL = 32_767  # characters: spreadsheets cut off the rest of a cell
# How the bytes of a list begin -> encoding. UTF-16 without a mark shows in the zero bytes of its first letters.
ENCODINGS = (
    (b"\xff\xfe|\xfe\xff", "utf-16"),
    (b"[^\0]\0[^\0]\0", "utf-16-le"),
    (b"\0[^\0]\0[^\0]", "utf-16-be"),
    (b"", "utf-8-sig"),
)
PATIENT_MAP = "patient map"  # its rows may hold names: no message quotes them
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
UID = re.compile(r"\d+(?:\.\d+){4,}", re.ASCII)
K = TypeVar("K")


@dataclass(frozen=True)
class Annotations:
    """An annotation list: per image name its (line number, text) rows in file order, in the competition's form."""

    path: str
    rows: dict[str, tuple[tuple[int, str], ...]]
    broken: dict[str, str]  # name -> "file:line: reason" of its first unusable row
    problems: tuple[str, ...]  # "file:line: reason" of every unusable row
    rle: str = "siim"  # convention of the offsets in the file; "": a list of films, without masks
    ids: dict[str, str] = field(default_factory=dict)  # file name -> image id, of a list that has both
    labels: dict[str, int] = field(default_factory=dict)  # name -> 1: pneumothorax, of a list that says so

    def texts(self, name: str) -> list[str]:
        """Return the run-length texts of one image."""
        return [text for _, text in self.rows.get(name, ()) if self.rle]

    def where(self, name: str) -> list[str]:
        """Return "file:line" of each row of one image."""
        return [f"{Path(self.path).name}:{line}" for line, _ in self.rows.get(name, ())]

    @property
    def only_positives(self) -> bool:
        """Whether the list says which films are positive, and names no negative one."""
        if not self.rle:
            return bool(self.labels) and all(self.labels.values())
        return all(text.strip() != EMPTY for rows in self.rows.values() for _, text in rows)

    def digest(self, name: str) -> str:
        """Return the sha256 of the annotation of one image, from which a changed annotation is detected."""
        label = [f"has_pneumo={self.labels[name]}"] if name in self.labels else []
        return hashlib.sha256("\n".join(self.texts(name) + label).encode()).hexdigest()

    def of_films(self, films: Mapping[str, str]) -> Annotations:
        """Return the list with the rows of each name under its film; other names stay as they are."""
        rows: dict[str, list[tuple[int, str]]] = {}
        broken, labels = dict[str, str](), dict[str, int]()
        for name, texts in self.rows.items():
            film = films.get(name, name)
            rows.setdefault(film, []).extend(texts)
            if name in self.labels and labels.setdefault(film, self.labels[name]) != self.labels[name]:
                broken.setdefault(film, f"{self.where(name)[0]}: has_pneumo is another than in the row before")
            if name in self.broken:
                broken.setdefault(film, self.broken[name])
        return replace(
            self, rows={film: tuple(sorted(texts)) for film, texts in rows.items()}, broken=broken, labels=labels
        )


def _text(path: Path, kind: str) -> str:
    """Return the text of a list: UTF-8 or UTF-16, decompressed if its name ends in .gz. Raises ConfigError."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode(next(encoding for start, encoding in ENCODINGS if re.match(start, data)))
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot read the {kind} ({getattr(error, 'strerror', None) or error})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: the {kind} is not {error.encoding.upper()} text (byte {error.start}): save it as UTF-8 csv"
        ) from None


def read_table(path: Path, kind: str, *headers: tuple[str, ...]) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return (column names in lower case, rows as (line number, stripped cells)) of a csv file.

    The separator is the first of comma, semicolon and tab whose columns include one of the `headers`, in any order.

    Raises:
        ConfigError: the file is unreadable or empty, or its header is another one.
    """
    path = Path(path)
    text, expected = _text(path, kind), ",".join(headers[0])
    csv.field_size_limit(FIELD_BYTES)
    for separator in ",;\t":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = _rows(reader, path, kind)
        _, header = next(rows, (0, []))
        if not header:
            raise ConfigError(f"{path}: the {kind} is empty: its first line must be {expected}")
        columns = [name.lower() for name in header]
        if any(all(columns.count(name.lower()) == 1 for name in names) for names in headers):
            return columns, rows
    first = "another line" if kind == PATIENT_MAP else repr(text.strip().splitlines()[0][:80])
    raise ConfigError(f"{path}:1: the {kind} starts with {first}, not with {expected}")


def _rows(reader: Any, path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, stripped cells) of the rows that are not blank."""
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: the {kind} cannot be read as csv ({error})") from None


def read_annotations(path: Path, rle: str | None = None, or_films: bool = False) -> Annotations:
    """Read an annotation list in any known dialect: separator, encoding, spaces, `-1`, several rows per image.

    A list may also hold file names (new_filename) and which films are positive (has_pneumo). Other columns are ignored.
    Unusable rows are reported, not raised: each quarantines its own film only. Runs past the end of a film are found in
    preprocessing, where its size is known.

    Args:
        rle: convention of the offsets as in data.rle; None: the competition's, unless the list looks otherwise.
        or_films: also read a list of films without masks.
    Raises:
        ConfigError: the file is missing, no csv, has another header or no row, or its offsets are ambiguous.
    """
    films = (("ImageId", "has_pneumo"), ("ImageId", "new_filename")) if or_films else ()
    columns, table = read_table(path, "annotation list", ("ImageId", "EncodedPixels"), *films)
    lines = [(line, dict(zip(columns, cells, strict=False)), len(cells)) for line, cells in table]
    sure = rle is not None
    rle = _convention(path, [row.get("encodedpixels", "") for _, row, _ in lines], rle)
    rows: dict[str, list[tuple[int, str]]] = {}
    broken: dict[str, str] = {}
    labels: dict[str, int] = {}
    problems = []
    for line, row, cells in lines:
        name, text = row.get("new_filename") or row.get("imageid", ""), row.get("encodedpixels", "")
        try:
            if cells != len(columns) or not name:
                raise RleError(f"{cells} cells, expected image id and runs" if name else "no image id")
            if "encodedpixels" in columns:
                text = _checked(text, rle, sure)
            if "has_pneumo" in columns and labels.setdefault(name, label := _label(row["has_pneumo"])) != label:
                raise RleError("has_pneumo is another than in the row before")
        except RleError as error:
            problems.append(f"{Path(path).name}:{line}: {error}")
            broken.setdefault(name, problems[-1])
        rows.setdefault(name, []).append((line, text))
    rows.pop("", None)
    broken.pop("", None)
    if not rows:
        raise ConfigError(f"{path}: the annotation list has no rows")
    ids = {row["new_filename"]: row["imageid"] for _, row, _ in lines if row.get("new_filename") and row.get("imageid")}
    return Annotations(
        str(path),
        {name: tuple(texts) for name, texts in rows.items()},
        broken,
        tuple(problems),
        rle if "encodedpixels" in columns else "",
        ids,
        labels,
    )


def _convention(path: Path, texts: list[str], rle: str | None) -> str:
    """Return the convention of a list's offsets: the configured one, or the competition's if nothing speaks against it.

    Raises:
        ConfigError: the offsets look like those of another convention.
    """
    counts = [ascending_steps(text) for text in texts]
    ascending, steps = sum(count[0] for count in counts), sum(count[1] for count in counts)
    if rle is None and steps and 2 * ascending >= steps:
        raise ConfigError(
            f"{path}: {ascending} of {steps} offsets ascend as absolute positions do: set data.rle=absolute (positions "
            "from 1, as in most Kaggle lists), absolute0 (from 0), or siim (each from the end of the run before)"
        )
    if rle in FIRST_PIXEL and 2 * ascending < steps:
        raise ConfigError(
            f"{path}: data.rle={rle}, but only {ascending} of {steps} offsets ascend as positions do: set data.rle=siim"
        )
    if rle == "absolute" and any(re.match(r"\s*0+\s", text) for text in texts):
        raise ConfigError(f"{path}: data.rle=absolute counts from 1, but a run is at 0: set data.rle=absolute0")
    return rle or "siim"


def _checked(text: str, rle: str, sure: bool) -> str:
    """Return one row in the competition's form; raise RleError if it is unusable."""
    if len(text) == SPREADSHEET_CELL:
        raise RleError(f"{SPREADSHEET_CELL} characters: cut off by a spreadsheet, export the list without one")
    if rle in FIRST_PIXEL:
        return relative_text(text, FIRST_PIXEL[rle])
    runs(text)
    ascending, steps = ascending_steps(text)
    if not sure and 2 <= steps == ascending:
        raise RleError("unlike in other rows, the offsets ascend as absolute positions do: correct it or set data.rle")
    return text


def _label(text: str) -> int:
    if text.lower() not in LABELS:
        raise RleError(f"has_pneumo is {text[:20]!r}, not 0 or 1")
    return LABELS[text.lower()]


def read_patient_map(path: Path) -> dict[str, str]:
    """Read `ImageId,PatientKey` rows as {image name: key}.

    Raises:
        ConfigError: the file is unreadable, has another header, a row without a key, or two keys for one image.
    """
    keys: dict[str, str] = {}
    columns, table = read_table(path, PATIENT_MAP, ("ImageId", "PatientKey"))
    image, patient = columns.index("imageid"), columns.index("patientkey")
    for line, cells in table:
        if len(cells) != len(columns) or not (cells[image] and cells[patient]):
            raise ConfigError(f"{path}:{line}: the row is not ImageId,PatientKey")
        if keys.setdefault(cells[image], cells[patient]) != cells[patient]:
            raise ConfigError(
                f"{path}:{line}: image {cells[image]} has two different patient keys: remove the wrong one"
            )
    return keys


def by_film(values: Mapping[str, str], names: FilmNames, path: Path) -> dict[str, str]:
    """Return {film id: value} of a list with a value for each name; raise ConfigError if a film has two values."""
    found: dict[str, str] = {}
    for name, film in names.match({name: (name,) for name in values}, str(path)).items():
        if found.setdefault(film, values[name]) != values[name]:
            raise ConfigError(
                f"{path}: {name} means film {film}, which has another value already: remove the wrong row"
            )
    return found


def read_ids(path: Path) -> list[str]:
    """Read a file with one image id per line; blank lines and `#` comments are skipped."""
    lines = _text(Path(path).expanduser(), "list of ids").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def bare(name: str) -> str:
    """Return a name without film extensions and with `/` between its folders."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    name = "/".join(parts)
    while name.lower().endswith(EXTENSIONS):
        name = name.rpartition(".")[0]
    return name


class FilmNames:
    """The films of a folder, to be found by the names that lists and mask files use.

    A name means the film with this id or path; else, extensions apart, the film whose path ends with the name, or whose
    path the name ends with; else, if it is a UID, the film with this name in any folder or with this SOP Instance UID.
    """

    def __init__(self, films: Sequence[tuple[str, str]], uid_of: Callable[[str], str] = lambda _: "") -> None:
        """Take (id, path) pairs, and a function from a path to the SOP Instance UID in the header ("": unknown)."""
        self.films, self._uid_of = films, uid_of
        self._exact = {name: film for film, path in films for name in (path, film)}
        self._ends: dict[str, dict[str, bool]] = {}  # end of a path -> {film: whether that is the whole path}
        for film, path in films:
            known = {bare(path)} if f"/{bare(path)}".endswith(f"/{bare(film)}") else {bare(path), bare(film)}
            for end in (end for name in known for end in _ends(name)):
                self._ends.setdefault(end, {})[film] = end in known

    def match(self, wanted: Mapping[K, Collection[str]], source: str) -> dict[K, str]:
        """Return {key: film id} of the keys one of whose names, in their order, means a film.

        Raises:
            ConfigError: a name means several films; the line starts with `source`.
        """
        found = {key: film for key, names in wanted.items() if (film := self._by_name(names, source))}
        missing: dict[str, list[K]] = {}
        for key, names in wanted.items():
            for uid in (bare(name).rpartition("/")[2] for name in names if key not in found):
                if UID.fullmatch(uid):
                    missing.setdefault(uid, []).append(key)
        named, paths = set(found.values()), dict(self.films)
        seen: dict[str, str] = {}
        for film, path in self.films if missing else ():
            uid = "" if film in named else self._uid_of(path)
            if uid in seen:
                raise _several(source, uid, [paths[seen[uid]], path])
            if uid in missing:
                seen[uid] = film
                found |= dict.fromkeys(missing[uid], film)
        return found

    def _by_name(self, names: Iterable[str], source: str) -> str | None:
        for name in names:
            if name in self._exact:
                return self._exact[name]
            for end in _ends(bare(name)):
                anywhere = end == bare(name) or UID.fullmatch(end)  # else other folders are other films
                films = [film for film, whole in self._ends.get(end, {}).items() if whole or anywhere]
                if len(films) > 1:
                    raise _several(source, name, films)
                if films:
                    return films[0]
        return None


def check_folders(matched: Mapping[str, str], source: str) -> None:
    """Raise ConfigError if names in different folders mean one film: they are probably of different images."""
    first: dict[str, str] = {}
    for name, film in matched.items():
        other = first.setdefault(film, name)
        if posixpath.dirname(name.replace("\\", "/")) != posixpath.dirname(other.replace("\\", "/")):
            raise ConfigError(
                f"{source}: {other} and {name} both have the name of film {film}: keep one of them, or put both into "
                "one folder if both belong to it"
            )


def _ends(name: str) -> Iterator[str]:
    """Yield a path, then the path without its first folder, and so on."""
    parts = name.split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))


def _several(source: str, name: str, films: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{source}: {name} may be {films[0]} or {films[1]}: remove one of these films, or name it by its path"
    )
