"""Learning rate and weight-averaging points as functions of the step; the plateau rule with a small state.

No optimizer, no clock, no ranks in here: results depend on the arguments alone, so a resume cannot change them.
"""

from __future__ import annotations

import math

from pneumo_dist.config import Swa, TrainStage

_PLATEAU_THRESHOLD = 1e-4  # smallest relative improvement that counts; this and the next are torch's defaults
_PLATEAU_EPS = 1e-8  # smallest change of the rate that is made


def swa_start(total_steps: int, swa: Swa) -> int:
    """Return the number of optimizer steps after which weight averaging begins."""
    return math.ceil(swa.start * total_steps)


def swa_due(step: int, total_steps: int, steps_per_epoch: int, swa: Swa) -> bool:
    """Return whether the weights after `step` steps (1, 2, ..., skipped ones included) enter the average.

    Points are counted back from the last step: the last weights always enter, and an interval of one epoch gives the
    ends of epochs. The caller leaves out a point whose step was skipped (fp16).
    """
    interval = swa.interval or steps_per_epoch
    return step > 0 and step >= swa_start(total_steps, swa) and (total_steps - step) % interval == 0


def learning_rate(
    step: int, total_steps: int, stage: TrainStage, swa: Swa | None = None, plateau_lr: float | None = None
) -> float:
    """Return the learning rate of optimizer step `step` (0, 1, ..., counting successful steps only).

    swa: only if this stage keeps an average; from its start on `swa.lr`, if set, replaces the schedule.
    plateau_lr: `Plateau.lr`, for schedule "plateau".
    """
    if swa is not None and swa.lr is not None and step >= swa_start(total_steps, swa):
        return swa.lr
    if stage.schedule == "cosine":
        share = min(step / max(total_steps, 1), 1.0)
        return stage.min_lr + 0.5 * (stage.lr - stage.min_lr) * (1 + math.cos(math.pi * share))
    if stage.schedule == "plateau" and plateau_lr is not None:
        return plateau_lr
    return stage.lr


class Plateau:
    """Lower the rate when the validation loss no longer falls: torch's ReduceLROnPlateau(mode="min") without optimizer.

    Every rank must pass the same loss (reduced sums and counts, never a mean of means).
    """

    def __init__(self, stage: TrainStage) -> None:
        self.lr = stage.lr
        self.best = math.inf
        self.bad_epochs = 0
        self._factor, self._patience, self._min_lr = stage.plateau_factor, stage.plateau_patience, stage.min_lr

    def step(self, loss: float) -> float:
        """Take one validation loss and return the new rate. NaN counts as no improvement."""
        if loss < self.best * (1 - _PLATEAU_THRESHOLD):
            self.best, self.bad_epochs = float(loss), 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > self._patience:
            lower = max(self.lr * self._factor, self._min_lr)
            if self.lr - lower > _PLATEAU_EPS:
                self.lr = lower
            self.bad_epochs = 0
        return self.lr

    def state_dict(self) -> dict[str, float | int]:
        """Return the state as plain numbers."""
        return {"lr": self.lr, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.lr, self.best, self.bad_epochs = float(state["lr"]), float(state["best"]), int(state["bad_epochs"])
