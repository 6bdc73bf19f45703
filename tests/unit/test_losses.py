"""The loss of a batch and its gradient against float64 formulas, in half precision and on empty masks too."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pneumo_dist.config import ConfigError, Loss, load
from pneumo_dist.training.losses import BatchLoss, bce_and_dice

Array = NDArray[np.float64]
# As a gradient scaler does: a film's gradients, about 1 / pixels, lie at the small end of float16's range.
SCALE = 2.0**14
OVER = ("positives", "batch", "all")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def share(config: Loss, logits: Tensor, masks: Tensor, labels: Tensor, film_logits: Tensor | None = None) -> Tensor:
    """The loss and its terms of a whole batch, as a training step computes them."""
    return BatchLoss(config).share(logits, film_logits, masks, labels, len(labels), int(labels.sum()))


def by_hand(x: Array, z: Array, t: Array, label: Array, loss: Loss) -> tuple[Array, Array, Array]:
    """Loss with its three terms (4,), and its derivatives by mask and film logits, in float64, without autograd."""
    axes, column = (1, 2, 3), (slice(None), None, None, None)
    films, n = len(x), x[0].size
    p = 1 / (1 + np.exp(-x))
    entropy = (np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))).sum(axes) / n
    top = 2 * (p * t).sum(axes) + loss.smooth * n
    low = p.sum(axes) + t.sum(axes) + loss.smooth * n
    counts = np.ones(films) if loss.dice_over == "all" else label * (t.sum(axes) > 0)
    weight = counts / (max(label.sum(), 1) if loss.dice_over == "positives" else films)
    slope = (2 * t * low[column] - top[column]) / low[column] ** 2  # d(top / low) / dp
    gradient = loss.bce * (p - t) / n / films - loss.dice * weight[column] * slope * p * (1 - p)
    of_film = (np.maximum(z, 0) - z * label + np.log1p(np.exp(-np.abs(z)))).mean()
    terms = np.array([entropy.mean(), (weight * (1 - top / low)).sum(), of_film])
    film_gradient = loss.image * (1 / (1 + np.exp(-z)) - label) / films
    return np.array([terms @ [loss.bce, loss.dice, loss.image], *terms]), gradient, film_gradient


def films(n: int, size: int, seed: int, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, 1, size, size, generator=generator)
    masks = (torch.rand(n, 1, size, size, generator=generator) < 0.1).to(torch.uint8)
    masks[0] = 0  # the usual film has no pneumothorax
    return logits, masks


def labels_of(masks: Tensor) -> Tensor:
    return masks.flatten(1).any(1).float()


def compare(logits: Tensor, masks: Tensor, loss: Loss, labels: Tensor | None = None) -> None:
    """float32 against float64: sums of up to a million terms, taken pairwise, keep about six digits."""
    labels = labels_of(masks) if labels is None else labels
    logits = logits.clone().requires_grad_()
    film_logits = torch.linspace(-3, 2, len(logits)).requires_grad_()
    found = share(loss, logits, masks, labels, film_logits)
    assert found.dtype == torch.float32 and found.shape == (4,)
    (SCALE * found[0]).backward()
    assert logits.grad is not None and film_logits.grad is not None
    wanted, *gradients = by_hand(
        *(tensor.detach().double().numpy() for tensor in (logits, film_logits, masks, labels)), loss
    )
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=3e-6)
    for tensor, gradient in zip((logits, film_logits), gradients, strict=True):
        # A half-precision logit has a half-precision gradient.
        relative = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}[tensor.dtype]
        found_gradient = tensor.grad.double().numpy() / SCALE
        np.testing.assert_allclose(found_gradient, gradient, rtol=relative, atol=relative * np.abs(gradient).max())


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    "loss", [Loss(), Loss(bce=0.3, dice=2.0, smooth=0.01, image=0.7), Loss(bce=0.0), Loss(dice=0.0), Loss(image=0.0)]
)
def test_loss_and_gradient_equal_float64_by_hand(loss: Loss, over: str) -> None:
    compare(*films(3, 32, seed=0), replace(loss, dice_over=over))


@pytest.mark.parametrize("over", OVER)
def test_a_batch_without_a_positive_film_has_a_loss_and_a_gradient_that_lowers_every_pixel(over: str) -> None:
    logits, masks = films(4, 32, seed=1)
    masks, labels, loss = torch.zeros_like(masks), torch.zeros(4), Loss(dice_over=over)
    compare(logits, masks, loss)
    x = logits.clone().requires_grad_()
    found = share(loss, x, masks, labels)
    assert torch.isfinite(found).all()
    of_all, of_bce, of_dice = (torch.autograd.grad(found[i], x, retain_graph=True)[0] for i in range(3))
    assert (of_all > 0).all() and (of_bce > 0).all()
    assert (of_dice > 0).all() if over == "all" else not of_dice.any() and not found[2]


@pytest.mark.parametrize("over", OVER)
def test_an_all_positive_batch_equals_float64(over: str) -> None:
    logits, masks = films(2, 32, seed=2)
    compare(logits, torch.ones_like(masks), Loss(dice_over=over))


@pytest.mark.parametrize("over", OVER)
def test_a_positive_film_whose_mask_is_empty_at_this_size_adds_no_dice_term(over: str) -> None:
    """Its soft Dice would ask for an empty answer, with a pneumothorax on the film; the film still counts as one."""
    logits, masks = films(3, 32, seed=6)
    labels = torch.ones(3)  # the mask of the first film is empty
    compare(logits, masks, Loss(dice_over=over), labels)
    x = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(share(Loss(dice_over=over), x, masks, labels)[2], x)
    assert bool(gradient[0].any()) == (over == "all") and gradient[1:].any()


def test_dice_over_positives_gives_an_empty_answer_no_credit() -> None:
    """The reason for the default: over all films an empty answer costs the share of positives only."""
    _, masks = films(8, 32, seed=7)
    masks[1:6] = 0  # two positive films of eight
    empty = torch.full((8, 1, 32, 32), -20.0)
    cost = {over: float(share(Loss(dice_over=over), empty, masks, labels_of(masks))[2]) for over in OVER}
    assert cost == pytest.approx({"positives": 1.0, "batch": 0.25, "all": 0.25}, abs=2e-3)


def test_smooth_means_the_same_at_every_size() -> None:
    logits, masks = films(3, 32, seed=8)
    for over in OVER:
        loss = Loss(smooth=0.01, dice_over=over)
        small = share(loss, logits, masks, labels_of(masks), torch.zeros(3))
        large, large_masks = (t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in (logits, masks))
        enlarged = share(loss, large, large_masks, labels_of(masks), torch.zeros(3))
        torch.testing.assert_close(enlarged, small, rtol=1e-5, atol=0)  # float32 sums of four times the terms


@pytest.mark.parametrize("over", OVER)
def test_the_shares_of_any_parts_of_a_batch_sum_to_the_whole(over: str) -> None:
    logits, masks = films(6, 32, seed=9)
    masks[4], labels, of_films = 0, labels_of(masks), torch.linspace(-2, 2, 6)
    labels[4] = 1  # positive, with an empty mask
    loss = BatchLoss(Loss(dice_over=over))
    whole = loss.share(logits, of_films, masks, labels, 6, int(labels.sum()))
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 6), k) for k in range(1, 6)):
        parts = [slice(*ends) for ends in itertools.pairwise((0, *cuts, 6))]
        shares = [loss.share(logits[i], of_films[i], masks[i], labels[i], 6, int(labels.sum())) for i in parts]
        torch.testing.assert_close(sum(shares), whole, rtol=1e-6, atol=1e-7)  # float32 sums in another order


def test_a_network_without_an_image_level_head_has_no_such_term() -> None:
    logits, masks = films(3, 32, seed=10)
    loss, bce, dice, image = share(Loss(), logits, masks, labels_of(masks))
    assert image == 0 and loss == bce + dice


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [512, 1024])
def test_half_precision_logits_of_large_films_lose_nothing_but_their_own_rounding(
    dtype: torch.dtype, size: int
) -> None:
    logits, masks = films(2, size, seed=3)
    compare(logits.to(dtype), masks, Loss())


def test_a_film_of_ones_does_not_overflow_where_float16_would() -> None:
    logits = torch.full((1, 1, 512, 512), 20.0, dtype=torch.float16)
    masks = torch.ones(1, 1, 512, 512, dtype=torch.uint8)
    assert torch.isinf(logits.sigmoid().sum(dtype=torch.float16))
    assert share(Loss(), logits, masks, torch.ones(1))[0].item() == pytest.approx(0.0, abs=1e-6)


def test_autocast_around_the_loss_changes_no_bit() -> None:
    logits, masks = films(2, 64, seed=4)
    of_films = torch.tensor([0.3, -0.2], dtype=torch.bfloat16)
    outside = share(Loss(), logits, masks, labels_of(masks), of_films)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = share(Loss(), logits, masks, labels_of(masks), of_films)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_a_films_terms_do_not_depend_on_its_batch() -> None:
    logits, masks = films(5, 64, seed=5)
    whole = torch.stack(bce_and_dice(logits, masks, 1e-4))
    parts = [torch.stack(bce_and_dice(logits[i], masks[i], 1e-4)) for i in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=0)  # float32 sums


@pytest.mark.parametrize("over", OVER)
def test_extreme_logits_stay_finite(over: str) -> None:
    logits = torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1).expand(2, 1, 32, 32).clone().requires_grad_()
    of_films = torch.tensor([1e4, -1e4], requires_grad=True)
    for masks in (torch.zeros(2, 1, 32, 32), torch.ones(2, 1, 32, 32)):
        found = share(Loss(dice_over=over), logits, masks, labels_of(masks), of_films)
        assert torch.isfinite(found).all() and (found >= 0).all()
        for gradient in torch.autograd.grad(found[0], [logits, of_films]):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("loss.smooth=0", r"loss.smooth=0.0 must be positive"),
        ("loss.dice_over=positive", r"loss.dice_over.*positives, batch.*all"),
        ("loss.bce=0 loss.dice=0", r"loss.bce and loss.dice must not both be 0"),
        ("loss.image=-1", r"loss.image=-1.0 must be at least 0"),
        ("loss.dice=inf", r"loss.dice=inf must be"),
    ],
)
def test_a_loss_that_cannot_train_is_refused_with_a_line(words: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        load(None, words.split())
    assert "\n" not in str(error.value)


def test_a_smooth_in_pixels_is_read_but_does_not_train() -> None:
    """Of an older version: its finished runs can still be evaluated."""
    with pytest.raises(ConfigError, match=r"loss.smooth=1.0 must be at most 0.1: it is a share of the image's pixels"):
        load(None, ["loss.smooth=1.0"]).loss.check()
    load(None, ["loss.smooth=0.1"]).loss.check()
