"""Films per second of batch inference, beside the bare forward pass and beside a plain loop, in one run.

    python -m tests.benchmarks infer [--films DIR | --count 48] [--size 512] [--outputs csv,masks] [--rounds 3]

CPU seconds (helpers included) are shown as well: on a machine that others use they tell more than the clock.

All three use the same weights, flips and device (the plain loop in the layout a network is built in); the variants take turns, so that a busy machine hits all alike.
Bare: uint8 tensors already in memory, nothing read, nothing written. Plain loop: pydicom, resize, forward, one film
after the other, mask and RLE kept in memory. End to end: `infer` with its files, from folder to merged submission.
"""

from __future__ import annotations

import argparse
import logging
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pneumo_dist.config import load
from pneumo_dist.data.films.dicom import read_film
from pneumo_dist.data.films.listing import find_films
from pneumo_dist.data.films.rle import encode_rle
from pneumo_dist.data.phantom import make_phantom
from pneumo_dist.data.shards import to_size
from pneumo_dist.inference import infer
from pneumo_dist.inference.film_plan import write_film_plan
from pneumo_dist.model.modelfile import load_model, save_model
from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.prediction.predictor import Forward, Predictor
from pneumo_dist.run import Run
from pneumo_dist.runtime.task import Task
from tests.benchmarks import frame

BARE = "bare forward"


def bare(predictor: Predictor, images: torch.Tensor, batch: int) -> None:
    """Forward preloaded films, one batch in flight ahead of the one waited for."""
    waiting: Callable[[], Forward] | None = None
    for start in range(0, len(images), batch):
        started = predictor.launch(images[start : start + batch])
        if waiting:
            waiting()
        waiting = started
    if waiting:
        waiting()


@torch.inference_mode()
def plain_loop(model: torch.nn.Module, paths: list[Path], size: int, device: torch.device, tta: str) -> None:
    """What one writes first: read, resize, forward, threshold, one film at a time."""
    import cv2
    import pydicom

    dtype = amp_dtype("auto", device)
    for path in paths:
        pixels = pydicom.dcmread(path).pixel_array
        small = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
        image = torch.from_numpy(small)[None, None].to(device)
        inputs = normalise(image)
        with autocast(dtype, device):
            prob = torch.sigmoid(model(inputs)[0].float())
            if tta == "hflip":
                prob = (prob + torch.sigmoid(model(inputs.flip(-1))[0].float()).flip(-1)) / 2
        wide = cv2.resize(prob[0, 0].cpu().numpy(), pixels.shape[::-1], interpolation=cv2.INTER_LINEAR)
        encode_rle(wide > 0.5)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the helpers that have ended."""
    return sum(
        use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def end_to_end(run_dir: Path, films: Path, model: Path, options: argparse.Namespace) -> None:
    """Run the whole inference: plan, array task, merge."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir()
    config = load(
        None,
        [f"infer.dir={films}", f"infer.models={model}", f"infer.outputs={options.outputs}", "infer.label=bench",
         f"infer.batch_size={options.batch}", f"data.workers={options.workers}"],
    )  # fmt: skip
    write_film_plan(Run(run_dir, config))
    infer.infer_parts(Task(run=Run(run_dir, config), stage="infer"))
    infer.merge(Task(run=Run(run_dir, config), stage="merge"))


def films_of(asked: argparse.Namespace, folder: Path) -> list[Path]:
    """Return the films to infer on, flat in `folder`: phantom ones, or copies of the first that were given."""
    if asked.films is None:
        make_phantom(folder, asked.count, 1024, 0)
    else:
        folder.mkdir()
        for name, path in find_films(asked.films)[0][: asked.count]:
            shutil.copyfile(asked.films / path, folder / f"{Path(name).name}.dcm")
    return [folder / path for _, path in find_films(folder)[0]]


def main() -> int:
    """Measure what the command line asks for."""
    parser = frame.arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--films", type=Path, help="folder of films; default: phantom ones of 1024x1024")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--outputs", default="csv,masks")
    parser.add_argument("--tta", default="hflip")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    device = torch.device(asked.device)
    torch.set_num_threads(frame.cores())
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = films_of(asked, folder / "films")
        file = folder / "model.pt"
        save_model(file, ResNet34UNet(0).state_dict(), {"size": asked.size, "threshold": 0.5, "tta": asked.tta})
        model, _ = load_model(file, device)
        plain = ResNet34UNet(0).eval().to(device)  # laid out as it is built
        predictor = Predictor([model], asked.size, device, asked.tta)
        images = torch.from_numpy(np.stack([to_size(read_film(path).pixels, asked.size) for path in paths]))[:, None]
        if device.type == "cuda":
            images = images.pin_memory()
        bare(predictor, images[: 4 * asked.batch], asked.batch)  # warm up
        variants: dict[str, Callable[[], object]] = {
            BARE: lambda: bare(predictor, images, asked.batch),
            "end to end": lambda: end_to_end(folder / "run", folder / "films", file, asked),
            "plain loop": lambda: plain_loop(plain, paths, asked.size, device, asked.tta),
        }

        def turn(name: str) -> float:
            begin, cpu = time.perf_counter(), cpu_seconds()
            variants[name]()
            took = time.perf_counter() - begin
            spent.setdefault(name, []).append(cpu_seconds() - cpu)
            return len(paths) / took

        found = frame.in_turns({name: lambda name=name: turn(name) for name in variants}, asked.rounds)
    title = f"Inference: {len(paths)} films, {asked.size} px, flips {asked.tta}, outputs {asked.outputs}"
    table = frame.speed_table(title, "films/s", found, BARE, "of bare", invert=True)
    table.columns.append("CPU s a film")
    for row in table.rows:
        row.append(statistics.median(spent[row[0]]) / len(paths))
    return frame.report([table], asked)


if __name__ == "__main__":
    sys.exit(main())
