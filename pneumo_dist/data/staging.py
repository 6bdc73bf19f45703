"""A node-local copy of the shards (`data.stage_dir`), made once per node and checked by hash.

Several ranks or jobs may share the node: one copies under a lock, the others wait and use its copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import stat
from pathlib import Path

from pneumo_dist.config import ConfigError
from pneumo_dist.data.shards import TEMPORARY, image_name, mask_name, size_name
from pneumo_dist.runtime.files import atomic_path, read_json, sha256_file, write_text

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"  # marks a finished copy; written last


def stage_shards(shard_dir: Path, stage_dir: Path, size: int) -> Path:
    """Copy the shards of one size below `stage_dir` and return the directory of the copy.

    Environment variables in `stage_dir` are expanded ($SLURM_TMPDIR). An existing copy of the same shards is reused;
    an incomplete one of a killed job is completed.

    Raises:
        ConfigError: a variable is not set, the disk is too small, or a shard does not match its manifest.
    """
    shard_dir = Path(shard_dir)
    target = os.path.expandvars(os.path.expanduser(stage_dir))  # noqa: PTH111 - ~user without a home stays as typed
    if "$" in target:
        raise ConfigError(f"data.stage_dir={stage_dir}: the variable is not set on this node: set another directory")
    hashes = _hashes(shard_dir, size, read_json(shard_dir / "manifest.json")["shards"])
    key = hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()[:16]
    copy = Path(target).absolute() / f"pneumo_dist-shards-{key}-{os.getuid()}"
    try:
        copy.mkdir(parents=True, exist_ok=True)
        found = copy.lstat()
        if found.st_uid != os.getuid() or stat.S_ISLNK(found.st_mode):  # it is read without its hashes from now on
            raise ConfigError(
                f"data.stage_dir={stage_dir}: {copy} is a link or belongs to another account: set another directory"
            )
        with (copy / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it if its holder dies
            if not (copy / COMPLETE).exists():
                _copy(shard_dir, copy, hashes)
    except OSError as error:
        raise ConfigError(f"data.stage_dir={stage_dir}: cannot copy the shards to it ({error.strerror})") from None
    return copy


def _hashes(shard_dir: Path, size: int, count: int) -> dict[str, str]:
    """Return {name: sha256} of all files that a reader of this size opens."""
    hashes: dict[str, str] = {}
    for shard in range(count):
        part = size_name(size, shard, count)
        listed = read_json(shard_dir / part)["files"]
        hashes |= {name(size, shard, count): listed[name(size, shard, count)] for name in (image_name, mask_name)}
        hashes[part] = sha256_file(shard_dir / part)
    lists = (f"manifest-{size}.json", "cases.csv", "manifest.json")
    return hashes | {name: sha256_file(shard_dir / name) for name in lists}


def _copy(shard_dir: Path, copy: Path, hashes: dict[str, str]) -> None:
    for path in copy.iterdir():
        if TEMPORARY.match(path.name):  # left by a killed job: this process holds the lock
            path.unlink()
    missing = [name for name in hashes if not (copy / name).exists()]
    need = sum((shard_dir / name).stat().st_size for name in missing)
    free = shutil.disk_usage(copy).free
    if need > free:
        raise ConfigError(
            f"{copy.parent} has {free / 1e9:.1f} GB free, the shards need {need / 1e9:.1f} GB: unset data.stage_dir"
        )
    log.info("copying %.1f GB of shards to %s", need / 1e9, copy)
    for name, sha256 in hashes.items():
        if (copy / name).exists() and sha256_file(copy / name) == sha256:
            continue
        with atomic_path(copy / name) as temporary:
            shutil.copyfile(shard_dir / name, temporary)
            if sha256_file(temporary) != sha256:
                raise ConfigError(
                    f"{shard_dir / name}: content and manifest differ: check with --stage preprocess --verify"
                )
    write_text(copy / COMPLETE, "")
