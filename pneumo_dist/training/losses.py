"""The training loss: binary cross-entropy plus soft Dice, one value per image.

Always float32, outside autocast: in float16 the sum over a 512x512 map of ones is infinite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pneumo_dist.config import Loss


def bce_and_dice(logits: Tensor, masks: Tensor, smooth: float) -> tuple[Tensor, Tensor]:
    """Return mean binary cross-entropy and 1 - soft Dice of each image, both float32 (N,).

    logits: (N, 1, S, S), any float type; masks: same shape, any type, values 0 and 1.
    Soft Dice is (2 sum(p t) + smooth) / (sum p + sum t + smooth): smooth > 0 gives an empty mask a gradient.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float().flatten(1)
        masks = masks.float().flatten(1)
        bce = binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1)
        probs = logits.sigmoid()
        dice = (2 * (probs * masks).sum(1) + smooth) / (probs.sum(1) + masks.sum(1) + smooth)
        return bce, 1 - dice


@dataclass(frozen=True)
class BCEDice:
    """The training loss: `config.bce` times cross-entropy plus `config.dice` times (1 - soft Dice)."""

    config: Loss

    def parts(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two terms of each image before weighting, both float32 (N,)."""
        return bce_and_dice(logits, masks, self.config.smooth)

    def weighted(self, bce: Tensor, dice: Tensor) -> Tensor:
        """Return the loss of each image, float32 (N,); the loss of a batch is their sum / global batch."""
        return self.config.bce * bce + self.config.dice * dice
