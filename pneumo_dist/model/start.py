"""The weights that a training stage starts from: the first rule that applies. A checkpoint of the stage comes before.

1. `stageN.init_from` (a model file, a checkpoint or a run), 2. the best weights of stage 1 for stage 2,
3. ImageNet weights or a seeded random start. Only weights are used: optimizer state and learning rate are new.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pneumo_dist.config import ConfigError
from pneumo_dist.run import RunFolder
from pneumo_dist.runtime.task import Task

if TYPE_CHECKING:
    from pneumo_dist.model.unet import ResNet34UNet

log = logging.getLogger(__name__)


def start_path(start: str, fold: int | None) -> Path:
    """Return the weights file for `init_from`: the file itself, or of a run the same fold's `best.pt`, stage 2 first.

    Raises:
        ConfigError: there is no such file, or the run has none for this fold (another fold has trained on its films).
    """
    path = Path(start).expanduser().absolute()
    if path.is_dir():
        for stage in ("2", "1"):
            best = RunFolder(path).in_fold(stage, fold) / "best.pt"
            if best.exists():
                return best
        raise ConfigError(f"init_from={start}: this run has no fold{fold}/stage1/best.pt or fold{fold}/stage2/best.pt")
    if not path.exists():
        raise ConfigError(f"init_from={start}: no such file or run directory")
    return path


def _read(path: Path) -> ResNet34UNet:
    """Load the network from a model file or a training checkpoint; only the weights are used."""
    import pickle

    import torch

    from pneumo_dist.model.modelfile import plain_state
    from pneumo_dist.model.unet import ResNet34UNet

    model = ResNet34UNet()
    try:
        model.load_state_dict(plain_state(torch.load(path, map_location="cpu", weights_only=True)["model"]))
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{path} has no weights of this network ({cause}): give a model file or a checkpoint"
        ) from None
    return model


def start_model(task: Task) -> ResNet34UNet:
    """Build the network of a training stage with its starting weights, on the CPU, in train mode."""
    from pneumo_dist.model.pretrained import build_model

    stage = task.config.train_stage(task.stage)
    before = task.config.train_stages[: task.config.train_stages.index(task.stage)]
    if stage.init_from:
        path = start_path(stage.init_from, task.fold)
    elif before:
        path = task.dir_of(before[-1]) / "best.pt"
    else:
        return build_model(task.config.model, task.config.train.seed)
    log.info("starting from the weights of %s", path)
    return _read(path).train()
