"""Validation during training: all scores at the recipe's fixed threshold, and the loss, the same for any ranks.

Scores come from the functions of the final evaluation, on a GPU within rounding (`film_scores`). A copy of the network
with rank 0's batch-norm buffers is evaluated, so that the training is not changed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pneumo_dist.config import Loss
from pneumo_dist.data.cases import Case
from pneumo_dist.prediction.film_scores import FilmLoss, FilmScorer, Mask, Masks, Share
from pneumo_dist.prediction.predictor import Predictor
from pneumo_dist.reports.pictures import fit_mask
from pneumo_dist.reports.tensorboard import SCORES, panel_shape
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.runtime.task import Task
from pneumo_dist.scoring.metrics import summary
from pneumo_dist.scoring.records import Records, Triplet, apply_triplet
from pneumo_dist.training.step import Stepper

_NO_OVERLAP = 1e-6  # far below the Dice of a network that segments


@dataclass(frozen=True, eq=False)
class Validation:
    """The result of one validation, the same on every rank; records and masks on rank 0 only."""

    scores: dict[str, Any]  # `summary` at the fixed threshold
    losses: dict[str, float | None]  # columns of metrics.jsonl, see `_losses`; None without films of that kind
    records: Records | None = None  # of all films; None on ranks other than 0
    masks: Masks = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The loss over all films at film size, as the plateau rule reads it."""
        return float(self.losses["loss"] or 0.0)

    def row(self) -> dict[str, float | None]:
        """Return the columns of metrics.jsonl; a score is None where it is undefined, Dice on positives 0."""
        named = {name: self.scores[name] for name in SCORES} | {"dice_positive": self.scores["dice_positive"] or 0.0}
        called_empty = 1 - self.scores["called_positive"] / self.scores["films"]
        return named | self.losses | {"called_empty": called_empty}

    def selection(self, select: str) -> float:
        """Return the score that decides the best epoch, by `train.select`.

        Competition Dice alone is highest for a network that calls every film empty; Dice on positives and its product
        with the AUC are 0 there.
        """
        dice_positive, auc = self.scores["dice_positive"], self.scores["auc"]
        if select == "dice" or dice_positive is None:
            return float(self.scores["dice"])
        if select == "dice_positive" or auc is None:
            return float(dice_positive)
        # Among epochs without any overlap the AUC decides.
        return float(auc if select == "auc" else (dice_positive + _NO_OVERLAP) * auc)


def evaluation_copy(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return a copy in evaluation mode with rank 0's batch-norm buffers; collective."""
    copied = copy.deepcopy(model).eval()
    buffers = dict(copied.named_buffers())
    own = {name: value.numpy(force=True) for name, value in buffers.items()} if ranks.first else {}
    canonical = ranks.broadcast(own)
    for name, value in buffers.items():
        value.copy_(torch.from_numpy(canonical[name]))
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

    def panel(case: Case, prob: NDArray[np.float32]) -> Mask:
        return fit_mask(apply_triplet(prob, rule), *panel_shape(case))

    predictor = Predictor(
        [evaluation_copy(stepper.model, ranks)], stepper.stage.size, stepper.device, "none", config.train.amp
    )
    share = FilmScorer(task, cases, shard_dir, stepper.stage.size, stop, shown, panel).score(predictor)
    if ranks.any(stop.requested):
        return None
    losses = {name: astuple(film) for name, film in share.losses.items()}
    gathered = ranks.gather((vars(share.records), losses, share.masks)) or []
    shares = [
        Share(Records(**fields), {name: FilmLoss(*film) for name, film in terms.items()}, drawn)
        for fields, terms, drawn in gathered
    ]
    merged = _merged(shares, rule, config.loss, predictor.scored) if shares else None
    numbers = ranks.broadcast((merged.scores, merged.losses) if merged else None)
    return merged or Validation(*numbers)


def _merged(shares: Sequence[Share], rule: Triplet, loss: Loss, scored: bool) -> Validation:
    records = Records.concatenate([share.records for share in shares])
    by_film = {name: film for share in shares for name, film in share.losses.items()}
    return Validation(
        scores=summary(records, rule),
        losses=_losses(records, [by_film[name] for name in records.ids], loss, scored),
        records=records,
        masks={name: mask for share in shares for name, mask in share.masks.items()},
    )


def _losses(records: Records, films: Sequence[FilmLoss], loss: Loss, scored: bool) -> dict[str, float | None]:
    """Return the loss of all films, its terms, and what shows a collapse: fsum is exact, so ranks change no bit.

    loss_positive and loss_negative: mean over the films of that kind. loss_above_empty: the loss of the masks less the
    Dice term of an empty answer on every film: the cross-entropy, slightly above 0, once the network has collapsed to
    that answer, and below 0 where it segments.
    """

    def mean(values: Iterable[float]) -> float | None:
        values = list(values)
        return math.fsum(values) / len(values) if values else None

    positive = (records.truth_px > 0).tolist()
    scores = np.clip(np.where(positive, records.top, 1 - records.top.astype(np.float64)), 1e-7, 1)
    of_film = (-np.log(scores)).tolist() if scored else [0.0] * len(films)
    counted = [label or loss.dice_over == "all" for label in positive]
    terms = [
        loss.bce * film.bce + loss.image * image + loss.dice * film.dice * counts
        for film, image, counts in zip(films, of_film, counted, strict=True)
    ]
    dice = [film.dice for film, counts in zip(films, counted, strict=True) if counts]
    # As the training loss is normalised: by the films of the term, or by all films.
    dice_term = math.fsum(dice) / (len(films) if loss.dice_over == "batch" else max(len(dice), 1))
    empty = float(any(positive)) if loss.dice_over == "positives" else sum(positive) / len(films)
    bce, image = mean(film.bce for film in films) or 0.0, mean(of_film) or 0.0
    whole = loss.bce * bce + loss.dice * dice_term + loss.image * image
    return {
        "loss": whole,
        "loss_bce": bce,
        "loss_dice": dice_term,
        "loss_image": image if scored else None,
        "loss_positive": mean(term for term, label in zip(terms, positive, strict=True) if label),
        "loss_negative": mean(term for term, label in zip(terms, positive, strict=True) if not label),
        "loss_above_empty": whole - loss.image * image - loss.dice * empty,
        "highest_probability": max(film.highest for film in films),
    }
