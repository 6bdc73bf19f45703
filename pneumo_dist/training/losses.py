"""The training loss: cross-entropy and soft Dice of the masks, and cross-entropy of the films.

Always float32, outside autocast: in float16 the sum over a 512x512 map of ones is infinite. No collectives in here:
the number of positive films of a global batch is known from the labels.
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
    Soft Dice is (2 sum(p t) + s) / (sum p + sum t + s) with s = smooth * S * S, so that `smooth` has the same effect
    at every image size.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float().flatten(1)
        masks = masks.float().flatten(1)
        bce = binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1)
        probs = logits.sigmoid()
        pixels = smooth * logits.shape[1]
        dice = (2 * (probs * masks).sum(1) + pixels) / (probs.sum(1) + masks.sum(1) + pixels)
        return bce, 1 - dice


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a global batch: the mean over films of each term, the Dice term over the films of `loss.dice_over`.

    A Dice term over every film makes "all empty" a stable answer: it has the full score on each empty film.
    """

    config: Loss

    def dice_weights(self, masks: Tensor, labels: Tensor, films: int, positives: int | Tensor) -> Tensor:
        """Return the weight of each film's Dice term, float32 (N,).

        films, positives: of the global batch; `positives` as a number or a scalar tensor. With "positives" the weights
        of a batch sum to 1, with "batch" to its share of positive films. A positive film whose mask is empty at this
        size, or after the augmentation, has none.
        """
        if self.config.dice_over == "all":
            return torch.full_like(labels, 1 / films)
        # A GPU multiplies by the inverse of a number from the host: the same bits, because it divides 0 or 1.
        count = torch.as_tensor(positives).clamp(min=1) if self.config.dice_over == "positives" else films
        return labels * masks.flatten(1).any(1) / count

    def share(
        self,
        logits: Tensor,
        film_logits: Tensor | None,
        masks: Tensor,
        labels: Tensor,
        films: int,
        positives: int | Tensor,
    ) -> Tensor:
        """Return what these images add to the batch's loss, mask cross-entropy, Dice term and film cross-entropy.

        Args:
            logits, masks: (N, 1, S, S), as for `bce_and_dice`.
            film_logits: (N,), or None for a network without an image-level head.
            labels: float32 (N,), 1 for a film with a pneumothorax.
            films, positives: of the global batch, as for `dice_weights`.

        Returns:
            float32 (4,); the sum over all images of a batch gives its loss and its terms before weighting.
        """
        bce, dice = bce_and_dice(logits, masks, self.config.smooth)
        dice_term = (dice * self.dice_weights(masks, labels, films, positives)).sum()
        bce_term = bce.sum() / films
        film_term = torch.zeros_like(bce_term)
        if film_logits is not None:
            film_term = binary_cross_entropy_with_logits(film_logits.float(), labels, reduction="sum") / films
        loss = self.config.bce * bce_term + self.config.dice * dice_term + self.config.image * film_term
        return torch.stack([loss, bce_term, dice_term, film_term])
