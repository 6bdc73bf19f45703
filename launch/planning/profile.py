"""A cluster profile (configs/cluster/*.yaml): what jobs request from a site's SLURM. Knows no training setting."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import bootstrap
from pneumo_dist.config import ConfigError
from pneumo_dist.config.loading import leaves, refuse_interpolation

FOLDER = bootstrap.ROOT.resolve() / "configs" / "cluster"
# Internal jobs take the settings of the stage that the user names; `cpu` names all jobs that never need a GPU.
FAMILY = {"phantom": "preprocess", "finalize": "preprocess", "pool": "evaluate", "merge": "infer"}
CPU_ONLY = ("phantom", "preprocess", "finalize", "merge", "pool")
# Options of sbatch that submit.py computes from a key of the profile, or from the chain alone (None).
FIXED_OPTIONS = {
    "partition": "partition", "time": "time_min", "cpus-per-task": "cpus_per_task", "signal": "signal_delay_s",
    "requeue": "requeue", "no-requeue": "requeue", "array": None, "dependency": None, "error": None,
    "job-name": None, "nodes": None, "ntasks": None, "ntasks-per-node": None, "open-mode": None, "output": None,
    "test-only": None, "wait": None,
}  # fmt: skip
ONE_CLUSTER = "jobs run on the default cluster of this SLURM only"
STAGE_KEYS = ("cpu", "phantom", "preprocess", "finalize", "1", "2", "swa", "evaluate", "pool", "infer", "merge")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job requests. SLURM, or the size of the partition's nodes, decides about unset values."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None  # the site's name for GPUs, without a number (gpu:a100); default --gpus-per-node
    cpus_per_task: int | None = None
    mem_gb: float | None = None  # per node
    # Any other sbatch option, long name without dashes; true for an option without a value, false for none.
    sbatch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gres and not re.fullmatch(r"[A-Za-z_]\w*(:[A-Za-z_][\w.-]*)?", self.gres):
            raise ConfigError(
                f"gres={self.gres!r} must be a name without a number, such as gpu:a100; the number is gpus_per_node"
            )
        if self.cpus_per_task is not None and self.cpus_per_task < 1:
            raise ConfigError(f"cpus_per_task={self.cpus_per_task} must be at least 1")
        if self.mem_gb is not None and self.mem_gb <= 0:
            raise ConfigError(f"mem_gb={self.mem_gb} must be positive")
        options = {name.replace("-", "_"): value for name, value in self.sbatch.items()}  # as submitit spells them
        if len(options) < len(self.sbatch):
            raise ConfigError(f"sbatch: an option is given twice, with - and with _: {', '.join(self.sbatch)}")
        for name, value in self.sbatch.items():
            option = name.replace("_", "-")
            if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
                raise ConfigError(f"sbatch.{name} is not the long name of an sbatch option")
            if option == "clusters":
                raise ConfigError(f"sbatch.{name}: {ONE_CLUSTER}")
            if option in FIXED_OPTIONS:
                use = f": use the key {FIXED_OPTIONS[option]}" if FIXED_OPTIONS[option] else ""
                raise ConfigError(f"sbatch.{name}: submit.py sets this option{use}")
            if not isinstance(value, str | int | float | None):
                raise ConfigError(f"sbatch.{name} must be one value (several: separate them by commas, in quotes)")
        object.__setattr__(self, "sbatch", options)


@dataclass(frozen=True, kw_only=True)
class Profile(Resources):
    """The settings of one site."""

    gpus_per_node: int | None = None
    time_min: dict[str, int] = field(default_factory=dict)  # minutes by stage; `default` for the rest
    stages: dict[str, Resources] = field(default_factory=dict)  # overrides for a stage, or for `cpu`
    setup: list[str] = field(default_factory=list)  # shell lines before the program: module load, source ...
    env: dict[str, str] = field(default_factory=dict)  # NCCL_SOCKET_IFNAME and the like
    srun: list[str] = field(default_factory=list)  # further arguments of srun, such as --container-image=...
    python: str | None = None  # command that starts Python on a node; default: the Python that submits
    umask: str | None = None  # permissions that the run's files lack; default: the shell's, and none for others (027)
    mail_user: str | None = None
    mail_type: str | None = None
    requeue: bool = True
    max_timeouts: int = 100  # how many times a job may reach its time limit and continue
    signal_delay_s: int = 180  # warning before the time limit: at least a step, an evaluation, a save and 60 s

    def __post_init__(self) -> None:
        super().__post_init__()
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
            raise ConfigError("max_timeouts must not be negative, and signal_delay_s must be at least 1")
        if self.umask not in (None, "022", "027", "077"):  # jobs run code of the run: nobody else may write it
            raise ConfigError(
                f"umask={self.umask!r} must be 027 (the group reads), 077 (nobody else), or 022 (every account reads)"
            )
        self._check_texts()

    def _check_texts(self) -> None:
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(f"env.{name} is not the name of an environment variable")
        for name, texts in (("env", self.env.values()), ("setup", self.setup), ("srun", self.srun)):
            if not all(isinstance(text, str) for text in texts):
                raise ConfigError(f"{name}: each value must be one text, not a list or a mapping")

    @property
    def file_mask(self) -> int:
        """The permissions that files of a run lack."""
        if self.umask is not None:
            return int(self.umask, 8)
        current = os.umask(0o027)
        os.umask(current)
        return current | 0o027

    def resources(self, stage: str) -> Resources:
        """Return what a job of `stage` requests: the stage's own values over `cpu`'s over the profile's."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(Resources)}
        for layer in (self.stages[name] for name in reversed(_keys_of(stage)) if name in self.stages):
            for key in values:
                value = getattr(layer, key)
                if key == "sbatch":
                    values[key] = {**values[key], **value}
                elif value is not None:
                    values[key] = value or None  # "" unsets a value, for example qos: "" for CPU jobs
        return Resources(**values)

    def minutes(self, stage: str) -> int | None:
        """Return the time limit of a job of `stage`, or None if the profile has none."""
        return next((self.time_min[key] for key in (*_keys_of(stage), "default") if key in self.time_min), None)


def _keys_of(stage: str) -> list[str]:
    """Return the keys of `stages` and `time_min` that hold for a stage, most specific first."""
    return [stage, FAMILY.get(stage, stage), *(["cpu"] if stage in CPU_ONLY else [])]


def _nearest(word: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(valid)}"


def _check_keys(tree: Any, cls: type, prefix: str) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} must hold key: value lines")
    kinds = {f.name: type(getattr(cls(), f.name)) for f in dataclasses.fields(cls)}
    for key, value in tree.items():
        if key not in kinds:
            raise ConfigError(f"unknown key {prefix}{key}{_nearest(str(key), list(kinds))}")
        if isinstance(value, dict | list) and not isinstance(value, kinds[key]):
            raise ConfigError(f"{prefix}{key} must not be a {'list' if isinstance(value, list) else 'mapping'}")


def _check_numbers(text: str) -> None:
    """Refuse what YAML reads as another number: 12:00:00 is 43200 (base 60), 010 is 8."""
    import yaml

    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken) and token.plain and re.fullmatch(r"\d+(:\d+)+|0\d+", token.value):
            raise ConfigError(
                f"line {token.start_mark.line + 1}: put {token.value} in quotes: YAML reads another number"
            )


def _check_texts(tree: dict[Any, Any]) -> None:
    """Refuse what would reach a script as something else: OmegaConf's ${...}, and line breaks except in `setup`."""
    for key, value in leaves(tree):
        refuse_interpolation(key, value)
        for text in value if isinstance(value, list) and key != "setup" else [value]:
            if any(unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" for c in str(text)):
                raise ConfigError(f"{key}: a line break or another control character is not allowed here")


def find_profile(name: str | None) -> Path | None:
    """Return the file of a profile: a path, a name in configs/cluster/, or its default.yaml if `name` is None.

    Raises:
        ConfigError: there is no such file.
    """
    if name is None:
        default = FOLDER / "default.yaml"
        return default if default.is_file() else None
    for path in (Path(name).expanduser(), FOLDER / name, FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
    raise ConfigError(f"--profile {name}: no such file; configs/cluster/ has: {known or 'none'}")


def load_profile(path: Path | None) -> Profile:
    """Read a profile; unset keys keep their defaults.

    Raises:
        ConfigError: one line naming the file, the key and the nearest valid one.
    """
    if path is None:
        return Profile()
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        text = path.read_text()
        _check_numbers(text)
        tree = OmegaConf.to_container(OmegaConf.create(text))
        _check_keys(tree, Profile, "")
        assert isinstance(tree, dict)
        _check_texts(tree)
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
