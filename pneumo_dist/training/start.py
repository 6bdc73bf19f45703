"""Which weights a training stage starts from: one place, in order. A resumed checkpoint beats all of this.

1. `stageN.init_from` (a model file, a checkpoint, or a run), 2. stage 1's best weights for stage 2,
3. ImageNet or a seeded random start. Only weights are taken: the optimizer and the learning rate start anew.
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
    """Return the weights file that `init_from` means: itself, or the same fold's last best weights of a run.

    Raises:
        ConfigError: there is no such file, or the run has none for this fold (another fold's would leak).
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
    """Load the weights of a model file or of a training checkpoint; nothing else in it is used."""
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
            f"{path}: no weights of this network to start from ({cause}): give a model file or a checkpoint"
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
