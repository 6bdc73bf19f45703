"""List the films, read the annotations, and divide the films into shards.

submit.py imports this: it decodes no film and writes nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.listing import find_films, ignored_text, object_reason
from pneumo_dist.data.films.masks import MaskFile
from pneumo_dist.data.lists import read_ids, read_patient_map
from pneumo_dist.data.preprocess.truth import Truth, read_truth
from pneumo_dist.run import Run
from pneumo_dist.runtime.files import sha256_text


@dataclass(frozen=True)
class FilmJob:
    """One film to decode, with its annotation: `texts` are rows of the list, `where` their positions ("file:line")."""

    id: str
    path: str  # relative to the folder of the films
    texts: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    masks: tuple[MaskFile, ...] = ()
    label: int | None = None  # 1: the list says that the film has a pneumothorax
    broken: str = ""  # why an annotation row is unusable; such a film is not decoded
    digest: str = ""  # sha256 of the annotation, "" without any


@dataclass(frozen=True)
class Source:
    """The films and their annotations, before any film is opened."""

    folder: Path
    jobs: list[list[FilmJob]]  # per shard, sorted by id throughout
    truth: Truth
    unannotated: list[str]
    ignored: list[tuple[str, str]]  # the other files: path, reason

    @property
    def films(self) -> int:
        """The number of films to write to shards, readable or not."""
        return sum(len(shard) for shard in self.jobs)


def read_source(run: Run) -> Source:
    """List the films and read the annotations. The division into shards depends on the sorted ids only.

    Raises:
        ConfigError: a path does not exist, there is no film or no annotated film, the annotations are unusable, or a
            film has no annotation and `data.unannotated=error`.
    """
    config = run.config
    folder = run.source("dicom_dir")
    for name in ("dicom_dir", "rle_csv", "masks"):
        path, kind = run.source(name), "file" if name == "rle_csv" else "folder"
        if path and not (path.is_file() if kind == "file" else path.is_dir()):
            raise ConfigError(f"data.{name}={path}: no such {kind}")
    if folder is None or not (run.source("rle_csv") or run.source("masks")):
        raise ConfigError("no films or no annotations: give data.dicom_dir=DIR and data.rle_csv=FILE or data.masks=DIR")
    films, ignored = find_films(folder)
    if not films:
        raise ConfigError(
            f"data.dicom_dir={folder}: no film in it ({ignored_text(ignored)}): films are DICOM, PNG or JPEG files"
        )
    truth, films = read_truth(run, folder, films)
    others = [film for film in films if film[0] not in truth.annotated]
    if config.data.unannotated != "negative":  # then they are decoded, and objects without an image are found there
        reasons = {path: object_reason(folder / path) for _, path in others}
        others = [film for film in others if not reasons[film[1]]]
        ignored = sorted([*ignored, *((path, reason) for path, reason in reasons.items() if reason)])
    unannotated = [name for name, _ in others]
    if unannotated and config.data.unannotated == "error":
        raise ConfigError(
            f"{len(unannotated)} films have no {'row' if truth.annotations else 'mask'} in {truth.path} (first: "
            f"{unannotated[0]}): annotate them, or set data.unannotated=drop or negative"
        )
    chosen = films if config.data.unannotated == "negative" else [f for f in films if f[0] in truth.annotated]
    if not chosen:
        row = f"first row: {truth.orphans[0]}; " if truth.orphans else "a listed film has no mask; "
        raise ConfigError(
            f"{truth.path}: no row belongs to any of the {len(films)} films in {folder} ({row}"
            f"first film: {films[0][1]}): check data.rle_csv and data.masks"
        )
    count = min(config.data.shards, len(chosen))
    edges = [len(chosen) * j // count for j in range(count + 1)]
    jobs = [[_job(truth, *film) for film in chosen[start:end]] for start, end in pairwise(edges)]
    return Source(folder, jobs, truth, unannotated, ignored)


def _job(truth: Truth, film: str, path: str) -> FilmJob:
    if film not in truth.annotated:
        return FilmJob(film, path)
    listed = truth.annotations
    masks = truth.masks.of_film.get(film, ()) if truth.masks else ()
    digest = listed.digest(film) if listed else ""
    if masks:
        digest = sha256_text("".join([digest, *(f"{mask.name}\t{mask.sha256}\n" for mask in masks)]))
    if listed is None:
        return FilmJob(film, path, masks=masks, digest=digest)
    return FilmJob(
        id=film,
        path=path,
        texts=tuple(listed.texts(film)),
        where=tuple(listed.where(film)),
        masks=masks,
        label=listed.labels.get(film),
        broken=listed.broken.get(film, ""),
        digest=digest,
    )


def check_source(run: Run) -> None:
    """Check the paths, the csv headers, the films and the free disk space. Raises ConfigError."""
    config, source = run.config, read_source(run)
    patients = run.source("patient_map")
    if patients is not None:
        read_patient_map(patients)
    if config.data.holdout_ids:
        read_ids(Path(config.data.holdout_ids))
    out = run.shard_dir
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    need = source.films * sum(size * size for size in config.sizes) * 17 // 16  # a sixteenth for masks and lists
    have = sum(path.stat().st_size for path in out.glob("*.npy")) if out.is_dir() else 0
    free = shutil.disk_usage(existing).free
    if free + have < need:
        raise ConfigError(
            f"{existing} has {free / 1e9:.1f} GB free, but the shards need {need / 1e9:.1f} GB: free disk space, "
            "or set data.shard_dir=DIR on another disk"
        )
