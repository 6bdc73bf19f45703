"""List the films, read the annotations, and divide the films into shards.

submit.py imports this: it decodes no film and writes nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pneumo_dist.config import ConfigError
from pneumo_dist.data import cases as casefiles
from pneumo_dist.data.cases import Annotations
from pneumo_dist.data.films.listing import find_films, ignored_text
from pneumo_dist.run import Run


@dataclass(frozen=True)
class FilmJob:
    """One film to decode; `texts` are its annotation rows, `where` is the position of each ("file:line")."""

    id: str
    path: str  # relative to the folder of the films
    texts: tuple[str, ...]
    where: tuple[str, ...] = ()
    broken: str = ""  # why an annotation row is unusable; such a film is not decoded
    digest: str = ""  # sha256 of the annotation rows, "" without any


@dataclass(frozen=True)
class Source:
    """The films and their annotations, before any film is opened."""

    folder: Path
    jobs: list[list[FilmJob]]  # per shard, sorted by id throughout
    annotations: Annotations
    unannotated: list[str]
    orphans: list[str]  # annotated ids without a film
    ignored: list[tuple[str, str]]  # the other files: path, reason

    @property
    def films(self) -> int:
        """The number of films to write to shards, readable or not."""
        return sum(len(shard) for shard in self.jobs)


def read_source(run: Run) -> Source:
    """List the films and read the annotations. The division into shards depends on the sorted ids only.

    Raises:
        ConfigError: a path does not exist, there is no film or no annotated film, the list is unusable, or a film has
            no annotation and `data.unannotated=error`.
    """
    config = run.config
    folder, csv = run.source("dicom_dir"), run.source("rle_csv")
    for key, path in (("data.dicom_dir", folder), ("data.rle_csv", csv)):
        if path is None or not path.exists():
            raise ConfigError(f"{key}={path}: no such {'folder' if key == 'data.dicom_dir' else 'file'}")
    assert folder is not None and csv is not None
    if not folder.is_dir():
        raise ConfigError(f"data.dicom_dir={folder} is not a folder")
    films, ignored = find_films(folder)
    if not films:
        raise ConfigError(
            f"data.dicom_dir={folder}: no film in it ({ignored_text(ignored)}): films are DICOM, PNG or JPEG files"
        )
    annotations = casefiles.read_annotations(csv)
    ids = {name for name, _ in films}
    unannotated = [name for name, _ in films if name not in annotations.rows]
    if unannotated and config.data.unannotated == "error":
        raise ConfigError(
            f"{len(unannotated)} films have no row in {csv} (first: {unannotated[0]}): "
            "annotate them, or set data.unannotated=drop or negative"
        )
    chosen = films if config.data.unannotated == "negative" else [f for f in films if f[0] in annotations.rows]
    if not chosen:
        raise ConfigError(f"{csv}: no row belongs to any of the {len(films)} films in {folder}: check data.rle_csv")
    count = min(config.data.shards, len(chosen))
    edges = [len(chosen) * j // count for j in range(count + 1)]
    jobs = [[_job(annotations, *film) for film in chosen[start:end]] for start, end in pairwise(edges)]
    orphans = sorted(annotations.rows.keys() - ids)
    return Source(folder, jobs, annotations, unannotated, orphans, ignored)


def _job(annotations: Annotations, name: str, path: str) -> FilmJob:
    if name not in annotations.rows:
        return FilmJob(name, path, (), digest="")
    return FilmJob(
        id=name,
        path=path,
        texts=tuple(annotations.texts(name)),
        where=tuple(annotations.where(name)),
        broken=annotations.broken.get(name, ""),
        digest=annotations.digest(name),
    )


def check_source(run: Run) -> None:
    """Check the paths, the csv headers, the films and the free disk space. Raises ConfigError."""
    config, source = run.config, read_source(run)
    patients = run.source("patient_map")
    if patients is not None:
        casefiles.read_patient_map(patients)
    if config.data.holdout_ids:
        casefiles.read_ids(Path(config.data.holdout_ids))
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
