"""ImageNet weights of the encoder; the only module that imports torchvision.

Without the weights it raises an error that says how to get them; it never falls back to a random start.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import ModuleType
from urllib.error import URLError
from urllib.parse import urlparse

import torch

from pneumo_dist.config import ConfigError, Model
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.runtime.files import sha256_file

_CONNECT_TIMEOUT_S = 20.0  # without it a job hangs for minutes where compute nodes drop packets silently
_HOW = (
    "on a machine with internet run `.venv/bin/python -m pneumo_dist.model.pretrained` (a shared home directory is "
    "enough), or copy {url} and set model.weights=PATH, or start from random weights with model.pretrained=none"
)
_declared: torch.library.Library | None = None  # a reference to it keeps its operators declared


def import_torchvision() -> ModuleType:
    """Import torchvision's models, even if its compiled part does not match the torch build.

    Package indexes serve a CUDA build of torchvision. With a CPU torch its operators are missing, and the import fails
    with "operator torchvision::nms does not exist" (pytorch/vision #9077, #9085). Models and weights need only the
    schemas of the operators, so these are declared and the import is repeated.
    """
    global _declared
    try:
        import torchvision.models
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _declared is not None:
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # the half-imported package
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models
    models: ModuleType = torchvision.models
    return models


def _entry() -> tuple[str, str]:
    """Return torchvision's URL of the weights and the sha256 prefix in its file name."""
    url = import_torchvision().ResNet34_Weights.IMAGENET1K_V1.url
    return url, Path(urlparse(url).path).stem.rpartition("-")[2]


def _check_hash(path: Path, prefix: str, url: str, cure: str) -> None:
    sha256 = sha256_file(path)
    if not sha256.startswith(prefix):
        raise ConfigError(
            f"{path} is not torchvision's {Path(urlparse(url).path).name}: its sha256 begins {sha256[: len(prefix)]}, "
            f"not {prefix}; {cure}"
        )


def imagenet_file(weights: str | Path | None = None) -> Path:
    """Return a verified local file of torchvision's resnet34 ImageNet weights.

    weights: a file to use (any name; the hash is checked). Default: the cache of torch.hub (TORCH_HOME), where the
    file is downloaded at the first call.

    Raises:
        ConfigError: the file is missing or not the official one, or the download failed.
    """
    url, prefix = _entry()
    how = _HOW.format(url=url)
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise ConfigError(f"model.weights={weights}: no such file; {how}")
        cure = f"copy {url} again (other weights are given as a checkpoint: stage1.init_from=PATH)"
        _check_hash(path, prefix, url, cure)
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.is_file():
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_CONNECT_TIMEOUT_S)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # It writes a temporary file and moves it: ranks that download at the same time end with one whole file.
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
        except (URLError, OSError, RuntimeError) as error:  # RuntimeError: a wrong hash
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"no ImageNet weights: {path} is missing and the download failed ({reason}); {how}"
            ) from None
        finally:
            socket.setdefaulttimeout(before)
    _check_hash(path, prefix, url, "delete it and try again")
    return path


def load_imagenet(model: ResNet34UNet, weights: str | Path | None = None) -> None:
    """Load ImageNet weights into the encoder; the decoder keeps its values.

    Raises:
        ConfigError: see `imagenet_file`.
    """
    state = torch.load(imagenet_file(weights), map_location="cpu", weights_only=True)
    model.encoder.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})


def build_model(config: Model, seed: int, film_head: bool = False) -> ResNet34UNet:
    """Build the network on the CPU; random weights are a pure function of `seed`, the global generator is not used.

    Raises:
        ConfigError: see `imagenet_file`.
    """
    model = ResNet34UNet(seed, film_head)
    if config.pretrained == "imagenet":
        load_imagenet(model, config.weights)
    return model


def main() -> int:
    """Download and verify the ImageNet weights, for a login node."""
    try:
        print(imagenet_file())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
