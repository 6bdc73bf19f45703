"""Shard files: film to square image, streaming writer, lazy memory-mapped reader.

Nothing appears under its final name unless it is whole, and nothing in here depends on time, host or process count:
writing a shard again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pneumo_dist.config import ConfigError
from pneumo_dist.runtime.files import atomic_path, read_json, sha256_file

HEADER_BYTES = 128  # of every .npy file in here
FLUSH_BYTES = 16 << 20  # are sent to the disk beside the decoding: the fsync at the end would wait for a whole shard
# What a killed writer leaves behind (runtime/files.py).
TEMPORARY = re.compile(r"^\.(?P<stem>.+)\.[0-9a-f]{8}\.tmp(\.\w+)?$")
OURS = re.compile(r"^(images|masks|size)-(\d+)-(\d{5})-of-(\d{5})\.(npy|json)$|^films-(\d{5})-of-(\d{5})\.json$")


def image_name(size: int, shard: int, count: int) -> str:
    """The file of one shard's images: uint8 (n, size, size)."""
    return f"images-{size}-{shard:05d}-of-{count:05d}.npy"


def mask_name(size: int, shard: int, count: int) -> str:
    """The file of one shard's masks: uint8 (positive films, size * size / 8), one bit a pixel."""
    return f"masks-{size}-{shard:05d}-of-{count:05d}.npy"


def size_name(size: int, shard: int, count: int) -> str:
    """The part manifest of one size of one shard, written last: its presence means that the shard is done."""
    return f"size-{size}-{shard:05d}-of-{count:05d}.json"


def films_name(shard: int, count: int) -> str:
    """What is known of one shard's films, independent of any size."""
    return f"films-{shard:05d}-of-{count:05d}.json"


def to_sizes(
    pixels: np.ndarray, sizes: Iterable[int], into: Mapping[int, np.ndarray] | None = None
) -> dict[int, np.ndarray]:
    """Return {size: uint8 (size, size)} of a uint8 (rows, columns) film; the aspect ratio is not kept.

    Halved by 2 x 2 means as long as both sides are even and at least twice the target, the rest by area (linear
    where a side grows). The levels of a larger size are those of a smaller one, so each is computed once; against
    one direct area mean a pixel differs by at most one grey level per halving beyond the first.

    Args:
        into: arrays to write the results to, by size, which saves a copy where they are to lie in a certain place.
    """
    import cv2  # here: submit.py reads file names without loading OpenCV

    level, found = pixels, {}
    for size in sorted(set(sizes), reverse=True):
        place = into[size] if into else np.empty((size, size), np.uint8)
        while min(level.shape) >= 2 * size and level.shape[0] % 2 == level.shape[1] % 2 == 0:
            half = level.shape[1] // 2, level.shape[0] // 2
            level = cv2.resize(level, half, place if half == (size, size) else None, interpolation=cv2.INTER_AREA)
        if level.shape == (size, size):
            if level is not place:
                place[:] = level
        else:
            way = cv2.INTER_AREA if min(level.shape) >= size else cv2.INTER_LINEAR
            cv2.resize(level, (size, size), place, interpolation=way)
        found[size] = place
    return found


def to_size(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return a uint8 (rows, columns) film as uint8 (size, size): the one way a film becomes an input of the network."""
    return to_sizes(pixels, [size])[size]


def masks_to_sizes(mask: np.ndarray, sizes: Iterable[int]) -> dict[int, np.ndarray]:
    """Return {size: bool (size, size)} of a (rows, columns) mask: inside where at least half a pixel is.

    The mask is bool, or uint8 with 255 inside, which saves a pass.
    """
    import cv2

    # By columns, as decoded masks lie in memory: transposing the small results is cheaper.
    grey = np.ascontiguousarray(mask.T)
    if grey.dtype == bool:
        grey = grey.view(np.uint8) * np.uint8(255)
    return {size: cv2.transpose(level) >= 128 for size, level in to_sizes(grey, sizes).items()}


class _NpyStream:
    """A .npy file written row by row; hashed on the way, and again only if fewer rows came than announced."""

    def __init__(self, path: Path, rows: int, shape: tuple[int, ...]) -> None:
        self._path, self._announced, self._shape, self.rows = path, rows, shape, 0
        self._file: BinaryIO = open(path, "wb")
        self._hash = hashlib.sha256()
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._put(self._header(rows))

    def _header(self, rows: int) -> bytes:
        text = io.BytesIO()
        fields = {"descr": "|u1", "fortran_order": False, "shape": (rows, *self._shape)}
        np.lib.format.write_array_header_1_0(text, fields)
        assert len(text.getvalue()) == HEADER_BYTES
        return text.getvalue()

    def _put(self, data: Any) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._unflushed += len(data)
        if self._unflushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._wait()
            self._flush, self._unflushed = self._flusher.submit(os.fdatasync, self._file.fileno()), 0

    def _wait(self) -> None:
        """Wait for what is being flushed; a disk's error counts as one of writing."""
        if self._flush is not None:
            self._flush.result()

    def add(self, row: np.ndarray) -> None:
        """Append one uint8 array of the row's shape."""
        self._put(np.ascontiguousarray(row).data.cast("B"))
        self.rows += 1

    def close(self) -> str:
        """Finish the file and return its sha256."""
        if self.rows != self._announced:
            # numpy pads headers for growing first axes: the length stays, the rows need not move.
            self._file.seek(0)
            self._file.write(self._header(self.rows))
        self._wait()
        self.abort()
        return self._hash.hexdigest() if self.rows == self._announced else sha256_file(self._path)

    def abort(self) -> None:
        """Close the file as it is."""
        self._flusher.shutdown()
        self._file.close()


class ShardWriter:
    """Writes one shard in all sizes at once; use as a context manager, then `finish` inside it.

    Leaving without `finish`, by an error or a stop, leaves nothing behind.
    """

    def __init__(self, folder: Path, shard: int, count: int, sizes: Iterable[int], films: int) -> None:
        self._folder, self._shard, self._count, self._sizes, self._films = (
            Path(folder),
            shard,
            count,
            list(sizes),
            films,
        )
        self._stack = ExitStack()
        self._images: dict[int, _NpyStream] = {}
        self._masks: dict[int, list[bytes]] = {size: [] for size in self._sizes}
        self._positives: list[int] = []
        self._paths: list[tuple[Path, Path]] = []
        self._done = False

    def __enter__(self) -> ShardWriter:
        for size in self._sizes:
            temporary = self._stack.enter_context(
                atomic_path(self._folder / image_name(size, self._shard, self._count))
            )
            self._images[size] = _NpyStream(temporary, self._films, (size, size))
        return self

    def add(self, images: dict[int, np.ndarray], masks: dict[int, bytes] | None) -> None:
        """Append one film: uint8 (size, size) per size, and for a positive film its packed masks."""
        if masks is not None:
            self._positives.append(self._images[self._sizes[0]].rows)
        for size in self._sizes:
            self._images[size].add(images[size])
            if masks is not None:
                self._masks[size].append(masks[size])

    def finish(self) -> dict[int, dict[str, Any]]:
        """Close the files; return per size what its part manifest says. They get their names when the block ends."""
        parts = {}
        for size in self._sizes:
            images, masks = image_name(size, self._shard, self._count), mask_name(size, self._shard, self._count)
            temporary = self._stack.enter_context(atomic_path(self._folder / masks))
            stream = _NpyStream(temporary, len(self._positives), (size * size // 8,))
            for packed in self._masks[size]:
                stream.add(np.frombuffer(packed, np.uint8))
            hashes = {images: self._images[size].close(), masks: stream.close()}
            parts[size] = {
                "size": size,
                "shard": self._shard,
                "of": self._count,
                "films": self._images[size].rows,
                "positives": self._positives,
                "files": hashes,
            }
        self._done = True
        return parts

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        for stream in self._images.values():
            stream.abort()
        if kind is None and not self._done:
            value = RuntimeError("a shard was left without finish()")
            self._stack.__exit__(RuntimeError, value, None)
            raise value
        self._stack.__exit__(kind, value, trace)


def map_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Map a uint8 .npy file read-only; its size is checked first, for a short file would be a SIGBUS later.

    Raises:
        ConfigError: missing, of another shape, or cut short.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path}: cannot map the shard ({error}): check it with --stage preprocess --verify"
        ) from None
    if array.shape != shape or array.dtype != np.uint8:
        raise ConfigError(f"{path}: shape {array.shape} {array.dtype}, not {shape} uint8: preprocess again")
    return array


class ShardReader:
    """Reads images and masks of one size out of a finished shard directory.

    Files are mapped at first use in each process, and the maps are left out of a pickle: a pickled memmap would
    be a full copy.
    """

    def __init__(self, shard_dir: Path, size: int) -> None:
        """Open the directory. Raises ConfigError where it is unfinished or has no such size."""
        self.shard_dir, self.size = Path(shard_dir), size
        try:
            self.count = int(read_json(self.shard_dir / f"manifest-{size}.json")["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{shard_dir}: no finished shards of {size} px here: run --stage preprocess") from None
        self._images: dict[int, np.ndarray] = {}
        self._masks: dict[int, tuple[np.ndarray, dict[int, int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": {}, "_masks": {}}

    def _part(self, shard: int) -> dict[str, Any]:
        return read_json(self.shard_dir / size_name(self.size, shard, self.count))

    def image(self, shard: int, row: int) -> np.ndarray:
        """Return one image, uint8 (size, size), a copy."""
        if shard not in self._images:
            path = self.shard_dir / image_name(self.size, shard, self.count)
            self._images[shard] = map_array(path, (self._part(shard)["films"], self.size, self.size))
        return np.array(self._images[shard][row])

    def mask(self, shard: int, row: int) -> np.ndarray:
        """Return one mask, uint8 (size, size) of 0 and 1, a copy."""
        if shard not in self._masks:
            rows = {film: at for at, film in enumerate(self._part(shard)["positives"])}
            path = self.shard_dir / mask_name(self.size, shard, self.count)
            packed = map_array(path, (len(rows), self.size**2 // 8)) if rows else np.zeros((0, 0), np.uint8)
            self._masks[shard] = packed, rows
        packed, rows = self._masks[shard]
        if row not in rows:
            return np.zeros((self.size, self.size), dtype=np.uint8)
        return np.unpackbits(packed[rows[row]]).reshape(self.size, self.size)
