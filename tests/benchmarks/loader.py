"""Images a second and worker of the training loader, beside other ways to feed the same films.

    python tests/benchmarks/loader.py [--films DIR --csv FILE] [--size 256] [--rounds 5] [--json FILE]

Contestants give the same uint8 image and mask through the same augmentation in batches of the same size, one worker
process each, in turns: (ours) memory-mapped shards; DICOM decoded on the fly; one PNG per film and mask;
mosaicml-streaming and webdataset with raw arrays, where they are installed (requirements.txt beside this file).
Images by second of the worker's processor time count. Our worker's anonymous memory over an epoch comes with it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from pneumo_dist import config as configuration  # noqa: E402
from pneumo_dist.data import preprocess  # noqa: E402
from pneumo_dist.data.augment import Augmenter  # noqa: E402
from pneumo_dist.data.cases import Case, read_cases  # noqa: E402
from pneumo_dist.data.dicom import read_film  # noqa: E402
from pneumo_dist.data.loaders import FilmDataset, TrainBatches, make_loader  # noqa: E402
from pneumo_dist.data.phantom import make_phantom  # noqa: E402
from pneumo_dist.data.rle import decode_rle  # noqa: E402
from pneumo_dist.data.shards import ShardReader, masks_to_sizes, to_size  # noqa: E402
from pneumo_dist.runtime.task import Task  # noqa: E402

BATCH = 16
EPOCHS = 6
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


def rss_anon_mb() -> float:
    """Return this process's anonymous memory."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


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
    before = rss_anon_mb()
    for batch in keys[half:]:
        dataset.__getitems__(batch)
    return rss_anon_mb() - before


def contestants(
    work: Path, films: Path, cases: list[Case], shards: Path, size: int, augmenter: Augmenter | None
) -> dict[str, Iterable[Any]]:
    """Return the loaders by name; peers that are not installed are left out, with a line."""
    reader, paths = ShardReader(shards, size), {path.stem: path for path in films.rglob("*.dcm")}
    pairs = [(reader.image(case.shard, case.row), reader.mask(case.shard, case.row)) for case in cases]

    def on_the_fly(i: int) -> Pair:
        mask = decode_rle(cases[i].rle, cases[i].rows, cases[i].columns)
        return to_size(read_film(paths[cases[i].id]).pixels, size), masks_to_sizes(mask, [size])[size].view(np.uint8)

    n = len(cases)
    found: dict[str, Iterable[Any]] = {
        "pneumo_dist, memory-mapped shards": make_loader(
            FilmDataset(shards, size, cases, augmenter), TrainBatches(n, BATCH, 0, EPOCHS), 1, 0
        ),
        "DICOM decoded on the fly": loader_of(Other(on_the_fly, augmenter), n),
        "one PNG per film and mask": loader_of(Other(pngs(work / "png", pairs), augmenter), n),
    }
    for name, make in (
        ("mosaicml-streaming, raw arrays", streaming_loader),
        ("webdataset, raw arrays", webdataset_loader),
    ):
        try:
            found[name] = make(work / name.split(",")[0], pairs, size, augmenter)
        except ImportError as error:
            print(f"{name}: not measured ({error})", file=sys.stderr)
    return found


def run(
    device: str = "cpu", films: Path | None = None, csv: Path | None = None, size: int = 256, rounds: int = 5,
    augmented: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure; return rows of name, median (images a second and worker), low, high, ratio (ours over it)."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if films is None or csv is None:
            csv = make_phantom(work / "phantom", 120, 1024)["train-rle.csv"]
            films = work / "phantom" / "dicom-images-train"
        words = [
            f"data.dicom_dir={films}",
            f"data.rle_csv={csv}",
            "data.shards=4",
            f"stage1.size={size}",
            "stages=1,swa",
        ]
        task = Task(config=configuration.load(None, words), run_dir=work, stage="preprocess")
        preprocess.run_part(task)
        preprocess.finalize(task)
        cases = read_cases(task.shard_dir)
        augmenter = Augmenter(task.config.augment, 0) if augmented else None
        loaders = contestants(work, films, cases, task.shard_dir, size, augmenter)
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, loader in loaders.items():
                rates[name].append(rate(loader))
        growth = memory_growth_mb(FilmDataset(task.shard_dir, size, cases, augmenter))
    ours = statistics.median(next(iter(rates.values())))
    rows = [
        {
            "name": f"{name}, {size} px{'' if augmented else ', not augmented'}",
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "unit": "images/s and worker",
            "ratio": ours / statistics.median(values),
        }
        for name, values in rates.items()
    ]
    rows[0]["note"] = f"anonymous memory over an epoch: {growth:+.1f} MB"
    return rows


def main() -> int:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="without augmentation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = run("cpu", options.films, options.csv, options.size, options.rounds, not options.plain)
    for row in rows:
        spread = f"{row['low']:.0f} to {row['high']:.0f}"
        figures = f"{row['median']:8.0f} {row['unit']} ({spread}), ours x{row['ratio']:.2f}"
        print(f"{row['name']:48} {figures}  {row.get('note', '')}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
