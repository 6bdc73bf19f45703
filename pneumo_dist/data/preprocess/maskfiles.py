"""List the files of data.masks and find the film of each. submit.py imports this: it decodes no mask."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.listing import find_films
from pneumo_dist.data.films.masks import MaskFile, seg_references
from pneumo_dist.data.lists import FilmNames, bare, check_folders
from pneumo_dist.runtime.files import sha256_file, sha256_text

SUFFIX = re.compile(r"[_-]mask[_-]?\d*$", re.IGNORECASE)


@dataclass(frozen=True)
class MaskFolder:
    """The mask files of a folder, by film."""

    path: Path
    of_film: dict[str, tuple[MaskFile, ...]]  # film id -> its files
    unused: tuple[str, ...]  # "file: why it is the mask of no film"
    sha256: str

    @property
    def files(self) -> int:
        """The number of files that belong to a film."""
        return sum(map(len, self.of_film.values()))


def masks_hash(folder: Path) -> str:
    """Return one hash for all mask files of a folder: it changes with any of them."""
    return _hash_of(_hashes(folder, _listed(folder)[0]))


def _listed(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return (files that may be masks, {any other file: reason}). A DICOM SEG is no film, but may be a mask."""
    pictures, ignored = find_films(folder)
    others = dict(ignored)
    objects = [path for path, reason in ignored if reason.startswith("not an image") and others.pop(path)]
    return sorted([*objects, *(path for _, path in pictures)]), others


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(8) as pool:  # waits for a network disk most of the time
        return dict(zip(names, pool.map(lambda name: sha256_file(folder / name), names), strict=True))


def _hash_of(digests: Mapping[str, str]) -> str:
    return sha256_text("".join(f"{name}\t{digest}\n" for name, digest in digests.items()))


def find_masks(folder: Path, films_folder: Path, films: FilmNames) -> MaskFolder:
    """Return the masks of the films.

    A PNG file is the mask of the film whose name it has, or has before `_mask` or `_mask<number>`; a DICOM SEG that of
    each film whose SOP Instance UID it refers to. Several masks of one film count together.

    Raises:
        ConfigError: the folders overlap, no file belongs to a film, or a file may belong to several films.
    """
    here, there = folder.resolve(), films_folder.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise ConfigError(
            f"data.masks={folder} and data.dicom_dir={films_folder} overlap, so masks would count as films: "
            "move them to folders of their own"
        )
    names, others = _listed(folder)
    digests, source = _hashes(folder, names), f"data.masks={folder}"
    wanted, unused = _names(folder, names)
    # A file of another kind with the name of a film is probably its mask.
    like_films = films.match({name: _stems(name.rpartition(".")[0]) for name in others}, source)
    unused |= {name: others[name] for name in like_films}
    of_film: dict[str, list[MaskFile]] = {}
    found = films.match(wanted, source)
    check_folders({name: film for (name, uid), film in found.items() if not uid}, source)
    for (name, uid), film in sorted(found.items()):
        of_film.setdefault(film, []).append(MaskFile(name, str(folder / name), digests[name], uid))
        unused.pop(name, None)
    lost = tuple(f"{name}: {reason}" for name, reason in sorted(unused.items()))
    if not of_film:
        first = f"its {len(lost)} files (first: {lost[0]})" if lost else "no files"
        raise ConfigError(
            f"{source}: no mask of the {len(films.films)} films (first: {films.films[0][1]}) among {first}. A mask is "
            "a PNG file with the name of its film, with or without _mask at the end, or a DICOM SEG that refers to it"
        )
    return MaskFolder(folder, {film: tuple(files) for film, files in of_film.items()}, lost, _hash_of(digests))


def _stems(name: str) -> tuple[str, str]:
    """Return the names that the film of a mask file may have."""
    return name, SUFFIX.sub("", name)


def _names(folder: Path, files: Iterable[str]) -> tuple[dict[tuple[str, str], tuple[str, ...]], dict[str, str]]:
    """Return ({(file, UID of the film or ""): names of the film}, {file: why it is no mask, if no film is found})."""
    wanted: dict[tuple[str, str], tuple[str, ...]] = {}
    unused: dict[str, str] = {}
    for name in files:
        if name.lower().endswith(".png"):
            wanted[name, ""] = _stems(bare(name))
            unused[name] = "no film has its name"
        elif name.lower().endswith((".jpg", ".jpeg")):
            unused[name] = "JPEG blurs the edge of a mask: save it as PNG"
        elif (uids := seg_references(folder / name)) is None:
            unused[name] = "neither a PNG file nor a DICOM SEG"
        else:
            wanted |= {(name, uid): (uid,) for uid in uids if uid}
            unused[name] = "it refers to no film"
    return wanted, unused
