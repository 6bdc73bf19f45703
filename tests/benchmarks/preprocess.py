"""Films a second and core: preprocessing to two sizes beside decoding alone and beside a plain loop.

    python tests/benchmarks/preprocess.py [--films DIR --csv FILE] [--rounds 5] [--json FILE]

Without films, phantom films of 1024 px serve. All contestants run in turns in one process on one core, several
rounds; the figure is the median. The last rows are the whole job with all cores. Needs nothing that is not installed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pydicom  # noqa: E402
import simplejpeg  # noqa: E402
from PIL import Image  # noqa: E402
from pydicom.encaps import get_frame  # noqa: E402

from pneumo_dist import config as configuration  # noqa: E402
from pneumo_dist.data import decoding, preprocess  # noqa: E402
from pneumo_dist.data.phantom import make_phantom  # noqa: E402
from pneumo_dist.data.rle import decode_union  # noqa: E402
from pneumo_dist.data.source import FilmJob, read_source  # noqa: E402
from pneumo_dist.runtime.task import Task  # noqa: E402

SIZES = (256, 512)
LIMIT = 64_000_000


def plain_loop(folder: Path, job: FilmJob) -> None:
    """Do what a first script does: pydicom, its default decoder, cv2.resize, masks likewise."""
    film = pydicom.dcmread(folder / job.path)
    pixels = film.pixel_array
    mask = decode_union(job.texts, *pixels.shape).astype(np.uint8) if job.texts != ("-1",) else None
    for size in SIZES:
        cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
        if mask is not None:
            cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST)


def contestants(folder: Path, jobs: list[FilmJob]) -> dict[str, Callable[[], object]]:
    """Return what is measured by name; each call handles every film once."""
    frames = [get_frame(pydicom.dcmread(folder / job.path).PixelData, 0, number_of_frames=1) for job in jobs]
    half = [dict(min_height=pixels.shape[0] // 2, min_width=pixels.shape[1] // 2) for pixels in map(_exact, frames)]
    return {
        "decoding alone, libjpeg-turbo through Pillow": lambda: [np.asarray(Image.open(io.BytesIO(f))) for f in frames],
        "decoding alone, libjpeg-turbo through OpenCV": lambda: [
            cv2.imdecode(np.frombuffer(f, np.uint8), cv2.IMREAD_GRAYSCALE) for f in frames
        ],
        "decoding alone, libjpeg-turbo through simplejpeg": lambda: [_exact(f) for f in frames],
        "pneumo_dist, file to two sizes and masks": lambda: [
            decoding._facts(job, folder, SIZES, LIMIT) for job in jobs
        ],
        "pydicom, its default decoder, cv2.resize": lambda: [plain_loop(folder, job) for job in jobs],
        "decoding at half size in the DCT (not offered)": lambda: [
            simplejpeg.decode_jpeg(f, "GRAY", min_factor=1, **size) for f, size in zip(frames, half, strict=True)
        ],
    }


def _exact(frame: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(frame, "GRAY", strict=True)[..., 0]


def half_size_distance(folder: Path, jobs: list[FilmJob]) -> tuple[float, int]:
    """Return (mean, largest) distance in grey levels of the half-size decode from the exact way at 512 px."""
    mean, largest = [], 0
    for job in jobs[:40]:
        frame = get_frame(pydicom.dcmread(folder / job.path).PixelData, 0, number_of_frames=1)
        exact = decoding.to_size(_exact(frame), 512).astype(int)
        quick = simplejpeg.decode_jpeg(frame, "GRAY", min_height=512, min_width=512, min_factor=1)[..., 0]
        distance = np.abs(decoding.to_size(np.ascontiguousarray(quick), 512) - exact)
        mean.append(float(distance.mean()))
        largest = max(largest, int(distance.max()))
    return statistics.mean(mean), largest


def whole_job(task: Task, films: int) -> float:
    """Run the array's one element on all cores; return films a second."""
    with tempfile.TemporaryDirectory() as out:
        begin = time.perf_counter()
        preprocess.run_part(Task(config=task.config, run_dir=Path(out), stage="preprocess"))
        return films / (time.perf_counter() - begin)


def run(
    device: str = "cpu", films: Path | None = None, csv: Path | None = None, rounds: int = 5
) -> list[dict[str, Any]]:
    """Measure; return rows of name, median (films a second and core), low, high, ratio to the fastest plain decoder."""
    cv2.setNumThreads(0)
    decoding.keep_memory()
    with tempfile.TemporaryDirectory() as work:
        if films is None or csv is None:
            csv = make_phantom(Path(work), 60, 1024)["train-rle.csv"]
            films = Path(work) / "dicom-images-train"
        words = [f"data.dicom_dir={films}", f"data.rle_csv={csv}", "data.shards=4"]
        config = configuration.load(None, words)
        source = read_source(config, Path(work))
        jobs = [job for shard in source.jobs for job in shard]
        found: dict[str, list[float]] = {}
        every = contestants(source.folder, jobs)
        for _ in range(rounds):
            for name, call in every.items():
                begin = time.perf_counter()
                call()
                found.setdefault(name, []).append(len(jobs) / (time.perf_counter() - begin))
            cores = len(os.sched_getaffinity(0))
            rate = whole_job(Task(config=config, run_dir=Path(work), stage="preprocess"), len(jobs))
            found.setdefault(f"whole job on {cores} cores, a core", []).append(rate / cores)
        mean, largest = half_size_distance(source.folder, jobs)
    best = max(statistics.median(rates) for name, rates in found.items() if name.startswith("decoding alone"))
    rows = [
        {
            "name": name,
            "median": statistics.median(rates),
            "low": min(rates),
            "high": max(rates),
            "unit": "films/s and core",
            "ratio": best / statistics.median(rates),  # time, in units of the fastest exact decode alone
        }
        for name, rates in found.items()
    ]
    for row in rows:
        if "half size" in row["name"]:
            row["note"] = f"grey levels off the exact way at 512 px: mean {mean:.2f}, largest {largest}"
    return rows


def main() -> int:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = run("cpu", options.films, options.csv, options.rounds)
    for row in rows:
        spread = f"{row['low']:.0f} to {row['high']:.0f}"
        print(
            f"{row['name']:52} {row['median']:7.1f} {row['unit']} ({spread}), time x{row['ratio']:.2f} {row.get('note', '')}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
