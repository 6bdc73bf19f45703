"""The annotations of the films: a list of run-length encoded masks, or mask files with or without a list of films.

submit.py imports this. It decodes nothing; where names do not match it reads the SOP Instance UIDs of films.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pneumo_dist.config import Config, ConfigError
from pneumo_dist.data.films.masks import sop_uid
from pneumo_dist.data.lists import UID, Annotations, FilmNames, bare, check_folders, read_annotations
from pneumo_dist.data.preprocess.maskfiles import MaskFolder, find_masks
from pneumo_dist.run import Run

Films = list[tuple[str, str]]  # (id, path), sorted by id


@dataclass(frozen=True)
class Truth:
    """The annotations of the films: rows of the list under the ids of their films, and mask files."""

    annotations: Annotations | None
    masks: MaskFolder | None
    annotated: set[str]  # film ids; the annotation may be an empty mask
    orphans: list[str]  # rows of the list without a film, as "file:line: name"

    @property
    def path(self) -> Path:
        """The list, else the folder of masks."""
        if self.annotations:
            return Path(self.annotations.path)
        assert self.masks
        return self.masks.path

    @property
    def record(self) -> dict[str, Any]:
        """What determines the truth, for the manifest: convention of the runs, hash of the mask files."""
        record: dict[str, Any] = {"rle": self.annotations.rle} if self.annotations and self.annotations.rle else {}
        return record | ({"masks_sha256": self.masks.sha256} if self.masks else {})


def notes(truth: Truth, unannotated: list[str], config: Config) -> Iterator[str]:
    """Yield what is worth knowing before anything starts: films and annotations that are not used, only positives."""
    name, policy = truth.path.name, config.data.unannotated
    masked = [film for film in unannotated if truth.masks and film in truth.masks.of_film]
    if masked:
        yield f"{len(masked)} films have a mask, but no row in {name} (first: {masked[0]}): they are dropped"
    if count := len(unannotated) - len(masked):
        fate = "are dropped" if policy == "drop" else "count as negative"
        other = "; if they have no pneumothorax, set data.unannotated=negative" if policy == "drop" else ""
        yield f"{count} films without annotation {fate} (data.unannotated={policy}){other}"
    if truth.annotations and truth.annotations.only_positives and not (unannotated and policy == "negative"):
        yield f"{name} lists positive films only: without a negative film a fold has no specificity and no AUC"
    if truth.orphans:
        yield f"{len(truth.orphans)} rows belong to no film (first: {truth.orphans[0]})"
    if truth.masks and (unused := truth.masks.unused):
        yield f"{len(unused)} files of {truth.masks.path.name} are not used (first: {unused[0]})"


def read_truth(run: Run, folder: Path, films: Films) -> tuple[Truth, Films]:
    """Return the annotations of the films in `folder`, and the films with their final ids.

    A film keeps its id, unless the list gives another to its file name (new_filename) or to its SOP Instance UID.

    Raises:
        ConfigError: the list or the folder of masks is unusable, both hold masks, or a name is ambiguous.
    """
    path, masks_folder = run.source("rle_csv"), run.source("masks")

    @cache
    def uid_of(film: str) -> str:
        return sop_uid(folder / film)

    annotations = None
    if path:
        annotations = read_annotations(path, run.config.data.rle, or_films=True)
        if annotations.rle and masks_folder:
            raise ConfigError(f"data.rle_csv={path} and data.masks={masks_folder} both hold masks: give one of them")
        if not annotations.rle and not masks_folder:
            raise ConfigError(f"{path}: no column EncodedPixels: give the folder of the masks with data.masks=DIR")
        annotations, films = _of_films(annotations, FilmNames(films, uid_of))
    names = FilmNames(films, uid_of)
    masks = find_masks(masks_folder, folder, names) if masks_folder else None
    annotated = set(masks.of_film) if masks else set()
    orphans = []
    if annotations:
        listed = annotations.rows.keys() & {film for film, _ in films}
        annotated = annotated & listed | (annotations.labels.keys() & listed) if masks else set(listed)
        orphans = [f"{annotations.where(name)[0]}: {name}" for name in sorted(annotations.rows.keys() - listed)]
    lost = [*masks.unused, *sorted(masks.of_film.keys() - annotated)] if masks else []
    if lost and run.config.data.unannotated == "negative":
        raise ConfigError(
            f"{masks_folder}: {len(lost)} masks would be lost (first: {lost[0]}) and their films count as negative: "
            "correct the names or the list, or set data.unannotated=drop"
        )
    return Truth(annotations, masks, annotated, orphans), films


def _of_films(annotations: Annotations, films: FilmNames) -> tuple[Annotations, Films]:
    """Return the list with its rows under the ids of the films, and the films with the ids that the list gives them."""
    found = films.match({name: (name,) for name in annotations.rows}, annotations.path)
    check_folders(found, annotations.path)
    paths, ids = dict(films.films), {film: film for film, _ in films.films}
    for name, film in found.items():
        uid = bare(name).rpartition("/")[2]
        if name in annotations.ids:
            ids[film] = annotations.ids[name]
        elif UID.fullmatch(uid) and bare(paths[film]).rpartition("/")[2] != uid:  # found in the header
            ids[film] = uid
    first: dict[str, str] = {}
    for film, new in ids.items():
        if first.setdefault(new, film) != film:
            both = f"{paths[first[new]]} and {paths[film]}"
            raise ConfigError(f"{annotations.path}: {both} both have the id {new}: keep one of them")
    renamed = annotations.of_films({name: ids[film] for name, film in found.items()})
    return renamed, sorted((ids[film], path) for film, path in films.films)
