"""One page that shows what super-resolution made of a 2D image, and how far it may be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import medsr
from medsr.errors import DataError
from medsr.resampling import antialiased_bicubic_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["superres_image_figure"]

WIDTH_IN, DPI = 10.0, 130
LARGEST = 1000
"""Pixels of a panel's longer side that are drawn at most: more would not be seen."""

DETAIL_SHARE, DETAIL_LEAST = 6, 24
"""The detail is a square of a sixth of the shorter side, and of at least so many pixels of the input."""

FLATTEST, TALLEST = 0.1, 4.0
"""Height of a panel over its width: an image beyond has room beside it, since its page would grow without end."""

CHANGE_CAPTION = "change against bicubic"


def superres_image_figure(item: Mapping[str, Any], facts: Mapping[str, Any]) -> Figure:
    """Figure of a super-resolved image: input, bicubic interpolation, result, and where to look twice.

    The last column is the uncertainty, if there is one, else how far the result is from the interpolation: what the
    network added. The second row is the detail with the most edges in the input, hence no choice of the network or of
    an author. Nothing is smoothed: the input is shown as its pixels are.

    Args:
        item: ``image`` of the input and ``pred``, intensities in [0, 1]; ``uncertainty`` of the result, if known;
            ``case``.
        facts: what the inferer says; ``data_consistency_db`` is printed.

    Shape:
        - image: ``(C, H, W)``, one channel or three
        - pred: ``(C, s H, s W)``, uncertainty: ``(1, s H, s W)``

    Raises:
        DataError: if the result is not the input times a whole number.

    Example:
        >>> item = {"image": torch.rand(3, 24, 30), "pred": torch.rand(3, 96, 120), "case": "a"}
        >>> len(superres_image_figure(item, {}).axes)  # 8 panels and a colour bar
        9
    """
    from matplotlib.figure import Figure

    low, high = (plain(item[key]) for key in ("image", "pred"))
    height, width = high.shape[1:]
    scale = scale_between(low, high)
    unsure = item.get("uncertainty")
    row, column, side = detail_of(low, scale)
    step = max(1, -(-max(height, width) // LARGEST))
    # Of a large photograph no more is ever computed than what is drawn.
    views = [
        view_at(low, high, rows=rows, columns=columns, unsure=None if unsure is None else plain(unsure))
        for rows, columns in (
            (slice(0, height, step), slice(0, width, step)),
            (slice(row, row + side), slice(column, column + side)),
        )
    ]
    top = max(*(float(view[-1].max()) for view in views), 1 / 255)
    names = ("input", "bicubic", f"result x{scale}", CHANGE_CAPTION if unsure is None else "uncertainty")

    panel, tall = WIDTH_IN / len(names), panel_shape(height, width)
    figure = Figure(
        figsize=(WIDTH_IN, panel * (tall + 1) + 1.0),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(2, len(names), gridspec_kw={"height_ratios": (tall, 1)})
    drawn = None
    for number, name in enumerate(names):
        for axis, view in zip(axes[:, number], views, strict=True):
            axis.set_axis_off()
            drawn = show(axis, view[number], top=top if number == len(names) - 1 else None)
        axes[0, number].set_title(name, fontsize=9)
        axes[0, number].add_patch(frame(*(v / step for v in (column, row, side, side))))
    colour_bar(figure, drawn, axes[1, -1])
    figure.suptitle(f"{item['case']}: {low.shape[2]} x {low.shape[1]} to {width} x {height}", fontsize=10)
    figure.supxlabel(footer(facts), fontsize=7, color="#555555")
    return figure


def scale_between(low: Tensor, high: Tensor) -> int:
    """How many times larger the second image is, or the error that says that it is not."""
    scale: int = high.shape[-1] // low.shape[-1]
    if scale < 1 or tuple(high.shape[1:]) != tuple(scale * n for n in low.shape[1:]):
        raise DataError(f"a result of {tuple(high.shape)} does not belong to an input of {tuple(low.shape)}")
    return scale


def panel_shape(height: int, width: int) -> float:
    """Height over width of a panel that shows an image of this size."""
    return min(max(height / width, FLATTEST), TALLEST)


def footer(facts: Mapping[str, Any]) -> str:
    """What is printed below a figure."""
    notes = []
    if facts.get("data_consistency_db") is not None:
        notes.append(f"made small again it differs from the input by {facts['data_consistency_db']:.1f} dB")
    return "; ".join([*notes, f"medsr {medsr.__version__}. Not for diagnosis."])


def view_at(
    low: Tensor, high: Tensor, *, rows: slice, columns: slice, unsure: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, interpolation, result and what is unsure, at some rows and columns of the result."""
    (height, width), scale = high.shape[1:], high.shape[-1] // low.shape[-1]
    at_rows, at_columns = (torch.arange(n)[part] // scale for n, part in ((height, rows), (width, columns)))
    matrices = (
        torch.from_numpy(antialiased_bicubic_matrix(old, new, part)).float()
        for old, new, part in ((low.shape[1], height, rows), (low.shape[2], width, columns))
    )
    down, across = matrices
    between = (down @ low @ across.T).clamp(0, 1)
    result = high[:, rows, columns].float()
    last = (result - between).abs().mean(0, keepdim=True) if unsure is None else unsure[:, rows, columns]
    return low[:, at_rows][:, :, at_columns], between, result, last.float()


def detail_of(low: Tensor, scale: int) -> tuple[int, int, int]:
    """First row, first column and side, in pixels of the result, of the square with the most edges.

    Beyond the strength that a tenth of the pixels reach, an edge counts no more: else the rim of a fundus photograph,
    or a burned-in letter, would always win over the vessels.
    """
    side = min(*low.shape[1:], max(min(low.shape[1:]) // DETAIL_SHARE, DETAIL_LEAST))
    grey = low.mean(0)
    edges = torch.zeros_like(grey)
    edges[1:] += grey.diff(dim=0).square()
    edges[:, 1:] += grey.diff(dim=1).square()
    sample = edges[:: -(-edges.shape[0] // 1000), :: -(-edges.shape[1] // 1000)]
    limit = sample.flatten().quantile(0.9)
    if limit > 0:
        edges = edges.clamp(max=limit)
    step = max(1, side // 4)
    energy = torch.nn.functional.avg_pool2d(edges[None, None], side, stride=step)[0, 0]
    row, column = divmod(int(energy.argmax()), energy.shape[1])
    return row * step * scale, column * step * scale, side * scale


def show(axis: Any, values: Tensor, *, top: float | None = None) -> Any:
    """Draw an image, or with ``top`` a map from 0 to it."""
    array = values.permute(1, 2, 0).numpy()
    if top is not None:
        return axis.imshow(array[..., 0], cmap="magma", vmin=0, vmax=top, interpolation="nearest")
    grey = array.shape[2] == 1
    return axis.imshow(
        array[..., 0] if grey else array.clip(0, 1),
        cmap="gray" if grey else None,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )


def colour_bar(figure: Figure, drawn: Any, axis: Any) -> None:
    """The scale of a map below it, with so few numbers that they do not touch."""
    from matplotlib.ticker import MaxNLocator

    bar = figure.colorbar(
        drawn, ax=axis, orientation="horizontal", fraction=0.05, pad=0.02, ticks=MaxNLocator(4)
    )
    bar.ax.tick_params(labelsize=7)


def frame(x: float, y: float, width: float, height: float) -> Any:
    """A rectangle that says where the detail is."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, edgecolor="#56B4E9", linewidth=0.8)


def plain(image: Any) -> Tensor:
    """The image as a tensor without metadata, on the CPU."""
    values = image.as_tensor() if hasattr(image, "as_tensor") else torch.as_tensor(image)
    return values.detach().cpu()
