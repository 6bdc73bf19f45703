"""Orders, batches and the loader: the same for any number of ranks and workers, small pickles, ignored signals."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pneumo_dist import config as configuration
from pneumo_dist.config import Augment, ConfigError
from pneumo_dist.data import staging
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import read_cases
from pneumo_dist.data.loaders import (
    FilmDataset,
    TrainBatches,
    deal,
    epoch_order,
    fixed_batches,
    fold_cases,
    make_loader,
    share_at,
    split_batch,
    stage_shards,
)
from pneumo_dist.data.preprocess import preprocess
from pneumo_dist.data.preprocess.finalize import finalize
from pneumo_dist.data.shards import ShardReader
from pneumo_dist.run import Run
from pneumo_dist.runtime.task import Task
from tests.film_files import overrides, small_set


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    settings = small_set(folder, films=24)
    small = ["data.shards=3", "data.folds=2", "data.workers=2", "stage1.size=32", "stage2.size=64"]
    task = Task(run=Run(folder, configuration.load(None, [*overrides(settings), *small])), stage="preprocess")
    preprocess.write_shards(task)
    finalize(task)
    return folder / "shards"


def dataset(shards: Path, augmented: bool = True) -> FilmDataset:
    train, _ = fold_cases(read_cases(shards), 0)
    return FilmDataset(shards, 32, train, Augmenter(Augment(tone=1.0), 5) if augmented else None)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    assert sorted(epoch_order(100, 3, 0)) == list(range(100))
    assert np.array_equal(epoch_order(100, 3, 1), epoch_order(100, 3, 1))
    assert not np.array_equal(epoch_order(100, 3, 1), epoch_order(100, 3, 2))
    assert not np.array_equal(epoch_order(100, 3, 1), epoch_order(100, 4, 1))
    assert epoch_order(5, 0, 0).dtype == np.int64


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_share_of_positives_is_kept_and_nothing_repeats_before_all_were_seen(share):
    labels = np.arange(200) % 5 == 0
    order = epoch_order(200, 0, 4, labels, share)
    assert len(order) == 200 and labels[order].sum() == round(share * 200)
    for label in (True, False):
        counts = np.bincount(order[labels[order] == label], minlength=200)[labels == label]
        assert counts.max() - counts.min() <= 1


def test_a_class_without_films_is_left_to_the_other():
    assert sorted(epoch_order(10, 0, 0, np.zeros(10), 0.5)) == list(range(10))
    assert sorted(epoch_order(10, 0, 0, np.ones(10), 0.5)) == list(range(10))


def test_the_share_runs_from_the_first_to_the_last_epoch():
    assert [round(share_at((0.8, 0.2), epoch, 4), 3) for epoch in range(4)] == [0.8, 0.6, 0.4, 0.2]
    assert share_at((0.8, 0.2), 0, 1) == 0.8
    labels = np.arange(100) < 22
    batches = list(TrainBatches(100, 10, 0, 3, labels=labels, shares=(0.8, 0.2)))
    for epoch, wanted in enumerate((80, 50, 20)):
        assert sum(labels[index] for batch in batches for e, index in batch if e == epoch) == wanted


@pytest.mark.parametrize(("batch", "ranks", "sizes"), [(14, 4, [4, 4, 3, 3]), (40, 3, [14, 13, 13]), (2, 2, [1, 1])])
def test_a_batch_is_split_into_contiguous_slices(batch, ranks, sizes):
    parts = [split_batch(range(batch), rank, ranks) for rank in range(ranks)]
    assert [len(part) for part in parts] == sizes
    assert [i for part in parts for i in part] == list(range(batch))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_kth_global_batch_is_the_same_for_any_number_of_ranks(world_size):
    whole = list(TrainBatches(59, 8, 1, 3))
    ranks = [list(TrainBatches(59, 8, 1, 3, rank, world_size)) for rank in range(world_size)]
    assert len(whole) == 3 * 7
    for step, batch in enumerate(whole):
        assert [key for rank in ranks for key in rank[step]] == batch


def test_a_resume_skips_to_the_same_batches():
    whole = list(TrainBatches(59, 8, 1, 3))
    sampler = TrainBatches(59, 8, 1, 3, start=(1, 3))
    assert list(sampler) == whole[10:] and len(sampler) == 11
    assert list(TrainBatches(59, 8, 1, 3, start=(2, 7))) == []
    assert list(sampler) == whole[10:]  # an iterator more starts at the same place


@pytest.mark.parametrize("shares", [None, (0.8, 0.3)])
@pytest.mark.parametrize("start", [(0, 0), (1, 3), (2, 6), (2, 7), (3, 0)])
def test_every_rank_knows_the_positive_films_of_each_global_batch(shares, start):
    labels = np.arange(59) % 5 == 0
    whole = TrainBatches(59, 8, 1, 3, start=start, labels=labels, shares=shares)
    wanted = [sum(labels[index] for _, index in batch) for batch in whole]
    assert len(wanted) == len(whole) and (len(set(wanted)) > 1 or len(wanted) < 2)
    for world_size in (1, 3):
        for rank in range(world_size):
            mine = TrainBatches(59, 8, 1, 3, rank, world_size, start=start, labels=labels, shares=shares)
            assert list(mine.positives()) == wanted


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="a batch of 8 does not fit into 7"):
        TrainBatches(7, 8, 0, 1)
    with pytest.raises(ConfigError, match="use at most 4"):
        TrainBatches(9, 4, 0, 1, 0, 5)


def test_fixed_batches_are_dealt_whole():
    batches = fixed_batches(11, 4)
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert deal(batches, 0, 2) == [batches[0], batches[2]] and deal(batches, 1, 2) == [batches[1]]
    assert deal(batches, 4, 5) == []


def test_a_patient_on_both_sides_is_refused(shards):
    cases = read_cases(shards)
    train, validation = fold_cases(cases, 1)
    assert len(train) + len(validation) == len(cases)
    assert not {case.group for case in train} & {case.group for case in validation}
    from dataclasses import replace

    moved = [replace(case, group=0) for case in cases]
    with pytest.raises(ConfigError, match="patient group 0 is in folds"):
        fold_cases(moved, 1)
    with pytest.raises(ConfigError, match="fold 7 has 23 training and 0 validation films"):
        fold_cases(cases, 7)


def bytes_of(batches) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for part in batch:
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def test_batches_are_the_same_bits_for_0_2_and_3_workers(shards):
    films = dataset(shards)
    digests = {bytes_of(make_loader(films, TrainBatches(len(films), 4, 0, 2), w, 0)) for w in (0, 2, 3)}
    assert len(digests) == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_bits_of_one_rank(shards, world_size):
    films = dataset(shards)
    whole = list(make_loader(films, TrainBatches(len(films), 4, 0, 2), 0, 0))
    parts = [
        list(make_loader(films, TrainBatches(len(films), 4, 0, 2, r, world_size), 0, 0)) for r in range(world_size)
    ]
    for step, batch in enumerate(whole):
        for i, tensor in enumerate(batch):
            assert torch.equal(tensor, torch.cat([rank[step][i] for rank in parts]))


def test_batches_are_uint8_one_channel_with_masks_of_0_and_1(shards):
    images, masks, indices = next(iter(make_loader(dataset(shards), [[(0, 3), (0, 1), (1, 2)]], 0, 0)))
    assert images.shape == masks.shape == (3, 1, 32, 32)
    assert images.dtype == masks.dtype == torch.uint8 and indices.tolist() == [3, 1, 2]
    assert set(masks.unique().tolist()) <= {0, 1}


def test_one_item_and_a_batch_are_the_same(shards):
    films = dataset(shards)
    images, masks, _ = films.__getitems__([(0, 2), (1, 0)])
    for at, key in enumerate([(0, 2), (1, 0)]):
        image, mask, index = films[key]
        assert torch.equal(images[at], image) and torch.equal(masks[at], mask) and index == key[1]


def test_without_augmenter_items_are_those_of_the_shards(shards):
    films, reader = dataset(shards, augmented=False), ShardReader(shards, 32)
    for index, case in enumerate(fold_cases(read_cases(shards), 0)[0]):
        image, mask, _ = films[(4, index)]
        assert np.array_equal(image[0].numpy(), reader.image(case.shard, case.row))
        assert np.array_equal(mask[0].numpy(), reader.mask(case.shard, case.row))


def test_the_global_generator_is_not_touched(shards):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for workers in (0, 2):
        list(make_loader(dataset(shards), TrainBatches(len(dataset(shards)), 4, 0, 1), workers, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_in_use_pickles_small_and_works_under_forkserver(shards):
    films = dataset(shards)
    first = films[(0, 0)]
    pickled = pickle.dumps(films)
    assert len(pickled) < 2000
    assert torch.equal(pickle.loads(pickled)[(0, 0)][0], first[0])


def rss_anon_kb(pid: int | str = "self") -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1])


def test_anonymous_memory_stays_flat_over_an_epoch(shards):
    films = dataset(shards)
    keys = [(0, index) for index in range(len(films))]
    films.__getitems__(keys)
    before = rss_anon_kb()
    for epoch in range(40):
        films.__getitems__([(epoch, index) for _, index in keys])
    assert rss_anon_kb() - before < 4096


def test_workers_ignore_the_signals_of_their_rank(shards):
    films = dataset(shards)
    batches = iter(make_loader(films, TrainBatches(len(films), 4, 0, 200), 2, 0))
    next(batches)
    children = list(multiprocessing.active_children())
    assert len(children) == 2
    for child in children:
        for name in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            os.kill(child.pid, name)
    time.sleep(0.3)
    for _ in range(20):
        next(batches)
    assert all(child.is_alive() for child in children)


def test_a_copy_on_the_node_is_made_once_checked_and_equal(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TMP", str(tmp_path))
    copies = []
    monkeypatch.setattr(
        staging, "_copy", lambda *args, make=staging._copy: (copies.append(1), time.sleep(0.2), make(*args))
    )
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(stage_shards(shards, "$MY_TMP/x", 32))) for _ in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(set(folders)) == 1 and len(copies) == 1
    cases = read_cases(folders[0])
    assert cases == read_cases(shards)
    one, other = ShardReader(shards, 32), ShardReader(folders[0], 32)
    assert all(np.array_equal(one.image(c.shard, c.row), other.image(c.shard, c.row)) for c in cases)


def test_a_half_made_copy_is_completed_and_a_damaged_source_refused(shards, tmp_path):
    copy = stage_shards(shards, tmp_path / "a", 32)
    assert not list(copy.glob("*-64-*"))
    (copy / "COMPLETE").unlink()
    victim = copy / "images-32-00001-of-00003.npy"
    victim.write_bytes(b"half")
    (copy / "masks-32-00000-of-00003.npy").unlink()
    leftover = copy / ".images-32-00002-of-00003.0123abcd.tmp.npy"
    leftover.write_bytes(b"of a killed copy")
    assert stage_shards(shards, tmp_path / "a", 32) == copy
    assert not leftover.exists()
    assert victim.read_bytes() == (shards / victim.name).read_bytes()
    import shutil

    broken = Path(shutil.copytree(shards, tmp_path / "broken"))
    data = bytearray((broken / victim.name).read_bytes())
    data[500] ^= 1
    (broken / victim.name).write_bytes(data)
    with pytest.raises(ConfigError, match="content and manifest differ"):
        stage_shards(broken, tmp_path / "b", 32)


def test_an_unset_variable_or_a_small_disk_is_one_line(shards, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="variable is not set"):
        stage_shards(shards, "$NO_SUCH_VARIABLE_HERE/x", 32)
    mine = stage_shards(shards, tmp_path / "mine", 32)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / mine.name).symlink_to(mine)
    (tmp_path / "tmp" / mine.name.replace(f"-{os.getuid()}", "-65534")).mkdir(parents=True)
    for folder, uid in (("linked", os.getuid()), ("tmp", 65534)):
        with (
            monkeypatch.context() as other,
            pytest.raises(ConfigError, match="is a link or belongs to another account"),
        ):
            other.setattr(staging.os, "getuid", lambda uid=uid: uid)
            stage_shards(shards, tmp_path / folder, 32)
    assert stage_shards(shards, tmp_path / "tmp", 32).name == mine.name, "another account's copy is not in the way"
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: staging.shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(ConfigError, match="GB free, the shards need"):
        stage_shards(shards, tmp_path / "small", 32)


def test_process_that_fails_while_its_workers_wait_ends() -> None:
    """The traceback keeps the loader alive, and workers ignore the signal with which Python ends its children."""
    script = """
from pneumo_dist.data.loaders import make_loader
class Films:
    def __getitems__(self, keys):
        return keys
def train():
    batches = iter(make_loader(Films(), [[0]] * 100, workers=1, seed=0))
    next(batches)
    raise SystemError("broken on purpose")
train()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("broken on purpose"), done.stderr
