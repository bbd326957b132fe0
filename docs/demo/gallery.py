"""One look for the figures of the gallery: the same grey for all panels, colours that every eye tells apart."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = Path(__file__).resolve().parents[1] / "figures"
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # of Okabe and Ito


def new_figure(*, columns: int, below: int) -> tuple[Figure, tuple[list[Axes], list[Axes]]]:
    """A row of panels, and below it a row of plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    return figure, (list(upper.subplots(1, columns)), list(lower.subplots(1, below)))


def panel(
    axes: Axes, image: Any, title: str, *, window: tuple[float, float], extent: Sequence[float] | None = None
) -> None:
    """An image in the window that all panels share, as its pixels are; the extent gives them their size in mm."""
    axes.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="nearest")
    axes.set_title(title, fontsize=8.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.xaxis.label.set_size(8.5)


def plot(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, units and legend of a plot whose lines are drawn."""
    axes.set_title(title, fontsize=8.5)
    axes.set_xlabel(x_label, fontsize=8.5)
    axes.set_ylabel(y_label, fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def save(figure: Figure, name: str) -> None:
    """Write the figure into the folder named on the command line, or to its place in the documentation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", nargs="?", type=Path, default=FIGURES, help="folder for the figure")
    path = parser.parse_args().output / name
    figure.savefig(path, dpi=130, metadata={"Software": None})
    print(path)
