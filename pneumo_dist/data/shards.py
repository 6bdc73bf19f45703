"""Shard files: resizing of films, streaming writer, lazy memory-mapped reader.

A file takes its final name only when it is complete. Its content does not depend on time, host or number of processes:
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

HEADER_BYTES = 128  # of each .npy file of a shard
FLUSH_BYTES = 16 << 20  # flushed while decoding goes on; else the fsync at the end would wait for the whole shard
# Temporary files that a killed writer leaves (see runtime/files.py).
TEMPORARY = re.compile(r"^\.(?P<stem>.+)\.[0-9a-f]{8}\.tmp(\.\w+)?$")
OURS = re.compile(r"^(images|masks|size)-(\d+)-(\d{5})-of-(\d{5})\.(npy|json)$|^films-(\d{5})-of-(\d{5})\.json$")


def image_name(size: int, shard: int, count: int) -> str:
    """Return the file name of the images of one shard: uint8 (n, size, size)."""
    return f"images-{size}-{shard:05d}-of-{count:05d}.npy"


def mask_name(size: int, shard: int, count: int) -> str:
    """Return the file name of the masks of one shard: uint8 (positive films, size * size / 8), one bit per pixel."""
    return f"masks-{size}-{shard:05d}-of-{count:05d}.npy"


def size_name(size: int, shard: int, count: int) -> str:
    """Return the name of the part manifest of a shard and size. It is written last: its presence marks completion."""
    return f"size-{size}-{shard:05d}-of-{count:05d}.json"


def films_name(shard: int, count: int) -> str:
    """Return the name of the list of the films of one shard, which does not depend on sizes."""
    return f"films-{shard:05d}-of-{count:05d}.json"


def to_sizes(
    pixels: np.ndarray, sizes: Iterable[int], into: Mapping[int, np.ndarray] | None = None
) -> dict[int, np.ndarray]:
    """Return {size: uint8 (size, size)} of a uint8 (rows, columns) film; the aspect ratio is not kept.

    The film is halved by 2 x 2 means while both sides are even and at least twice the target, then resized by area
    (linearly if a side grows). Sizes share their halvings, so each is computed once. Compared with one direct area
    mean, a pixel differs by at most one grey level per halving beyond the first.

    Args:
        into: arrays for the results, by size; saves a copy into shared memory.
    """
    import cv2  # not at the top: submit.py imports the file names without loading OpenCV

    level, resized = pixels, {}
    for size in sorted(set(sizes), reverse=True):
        target = into[size] if into else np.empty((size, size), np.uint8)
        while min(level.shape) >= 2 * size and level.shape[0] % 2 == level.shape[1] % 2 == 0:
            half = level.shape[1] // 2, level.shape[0] // 2
            level = cv2.resize(level, half, target if half == (size, size) else None, interpolation=cv2.INTER_AREA)
        if level.shape == (size, size):
            if level is not target:
                target[:] = level
        else:
            interpolation = cv2.INTER_AREA if min(level.shape) >= size else cv2.INTER_LINEAR
            cv2.resize(level, (size, size), target, interpolation=interpolation)
        resized[size] = target
    return resized


def to_size(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return a uint8 (rows, columns) film as uint8 (size, size), the input of the network."""
    return to_sizes(pixels, [size])[size]


def masks_to_sizes(mask: np.ndarray, sizes: Iterable[int]) -> dict[int, np.ndarray]:
    """Return {size: bool (size, size)} of a (rows, columns) mask: true where at least half of a pixel is inside.

    The mask is bool, or uint8 with 255 inside, which saves a conversion.
    """
    import cv2

    # Decoded masks are column-major in memory: transposing the small results is cheaper.
    grey = np.ascontiguousarray(mask.T)
    if grey.dtype == bool:
        grey = grey.view(np.uint8) * np.uint8(255)
    return {size: cv2.transpose(level) >= 128 for size, level in to_sizes(grey, sizes).items()}


class _NpyStream:
    """A .npy file written row by row and hashed meanwhile; hashed again only if fewer rows came than announced."""

    def __init__(self, path: Path, rows: int, shape: tuple[int, ...]) -> None:
        self._path, self._announced, self._shape, self.rows = path, rows, shape, 0
        self._file: BinaryIO = path.open("wb")
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
        """Wait for the flush in progress; raise its disk error."""
        if self._flush is not None:
            self._flush.result()

    def add(self, row: np.ndarray) -> None:
        """Append one uint8 array of the row's shape."""
        self._put(np.ascontiguousarray(row).data.cast("B"))
        self.rows += 1

    def close(self) -> str:
        """Finish the file and return its sha256."""
        if self.rows != self._announced:
            # numpy pads headers so that the first axis may grow: the new header has the same length.
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
    """Write one shard in all sizes at once. Use as a context manager and call `finish` inside it.

    Without `finish`, after an error or a stop, no file remains.
    """

    def __init__(self, folder: Path, shard: int, count: int, sizes: Iterable[int], films: int) -> None:
        self._folder, self._sizes = Path(folder), list(sizes)
        self._shard, self._count, self._films = shard, count, films
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
        """Append one film: uint8 (size, size) per size, and the packed masks of a positive film."""
        if masks is not None:
            self._positives.append(self._images[self._sizes[0]].rows)
        for size in self._sizes:
            self._images[size].add(images[size])
            if masks is not None:
                self._masks[size].append(masks[size])

    def finish(self) -> dict[int, dict[str, Any]]:
        """Close the files and return the part manifest of each size. The block's end renames the files."""
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
            value = RuntimeError("ShardWriter was left without finish()")
            self._stack.__exit__(RuntimeError, value, None)
            raise value
        self._stack.__exit__(kind, value, trace)


def map_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Map a uint8 .npy file read-only.

    numpy checks the length first: reading past the end of a truncated file would end the process with SIGBUS.

    Raises:
        ConfigError: the file is missing, truncated or of another shape.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path}: cannot map the shard ({error}): check it with --stage preprocess --verify"
        ) from None
    if array.shape != shape or array.dtype != np.uint8:
        raise ConfigError(f"{path}: shape {array.shape} {array.dtype}, not {shape} uint8: preprocess again")
    return array


class ShardReader:
    """Read images and masks of one size from a finished shard directory.

    Files are mapped at first use in each process. A pickle excludes the maps, since a pickled memmap is a full copy.
    """

    def __init__(self, shard_dir: Path, size: int) -> None:
        """Open the directory. Raises ConfigError if it is unfinished or lacks this size."""
        self.shard_dir, self.size = Path(shard_dir), size
        try:
            self.count = int(read_json(self.shard_dir / f"manifest-{size}.json")["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{shard_dir}: no finished shards of {size} px: run --stage preprocess") from None
        self._images: dict[int, np.ndarray] = {}
        self._masks: dict[int, tuple[np.ndarray, dict[int, int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": {}, "_masks": {}}

    def _part(self, shard: int) -> dict[str, Any]:
        return dict(read_json(self.shard_dir / size_name(self.size, shard, self.count)))

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
