"""Films a second and core: preprocessing to two sizes beside decoding alone and beside a plain loop.

    python -m tests.benchmarks preprocess [--films DIR --csv FILE] [--rounds 5]

Without films, phantom films of 1024 px serve. The contestants run in turns in one process, several rounds, and the
median of films by second of processor time counts. The last row is the whole job with all its processes, from an
empty directory to finished shards.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pydicom
import simplejpeg
from PIL import Image
from pydicom.encaps import get_frame

from pneumo_dist import config as configuration
from pneumo_dist.data.films.rle import decode_union
from pneumo_dist.data.phantom import make_phantom
from pneumo_dist.data.preprocess import decoding, preprocess
from pneumo_dist.data.preprocess.source import FilmJob, read_source
from pneumo_dist.run import Run
from pneumo_dist.runtime.processes import keep_memory
from pneumo_dist.runtime.task import Task
from tests.benchmarks import frame

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
    """Return what is measured by name; each call handles every film once and keeps none of them."""
    frames = [get_frame(pydicom.dcmread(folder / job.path).PixelData, 0, number_of_frames=1) for job in jobs]
    half = [{"min_height": pixels.shape[0] // 2, "min_width": pixels.shape[1] // 2} for pixels in map(_exact, frames)]
    images = {size: np.empty((size, size), np.uint8) for size in SIZES}

    def each(handle: Callable[..., object], *items: Sequence[object]) -> Callable[[], object]:
        return lambda: deque(map(handle, *items), maxlen=0)

    return {
        "decoding alone, libjpeg-turbo through Pillow": each(lambda f: np.asarray(Image.open(io.BytesIO(f))), frames),
        "decoding alone, libjpeg-turbo through OpenCV": each(
            lambda f: cv2.imdecode(np.frombuffer(f, np.uint8), cv2.IMREAD_GRAYSCALE), frames
        ),
        "decoding alone, libjpeg-turbo through simplejpeg": each(_exact, frames),
        "pneumo_dist, file to two sizes and masks": each(
            lambda job: decoding.decode_film(job, folder, LIMIT, images), jobs
        ),
        "pydicom, its default decoder, cv2.resize": each(lambda job: plain_loop(folder, job), jobs),
        "decoding at half size in the DCT (not offered)": each(
            lambda f, size: simplejpeg.decode_jpeg(f, "GRAY", min_factor=1, **size), frames, half
        ),
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
        preprocess.write_shards(Task(run=Run(Path(out), config), stage="preprocess"))
        return films / (cpu_s() - used), films / (time.perf_counter() - begin)


def main() -> int:
    """Measure what the command line asks for."""
    parser = frame.arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--films", type=Path, help="a folder of DICOMs (default: phantom films)")
    parser.add_argument("--csv", type=Path, help="their annotations")
    asked = parser.parse_args()
    cv2.setNumThreads(0)
    keep_memory()
    clock: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        films, csv = asked.films, asked.csv
        if films is None or csv is None:
            csv = make_phantom(Path(work), 60, 1024)["train-rle.csv"]
            films = Path(work) / "dicom-images-train"
        config = configuration.load(None, [f"data.dicom_dir={films}", f"data.rle_csv={csv}", "data.shards=4"])
        source = read_source(Run(Path(work), config))
        jobs = [job for shard in source.jobs for job in shard]

        def by_core(call: Callable[[], object]) -> float:
            begin = time.process_time()
            call()
            return len(jobs) / (time.process_time() - begin)

        def job_by_core() -> float:
            core, wall = whole_job(config, len(jobs))
            clock.append(wall)
            return core

        turns = {name: lambda call=call: by_core(call) for name, call in contestants(source.folder, jobs).items()} | {
            "whole job, all its processes": job_by_core
        }
        found = frame.in_turns(turns, asked.rounds)
        mean, largest = half_size_distance(source.folder, jobs)
    best = max((n for n in found if n.startswith("decoding alone")), key=lambda n: statistics.median(found[n]))
    title = f"Preprocessing to {SIZES[0]} and {SIZES[1]} px, {len(jobs)} films"
    table = frame.speed_table(title, "films/s and core", found, best, "time over the fastest decoder's")
    table.notes = [
        f"decoding at half size is off the exact way, at 512 px, by mean {mean:.2f}, at most {largest} grey levels",
        f"the whole job makes {statistics.median(clock):.0f} films/s by the clock on {frame.cores()} cores",
    ]
    return frame.report([table], asked)


if __name__ == "__main__":
    sys.exit(main())
