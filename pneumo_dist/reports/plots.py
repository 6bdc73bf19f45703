"""Plots for the reports, as inline SVG. Equal data give equal text.

Only modules that write a report import it: matplotlib takes a second to load.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

matplotlib.use("Agg")
matplotlib.rcParams.update({
    "svg.hashsalt": "pneumo_dist",  # without it, the ids in the SVG are random
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
})  # fmt: skip
ORANGE, BLUE, GREEN, GREY = "#d98200", "#1a7f9c", "#4f9c1a", "#888888"
Floats = NDArray[np.floating[Any]]


def _figure(panels: int, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # HTML allows no XML prologue
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)


def score_histogram(scores: Floats, positive: NDArray[np.bool_], threshold: float) -> str:
    """Plot the histogram of the films' scores, by decision, with the triplet's top score as a line."""
    figure, (axes,) = _figure(1, 7.0, 2.4)
    bins = np.linspace(0, 1, 41)
    axes.hist(
        [scores[positive], scores[~positive]],
        bins,
        stacked=True,
        color=[ORANGE, GREY],
        label=["positive", "negative"],
    )
    if 0 < threshold <= 1:
        axes.axvline(threshold, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="score of the film", ylabel="films", xlim=(0, 1))
    axes.legend(frameon=False)
    return _svg(figure)


def learning_curves(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Plot loss and Dice of each stage by epoch from the rows of its metrics.jsonl; "" without rows."""
    trained = {name: rows for name, rows in stages.items() if rows}
    if not trained:
        return ""
    figure, axes = _figure(2 * len(trained), 3.6)
    for i, (name, rows) in enumerate(trained.items()):
        loss, dice = axes[2 * i], axes[2 * i + 1]
        for key, label, colour in (
            ("train_loss", "training", GREY),
            ("loss", "validation", BLUE),
            ("loss_positive", "validation, with pneumothorax", ORANGE),
            ("loss_negative", "validation, without", GREEN),
        ):
            _line(loss, rows, key, label, colour)
        for key, label, colour in (("dice", "all films", BLUE), ("dice_positive", "on positives", ORANGE)):
            _line(dice, rows, key, label, colour)
        loss.set(title=f"{name}: loss", xlabel="epoch")
        dice.set(title=f"{name}: validation Dice", xlabel="epoch", ylim=(0, 1))
        for panel in (loss, dice):
            if panel.lines:
                panel.legend(frameon=False)
    return _svg(figure)


def _line(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, colour: str) -> None:
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="." if len(points) < 30 else "")


def ranking_curves(top: Floats, positive: NDArray[np.bool_]) -> str:
    """Plot ROC and precision-recall curves of the films' scores; "" if one class is missing."""
    if not positive.any() or positive.all():
        return ""
    order = np.argsort(-top, kind="stable")
    ranked = positive[order]
    # Films of equal score are one point of the curve.
    last = np.flatnonzero(np.append(np.diff(top[order]) != 0, True))
    true_positives, false_positives = np.cumsum(ranked)[last], np.cumsum(~ranked)[last]
    recall, false_positive_rate = true_positives / positive.sum(), false_positives / (~positive).sum()
    figure, (roc, pr) = _figure(2)
    roc.plot(np.append(0, false_positive_rate), np.append(0, recall), color=BLUE)
    roc.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    roc.set(title="ROC, by film", xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01))
    pr.plot(recall, true_positives / (true_positives + false_positives), color=ORANGE)
    pr.axhline(positive.mean(), color=GREY, linewidth=0.8, linestyle="--")
    pr.set(title="precision-recall, by film", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    return _svg(figure)


def reliability(top: Floats, positive: NDArray[np.bool_], pixels: NDArray[np.int64]) -> str:
    """Plot observed share against predicted probability, for films and for pixels.

    top, positive: (n,) score and class of the films, drawn in 10 bins.
    pixels: (2, bins) counts of pixels outside and inside the annotation, by probability.
    """
    figure, (film_axes, pixel_axes) = _figure(2)
    bins = np.minimum((top * 10).astype(int), 9)
    count = np.bincount(bins, minlength=10)
    filled = count > 0
    mean = np.bincount(bins, top, 10)[filled] / count[filled]
    share = np.bincount(bins, positive, 10)[filled] / count[filled]
    film_axes.scatter(mean, share, s=12 + 120 * count[filled] / count.max(), color=BLUE, clip_on=False)
    film_axes.set(title="films: share with pneumothorax", xlabel="score", ylabel="observed share")
    total = pixels.sum(0)
    filled = total > 0
    middle = (np.arange(len(total)) + 0.5) / max(1, len(total))
    share = pixels[1][filled] / total[filled]
    pixel_axes.plot(middle[filled], share, marker="o", markersize=3, color=ORANGE, clip_on=False)
    pixel_axes.set(title="pixels: share inside the annotation", xlabel="probability", ylabel="observed share")
    for axes in (film_axes, pixel_axes):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        axes.set(xlim=(0, 1), ylim=(0, 1))
    return _svg(figure)


def threshold_surface(
    surface: NDArray[np.float64],
    tops: Sequence[float],
    areas: Sequence[int],
    masks: Sequence[float],
    best: tuple[float, int, float],
) -> str:
    """Plot mean Dice by top score and minimum area at the best mask threshold, and its maximum by mask threshold."""
    nearest = [
        int(np.argmin(np.abs(np.asarray(axis) - value))) for axis, value in zip((tops, areas, masks), best, strict=True)
    ]
    figure, (heat, line) = _figure(2, 4.6)
    image = heat.imshow(surface[:, :, nearest[2]], origin="lower", aspect="auto", cmap="viridis")
    heat.grid(False)
    heat.set_xticks(range(len(areas)), [str(area) for area in areas], rotation=60)
    heat.set_yticks(range(len(tops)), ["no film" if top > 1 else f"{top:g}" for top in tops])
    heat.plot(nearest[1], nearest[0], "wo", mfc="none")
    heat.set(
        title=f"mean Dice, mask threshold {masks[nearest[2]]:g}",
        xlabel="minimum area (px of 1024x1024)",
        ylabel="lowest score of a positive film",
    )
    figure.colorbar(image, ax=heat)
    order = np.argsort(masks)
    line.plot(np.asarray(masks)[order], surface.max((0, 1))[order], marker=".", color=BLUE)
    line.axvline(best[2], color=ORANGE, linewidth=1)
    line.set(title="best mean Dice by mask threshold", xlabel="mask threshold")
    return _svg(figure)


def dice_by_size(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Plot mean Dice by size of the annotated mask, for several rules ({label: a summary's by_mask_size})."""
    figure, (axes,) = _figure(1, 6.4, 2.8)
    width = 0.8 / max(1, len(bins))
    for i, (label, rows) in enumerate(bins.items()):
        values = [row["dice"] or 0.0 for row in rows]
        axes.bar(np.arange(len(rows)) + i * width, values, width, label=label, color=[BLUE, ORANGE, GREY][i % 3])
    rows = next(iter(bins.values()))
    upper = ["+" if row["below_px"] is None else f" to {row['below_px']:,}" for row in rows]
    labels = [f"{row['from_px']:,}{end}\n{row['films']} films" for row, end in zip(rows, upper, strict=True)]
    axes.set_xticks(np.arange(len(rows)) + 0.4 - width / 2, labels)
    axes.set(ylabel="mean Dice", ylim=(0, 1), title="by size of the annotated mask (px of 1024x1024)")
    axes.legend(frameon=False)
    return _svg(figure)


def dice_histogram(values: Floats) -> str:
    """Plot the histogram of the Dice of the films with pneumothorax; "" without such films."""
    if not len(values):
        return ""
    figure, (axes,) = _figure(1, 4.2, 2.8)
    axes.hist(values, np.linspace(0, 1, 21), color=ORANGE)
    axes.set(title="Dice of the films with pneumothorax", xlabel="Dice", ylabel="films", xlim=(0, 1))
    return _svg(figure)
