"""One page that shows what super-resolution made of a stereo pair, and whether the views still fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medsr.errors import DataError
from medsr.handlers.qc_image import (
    DPI,
    LARGEST,
    WIDTH_IN,
    colour_bar,
    detail_of,
    footer,
    frame,
    panel_shape,
    plain,
    scale_between,
    show,
    view_at,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["superres_pair_figure"]


def superres_pair_figure(item: Mapping[str, Any], facts: Mapping[str, Any]) -> Figure:
    """Figure of a super-resolved pair: both views, an anaglyph, and one detail of both on the same rows.

    The anaglyph has the left view in red and the right one in cyan: where rows do not match, edges have coloured
    fringes above and below. The detail is the one with the most edges in the left view; that of the right view is
    moved by the median disparity of the pair, if it is known, and has the same rows, so that a thin line runs through
    the same points of both. Where an uncertainty is known, it is shown beside, in one scale for both views.

    Args:
        item: ``image`` of the input and ``pred``, pairs in [0, 1]; ``uncertainty`` of both views, if known; ``case``.
            ``disparity_px`` in the metadata of the input, see :class:`~medsr.transforms.stereo.AlignRowsd`, is used.
        facts: what the inferer says; ``data_consistency_db`` is printed.

    Shape:
        - image: ``(2C, H, W)``, left before right, C = 1 or 3
        - pred: ``(2C, s H, s W)``, uncertainty: ``(2, s H, s W)``

    Raises:
        DataError: if the result is not the input times a whole number, or is no pair.

    Example:
        >>> item = {"image": torch.rand(6, 24, 30), "pred": torch.rand(6, 96, 120), "case": "a"}
        >>> len(superres_pair_figure(item, {}).axes)
        9
    """
    from matplotlib.figure import Figure

    low, high = (plain(item[key]) for key in ("image", "pred"))
    if len(low) % 2 or len(high) != len(low):
        raise DataError(f"{len(low)} channels and a result of {len(high)} are no pairs")
    scale = scale_between(low, high)
    height, width = high.shape[1:]
    lows, highs = low.chunk(2), high.chunk(2)
    row, column, side = detail_of(lows[0], scale)
    disparity = float(getattr(item["image"], "meta", {}).get("disparity_px", 0))
    columns = (column, min(max(0, column - round(scale * disparity)), width - side))
    step = max(1, -(-max(height, width) // LARGEST))

    wide, tall = WIDTH_IN / 3, panel_shape(height, width)
    figure = Figure(
        figsize=(WIDTH_IN, wide * (tall + 2) + 1.0),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(3, 3, gridspec_kw={"height_ratios": (tall, 1, 1)})
    for axis in axes.flat:
        axis.set_axis_off()
    whole = [view[:, ::step, ::step].float() for view in highs]
    names = (f"left, result x{scale}", f"right, result x{scale}", "left in red, right in cyan")
    for axis, values, name in zip(axes[0], [*whole, _anaglyph(*whole)], names, strict=True):
        show(axis, values)
        axis.set_title(name, fontsize=9)
    unsure = plain(item["uncertainty"]) if "uncertainty" in item else None
    details = [
        view_at(
            lows[number],
            highs[number],
            rows=slice(row, row + side),
            columns=slice(columns[number], columns[number] + side),
            unsure=None if unsure is None else unsure[number][None],
        )
        for number in range(2)
    ]
    # Three panels are all that a row has room for: the interpolation makes way for the uncertainty.
    panels = (0, 1, 2) if unsure is None else (0, 2, 3)
    top = max(*(float(view[-1].max()) for view in details), 1 / 255)
    drawn = None
    for number, view in enumerate(("left", "right")):
        axes[0, number].add_patch(frame(*(v / step for v in (columns[number], row, side, side))))
        names = (f"{view}, input", "bicubic", f"result x{scale}", "uncertainty")
        for axis, panel in zip(axes[1 + number], panels, strict=True):
            drawn = show(axis, details[number][panel], top=top if panel == 3 else None)
            axis.axhline(side / 2, color="#56B4E9", linewidth=0.5)
            axis.set_title(names[panel], fontsize=8)
    if unsure is not None:
        colour_bar(figure, drawn, axes[2, -1])
    figure.suptitle(f"{item['case']}: {low.shape[2]} x {low.shape[1]} to {width} x {height}", fontsize=10)
    figure.supxlabel(footer(facts), fontsize=7, color="#555555")
    return figure


def _anaglyph(left: Tensor, right: Tensor) -> Tensor:
    """The greys of the left view in red, those of the right one in green and blue."""
    red, cyan = (view.mean(0) for view in (left, right))
    return torch.stack([red, cyan, cyan])
