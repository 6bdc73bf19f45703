"""Films per second of batch inference, beside the bare forward pass and beside a plain loop, in one run.

    python tests/benchmarks/infer.py [--films DIR | --count 48] [--size 512] [--outputs csv,masks] [--repeat 2]

CPU seconds (helpers included) are shown as well: on a machine that others use they tell more than the clock.

All three use the same weights, flips and device; the variants take turns, so that a busy machine hits all alike.
Bare: uint8 tensors already in memory, nothing read, nothing written. Plain loop: pydicom, resize, forward, one film
after the other, mask and RLE kept in memory. End to end: `infer` with its files, from folder to merged submission.
"""

from __future__ import annotations

import argparse
import json
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pneumo_dist.config import load
from pneumo_dist.data.cases import find_films
from pneumo_dist.data.decoding import cores
from pneumo_dist.data.dicom import read_film
from pneumo_dist.data.phantom import make_phantom
from pneumo_dist.data.rle import encode_rle
from pneumo_dist.data.shards import to_size
from pneumo_dist.model.modelfile import load_model, save_model
from pneumo_dist.model.precision import amp_dtype, autocast
from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.prediction import infer
from pneumo_dist.prediction.predictor import Predictor
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.task import Task


def bare(predictor: Predictor, images: torch.Tensor, batch: int) -> None:
    """Forward preloaded films, one batch in flight ahead of the one waited for."""
    waiting: Callable[[], torch.Tensor] | None = None
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
            prob = torch.sigmoid(model(inputs).float())
            if tta == "hflip":
                prob = (prob + torch.sigmoid(model(inputs.flip(-1)).float()).flip(-1)) / 2
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
    infer.plan(config, run_dir)
    infer.run_part(Task(config=config, run_dir=run_dir, stage="infer"))
    infer.merge(Task(config=config, run_dir=run_dir, stage="merge"))


def main() -> None:
    """Measure and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path, help="folder of films; default: synthetic ones of 1024x1024")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--outputs", default="csv,masks")
    parser.add_argument("--tta", default="hflip")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-loop", action="store_true", help="leave the plain loop out")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    device = Ranks().device
    if device.type == "cpu":
        torch.set_num_threads(cores(0))
    with tempfile.TemporaryDirectory() as folder:
        films = options.films
        if films is None:
            films = Path(folder) / "films"
            make_phantom(films, options.count, 1024, 0)
        else:  # a copy of the first ones, flat
            films = Path(folder) / "films"
            films.mkdir()
            for name, path in find_films(options.films)[0][: options.count]:
                shutil.copyfile(options.films / path, films / f"{Path(name).name}.dcm")
        paths = [films / path for _, path in find_films(films)[0]]
        file = Path(folder) / "model.pt"
        meta = {"size": options.size, "threshold": 0.5, "tta": options.tta}
        save_model(file, ResNet34UNet(0).state_dict(), meta)
        model, _ = load_model(file, device)
        if device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        predictor = Predictor([model], options.size, device, options.tta)
        images = torch.from_numpy(np.stack([to_size(read_film(path).pixels, options.size) for path in paths]))[:, None]
        if device.type == "cuda":
            images = images.pin_memory()
        bare(predictor, images[: 4 * options.batch], options.batch)  # warm up
        variants: dict[str, Callable[[], object]] = {
            "bare forward": lambda: bare(predictor, images, options.batch),
            "end to end": lambda: end_to_end(Path(folder) / "run", films, file, options),
            "plain loop": lambda: plain_loop(model, paths, options.size, device, options.tta),
        }
        if options.no_loop:
            del variants["plain loop"]
        clock: dict[str, list[float]] = {name: [] for name in variants}
        spent: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(options.repeat):
            for name, variant in variants.items():
                begin, cpu = time.perf_counter(), cpu_seconds()
                variant()
                clock[name].append(time.perf_counter() - begin)
                spent[name].append(cpu_seconds() - cpu)
    rates = {name: len(paths) / statistics.median(seconds) for name, seconds in clock.items()}
    cpu_s = {name: statistics.median(seconds) / len(paths) for name, seconds in spent.items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {cores(0)} cores"
    print(f"{len(paths)} films, {options.size} px, flips {options.tta}, outputs {options.outputs}, {name}")
    for label, rate in rates.items():
        share = rate / rates["bare forward"]
        print(f"{label:16}{rate:10.2f} films/s{share:8.2f} of the bare forward pass{cpu_s[label]:10.3f} CPU s/film")
    print(json.dumps({"device": name, "films": len(paths), "size": options.size, "films_per_s": rates, "cpu_s": cpu_s}))


if __name__ == "__main__":
    main()
