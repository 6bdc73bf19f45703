"""A cluster profile (configs/cluster/*.yaml): how this site's SLURM is asked for nodes. Knows no training setting."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from launch import bootstrap
from pneumo_dist.config import ConfigError

FOLDER = Path(bootstrap.ROOT) / "configs" / "cluster"
# Internal jobs count as the stage a person names; `cpu` stands for all that never need a GPU.
FAMILY = {"phantom": "preprocess", "finalize": "preprocess", "pool": "evaluate", "merge": "infer"}
CPU_ONLY = ("phantom", "preprocess", "finalize", "merge", "pool")
STAGE_KEYS = ("cpu", "phantom", "preprocess", "finalize", "1", "2", "swa", "evaluate", "pool", "infer", "merge")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks for. Unset values are left to SLURM, or chosen from what the partition's nodes have."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None  # how GPUs are named here, without a number (gpu:a100); default --gpus-per-node
    cpus_per_task: int | None = None
    mem_gb: float | None = None  # per node
    sbatch: dict[str, str] = field(default_factory=dict)  # any other sbatch option, long name without dashes


@dataclass(frozen=True, kw_only=True)
class Profile(Resources):
    """One site."""

    gpus_per_node: int | None = None
    time_min: dict[str, int] = field(default_factory=dict)  # minutes by stage; `default` for the rest
    stages: dict[str, Resources] = field(default_factory=dict)  # what differs for a stage, or for `cpu`
    setup: list[str] = field(default_factory=list)  # shell lines before the program: module load, source ...
    env: dict[str, str] = field(default_factory=dict)  # NCCL_SOCKET_IFNAME and the like
    srun: list[str] = field(default_factory=list)  # further words for srun, such as --container-image=...
    python: str | None = None  # command that starts Python on a node; default: the Python that submits
    mail_user: str | None = None
    mail_type: str | None = None
    requeue: bool = True
    max_timeouts: int = 100  # how often a job may run into its time limit and continue
    signal_delay_s: int = 180  # warning before the time limit: at least a step, an evaluation, a save and 60 s

    def __post_init__(self) -> None:
        for where, names in (("time_min", self.time_min), ("stages", self.stages)):
            valid = [*STAGE_KEYS, "default"] if where == "time_min" else list(STAGE_KEYS)
            for name in names:
                if name not in valid:
                    raise ConfigError(f"{where}.{name}: no such stage{_nearest(name, valid)}")
        for name, minutes in self.time_min.items():
            if minutes < 1:
                raise ConfigError(f"time_min.{name}={minutes} must be at least 1 minute")
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            raise ConfigError(f"gpus_per_node={self.gpus_per_node} must not be negative")
        if self.max_timeouts < 0 or self.signal_delay_s < 1:
            raise ConfigError("max_timeouts must not be negative, signal_delay_s must be at least 1")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(f"env.{name} is no name of an environment variable")
        for part in (self, *self.stages.values()):
            if part.gres and not re.fullmatch(r"[A-Za-z_]\w*(:[A-Za-z_][\w.-]*)?", part.gres):
                raise ConfigError(
                    f"gres={part.gres!r} must be a name without a number, such as gpu:a100; the number is gpus_per_node"
                )
            if part.cpus_per_task is not None and part.cpus_per_task < 1:
                raise ConfigError(f"cpus_per_task={part.cpus_per_task} must be at least 1")
            if part.mem_gb is not None and part.mem_gb <= 0:
                raise ConfigError(f"mem_gb={part.mem_gb} must be positive")

    def resources(self, stage: str) -> Resources:
        """Return what a job of `stage` asks for: the stage's own values over `cpu`'s over the profile's."""
        names = [stage, FAMILY.get(stage, stage), *(("cpu",) if stage in CPU_ONLY else ())]
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(Resources)}
        for layer in (self.stages[name] for name in reversed(names) if name in self.stages):
            for key in found:
                value = getattr(layer, key)
                if key == "sbatch":
                    found[key] = {**found[key], **value}
                elif value is not None:
                    found[key] = value or None  # "" takes a value back, for example qos: "" for CPU jobs
        return Resources(**found)

    def minutes(self, stage: str) -> int | None:
        """Return the time limit of a job of `stage`, or None where the profile leaves it open."""
        for name in (stage, FAMILY.get(stage, stage), *(("cpu",) if stage in CPU_ONLY else ()), "default"):
            if name in self.time_min:
                return self.time_min[name]
        return None


_Schema = TypeVar("_Schema")


def _nearest(word: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid here: {', '.join(valid)}"


def _check_keys(tree: Any, cls: type, prefix: str) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} must hold key: value lines")
    valid = [f.name for f in dataclasses.fields(cls)]
    for key in tree:
        if key not in valid:
            raise ConfigError(f"unknown key {prefix}{key}{_nearest(str(key), valid)}")


def find(name: str | None) -> Path | None:
    """Return the profile's file: a path, a name in configs/cluster/, or default.yaml there when nothing is named."""
    if name is None:
        default = FOLDER / "default.yaml"
        return default if default.is_file() else None
    for path in (Path(name).expanduser(), FOLDER / name, FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
    raise ConfigError(f"--profile {name}: no such file; in configs/cluster/ there are: {known or 'none'}")


def load(path: Path | None) -> Profile:
    """Read a profile over the defaults.

    Raises:
        ConfigError: one line naming the file, the key and the nearest valid one.
    """
    if path is None:
        return Profile()
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path)) or {}
        _check_keys(tree, Profile, "")
        assert isinstance(tree, dict)
        if isinstance(tree.get("time_min"), int):
            tree["time_min"] = {"default": tree["time_min"]}
        for key in ("time_min", "stages"):  # YAML reads the stage names 1 and 2 as numbers
            if isinstance(tree.get(key), dict):
                tree[key] = {str(name): value for name, value in tree[key].items()}
        for name, part in (tree.get("stages") or {}).items():
            _check_keys(part, Resources, f"stages.{name}.")
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Profile), tree))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the profile ({error.strerror})") from None
    except (ConfigError, OmegaConfBaseException, YAMLError, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
        where = getattr(error, "full_key", None) if cause is error else None
        raise ConfigError(
            f"{path}: {where + ': ' if where else ''}" + " ".join(str(cause).split("\n")[0].split())
        ) from None
    assert isinstance(result, Profile)
    return result
