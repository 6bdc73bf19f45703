"""The contact sheet `pictures/augmented.png`: films with outlined masks, as stored and as augmented in training.

It is for people only: no code reads it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pneumo_dist.config import Config
from pneumo_dist.data.cases import Case
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.runtime.files import atomic_path

POSITIVE_ROWS, NEGATIVE_ROWS, EPOCHS = 5, 1, 5
SIDE, GAP, TITLE = 256, 6, 26  # pixels
OUTLINE = (255, 70, 40)


def _chosen(cases: list[Case]) -> list[int]:
    """Return indices of films spread over the set, most of them positive."""
    chosen: list[int] = []
    for label, most in ((1, POSITIVE_ROWS), (0, NEGATIVE_ROWS)):
        indices = [i for i, case in enumerate(cases) if case.label == label]
        count = min(most, len(indices))
        chosen += [indices[len(indices) * i // count] for i in range(count)]
    return chosen


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a uint8 (SIDE, SIDE, 3) tile of a film with the outline of its mask."""
    import cv2

    grey = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    tile: np.ndarray = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    inside = cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    tile[cv2.dilate(inside, np.ones((3, 3), np.uint8)) != inside] = OUTLINE
    return tile


def write_contact_sheet(shard_dir: Path, config: Config, cases: list[Case]) -> Path:
    """Write the sheet: one film a row, first as stored, then augmented as in the first epochs; return its path.

    `cases` are sorted by id. The augmentation is seeded by the index among all films; in a fold the indices differ.
    """
    from PIL import Image, ImageDraw

    from pneumo_dist.data.augment import Augmenter

    size = config.sizes[0]
    reader, augment = ShardReader(shard_dir, size), Augmenter(config.augment, config.train.seed)
    rows = _chosen(cases)
    sheet = np.full((TITLE + len(rows) * (SIDE + GAP), (1 + EPOCHS) * (SIDE + GAP) - GAP, 3), 24, np.uint8)
    for at, index in enumerate(rows):
        image, mask = (read(cases[index].shard, cases[index].row) for read in (reader.image, reader.mask))
        pairs = [(image, mask), *(augment(image, mask, epoch, index) for epoch in range(EPOCHS))]
        for column, pair in enumerate(pairs):
            top, left = TITLE + at * (SIDE + GAP), column * (SIDE + GAP)
            sheet[top : top + SIDE, left : left + SIDE] = outlined(*pair)
    picture = Image.fromarray(sheet)
    draw = ImageDraw.Draw(picture)
    draw.text((6, 7), f"as in the shards, {size} px; mask outlined", fill="white")
    for epoch in range(EPOCHS):
        draw.text(((1 + epoch) * (SIDE + GAP) + 6, 7), f"augmented, epoch {epoch}", fill="white")
    path = Path(shard_dir) / "pictures" / "augmented.png"
    with atomic_path(path) as temporary:
        picture.save(temporary)
    return path
