"""Weights of a file that was trained elsewhere -> this network: a model file, a checkpoint, or a plain state dict.

Reads weights only (`weights_only=True`), so that a foreign file cannot run code.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from pneumo_dist.config import ConfigError
from pneumo_dist.model.modelfile import unwrapped
from pneumo_dist.model.unet import ResNet34UNet

# segmentation_models_pytorch names the same layers of its Unet("resnet34") differently.
_OTHER_NAMES = (
    (re.compile(r"^decoder\.blocks\.(\d+)\.conv([12])\.0\."), r"decoder.\1.conv\2."),
    (re.compile(r"^decoder\.blocks\.(\d+)\.conv([12])\.1\."), r"decoder.\1.bn\2."),
    (re.compile(r"^segmentation_head\.0\."), "head."),
    (re.compile(r"^(conv1|bn1|layer[1-4])\."), r"encoder.\1."),  # a bare ResNet-34
)
PARTS = {"encoder": "encoder", "decoder": "decoder", "head": "mask head", "film_head": "image-level head"}


def _read_state(path: Path) -> dict[str, Tensor]:
    """Return the weights in a model file, a checkpoint or a plain state dict, under the names of this network."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        stored = stored.get(key, stored)
    state: dict[str, Tensor] = {}
    for name, value in stored.items():
        name = unwrapped(name)
        for pattern, replacement in _OTHER_NAMES:
            name = pattern.sub(replacement, name)
        state[name] = value
    return state


def load_weights(model: ResNet34UNet, path: Path) -> list[str]:
    """Load each part of `model` that the file has whole, and return their names; the other parts keep their values.

    Raises:
        ConfigError: the file cannot be read, or does not have a whole encoder of this network.
    """
    try:
        state = _read_state(path)
    except (OSError, RuntimeError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{path}: cannot read its weights ({' '.join(str(error).split())[:200]}): "
            "give a model file, a checkpoint or a state dict"
        ) from None
    taken = []
    for part, name in PARTS.items():
        wanted = {key: value for key, value in model.state_dict().items() if key.startswith(f"{part}.")}
        given = {key: state[key] for key in wanted if isinstance(state.get(key), Tensor)}
        given = {key: value for key, value in given.items() if value.shape == wanted[key].shape}
        # torch before 0.4.1 did not count the batches of batch norm; the count changes no result here.
        if wanted and all(key.endswith(".num_batches_tracked") for key in wanted.keys() - given.keys()):
            model.load_state_dict(given, strict=False)
            taken.append(name)
    if PARTS["encoder"] not in taken:
        raise ConfigError(
            f"{path} has no whole ResNet-34 encoder of this network: give a model file, a checkpoint or a state dict"
        )
    return taken
