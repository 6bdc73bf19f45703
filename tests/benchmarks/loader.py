"""Images a second and worker of the training loader beside other ways to feed the same films; and beside the step.

    python -m tests.benchmarks loader [--films DIR --csv FILE] [--sizes 256,512] [--rounds 5] [--plain]

Contestants give the same uint8 image and mask through the same augmentation in batches of the same size, one worker
process each, in turns: (ours) memory-mapped shards; DICOM decoded on the fly; one PNG per film and mask;
mosaicml-streaming and webdataset with raw arrays. Images by second of the worker's processor time count. Our worker's
anonymous memory over an epoch comes with it. The second table is the loader alone, by the clock, over what the step
consumes.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pneumo_dist import config as configuration
from pneumo_dist.data.augment import Augmenter
from pneumo_dist.data.cases import Case, read_cases
from pneumo_dist.data.films.dicom import read_film
from pneumo_dist.data.films.rle import decode_rle
from pneumo_dist.data.loaders import FilmDataset, TrainBatches, make_loader
from pneumo_dist.data.phantom import make_phantom
from pneumo_dist.data.preprocess import preprocess
from pneumo_dist.data.preprocess.finalize import finalize
from pneumo_dist.data.shards import ShardReader, masks_to_sizes, to_size
from pneumo_dist.run import Run
from pneumo_dist.runtime.task import Task
from tests.benchmarks import contestants, frame
from tests.benchmarks.frame import Table

BATCH = 16
EPOCHS = 6
OURS = "pneumo_dist, memory-mapped shards"
Pair = tuple[np.ndarray, np.ndarray]


class Other(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A dataset whose key (epoch, index) is read by `read(index)` and augmented as ours is."""

    def __init__(self, read: Callable[[int], Pair], augmenter: Augmenter | None) -> None:
        self.read, self.augmenter = read, augmenter

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.read(key[1])
        image, mask = self.augmenter(*pair, *key) if self.augmenter else pair
        return torch.from_numpy(image)[None], torch.from_numpy(mask)[None]


def quiet(_: int) -> None:
    """Give a worker one thread, as ours has."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def loader_of(dataset: Dataset[Any], n: int) -> Iterable[Any]:
    """Return torch's ordinary loader over the same batches."""
    batches = list(TrainBatches(n, BATCH, 0, EPOCHS))
    return DataLoader(dataset, batch_sampler=batches, num_workers=1, worker_init_fn=quiet, prefetch_factor=4)


def pngs(folder: Path, pairs: list[Pair]) -> Callable[[int], Pair]:
    """Write one PNG per image and mask; return their reader."""
    folder.mkdir()
    for i, (image, mask) in enumerate(pairs):
        cv2.imwrite(str(folder / f"{i}.png"), image)
        cv2.imwrite(str(folder / f"{i}-mask.png"), mask)

    def read(i: int) -> Pair:
        image, mask = (cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED) for name in (f"{i}.png", f"{i}-mask.png"))
        return image, mask

    return read


def streaming_loader(folder: Path, pairs: list[Pair], size: int, augmenter: Augmenter | None) -> Iterable[Any]:
    """mosaicml-streaming: raw arrays in its own shards, its own shuffle, read from the local disk."""
    from pneumo_dist.model.pretrained import import_torchvision

    import_torchvision()  # streaming imports it
    import streaming

    shape = f"ndarray:uint8:{size},{size}"
    with streaming.MDSWriter(out=str(folder), columns={"image": shape, "mask": shape}) as writer:
        for image, mask in pairs:
            writer.write({"image": image, "mask": mask})

    class Films(streaming.StreamingDataset):
        def __getitem__(self, i: int) -> Any:
            sample = super().__getitem__(i)
            pair = np.array(sample["image"]), np.array(sample["mask"])
            image, mask = augmenter(*pair, 0, int(i)) if augmenter else pair
            return torch.from_numpy(image)[None], torch.from_numpy(mask)[None]

    dataset = Films(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)

    class Repeated:
        def __iter__(self) -> Iterator[Any]:
            loader = DataLoader(
                dataset, batch_size=BATCH, num_workers=1, drop_last=True, worker_init_fn=quiet, prefetch_factor=4,
                persistent_workers=True,
            )  # fmt: skip
            for _ in range(EPOCHS):
                yield from loader

    return Repeated()


def webdataset_loader(folder: Path, pairs: list[Pair], size: int, augmenter: Augmenter | None) -> Iterable[Any]:
    """webdataset: raw arrays in a tar file, with a shuffle buffer of the whole set."""
    import webdataset

    folder.mkdir()
    with webdataset.TarWriter(str(folder / "films.tar")) as writer:
        for i, (image, mask) in enumerate(pairs):
            writer.write({"__key__": f"{i:06d}", "image": image.tobytes(), "mask": mask.tobytes()})

    def decode(sample: dict[str, Any]) -> Any:
        pair = tuple(np.frombuffer(sample[name], np.uint8).reshape(size, size).copy() for name in ("image", "mask"))
        image, mask = augmenter(*pair, 0, int(sample["__key__"])) if augmenter else pair
        return torch.from_numpy(image)[None], torch.from_numpy(mask)[None]

    films = webdataset.WebDataset(str(folder / "films.tar"), shardshuffle=False, empty_check=False).repeat(EPOCHS)
    films = films.shuffle(len(pairs)).map(decode).batched(BATCH, partial=False)
    return DataLoader(films, batch_size=None, num_workers=1, worker_init_fn=quiet, prefetch_factor=4)


def rate(loader: Iterable[Any]) -> float:
    """Return images a second of the worker's processor time: other work on the machine disturbs it least."""
    gc.collect()
    before, count = os.times(), 0
    batches = iter(loader)
    for batch in batches:
        count += len(batch[0])
    del batches
    gc.collect()  # ends the worker, whose time counts once it has ended
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return count / used


def memory_growth_mb(dataset: FilmDataset) -> float:
    """Return how much anonymous memory an epoch of reading adds, after a first one."""
    keys = [
        [(epoch, i) for i in range(start, start + BATCH)]
        for epoch in range(2)
        for start in range(0, len(dataset) - BATCH, BATCH)
    ]
    half = len(keys) // 2
    for batch in keys[:half]:
        dataset.__getitems__(batch)
    before = frame.anonymous_memory_mb()
    for batch in keys[half:]:
        dataset.__getitems__(batch)
    return frame.anonymous_memory_mb() - before


def loaders(
    work: Path, films: Path, cases: list[Case], shards: Path, size: int, augmenter: Augmenter | None
) -> dict[str, Iterable[Any]]:
    """Return the loaders by name."""
    reader, paths = ShardReader(shards, size), {path.stem: path for path in films.rglob("*.dcm")}
    pairs = [(reader.image(case.shard, case.row), reader.mask(case.shard, case.row)) for case in cases]

    def on_the_fly(i: int) -> Pair:
        mask = decode_rle(cases[i].rle, cases[i].rows, cases[i].columns)
        return to_size(read_film(paths[cases[i].id]).pixels, size), masks_to_sizes(mask, [size])[size].view(np.uint8)

    n = len(cases)
    return {
        OURS: make_loader(FilmDataset(shards, size, cases, augmenter), TrainBatches(n, BATCH, 0, EPOCHS), 1, 0),
        "DICOM decoded on the fly": loader_of(Other(on_the_fly, augmenter), n),
        "one PNG per film and mask": loader_of(Other(pngs(work / "png", pairs), augmenter), n),
        "mosaicml-streaming, raw arrays": streaming_loader(work / "streaming", pairs, size, augmenter),
        "webdataset, raw arrays": webdataset_loader(work / "webdataset", pairs, size, augmenter),
    }


def beside_others(work: Path, task: Task, films: Path, size: int, rounds: int, augmenter: Augmenter | None) -> Table:
    """Measure the loaders at one size in turns."""
    cases = read_cases(task.run.shard_dir)
    folder = work / str(size)
    folder.mkdir()
    every = loaders(folder, films, cases, task.run.shard_dir, size, augmenter)
    found = frame.in_turns({name: lambda loader=loader: rate(loader) for name, loader in every.items()}, rounds)
    title = f"Loader, {size} px{'' if augmenter else ', not augmented'}"
    table = frame.speed_table(title, "images/s and worker", found, OURS, "ours over it")
    growth = memory_growth_mb(FilmDataset(task.run.shard_dir, size, cases, augmenter))
    table.notes.append(f"anonymous memory of our worker over an epoch: {growth:+.1f} MB")
    return table


def loader_alone(task: Task, size: int, batch: int, device: str, workers: int) -> float:
    """Return the images a second that the loader gives when nobody else wants the processor, after the first batch."""
    cases = read_cases(task.run.shard_dir)
    dataset = FilmDataset(task.run.shard_dir, size, cases, Augmenter(task.config.augment, 0))
    epochs = max(EPOCHS, 4096 * 256 // size // len(cases))
    batches = iter(make_loader(dataset, TrainBatches(len(cases), batch, 0, epochs), workers, 0, device == "cuda"))
    next(batches)
    begin, count = time.perf_counter(), 0
    for images, *_ in batches:
        count += len(images)
    return count / (time.perf_counter() - begin)


def beside_the_step(task: Task, device: str, rounds: int, workers: int) -> Table:
    """Measure, in turns, what the loader gives and what the step consumes at the two stages' sizes."""
    table = Table(
        f"Loader with {workers} workers over the step, {device}",
        ["", "loader images/s (median)", "step images/s (median)", "loader over step"],
    )
    batches = {256: 64, 512: 16} if device == "cuda" else {256: 4, 512: 2}
    for size, batch in batches.items():
        step = contestants.Ours(contestants.Case(size, batch, "bf16" if device == "cuda" else "off", device))
        step(1)
        steps = 20 if device == "cuda" else 1
        turns: dict[str, Callable[[], float]] = {
            "loader": lambda size=size: loader_alone(task, size, 16, device, workers),
            "step": lambda step=step, batch=batch, steps=steps: batch * steps / step(steps),
        }
        found = frame.in_turns(turns, rounds)
        loader, consumed = (statistics.median(values) for values in found.values())
        table.rows.append([f"{size} px", loader, consumed, frame.ratio(found["loader"], found["step"])])
    return table


def main() -> int:
    """Measure what the command line asks for."""
    parser = frame.arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--films", type=Path, help="a folder of DICOMs (default: phantom films)")
    parser.add_argument("--csv", type=Path, help="their annotations")
    parser.add_argument("--sizes", default="256,512")
    parser.add_argument("--plain", action="store_true", help="without augmentation")
    parser.add_argument("--workers", type=int, default=4, help="of the loader beside the step")
    asked = parser.parse_args()
    torch.set_num_threads(frame.cores())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        films, csv = asked.films, asked.csv
        if films is None or csv is None:
            csv = make_phantom(work / "phantom", 120, 1024)["train-rle.csv"]
            films = work / "phantom" / "dicom-images-train"
        config = configuration.load(None, [f"data.dicom_dir={films}", f"data.rle_csv={csv}", "data.shards=4"])
        task = Task(run=Run(work, config), stage="preprocess")
        preprocess.write_shards(task)
        finalize(task)
        augmenter = None if asked.plain else Augmenter(config.augment, 0)
        tables = [
            beside_others(work, task, films, size, asked.rounds, augmenter) for size in map(int, asked.sizes.split(","))
        ]
        tables.append(beside_the_step(task, asked.device, asked.rounds, asked.workers))
    return frame.report(tables, asked)


if __name__ == "__main__":
    sys.exit(main())
