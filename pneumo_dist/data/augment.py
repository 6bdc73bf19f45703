"""The recipe's augmentations as a pure function of (seed, epoch, index), independent of workers and ranks.

albumentations draws from generators of its own. They are seeded again for every sample, or epochs would repeat.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable
from typing import Any

import numpy as np

from pneumo_dist.config import Augment

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would look for updates over the network
import albumentations

_RAMP = np.arange(256, dtype=np.uint8)[None]


class Augmenter:
    """Move, flip, and change one of contrast, brightness and gamma, with the configured probabilities and limits."""

    def __init__(self, config: Augment, seed: int) -> None:
        self.config, self.seed = config, seed
        self._compose = _build(config)
        # One pair of generators for all transforms. `set_random_seed` would give each transform its own, equally
        # seeded: all would draw the same numbers, and an image that is not flipped would never change its tone.
        self._bits, self._random = np.random.PCG64(0), random.Random(0)
        self._compose.set_random_state(np.random.Generator(self._bits), self._random)

    def __call__(self, image: np.ndarray, mask: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the augmented (image, mask), both uint8 (size, size); the inputs are not modified."""
        digest = hashlib.blake2b(f"{self.seed} {epoch} {index}".encode(), digest_size=24).digest()
        self._random.seed(int.from_bytes(digest[:8], "little"))
        state: Any = {"state": int.from_bytes(digest[8:], "little"), "inc": 1}
        self._bits.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}
        augmented = self._compose(image=image, mask=mask)
        return np.ascontiguousarray(augmented["image"]), np.ascontiguousarray(augmented["mask"])

    @property
    def tabular(self) -> bool:
        """Whether each augmentation is a flip or a function of the grey value: then `draw` describes it."""
        return not self.config.affine

    def draw(self, keys: Iterable[tuple[int, int]]) -> np.ndarray:
        """Return for each (epoch, index) 255 if its film is flipped, else 0, then the new value of each grey value.

        uint8 (N, 257). Read off a ramp of all grey values, so that the numbers are albumentations' own.
        """
        rows = []
        for key in keys:
            ramp, where = self(_RAMP, _RAMP, *key)  # the tone leaves a mask as it is: its first value is 255 or 0
            rows.append(np.concatenate([where[0, :1], ramp[0, ::-1] if where[0, 0] else ramp[0]]))
        return np.stack(rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _build(config: Augment) -> Any:
    """Build the pipeline; a limit of 0 disables its augmentation."""
    contrast, brightness, gamma = config.contrast, config.brightness, config.gamma
    lowest = max(1, round(100 * (1 - gamma)))  # albumentations takes gamma in per cent, at least 1
    affine = albumentations.Affine(
        translate_percent=(-config.shift, config.shift),
        scale=(1 - config.scale, 1 + config.scale),
        rotate=(-config.rotate, config.rotate),
        keep_ratio=True,  # one scale for both axes
        p=config.affine,
    )
    return albumentations.Compose(
        [
            *([affine] if config.affine else []),
            albumentations.HorizontalFlip(p=config.hflip),
            albumentations.OneOf(
                [
                    albumentations.RandomBrightnessContrast(brightness_limit=0, contrast_limit=contrast, p=1),
                    albumentations.RandomGamma(gamma_limit=(lowest, max(lowest, round(100 * (1 + gamma)))), p=1),
                    albumentations.RandomBrightnessContrast(brightness_limit=brightness, contrast_limit=0, p=1),
                ],
                p=config.tone,
            ),
        ]
    )
