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


def start_model(task: Task) -> ResNet34UNet:
    """Build the network of a training stage with its starting weights, on the CPU, in train mode."""
    from pneumo_dist.model.pretrained import build_model
    from pneumo_dist.model.transfer import PARTS, load_weights
    from pneumo_dist.model.unet import ResNet34UNet

    config, stage = task.config, task.config.train_stage(task.stage)
    before = config.train_stages[: config.train_stages.index(task.stage)]
    film_head = config.loss.image > 0
    if stage.init_from:
        path = start_path(stage.init_from, task.fold)
    elif before:
        path = task.dir_of(before[-1]) / "best.pt"
    else:
        return build_model(config.model, config.train.seed, film_head)
    model = ResNet34UNet(config.train.seed, film_head)
    taken = load_weights(model, path)
    fresh = [name for part, name in PARTS.items() if getattr(model, part) is not None and name not in taken]
    random = f"; random start: {', '.join(fresh)}" if fresh else ""
    log.info("starting from the weights of %s: %s%s", path, ", ".join(taken), random)
    return model.train()
