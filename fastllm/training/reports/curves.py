"""Curves of runs whose score is not bits per byte."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import whole_file
from .progress import METRICS, read_metrics

if TYPE_CHECKING:
    import numpy as np

BLUE, ORANGE, GREY = "#2a78b5", "#d9662b", "#666666"
# The entries of an evaluation that are not scores.
PLACE = {"step", "tokens", "seconds", "validation_tokens", "validation_loss"}


# One in this many of a run's steps is at its start, where losses are far above the rest. It is the span of smoothing
# too. A guess.
START = 50


def after_the_start(values: list[float]) -> list[float]:
    """``values`` without those of the start, which would flatten the rest of a picture."""
    return values[len(values) // START :]


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, one in :data:`START` of all values on either side.

    At the ends there are fewer. At the start, where values fall steeply, it takes no more values after than before.
    """
    span = len(values) // START
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for i in range(len(values)):
        first = max(0, i - span)
        end = min(2 * i - first + 1, len(values))
        result.append((sums[end] - sums[first]) / (end - first))
    return result


def new_figure(panels: int, width: float = 4.6, height: float = 3.8, dpi: int = 130):
    """A figure and its panels in a row, each ``width`` x ``height`` inches; one alone is at least 6 inches wide."""
    # The Agg canvas directly: pyplot would look for a window system and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, width * panels), height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(color="#e6e6e6", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def save_figure(figure, path: Path) -> Path:
    """Write ``figure`` as PNG, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    with whole_file(path) as file:
        file.write(image.getvalue())
    return path


def plot_terms(run: Path, title: str) -> Path:
    """Draw metrics.jsonl into ``run/loss.png``: training and validation loss, and a panel for each score."""
    lines = read_metrics(run / METRICS)
    train = [line for line in lines if line.get("loss") is not None]
    held = [line for line in lines if line.get("validation_loss") is not None]
    scores = [name for name in (held[-1] if held else {}) if name.startswith("validation_") and name not in PLACE]
    figure, axes = new_figure(1 + len(scores))
    if train:
        values = [line["loss"] for line in train]
        axes[0].plot([line["step"] for line in train], values, color=BLUE, linewidth=0.6, alpha=0.25)
        axes[0].plot([x["step"] for x in train], smoothed(values), color=BLUE, label="training")
    axes[0].plot([x["step"] for x in held], [x["validation_loss"] for x in held], color=ORANGE, marker="o",
                 markersize=3, label="validation")  # fmt: skip
    axes[0].set_ylabel("loss (nats)")
    axes[0].legend(frameon=False)
    for one, name in zip(axes[1:], scores, strict=True):
        one.plot([x["step"] for x in held], [x[name] for x in held], color=ORANGE, marker="o", markersize=3)
        one.set_ylabel(name.removeprefix("validation_").replace("_", " "))
    for one in axes:
        one.set_xlabel("step")
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, run / "loss.png")


def plot_confusion(table: np.ndarray, labels: Sequence[str], path: Path) -> Path:
    """Draw counts (labels, predictions), of integers, as a coloured table."""
    figure, (axes,) = new_figure(1, height=4.2)
    axes.grid(False)
    shares = table / table.sum(1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in ((place, table[place]) for place in zip(*table.nonzero(), strict=True)):
        dark = shares[row, column] > 0.5
        axes.text(column, row, f"{count:,}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=45 if len(labels) > 4 else 0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    return save_figure(figure, path)
