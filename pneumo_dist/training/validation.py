"""Validation while training: competition Dice at the recipe's fixed threshold and the loss, the same on any ranks.

Scores come through the same functions as the final evaluation's. A copy of the network with rank 0's batch-norm
buffers is evaluated, so that nothing of the training is touched.
"""

from __future__ import annotations

import copy
import faulthandler
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pneumo_dist.config import Loss
from pneumo_dist.data.cases import Case
from pneumo_dist.prediction.forward import Predictor, predict_records
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.metrics import dice
from pneumo_dist.scoring.records import Records, Triplet
from pneumo_dist.training.step import Stepper


@dataclass(frozen=True)
class Validation:
    """What one validation found; the same on every rank."""

    dice: float  # competition Dice, mean over films
    dice_positive: float  # over the films that have a mask; 0 where the fold has none
    loss: float


def film_loss(prob: NDArray[np.float32], truth: NDArray[np.bool_], loss: Loss) -> float:
    """Return the training loss of one film from float32 probabilities at film size (clipped at 1e-7)."""
    right = np.clip(np.where(truth, prob, 1 - prob), 1e-7, 1)
    bce = -float(np.log(right).mean(dtype=np.float64))
    hit = float(prob.sum(where=truth, dtype=np.float64))
    total = float(prob.sum(dtype=np.float64)) + float(np.count_nonzero(truth))
    return loss.bce * bce + loss.dice * (1 - (2 * hit + loss.smooth) / (total + loss.smooth))


def evaluation_copy(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return a copy in evaluation mode with rank 0's batch-norm buffers; collective."""
    copied = copy.deepcopy(model).eval()
    buffers = dict(copied.named_buffers())
    canonical = ranks.broadcast({name: value.cpu() for name, value in buffers.items()} if ranks.first else None)
    for name, value in buffers.items():
        value.copy_(canonical[name])
    return copied


class _UntilAsked(StopSignal):
    """Ends a validation for a save as well: SLURM's grace time may be over before the last film."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop

    @property
    def requested(self) -> bool:
        return self._stop.requested or self._stop.save_due


def validate(task: Task, stepper: Stepper, cases: Sequence[Case], shard_dir: Path) -> Validation | None:
    """Validate on every rank's share of the fixed batches; None when some rank was asked to leave or save meanwhile."""
    ranks, config, stop = task.ranks, task.config, _UntilAsked(task.stop)
    losses: dict[str, float] = {}

    def note(case: Case, prob: NDArray[np.float32], truth: NDArray[np.bool_]) -> None:
        losses[case.id] = film_loss(prob, truth, config.loss)
        faulthandler.dump_traceback_later(config.train.timeout_s / 2)  # the watchdog: a film is progress

    rule = Triplet(0.0, 0, config.evaluate.threshold)
    predictor = Predictor(
        [evaluation_copy(stepper.model, ranks)], stepper.stage.size, stepper.device, "none", config.train.amp
    )
    records = predict_records(
        predictor, cases, shard_dir, stepper.stage.size, config.evaluate.batch_size, [rule.mask_threshold],
        ranks.rank, ranks.world_size, stop, per_film=note,
    )  # fmt: skip
    if ranks.any(stop.requested):
        return None
    shares = ranks.gather((records, losses))
    found = None
    if shares is not None:
        joined = Records.concatenate([share for share, _ in shares])
        every = {name: value for _, share in shares for name, value in share.items()}
        scores = dice(joined, rule)
        positive = joined.truth_px > 0
        found = Validation(
            dice=float(scores.mean()),
            dice_positive=float(scores[positive].mean()) if positive.any() else 0.0,
            loss=math.fsum(every[name] for name in joined.ids) / len(joined),
        )
    result: Validation | None = ranks.broadcast(found)
    return result
