"""The last job of preprocessing: check every shard against its source, then write folds, audit and manifests.

It rewrites no shard: a different number of folds needs this job only.
"""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_dist.config import Config, ConfigError
from pneumo_dist.data import cases as casefiles
from pneumo_dist.data import shards as files
from pneumo_dist.data.cases import HOLDOUT, Case
from pneumo_dist.data.films.dicom import read_film
from pneumo_dist.data.films.masks import sop_uid
from pneumo_dist.data.folds import assign_folds, check_folds, group_films
from pneumo_dist.data.lists import FilmNames, by_film, read_ids, read_patient_map
from pneumo_dist.data.preprocess.decoding import is_film
from pneumo_dist.data.preprocess.manifest import changed, remove_leftovers, write_manifests, writing
from pneumo_dist.data.preprocess.source import Source, read_source
from pneumo_dist.runtime.files import read_json, sha256_file, write_json, write_text
from pneumo_dist.runtime.processes import cores
from pneumo_dist.runtime.task import Task

log = logging.getLogger(__name__)


def check_bad(bad: list[dict[str, Any]], films: int, config: Config) -> None:
    """Raise ConfigError if more of the films are unusable than `data.max_bad` allows; an object is no film."""
    films -= len(bad)
    bad = [film for film in bad if is_film(film)]
    films += len(bad)
    allowed = int(config.data.max_bad * films)
    if len(bad) > allowed:
        first = "; ".join(f"{film['path']}: {film['reason']}" for film in bad[:3])
        raise ConfigError(
            f"{len(bad)} of {films} films are unusable, more than data.max_bad={config.data.max_bad} allows "
            f"({allowed}); first: {first}. Repair or remove them and start over with --redo, or raise data.max_bad"
        )


def finalize(task: Task) -> dict[str, Path]:
    """Check every shard against its source; write folds, audit, manifests and the contact sheet.

    Raises:
        ConfigError: a shard is missing or holds other films than the source, the source has changed, too many films
            are unusable, or there are fewer patients than folds.
    """
    from pneumo_dist.data.preprocess.audit import audit_of, audit_text
    from pneumo_dist.data.preprocess.contact_sheet import write_contact_sheet

    config, out = task.config, task.run.shard_dir
    source = read_source(task.run)
    listings, parts = _collect(out, source, config)
    films = [
        film | {"shard": j, "row": row} for j, part in enumerate(listings) for row, film in enumerate(part["films"])
    ]
    bad = [film for part in listings for film in part["bad"]]
    _check_ids(out, source, films, bad)
    _check_hashes(out, source, [*films, *bad], task)
    check_bad(bad, source.films, config)
    if not films:
        raise ConfigError(f"{source.folder}: no film is usable; first: {bad[0]['path']}: {bad[0]['reason']}")
    duplicates = _duplicates(source, films, config)
    names = FilmNames([(film["id"], film["path"]) for film in films], lambda path: sop_uid(source.folder / path))
    patients = _patients(task, names)
    cases, holdout = _cases(config, films, patients, duplicates, names)
    with writing(out):
        audit = audit_of(source, films, bad, duplicates, patients, cases, holdout, config)
        outputs = {"cases": casefiles.write_cases(out, cases)}
        write_json(out / "audit.json", audit)
        write_text(out / "audit.txt", audit_text(audit))
        outputs["audit"] = out / "audit.json"
        outputs |= write_manifests(out, source, listings, parts, config)
        write_contact_sheet(out, config, cases)
        remove_leftovers(out)
    log.info("%s", audit_text(audit))
    return outputs


def _patients(task: Task, names: FilmNames) -> dict[str, str]:
    """Return {film id: patient key}, {} without a patient map; warn about films that it lacks."""
    path = task.run.source("patient_map")
    if path is None:
        log.warning(
            "no data.patient_map: FOLDS ARE IMAGE-LEVEL. Films of one patient may be in training and validation: "
            "scores may be inflated (patient leakage)"
        )
        return {}
    patients = by_film(read_patient_map(path), names, path)
    count = len(names.films)
    if not patients:
        raise ConfigError(f"{path}: it lists none of the {count} films: its ImageId must be the film's id")
    if len(patients) < count:
        missing = count - len(patients)
        log.warning("%d of %d films are not in data.patient_map: each counts as a patient", missing, count)
    return patients


def _collect(out: Path, source: Source, config: Config) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]]]:
    """Read the lists of all shards and check their files; return (film lists, {size: part manifests})."""
    count = len(source.jobs)
    missing = sorted(
        {j for j in range(count) for s in config.sizes if not (out / files.size_name(s, j, count)).exists()}
    )
    if missing:
        names = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise ConfigError(f"{out}: {len(missing)} of {count} shards are missing ({names}): repeat --stage preprocess")
    for path in sorted(out.iterdir()):
        match = files.OURS.match(path.name)
        of = match and int(match[4] or match[7])
        if of and of != count:
            raise changed(
                out, f"{path.name} belongs to another division into shards; the films or data.shards have changed"
            )
    parts = {s: [read_json(out / files.size_name(s, j, count)) for j in range(count)] for s in config.sizes}
    for part in (part for each in parts.values() for part in each):
        size, n = part["size"], part["films"]
        lengths = {
            files.image_name(size, part["shard"], count): files.HEADER_BYTES + n * size * size,
            files.mask_name(size, part["shard"], count): files.HEADER_BYTES + len(part["positives"]) * size * size // 8,
        }
        for name, length in lengths.items():
            if not (out / name).is_file() or (out / name).stat().st_size != length or name not in part["files"]:
                raise ConfigError(f"{out / name}: missing or truncated: start over with --redo")
    return [read_json(out / files.films_name(j, count)) for j in range(count)], parts


def _check_ids(out: Path, source: Source, films: list[dict[str, Any]], bad: list[dict[str, Any]]) -> None:
    """Compare the ids in the shards with those of the source: none missing, none twice, none foreign."""
    ids = [film["id"] for film in (*films, *bad)]
    jobs = {job.id: job for shard in source.jobs for job in shard}
    for problem, names in (
        ("twice", {name for name, count in Counter(ids).items() if count > 1}),
        ("foreign", set(ids) - jobs.keys()),
        ("missing", jobs.keys() - set(ids)),
    ):
        if names:
            raise changed(
                out, f"{len(names)} films are {problem} in the shards (first: {min(names)}): the source changed"
            )
    for film in (*films, *bad):
        job = jobs[film["id"]]
        if film["annotation"] != job.digest or film["path"] != job.path:
            raise changed(out, f"the annotation or path of film {film['id']} has changed")


def _check_hashes(out: Path, source: Source, films: list[dict[str, Any]], task: Task) -> None:
    """Hash every source file again: a replaced film would stay in the shards unnoticed."""

    def same(film: dict[str, Any]) -> bool:
        path = source.folder / film["path"]
        try:
            return bool(path.stat().st_size == film["bytes"] and sha256_file(path) == film["sha256"])
        except OSError:
            return bool(film["bytes"] == -1)

    with ThreadPoolExecutor(cores(task.config.data.workers)) as pool:
        for film, unchanged in zip(films, pool.map(same, films), strict=True):
            task.stop.check()
            if not unchanged:
                raise changed(out, f"the file of film {film['id']} has changed")


def _duplicates(source: Source, films: list[dict[str, Any]], config: Config) -> list[list[dict[str, Any]]]:
    """Return the groups of films with identical pixels; candidates with one hash are decoded again and compared."""
    by_hash: dict[Any, list[dict[str, Any]]] = {}
    for film in films:
        by_hash.setdefault((film["pixels"], film["rows"], film["columns"]), []).append(film)
    groups: list[list[dict[str, Any]]] = []
    for candidates in by_hash.values():
        if len(candidates) < 2:
            continue
        exact: dict[bytes, list[dict[str, Any]]] = {}
        for film in candidates:
            pixels = read_film(source.folder / film["path"], config.data.max_pixels).pixels
            exact.setdefault(pixels.tobytes(), []).append(film)
        groups += [group for group in exact.values() if len(group) > 1]
    return groups


def _cases(
    config: Config,
    films: list[dict[str, Any]],
    patients: dict[str, str],
    duplicates: list[list[dict[str, Any]]],
    names: FilmNames,
) -> tuple[list[Case], dict[str, int]]:
    """Assign the readable films to groups and folds; return (cases, counts of the hold-out)."""
    ids = [film["id"] for film in films]
    groups = group_films(ids, patients, [[film["id"] for film in group] for group in duplicates])
    labels = np.array([film["label"] for film in films])
    areas = np.array([film["area"] / (film["rows"] * film["columns"]) for film in films])
    path = config.data.holdout_ids
    listed = set(read_ids(Path(path))) if path else set()
    found = names.match({name: (name,) for name in listed}, str(path))
    if listed and not found:
        raise ConfigError(f"{path}: none of its {len(listed)} ids is a film: no film would be held out")
    # All films of a held-out patient are held out: training on the rest would leak.
    held = np.isin(groups, groups[np.isin(ids, sorted(found.values()))]) if listed else np.zeros(len(ids), bool)
    holdout = {
        "listed": len(listed),
        "unknown": len(listed) - len(found),
        "films": int(held.sum()),
        "added_with_their_patients": int(held.sum()) - len(set(found.values())),
    }
    folds = np.full(len(ids), HOLDOUT)
    folds[~held] = assign_folds(groups[~held], labels[~held], areas[~held], config.data.folds, config.data.fold_seed)
    check_folds(groups, folds)
    facts = ("id", "shard", "row", "rows", "columns", "label", "view", "sex", "rle")
    cases = [
        Case(**{name: film[name] for name in facts}, group=int(group), fold=int(fold))
        for film, group, fold in zip(films, groups, folds, strict=True)
    ]
    return cases, holdout
