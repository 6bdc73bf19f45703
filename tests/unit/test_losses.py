"""The loss and its gradient against float64 formulas, in half precision and on empty masks too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pneumo_dist.config import Loss
from pneumo_dist.training.losses import BCEDice, bce_and_dice

Array = NDArray[np.float64]
# As a gradient scaler does: a film's gradients, about 1 / pixels, lie at the small end of float16's range.
SCALE = 2.0**14


def per_image(config, logits, masks):
    """The loss of each image as a training step computes it."""
    loss = BCEDice(config)
    return loss.weighted(*loss.parts(logits, masks))


def by_hand(x: Array, t: Array, bce: float, dice: float, smooth: float) -> tuple[Array, Array]:
    """Loss (N,) and its derivative by the logits, in float64, from the formulas and not from autograd."""
    axes = (1, 2, 3)
    n = x[0].size
    p = 1 / (1 + np.exp(-x))
    entropy = (np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))).sum(axes) / n
    top = 2 * (p * t).sum(axes) + smooth
    low = p.sum(axes) + t.sum(axes) + smooth
    column = (slice(None), None, None, None)
    slope = (2 * t * low[column] - top[column]) / low[column] ** 2  # d(top / low) / dp
    gradient = bce * (p - t) / n - dice * slope * p * (1 - p)
    return bce * entropy + dice * (1 - top / low), gradient


def films(n: int, size: int, seed: int, spread: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, 1, size, size, generator=generator)
    masks = (torch.rand(n, 1, size, size, generator=generator) < 0.1).to(torch.uint8)
    masks[0] = 0  # the usual film has no pneumothorax
    return logits, masks


def compare(logits: torch.Tensor, masks: torch.Tensor, loss: Loss) -> None:
    """float32 against float64: sums of up to a million terms, taken pairwise, keep about six digits."""
    logits = logits.clone().requires_grad_()
    found = per_image(loss, logits, masks)
    assert found.dtype == torch.float32 and found.shape == (len(logits),)
    (SCALE * found).sum().backward()
    assert logits.grad is not None
    wanted, gradient = by_hand(
        logits.detach().double().numpy(), masks.double().numpy(), loss.bce, loss.dice, loss.smooth
    )
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=3e-6)
    # A half-precision logit has a half-precision gradient.
    relative = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}[logits.dtype]
    found_gradient = logits.grad.double().numpy() / SCALE
    np.testing.assert_allclose(found_gradient, gradient, rtol=relative, atol=relative * np.abs(gradient).max())


@pytest.mark.parametrize("loss", [Loss(), Loss(bce=0.3, dice=2.0, smooth=10.0), Loss(bce=0.0), Loss(dice=0.0)])
def test_loss_and_gradient_equal_float64_by_hand(loss: Loss) -> None:
    compare(*films(3, 32, seed=0), loss)


def test_an_all_empty_batch_has_a_loss_and_a_gradient_that_lowers_every_pixel() -> None:
    logits, masks = films(4, 32, seed=1)
    compare(logits, torch.zeros_like(masks), Loss())
    for term in (0, 1):  # the Dice term too, by itself
        x = logits.clone().requires_grad_()
        bce_and_dice(x, torch.zeros_like(masks), smooth=1.0)[term].sum().backward()
        assert x.grad is not None and (x.grad > 0).all()


def test_an_all_positive_batch_equals_float64() -> None:
    logits, masks = films(2, 32, seed=2)
    compare(logits, torch.ones_like(masks), Loss())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [512, 1024])
def test_half_precision_logits_of_large_films_lose_nothing_but_their_own_rounding(
    dtype: torch.dtype, size: int
) -> None:
    torch.set_num_threads(1)
    logits, masks = films(2, size, seed=3)
    compare(logits.to(dtype), masks, Loss())


def test_a_film_of_ones_does_not_overflow_where_float16_would() -> None:
    logits = torch.full((1, 1, 512, 512), 20.0, dtype=torch.float16)
    masks = torch.ones(1, 1, 512, 512, dtype=torch.uint8)
    assert torch.isinf(logits.sigmoid().sum(dtype=torch.float16))
    assert per_image(Loss(), logits, masks).item() == pytest.approx(0.0, abs=1e-6)


def test_autocast_around_the_loss_changes_no_bit() -> None:
    logits, masks = films(2, 64, seed=4)
    outside = per_image(Loss(), logits, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = per_image(Loss(), logits, masks)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_an_images_loss_does_not_depend_on_its_batch() -> None:
    logits, masks = films(5, 64, seed=5)
    whole = per_image(Loss(), logits, masks)
    parts = torch.cat([per_image(Loss(), logits[i], masks[i]) for i in (slice(0, 2), slice(2, 5))])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)  # float32 sums


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1).expand(2, 1, 32, 32).clone().requires_grad_()
    for masks in (torch.zeros(2, 1, 32, 32), torch.ones(2, 1, 32, 32)):
        found = per_image(Loss(), logits, masks)
        assert torch.isfinite(found).all() and (found >= 0).all()
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert torch.isfinite(gradient).all()
