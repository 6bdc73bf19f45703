"""The training films of a stage in the device's memory: batches are cut and augmented there, without loader processes.

Bits are those of `FilmDataset` with the same augmenter, which stays the reference. Nothing in a batch waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.loaders import Batch, FilmDataset, Key, to_device

_CHUNK = 128  # films of one copy to the device


class ResidentFilms:
    """All films of a dataset on a device: a byte per pixel, and a bit per pixel of the positive films' masks."""

    def __init__(self, films: FilmDataset, augmenter: Augmenter, device: torch.device) -> None:
        """Load `films`, which have no augmenter of their own. The augmenter must not move pixels (`tabular`)."""
        self._augmenter, self._device = augmenter, device
        self._images = torch.empty((len(films), 1, films.size, films.size), dtype=torch.uint8, device=device)
        packed = [np.zeros(films.size**2 // 8, np.uint8)]  # the empty mask
        rows = []
        for start in range(0, len(films), _CHUNK):
            images, masks, _ = films.__getitems__([(0, i) for i in range(start, min(start + _CHUNK, len(films)))])
            self._images[start : start + len(images)] = images
            for mask in masks.numpy():
                rows.append(len(packed) if mask.any() else 0)
                packed += [np.packbits(mask)] if mask.any() else []
        self._masks = torch.from_numpy(np.stack(packed)).to(device)
        self._mask_rows = torch.tensor(rows, device=device)
        self._bits = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)

    def batch(self, keys: Sequence[Key]) -> Batch:
        """Return images and masks, uint8 (N, 1, size, size) on the device, and the films' indices (N,) on the CPU."""
        indices = torch.tensor([index for _, index in keys], dtype=torch.int64)
        at = to_device(indices, self._device)
        flip, tables = to_device(torch.from_numpy(self._augmenter.draw(keys)), self._device).split([1, 256], dim=1)
        images = self._images.index_select(0, at)
        packed = self._masks.index_select(0, self._mask_rows.index_select(0, at))
        masks = (packed.unsqueeze(2).bitwise_right_shift(self._bits) & 1).view_as(images)
        images = tables.gather(1, images.flatten(1).long()).view_as(images)
        return _flipped(images, flip), _flipped(masks, flip), indices


def _flipped(films: Tensor, flip: Tensor) -> Tensor:
    """Return `films` (N, 1, S, S), mirrored where `flip` (N, 1) is 255, not 0: six times as fast as `torch.where`."""
    return films ^ ((films ^ films.flip(-1)) & flip.view(-1, 1, 1, 1))
