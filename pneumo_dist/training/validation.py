"""Validation during training: all scores at the recipe's fixed threshold, and the loss, the same for any ranks.

Scores come from the functions of the final evaluation. A copy of the network with rank 0's batch-norm buffers is
evaluated, so that the training is not changed.
"""

from __future__ import annotations

import copy
import faulthandler
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pneumo_dist.config import Loss
from pneumo_dist.data.cases import Case
from pneumo_dist.prediction.forward import Predictor, predict_records
from pneumo_dist.reports.pictures import fit_mask
from pneumo_dist.reports.tensorboard import SCORES, panel_shape
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.metrics import Records, Triplet, apply_triplet, summary
from pneumo_dist.training.step import Stepper

Losses = dict[str, tuple[float, float]]  # film id -> cross-entropy and 1 - soft Dice
Masks = dict[str, NDArray[np.bool_]]  # film id -> prediction at panel size, of the films to draw


@dataclass(frozen=True, eq=False)
class Validation:
    """The result of one validation, the same on every rank; records and masks on rank 0 only."""

    scores: dict[str, Any]  # `summary` at the fixed threshold
    loss: float  # mean over films, at film size
    loss_bce: float  # its terms before weighting
    loss_dice: float
    records: Records | None = None  # of all films; None on ranks other than 0
    masks: Masks = field(default_factory=dict)

    @property
    def dice(self) -> float:
        """Competition Dice, mean over films."""
        return float(self.scores["dice"])

    def row(self) -> dict[str, float | None]:
        """Return the columns of metrics.jsonl; a score is None where it is undefined, Dice on positives 0."""
        named = {name: self.scores[name] for name in SCORES} | {"dice_positive": self.scores["dice_positive"] or 0.0}
        return named | {"loss": self.loss, "loss_bce": self.loss_bce, "loss_dice": self.loss_dice}


def film_losses(prob: NDArray[np.float32], truth: NDArray[np.bool_], smooth: float) -> tuple[float, float]:
    """Return cross-entropy and 1 - soft Dice of one film from float32 probabilities at film size (clipped at 1e-7)."""
    likelihood = np.clip(np.where(truth, prob, 1 - prob), 1e-7, 1)
    bce = -float(np.log(likelihood).mean(dtype=np.float64))
    overlap = float(prob.sum(where=truth, dtype=np.float64))
    total = float(prob.sum(dtype=np.float64)) + float(np.count_nonzero(truth))
    return bce, 1 - (2 * overlap + smooth) / (total + smooth)


def evaluation_copy(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return a copy in evaluation mode with rank 0's batch-norm buffers; collective."""
    copied = copy.deepcopy(model).eval()
    buffers = dict(copied.named_buffers())
    canonical = ranks.broadcast({name: value.cpu() for name, value in buffers.items()} if ranks.first else None)
    for name, value in buffers.items():
        value.copy_(canonical[name])
    return copied


class _StopOrSave(StopSignal):
    """Stops a validation for a save as well: SLURM's grace time may end before the last film."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop

    @property
    def requested(self) -> bool:
        return self._stop.requested or self._stop.save_due


def validate(
    task: Task, stepper: Stepper, cases: Sequence[Case], shard_dir: Path, shown: Container[str] = ()
) -> Validation | None:
    """Validate on every rank's share of the fixed batches; None: a rank got a signal to leave or save before the end.

    shown: ids of the films whose predictions are to be drawn.
    """
    ranks, config, stop = task.ranks, task.config, _StopOrSave(task.stop)
    rule = Triplet(0.0, 0, config.evaluate.threshold)
    losses: Losses = {}
    masks: Masks = {}

    def note(case: Case, prob: NDArray[np.float32], truth: NDArray[np.bool_]) -> None:
        losses[case.id] = film_losses(prob, truth, config.loss.smooth)
        if case.id in shown:
            masks[case.id] = fit_mask(apply_triplet(prob, rule), *panel_shape(case))
        faulthandler.dump_traceback_later(config.train.timeout_s / 2)  # the next film gets as long again

    predictor = Predictor(
        [evaluation_copy(stepper.model, ranks)], stepper.stage.size, stepper.device, "none", config.train.amp
    )
    records = predict_records(
        predictor, cases, shard_dir, stepper.stage.size, config.evaluate.batch_size, [rule.mask_threshold],
        ranks.rank, ranks.world_size, stop, per_film=note,
    )  # fmt: skip
    if ranks.any(stop.requested):
        return None
    shares = ranks.gather((records, losses, masks))
    merged = _merged(shares, rule, config.loss) if shares is not None else None
    numbers: Validation | None = ranks.broadcast(replace(merged, records=None, masks={}) if merged else None)
    return merged or numbers


def _merged(shares: Sequence[tuple[Records, Losses, Masks]], rule: Triplet, loss: Loss) -> Validation:
    """Return the validation on the films of all ranks; fsum is exact, so the number of ranks changes no bit."""
    records = Records.concatenate([share for share, _, _ in shares])
    by_film = {name: terms for _, share, _ in shares for name, terms in share.items()}
    terms = [by_film[name] for name in records.ids]
    return Validation(
        scores=summary(records, rule),
        loss=math.fsum(loss.bce * bce + loss.dice * dice for bce, dice in terms) / len(records),
        loss_bce=math.fsum(bce for bce, _ in terms) / len(records),
        loss_dice=math.fsum(dice for _, dice in terms) / len(records),
        records=records,
        masks={name: mask for _, _, share in shares for name, mask in share.items()},
    )
