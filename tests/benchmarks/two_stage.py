"""Two stages against one at equal compute on phantom films: the claim of 2ST-UNet (arXiv 2009.02805), put to a test.

    python tests/benchmarks/two_stage.py --plot two_stage.png [--films 96 --small 64 --large 128 ...]

Compute is counted in pixels that went forward and backward: an epoch at half the size costs a quarter. Both arms see
the same films and fold, the same seeds, a cosine to zero per stage, random starts. What counts is the last epoch's
validation score, and the second stage starts from the first one's last weights: no epoch is chosen by looking. Prints
a table and JSON; finished stages are not repeated when the same --work is given again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from pneumo_dist import config as configuration
from pneumo_dist.runtime.files import write_json, write_text
from pneumo_dist.stages import run_stage

Curve = list[dict[str, float]]  # one point an epoch: megapixels so far, validation scores


def run_dir(arm: str, seed: int, work: Path) -> Path:
    """Return the run directory of one arm and seed."""
    return work / f"{arm}-seed{seed}"


def recipe(options: argparse.Namespace, arm: str, seed: int, work: Path) -> configuration.Config:
    """Return the configuration of one arm: "two" trains small, then large; "one" large only, for as many pixels."""
    equal = round(options.epochs_large + options.epochs_small * (options.small / options.large) ** 2)
    stages = {
        "two": [
            f"stage1.size={options.small}",
            f"stage1.epochs={options.epochs_small}",
            "stages=1,2",
            f"stage2.init_from={run_dir(arm, seed, work) / 'fold0' / 'stage1' / 'last.pt'}",
        ],
        "one": [f"stage1.size={options.large}", f"stage1.epochs={equal}", "stages=1"],
    }[arm]
    return configuration.load(
        None,
        [
            *stages,
            f"stage2.size={options.large}",
            f"stage2.epochs={options.epochs_large}",
            *(f"stage{n}.batch_size={options.batch}" for n in (1, 2)),
            *(f"stage{n}.lr={options.lr}" for n in (1, 2)),
            f"phantom.films={options.films}",
            f"phantom.size={options.large}",
            f"data.shard_dir={work / 'shards'}",
            "data.shards=2",
            "data.folds=4",
            "model.pretrained=none",
            f"train.seed={seed}",
            f"train.threads={options.threads}",
            "train.workers=0",
            "evaluate.threshold=0.5",
        ],
    )


def run_arm(options: argparse.Namespace, arm: str, seed: int, work: Path) -> Curve:
    """Train one arm with one seed through the ordinary stage functions and return its validation curve."""
    config = recipe(options, arm, seed, work)
    folder = run_dir(arm, seed, work)
    write_text(folder / "config.yaml", configuration.to_yaml(config))
    curve: Curve = []
    pixels = 0.0
    for stage in config.train_stages:
        run_stage(stage, folder, fold=0)
        settings = config.train_stage(stage)
        for line in (folder / "fold0" / f"stage{stage}" / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            films = row["steps"] // row["epochs"] * settings.batch_size
            pixels += films * settings.size**2 / 1e6
            curve.append({"megapixels": pixels, "dice": row["dice"], "dice_positive": row["dice_positive"]})
    return curve


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Make the phantom films and the shards of both sizes, which all arms share."""
    folder = work / "data"
    write_text(folder / "config.yaml", configuration.to_yaml(recipe(options, "two", 0, work)))
    for stage in ("phantom", "preprocess", "finalize"):
        run_stage(stage, folder)


def plot(path: Path, curves: dict[str, list[Curve]], options: argparse.Namespace) -> None:
    """Draw Dice on positive films against compute, one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    names = {"two": f"{options.small} px, then {options.large} px", "one": f"{options.large} px only"}
    for colour, (arm, seeds) in zip(("tab:blue", "tab:orange"), curves.items(), strict=True):
        for i, curve in enumerate(seeds):
            points = [[p["megapixels"] for p in curve], [p["dice_positive"] for p in curve]]
            axes.plot(*points, color=colour, alpha=0.7, marker=".", label=None if i else names[arm])
    axes.set_xlabel("training pixels, forward and backward (10⁶)")
    axes.set_ylabel("validation Dice on positive films")
    axes.set_title(f"Two stages against one at equal compute: {options.films} phantom films, {options.seeds} seeds")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run every arm and seed, print the table, draw the plot, and return the last epochs' scores."""
    prepare(options, work)
    curves = {arm: [run_arm(options, arm, seed, work) for seed in range(options.seeds)] for arm in ("two", "one")}
    result: dict[str, Any] = {
        "options": {k: v for k, v in vars(options).items() if isinstance(v, (int, float))},
        "curves": curves,
    }
    print(f"{'arm':>4} {'10^6 px':>8} {'Dice':>22} {'Dice on positives':>22}   (mean, lowest to highest of the seeds)")
    for arm, seeds in curves.items():
        last = {name: [curve[-1][name] for curve in seeds] for name in ("megapixels", "dice", "dice_positive")}
        result[arm] = last
        shown = [
            f"{statistics.mean(v):.4f} ({min(v):.3f}..{max(v):.3f})" for v in (last["dice"], last["dice_positive"])
        ]
        print(f"{arm:>4} {last['megapixels'][0]:8.2f} {shown[0]:>22} {shown[1]:>22}")
    if options.plot:
        plot(options.plot, curves, options)
        write_json(options.plot.with_suffix(".json"), result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="where to write the picture (and beside it the numbers as .json)")
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--films", type=int, default=96)
    parser.add_argument("--small", type=int, default=64, help="size of stage 1, pixels")
    parser.add_argument("--large", type=int, default=128, help="size of stage 2, pixels")
    parser.add_argument("--epochs-small", type=int, default=8)
    parser.add_argument("--epochs-large", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="two-stage-") as temporary:
        compare(options, (options.work or Path(temporary)).absolute())


if __name__ == "__main__":
    main()
