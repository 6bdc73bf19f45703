"""A node-local copy of the shards (`data.stage_dir`), made once per node and checked by hash.

Safe when several ranks or jobs share the node: one copies under a lock, the others wait and use its copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from pathlib import Path

from pneumo_dist.config import ConfigError
from pneumo_dist.data.shards import TEMPORARY, image_name, mask_name, size_name
from pneumo_dist.runtime.files import atomic_path, read_json, sha256_file, write_text

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"  # written last into a copy


def stage_shards(shard_dir: Path, stage_dir: Path, size: int | None = None) -> Path:
    """Copy the shards of one size (default: all) below `stage_dir` and return the copy's directory.

    Environment variables in `stage_dir` are expanded ($SLURM_TMPDIR). A copy of the same shards that is there
    already is used as it is; one that a killed job left half-done is completed.

    Raises:
        ConfigError: a variable is not set, the disk is too small, or a shard's content does not match its manifest.
    """
    shard_dir = Path(shard_dir)
    target = os.path.expandvars(os.path.expanduser(str(stage_dir)))
    if "$" in target:
        raise ConfigError(f"data.stage_dir={stage_dir}: the variable is not set on this node: give another directory")
    manifest = read_json(shard_dir / "manifest.json")
    sizes = [size] if size else list(manifest["sizes"])
    wanted = _files(shard_dir, sizes, manifest["shards"])
    key = hashlib.sha256(repr(sorted(wanted.items())).encode()).hexdigest()[:16]
    copy = Path(target).absolute() / f"pneumo_dist-shards-{key}"
    try:
        copy.mkdir(parents=True, exist_ok=True)
        with open(copy.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel if its holder dies
            if not (copy / COMPLETE).exists():
                _copy(shard_dir, copy, wanted)
    except OSError as error:
        raise ConfigError(f"data.stage_dir={stage_dir}: cannot copy the shards there ({error.strerror})") from None
    return copy


def _files(shard_dir: Path, sizes: list[int], count: int) -> dict[str, str]:
    """Return {name: sha256} of everything a reader of these sizes opens."""
    wanted: dict[str, str] = {}
    for size in sizes:
        for shard in range(count):
            part = size_name(size, shard, count)
            hashes = read_json(shard_dir / part)["files"]
            wanted |= {name(size, shard, count): hashes[name(size, shard, count)] for name in (image_name, mask_name)}
            wanted[part] = sha256_file(shard_dir / part)
        wanted[f"manifest-{size}.json"] = sha256_file(shard_dir / f"manifest-{size}.json")
    return wanted | {name: sha256_file(shard_dir / name) for name in ("cases.csv", "manifest.json")}


def _copy(shard_dir: Path, copy: Path, wanted: dict[str, str]) -> None:
    for path in copy.iterdir():
        if TEMPORARY.match(path.name):  # of a killed one: the lock is ours
            path.unlink()
    missing = [name for name in wanted if not (copy / name).exists()]
    need = sum((shard_dir / name).stat().st_size for name in missing)
    free = shutil.disk_usage(copy).free
    if need > free:
        raise ConfigError(
            f"{copy.parent} has {free / 1e9:.1f} GB free, the shards need {need / 1e9:.1f} GB: unset data.stage_dir"
        )
    log.info("copying %.1f GB of shards to %s", need / 1e9, copy)
    for name, sha256 in wanted.items():
        if (copy / name).exists() and sha256_file(copy / name) == sha256:
            continue
        with atomic_path(copy / name) as temporary:
            shutil.copyfile(shard_dir / name, temporary)
            if sha256_file(temporary) != sha256:
                raise ConfigError(f"{shard_dir / name}: content and manifest differ: see --stage preprocess --verify")
    write_text(copy / COMPLETE, "")
