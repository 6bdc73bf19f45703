"""The gradient is that of the global batch, whatever the ranks and micro-batches.

Batch norm is in evaluation mode here: in training its statistics are those of each rank's (micro-)batch, which is
the one thing that does depend on the ranks (SyncBN, on GPUs, takes the ranks out of that; micro-batches stay).
"""

import hashlib

import numpy as np
import pytest
import torch

from pneumo_dist import config as configuration
from pneumo_dist.config import Loss
from pneumo_dist.data.loaders import split_batch
from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.training.losses import bce_and_dice
from pneumo_dist.training.step import Stepper, TrainBatch
from tests.dist.spawn import on_ranks

SIZE = 32


def _films(n: int) -> TrainBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    masks = (torch.rand((n, 1, SIZE, SIZE), generator=generator) < 0.1).to(torch.uint8)
    masks[::3] = 0  # empty masks are the rule
    labels = masks.flatten(1).any(1).float()
    labels[3] = 1  # a pneumothorax that the size or the augmentation has lost
    return TrainBatch(images, masks, labels, n, int(labels.sum()))


def _part(batch: TrainBatch, films: list[int]) -> TrainBatch:
    images, masks, labels = (tensor[films] for tensor in batch[:3])
    return batch._replace(images=images, masks=masks, labels=labels)


def gradient(ranks, size: int, accumulate: int, over: str) -> tuple[str, np.ndarray | None, list[float]]:
    """The hash of one global batch's gradient on this rank, on rank 0 the float32 gradient itself, and the loss."""
    config = configuration.load(
        None,
        [
            f"stage1.size={SIZE}",
            f"stage1.batch_size={size}",
            f"stage1.accumulate={accumulate}",
            f"loss.dice_over={over}",
            "model.pretrained=none",
        ],
    )
    stepper = Stepper(ResNet34UNet(seed=3, film_head=True).eval(), config, config.stage1, ranks)
    mine = split_batch(list(range(size)), ranks.rank, ranks.world_size)
    share = stepper._backward(_part(_films(size), mine))
    found = torch.cat([p.grad.flatten() for p in stepper.model.parameters()]).numpy()
    return hashlib.sha256(found.tobytes()).hexdigest(), found if ranks.first else None, share.tolist()


@pytest.fixture(scope="module")
def reference():
    """Gradient and loss of the batch in one piece, without any of the distributed code or `BatchLoss`."""
    found = {}

    def compute(size: int, over: str) -> tuple[np.ndarray, list[float]]:
        torch.set_num_threads(1)
        model = ResNet34UNet(seed=3, film_head=True).eval()
        model.lay_out(SIZE)
        batch, config = _films(size), Loss()
        logits, film_logits = model(normalise(batch.images))
        bce, dice = bce_and_dice(logits, batch.masks, config.smooth)
        kept = dice if over == "all" else dice[batch.masks.flatten(1).any(1)]
        dice_term = kept.sum() / (batch.positives if over == "positives" else size)
        image = torch.nn.functional.binary_cross_entropy_with_logits(film_logits, batch.labels)
        loss = config.bce * bce.mean() + config.dice * dice_term + config.image * image
        loss.backward()
        terms = torch.stack([loss, bce.mean(), dice_term, image]).tolist()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).numpy(), terms

    def cached(*key):
        if key not in found:
            found[key] = compute(*key)
        return found[key]

    return cached


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    # float32 sums over images in another order, relative to the gradient's length. (Against float64 the gradient of
    # this network is good to 1e-4 only: a rounding that crosses a ReLU's kink switches that unit's whole share.)
    error = np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < 2e-6, error


@pytest.mark.parametrize(
    ("world_size", "batch", "accumulate", "over"),
    [
        (1, 14, 1, "positives"),
        (1, 16, 4, "positives"),
        (1, 16, 4, "batch"),
        (2, 14, 3, "all"),
        (2, 14, 3, "positives"),
        (3, 14, 1, "batch"),
        (4, 14, 1, "positives"),
    ],
)
def test_gradient_does_not_depend_on_ranks_or_micro_batches(reference, world_size, batch, accumulate, over):
    found = on_ranks(gradient, world_size, batch, accumulate, over)
    assert len({bits for bits, *_ in found}) == 1  # every rank steps with the same bits
    wanted, loss = reference(batch, over)
    _close(found[0][1], wanted)
    np.testing.assert_allclose(np.sum([share for *_, share in found], 0), loss, rtol=1e-5)  # float32 sums
