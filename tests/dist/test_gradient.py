"""The gradient is that of the global batch, whatever the ranks and micro-batches.

Batch norm is in evaluation mode here: in training its statistics are those of each rank's (micro-)batch, which is
the one thing that does depend on the ranks (SyncBN, on GPUs, takes the ranks out of that; micro-batches stay).
"""

import hashlib

import numpy as np
import pytest
import torch

from pneumo_dist import config as configuration
from pneumo_dist.data.loaders import split_batch
from pneumo_dist.model.unet import ResNet34UNet
from pneumo_dist.training.step import Stepper
from tests.dist.spawn import on_ranks

SIZE = 32


def _films(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    masks = (torch.rand((n, 1, SIZE, SIZE), generator=generator) < 0.1).to(torch.uint8)
    masks[::3] = 0  # empty masks are the rule
    return images, masks


def gradient(ranks, batch: int, accumulate: int) -> tuple[str, np.ndarray | None]:
    """The hash of one global batch's whole gradient on this rank, and on rank 0 the float32 gradient itself."""
    config = configuration.load(
        None,
        [
            f"stage1.size={SIZE}",
            f"stage1.batch_size={batch}",
            f"stage1.accumulate={accumulate}",
            "model.pretrained=none",
        ],
    )
    stepper = Stepper(ResNet34UNet(seed=3).eval(), config, config.stage1, ranks)
    images, masks = _films(batch)
    mine = split_batch(list(range(batch)), ranks.rank, ranks.world_size)
    stepper._backward(images[mine], masks[mine], batch)
    found = torch.cat([p.grad.flatten() for p in stepper.model.parameters()]).numpy()
    return hashlib.sha256(found.tobytes()).hexdigest(), found if ranks.first else None


@pytest.fixture(scope="module")
def reference():
    """Mean over the batch of the loss per image, in one piece, without any of the distributed code."""
    from pneumo_dist.config import Loss
    from pneumo_dist.model.unet import normalise
    from pneumo_dist.training.losses import BCEDice

    def compute(batch: int) -> np.ndarray:
        torch.set_num_threads(1)
        model = ResNet34UNet(seed=3).eval()
        model.lay_out(SIZE)
        images, masks = _films(batch)
        inputs = normalise(images)
        loss = BCEDice(Loss())
        loss.weighted(*loss.parts(model(inputs), masks)).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()

    return {batch: compute(batch) for batch in (14, 16)}


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    # float32 sums over images in another order, relative to the gradient's length. (Against float64 the gradient of
    # this network is good to 1e-4 only: a rounding that crosses a ReLU's kink switches that unit's whole share.)
    error = np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < 2e-6, error


@pytest.mark.parametrize(
    ("world_size", "batch", "accumulate"), [(1, 14, 1), (1, 16, 4), (2, 14, 3), (3, 14, 1), (4, 14, 1)]
)
def test_gradient_does_not_depend_on_ranks_or_micro_batches(reference, world_size, batch, accumulate):
    found = on_ranks(gradient, world_size, batch, accumulate)
    assert len({bits for bits, _ in found}) == 1  # every rank steps with the same bits
    _close(found[0][1], reference[batch])
