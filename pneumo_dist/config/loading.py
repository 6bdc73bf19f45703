"""Read a configuration from a YAML file and `key=value` overrides, and write it back as YAML.

OmegaConf and YAML are imported in the functions that use them, so that the schema alone loads quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pneumo_dist.config.rules import ConfigError, require
from pneumo_dist.config.schema import Config, keys


def nearest(word: str, choices: list[str]) -> str:
    """Return the end of an error line about an unknown word: the most similar choices, or where to find all keys."""
    last = {choice: choice.rpartition(".")[2] for choice in choices}
    wanted = difflib.get_close_matches(word, last.values(), n=1, cutoff=0.8)  # a key without its section
    close = [choice for choice in choices if last[choice] in wanted][:3]
    close = close or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else "; python -m pneumo_dist.config lists every key"


def _override(text: str) -> tuple[str, str]:
    """Split one `key=value` override; the values of a list are separated by commas."""
    key, sep, value = text.partition("=")
    key = key.strip()
    require(bool(sep and key), f"{text!r} is not key=value (for example stage1.epochs=10)")
    refuse_interpolation(key, value)
    known = keys()
    if key not in known:
        raise ConfigError(f"unknown key {key!r}{nearest(key, list(known))}")
    kind = known[key].type
    if get_origin(kind) is list and not value.strip().startswith("["):
        item = get_args(kind)[0]
        parts = [p.strip() for p in value.split(",") if p.strip()]
        value = json.dumps(parts) if item is str else f"[{','.join(parts)}]"
    elif str in (kind, *get_args(kind)) and value not in ("null", ""):
        value = json.dumps(value)  # quoted, because a path may contain YAML syntax
    return key, value if value else "null"


def load(
    path: str | Path | None = None, overrides: list[str] | None = None, below: Mapping[str, Any] | None = None
) -> Config:
    """Merge a YAML file and then `key=value` overrides into the defaults, or into `below`, {section: {name: value}}.

    Raises:
        ConfigError: one line with the file or key, and the most similar valid key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    tree = OmegaConf.merge(OmegaConf.structured(Config), below or {})
    where = ""
    try:
        if path is not None:
            where = f"{path}: "
            try:
                layer = OmegaConf.load(path)
            except OSError as error:
                raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from None
            require(OmegaConf.is_dict(layer), f"{path}: a configuration must be a mapping of keys to values")
            for key, value in leaves(OmegaConf.to_container(layer)):
                refuse_interpolation(f"{path}: {key}", value)
                if not any(known == key or known.startswith(key + ".") for known in keys()):
                    raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, list(keys()))}")
            tree = OmegaConf.merge(tree, layer)
        for text in overrides or []:
            where = f"{text}: "
            key, value = _override(text)
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([f"{key}={value}"]))
        where = ""
        result = OmegaConf.to_object(tree)
    except ConfigError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError, AttributeError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
        raise ConfigError(where + " ".join(str(cause).split("\n")[0].split())) from None
    assert isinstance(result, Config)
    return result


def refuse_interpolation(key: str, value: Any) -> None:
    """Raise ConfigError on OmegaConf's ${...}: ${oc.env:TOKEN} would write a secret of the shell into config.yaml."""
    require("${" not in str(value), f"{key}: ${{...}} is not replaced here: write the value, or $NAME without braces")


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything in nested mappings that is not a mapping itself."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def word(value: Any) -> str:
    """Return a value as in YAML; a list with commas, as on the command line."""
    if isinstance(value, list):
        return ",".join(map(word, value)) or "[]"
    return value if isinstance(value, str) else json.dumps(value)


def flatten(config: Config) -> dict[str, Any]:
    """Return the configuration as {dotted key: plain value}."""
    return dict(leaves(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML text that `load` reads back to an equal object."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
