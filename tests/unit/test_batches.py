"""The batches of a training: films, masks and labels that belong together, and what every rank knows of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.training.batches import StageFilms
from pneumo_dist.training.step import TrainBatch
from tests.films import make_shards, task

OVERRIDES = [
    "phantom.films=16", "phantom.size=96", "stages=1", "stage1.size=32", "stage1.epochs=3", "stage1.batch_size=3",
    "stage1.positive_share=0.8,0.2", "data.shards=2", "data.folds=2", "train.workers=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    make_shards(run, OVERRIDES)
    return run


def batches_of(run_dir: Path, start: tuple[int, int], rank: int = 0, ranks: int = 1) -> list[TrainBatch]:
    films = StageFilms(task(run_dir, "1", OVERRIDES, fold=0, ranks=Ranks(rank, ranks)))
    found = []
    for batch, indices in films.batches(*start):
        assert batch.labels.tolist() == [films.training[i].label for i in indices.tolist()]
        assert batch.labels.dtype == torch.float32 and len(batch.images) == len(batch.masks) == len(batch.labels)
        assert batch.films == 3 and batch.masks.flatten(1).any(1).tolist() == batch.labels.bool().tolist()
        found.append(batch)
    return found


def test_every_rank_counts_the_positive_films_of_the_whole_batch_from_any_start(run_dir: Path) -> None:
    whole = batches_of(run_dir, (0, 0))
    counts = [batch.positives for batch in whole]
    assert counts == [int(batch.labels.sum()) for batch in whole] and len(set(counts)) > 1
    first, second = (batches_of(run_dir, (0, 0), rank, 2) for rank in range(2))
    for batch, *parts in zip(whole, first, second, strict=True):
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert {part.positives for part in parts} == {batch.positives}
    steps = len(whole) // 3
    for start in ((0, 1), (1, 0), (2, steps - 1)):
        rest = batches_of(run_dir, start)
        assert [batch.positives for batch in rest] == counts[start[0] * steps + start[1] :]
        assert torch.equal(rest[0].images, whole[start[0] * steps + start[1]].images)
    assert batches_of(run_dir, (3, 0)) == []
