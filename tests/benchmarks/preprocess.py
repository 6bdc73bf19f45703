"""Films a second and core: preprocessing to two sizes beside decoding alone and beside a plain loop.

    python tests/benchmarks/preprocess.py [--films DIR --csv FILE] [--rounds 5] [--json FILE]

Without films, phantom films of 1024 px serve. The contestants run in turns in one process, several rounds, and the
median of films by second of processor time counts. The last row is the whole job with all its processes, from an
empty directory to finished shards.
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


def cpu_s() -> float:
    """Return the processor time of this process and its ended children: other work on the machine disturbs it least."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def whole_job(config: configuration.Config, films: int) -> tuple[float, float]:
    """Run the array's one element on all cores; return films a second of processor time and of the clock."""
    with tempfile.TemporaryDirectory() as out:
        begin, used = time.perf_counter(), cpu_s()
        preprocess.run_part(Task(config=config, run_dir=Path(out), stage="preprocess"))
        return films / (cpu_s() - used), films / (time.perf_counter() - begin)


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
        clock: list[float] = []
        every = contestants(source.folder, jobs)
        for _ in range(rounds):
            for name, call in every.items():
                begin = time.process_time()
                call()
                found.setdefault(name, []).append(len(jobs) / (time.process_time() - begin))
            by_core, by_clock = whole_job(config, len(jobs))
            found.setdefault("whole job, all its processes", []).append(by_core)
            clock.append(by_clock)
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
            row["note"] = f"at 512 px off the exact way by mean {mean:.2f}, at most {largest} grey levels"
        if row["name"].startswith("whole job"):
            cores = len(os.sched_getaffinity(0))
            row["note"] = f"{statistics.median(clock):.0f} films/s by the clock on {cores} cores"
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
        figures = f"{row['median']:7.1f} {row['unit']} ({spread}), time x{row['ratio']:.2f}"
        print(f"{row['name']:50} {figures}  {row.get('note', '')}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
