"""Augmentation as a pure function of (seed, epoch, index)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pneumo_dist.config import Augment, ConfigError, load
from pneumo_dist.data.augment import Augmenter
from tests.film_files import grey

IMAGE = grey(48, 48)
MASK = (IMAGE > 200).astype(np.uint8)
NONE = {"hflip": 0.0, "tone": 0.0}


def all_of(augmenter: Augmenter, count: int = 200) -> list[np.ndarray]:
    return [np.stack(augmenter(IMAGE, MASK, epoch, index)) for epoch in range(2) for index in range(count // 2)]


def test_the_same_key_gives_the_same_pixels_in_any_order_and_after_pickling():
    one, two = Augmenter(Augment(), 7), pickle.loads(pickle.dumps(Augmenter(Augment(), 7)))
    two(IMAGE, MASK, 9, 9)
    keys = [(epoch, index) for epoch in range(3) for index in range(20)]
    first = {key: np.stack(one(IMAGE, MASK, *key)) for key in keys}
    second = {key: np.stack(two(IMAGE, MASK, *key)) for key in reversed(keys)}
    assert all(np.array_equal(first[key], second[key]) for key in keys)


def test_global_generators_are_neither_read_nor_moved():
    import random

    augmenter = Augmenter(Augment(tone=1.0), 0)
    random.seed(1), np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = augmenter(IMAGE, MASK, 0, 3)[0]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(2), np.random.seed(2)
    assert np.array_equal(first, augmenter(IMAGE, MASK, 0, 3)[0])


def test_seed_epoch_and_index_each_change_the_picture():
    strong = Augment(hflip=0.5, tone=1.0)
    base = np.stack([Augmenter(strong, 0)(IMAGE, MASK, 0, i)[0] for i in range(20)])
    for seed, epoch, shift in ((1, 0, 0), (0, 1, 0), (0, 0, 20)):
        other = np.stack([Augmenter(strong, seed)(IMAGE, MASK, epoch, shift + i)[0] for i in range(20)])
        assert np.mean([np.array_equal(a, b) for a, b in zip(base, other, strict=True)]) < 0.2


def test_probabilities_are_the_configured_ones():
    flips = tones = 0
    for image, _ in ((done[0], done[1]) for done in all_of(Augmenter(Augment(), 0), 1000)):
        flip = np.abs(image.astype(int) - IMAGE[:, ::-1]).mean() < np.abs(image.astype(int) - IMAGE).mean()
        flips += flip
        tones += not np.array_equal(image, IMAGE[:, ::-1] if flip else IMAGE)
    assert abs(flips - 500) < 5 * 16  # five standard deviations of 1,000 draws
    assert abs(tones - 300) < 5 * 15


def test_flip_and_tone_are_drawn_independently():
    # Seeding albumentations per sample seeds each transform alike: flip and tone would use the same number.
    augmenter = Augmenter(Augment(hflip=0.5, tone=0.5, contrast=0.5, brightness=0.5, gamma=0.5), 0)
    counts = np.zeros((2, 2))
    for index in range(800):
        image, mask = augmenter(IMAGE, MASK, 0, index)
        flip = int(not np.array_equal(mask, MASK))
        counts[flip, int(not np.array_equal(image, IMAGE[:, ::-1] if flip else IMAGE))] += 1
    assert counts.min() > 200 - 5 * 13, counts  # five standard deviations below 800 / 4


def test_flips_take_the_mask_along_and_tones_leave_it():
    image, mask = Augmenter(Augment(hflip=1.0, tone=0.0), 0)(IMAGE, MASK, 0, 0)
    assert np.array_equal(image, IMAGE[:, ::-1]) and np.array_equal(mask, MASK[:, ::-1])
    for index in range(20):
        _, mask = Augmenter(Augment(hflip=0.0, tone=1.0), 0)(IMAGE, MASK, 0, index)
        assert np.array_equal(mask, MASK)


def test_no_augmentation_is_the_identity():
    image, mask = Augmenter(Augment(**NONE), 0)(IMAGE, MASK, 0, 0)
    assert np.array_equal(image, IMAGE) and np.array_equal(mask, MASK)
    still = Augmenter(Augment(hflip=0, tone=1, contrast=0, brightness=0, gamma=0), 0)
    assert all(np.abs(still(IMAGE, MASK, 0, i)[0].astype(int) - IMAGE).max() <= 1 for i in range(10))


@pytest.mark.parametrize("name", ["contrast", "brightness", "gamma"])
@pytest.mark.parametrize("limit", [0.2, 1.0])
def test_limits_bound_each_tone(name, limit):
    others = {other: 0.0 for other in ("contrast", "brightness", "gamma") if other != name}
    augmenter = Augmenter(Augment(hflip=0, tone=1, **{name: limit}, **others), 0)
    half = np.full((8, 8), 100, np.uint8)
    values = np.array([augmenter(half, half, 0, index)[0][0, 0] for index in range(300)]).astype(float)
    x = 100 / 255
    low, high = {
        "contrast": (100 - limit * 100, 100 + limit * 100),
        "brightness": (100 - limit * 255, 100 + limit * 255),
        "gamma": (255 * x ** (1 + limit), 255 * x ** max(0.01, 1 - limit)),
    }[name]
    assert values.min() >= max(0, low - 1) and values.max() <= min(255, high + 1)
    if name != "contrast":  # a flat picture has no contrast to change
        assert values.max() - values.min() > 0.5 * (min(255, high) - max(0, low))


def ellipse() -> np.ndarray:
    y, x = np.mgrid[:96, :96] - 47.5
    return ((x / 36) ** 2 + (y / 12) ** 2 < 1).astype(np.uint8)


def moved(count: int, **limits: float) -> list[tuple[np.ndarray, np.ndarray]]:
    limits = {"shift": 0.0, "scale": 0.0, "rotate": 0.0, **limits}
    augmenter, mask = Augmenter(Augment(**NONE, affine=1.0, **limits), 3), ellipse()
    return [augmenter(mask * np.uint8(200), mask, 0, index) for index in range(count)]


def test_a_film_and_its_mask_are_moved_together_and_the_mask_stays_one():
    for image, mask in moved(30, shift=0.2, scale=0.3, rotate=30.0):
        assert image.dtype == mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
        assert np.mean((image > 100) == mask) > 0.99  # the film is interpolated, the mask is not


def test_limits_bound_shift_scale_and_rotation():
    centres = np.array([np.argwhere(mask).mean(0) - np.argwhere(ellipse()).mean(0) for _, mask in moved(60, shift=0.1)])
    assert 6 < np.abs(centres).max() <= 9.6 + 1 and centres.min() < -6 and centres.max() > 6
    scales = np.array([np.sqrt(mask.sum() / ellipse().sum()) for _, mask in moved(60, scale=0.2)])
    assert 0.79 < scales.min() < 0.86 and 1.14 < scales.max() < 1.21
    angles = []
    for _, mask in moved(60, rotate=20.0):
        assert abs(int(mask.sum()) - int(ellipse().sum())) < 40
        (yy, xy), (_, xx) = np.cov(np.argwhere(mask).T)
        angles.append(np.degrees(np.arctan2(2 * xy, xx - yy)) / 2)
    assert -20.5 < min(angles) < -12 and 12 < max(angles) < 20.5


def test_moving_is_off_by_default_and_draws_by_its_probability():
    plain, other = Augmenter(Augment(), 5), Augmenter(Augment(shift=0.5, scale=0.5, rotate=90.0), 5)
    assert all(np.array_equal(plain(IMAGE, MASK, 0, i), other(IMAGE, MASK, 0, i)) for i in range(40))
    augmenter = Augmenter(Augment(**NONE, affine=0.5), 5)
    changed = sum(not np.array_equal(augmenter(IMAGE, MASK, 0, i)[0], IMAGE) for i in range(200))
    assert abs(changed - 100) < 5 * 7  # five standard deviations of 200 draws


@pytest.mark.parametrize("word", ["affine=1.1", "shift=-0.1", "scale=1", "rotate=181"])
def test_limits_that_make_no_sense_are_refused(word: str):
    with pytest.raises(ConfigError, match=rf"augment\.{word.partition('=')[0]}"):
        load(None, [f"augment.{word}"])


def test_inputs_are_left_as_they_are_and_types_are_kept():
    image, mask = IMAGE.copy(), MASK.copy()
    done = Augmenter(Augment(hflip=1.0, tone=1.0), 0)(image, mask, 0, 0)
    assert np.array_equal(image, IMAGE) and np.array_equal(mask, MASK)
    assert all(part.dtype == np.uint8 and part.shape == (48, 48) and part.flags.c_contiguous for part in done)
    assert set(np.unique(done[1])) <= {0, 1}


def test_importing_looks_up_nothing_in_the_network():
    program = "import os; os.environ.pop('NO_ALBUMENTATIONS_UPDATE', None); import socket\n"
    program += "def refuse(*a, **k): raise SystemExit('network')\nsocket.socket.connect = refuse\n"
    program += "import pneumo_dist.data.augment; print(os.environ['NO_ALBUMENTATIONS_UPDATE'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "1", done.stderr
