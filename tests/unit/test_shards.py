"""Resizing, the shard writer, and the lazy reader."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle

import cv2
import numpy as np
import pytest

from pneumo_dist.config import ConfigError
from pneumo_dist.data.films.rle import decode_rle, encode_rle
from pneumo_dist.data.shards import (
    ShardReader,
    ShardWriter,
    image_name,
    mask_name,
    masks_to_sizes,
    size_name,
    to_size,
    to_sizes,
)
from pneumo_dist.runtime.files import write_json
from tests.film_files import grey

SIZES = (32, 64)


@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 1200), (2048, 1536), (300, 200), (40, 50), (129, 257)])
def test_one_pass_for_all_sizes_equals_each_size_alone(shape):
    film = grey(*shape)
    together = to_sizes(film, (32, 64, 128))
    for size in (32, 64, 128):
        assert together[size].shape == (size, size) and together[size].dtype == np.uint8
        assert np.array_equal(together[size], to_size(film, size))
    places = {size: np.full((size, size), 7, np.uint8) for size in (32, 64, 128)}
    to_sizes(film, places, places)
    assert all(np.array_equal(places[size], together[size]) for size in places)


def test_halving_stays_within_a_grey_level_of_the_direct_area_mean():
    film = grey(1024, 1024)
    direct = cv2.resize(film.astype(np.float64), (256, 256), interpolation=cv2.INTER_AREA)
    # Two roundings of at most half a level each.
    assert np.abs(to_size(film, 256) - direct).max() <= 1
    assert abs((to_size(film, 256) - direct).mean()) < 0.3  # halves are rounded up: an eighth of a level each
    assert np.abs(to_size(film, 512) - cv2.resize(film.astype(float), (512, 512), interpolation=3)).max() <= 0.5


def test_a_film_of_the_target_size_is_left_alone():
    film = grey(64, 64)
    assert np.array_equal(to_size(film, 64), film)


def test_masks_follow_the_film_whatever_their_memory_order():
    mask = np.zeros((300, 200), bool)
    mask[30:150, 100:200] = True
    decoded = decode_rle(encode_rle(mask), 300, 200)
    assert decoded.flags.f_contiguous
    for size, small in masks_to_sizes(mask, SIZES).items():
        assert np.array_equal(small, masks_to_sizes(decoded, SIZES)[size])
        rows, columns = np.flatnonzero(small.any(1)), np.flatnonzero(small.any(0))
        assert abs(rows[0] - size * 30 / 300) <= 1 and abs(rows[-1] + 1 - size * 150 / 300) <= 1
        assert columns[0] == size // 2 and columns[-1] == size - 1


def shard(folder, films: int, announced: int | None = None) -> dict[int, np.ndarray]:
    """Write shard 0 of 1 with masks on the odd films; return its images."""
    images = {size: np.stack([grey(size, size, seed=i) for i in range(films)]) for size in SIZES} if films else {}
    with ShardWriter(folder, 0, 1, SIZES, films if announced is None else announced) as writer:
        for i in range(films):
            packed = {size: np.packbits(images[size][i] > 128).tobytes() for size in SIZES} if i % 2 else None
            writer.add({size: images[size][i] for size in SIZES}, packed)
        parts = writer.finish()
    for size in SIZES:
        write_json(folder / size_name(size, 0, 1), parts[size])
        write_json(folder / f"manifest-{size}.json", {"shards": 1})
        for name, sha256 in parts[size]["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
    return images


@pytest.mark.parametrize("announced", [5, 9])
def test_what_was_written_is_read_back(tmp_path, announced):
    images = shard(tmp_path, 5, announced)
    for size in SIZES:
        assert np.array_equal(np.load(tmp_path / image_name(size, 0, 1)), images[size])
        reader = ShardReader(tmp_path, size)
        for i in range(5):
            assert np.array_equal(reader.image(0, i), images[size][i])
            assert np.array_equal(reader.mask(0, i), (images[size][i] > 128) * (i % 2))
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]


def test_films_that_dropped_out_leave_the_bytes_of_a_shard_without_them(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shard(tmp_path / "a", 4, 4)
    shard(tmp_path / "b", 4, 40)
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_shard_without_a_readable_film_is_written_all_the_same(tmp_path):
    shard(tmp_path, 0, 3)
    assert np.load(tmp_path / image_name(32, 0, 1)).shape == (0, 32, 32)


def test_an_interrupted_writer_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, 0, 1, SIZES, 3) as writer:
        writer.add({size: grey(size, size) for size in SIZES}, None)
        raise KeyError
    with pytest.raises(RuntimeError, match="without finish"), ShardWriter(tmp_path, 0, 1, SIZES, 3):
        pass
    assert os.listdir(tmp_path) == []


def test_the_reader_pickles_small_and_opens_again(tmp_path):
    images = shard(tmp_path, 5)
    reader = ShardReader(tmp_path, 64)
    reader.image(0, 1), reader.mask(0, 1)
    pickled = pickle.dumps(reader)
    assert len(pickled) < 500
    assert np.array_equal(pickle.loads(pickled).image(0, 1), images[64][1])


def test_images_are_copies_that_may_be_written(tmp_path):
    images = shard(tmp_path, 2)
    reader = ShardReader(tmp_path, 64)
    reader.image(0, 0)[:] = 0
    reader.mask(0, 0)[:] = 1
    assert np.array_equal(reader.image(0, 0), images[64][0]) and not reader.mask(0, 0).any()


@pytest.mark.parametrize("name", [image_name, mask_name])
def test_a_short_shard_is_an_error_and_no_bus_error(tmp_path, name):
    shard(tmp_path, 5)
    path = tmp_path / name(64, 0, 1)
    os.truncate(path, path.stat().st_size - 4096 if path.stat().st_size > 4224 else 200)
    reader = ShardReader(tmp_path, 64)
    with pytest.raises(ConfigError, match="cannot map the shard"):
        (reader.image if name is image_name else reader.mask)(0, 1)


def test_an_unfinished_directory_or_a_missing_size_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no finished shards of 64 px"):
        ShardReader(tmp_path, 64)


def test_a_disk_that_fails_beside_the_writing_leaves_no_shard(tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pneumo_dist.data.shards.FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        shard(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
