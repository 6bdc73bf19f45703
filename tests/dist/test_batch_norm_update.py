"""The batch-norm update against torch's own, on one rank and on several."""

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn

from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.training.swa import update_batch_norm
from tests.dist.spawn import on_ranks

BATCHES = 5


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (2, 1, 64, 64), generator=generator, dtype=torch.uint8) for _ in range(BATCHES)]


def _statistics(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items() if "running_" in name}


def updated(ranks) -> dict[str, np.ndarray]:
    """The statistics after the update with batch j on rank j mod N."""
    model = ResNet34UNet(seed=2).eval()
    count = update_batch_norm(
        model, _batches()[ranks.rank :: ranks.world_size], torch.device("cpu"), None, ranks, StopSignal()
    )
    assert count == BATCHES and not model.training
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    return _statistics(model)


@pytest.fixture(scope="module")
def wanted():
    model = ResNet34UNet(seed=2)
    update_bn([normalise(b) for b in _batches()], model)
    return _statistics(model)


def _agree(found, wanted):
    for name, value in wanted.items():
        # torch keeps a cumulative mean in float32, this a sum in float64.
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_one_rank_gives_what_torch_gives(wanted):
    torch.set_num_threads(1)
    _agree(updated(Ranks()), wanted)


def test_three_ranks_agree_with_torch_and_end_bit_equal(wanted):
    found = on_ranks(updated, 3)  # 2, 2 and 1 batches
    _agree(found[0], wanted)
    for other in found[1:]:
        for name in wanted:
            np.testing.assert_array_equal(other[name], found[0][name])
