"""The model file: weights with plain keys, and the metadata that inference needs.

Written atomically and byte-identical for equal content; read with `weights_only=True`, so that a foreign file cannot
run code.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pneumo_dist.config import Config, ConfigError, flatten
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.runtime.files import atomic_path

FORMAT = "pneumo_dist.model/1"
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")  # DDP and AveragedModel, torch.compile, Lightning modules

# Paths and process counts belong to a machine, not to the model.
_OF_THE_MACHINE = (
    "run_root", "data.dicom_dir", "data.rle_csv", "data.masks", "data.patient_map", "data.shard_dir",
    "data.holdout_ids", "data.stage_dir", "data.on_device", "data.workers", "model.weights", "stage1.init_from",
    "stage2.init_from", "infer.", "train.workers", "train.threads", "train.save_every_s", "train.keep",
    "train.log_every", "train.meet_timeout_s", "train.first_timeout_s", "train.timeout_s",
)  # fmt: skip


def portable(config: Config) -> dict[str, Any]:
    """Return the settings for a model file: the same bytes wherever it was trained, and no paths of a site."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(_OF_THE_MACHINE)}


def unwrapped(key: str) -> str:
    """Return the key of a weight without the prefixes that modules around the network add."""
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the network as float32 copies on the CPU, without wrapper prefixes and averaging count.

    The image-level head is optional.

    Raises:
        ValueError: the keys are not those of the network.
    """
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if (name := unwrapped(key)) != "n_averaged":
            plain[name] = value
    wanted = _empty_network(plain).state_dict()
    if plain.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - plain.keys()), sorted(plain.keys() - wanted.keys())
        raise ValueError(
            f"not a ResNet34UNet state: {len(missing)} keys missing {missing[:3]}, {len(extra)} unknown {extra[:3]}"
        )
    return {
        key: plain[key].detach().to("cpu", like.dtype, copy=True, memory_format=torch.contiguous_format)
        for key, like in wanted.items()
    }


def _empty_network(state: Mapping[str, Tensor]) -> ResNet34UNet:
    """Return the network that `state` is of, without values: no memory, no random numbers."""
    with torch.device("meta"):
        return ResNet34UNet(film_head="film_head.weight" in state)


def save_model(path: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a model file atomically.

    state_dict: of a ResNet34UNet, wrapped (DDP, AveragedModel, compiled) or not, any float type, any device.
    meta: strings, numbers, booleans, None, and lists and dicts of them (tuples become lists).

    Raises:
        ValueError: the keys are not those of the network. TypeError: meta holds other types.
    """
    payload = {"format": FORMAT, "model": plain_state(state_dict), "meta": _plain(meta, "meta")}
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        torch.save(payload, file)  # not the path: torch would store the temporary name in the file


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[ResNet34UNet, dict[str, Any]]:
    """Read a model file and return (network in evaluation mode and channels_last on `device`, meta).

    Raises:
        ConfigError: the file is missing, or is not a model file of this project.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the model file in it, for example {path}/fold0/model.pt")
    try:
        payload = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the model file ({error.strerror or error})") from None
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
        raise ConfigError(f"{path} is damaged or not a model file: give a model.pt that training wrote") from None
    file_format = payload.get("format") if isinstance(payload, dict) else None
    if file_format != FORMAT:
        raise ConfigError(
            f"{path} is not a model file (format {file_format!r}, expected {FORMAT!r}): "
            "give a model.pt that training wrote"
        )
    try:
        model = _empty_network(payload["model"])
        model.load_state_dict(payload["model"], assign=True)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not fit this network: {' '.join(str(error).split())[:300]}") from None
    # NumPy takes 0.02 s; torch on a busy machine half a second, because its threads synchronise at every small tensor.
    if not all(np.isfinite(value.numpy(force=True)).all() for value in model.state_dict().values()):
        raise ConfigError(
            f"{path} has weights that are not finite: every film would be predicted negative; train again"
        )
    model.lay_out()
    return model.eval(), payload.get("meta", {})


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}: a model file takes plain values only")
