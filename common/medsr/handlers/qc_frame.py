"""One page that shows which classes a segmentation found in a frame, and where it was not sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medsr.errors import DataError
from medsr.handlers.qc_figure import CLASS_COLOURS
from medsr.handlers.qc_image import DPI, LARGEST, WIDTH_IN, footer, panel_shape, plain, scale_between, show
from medsr.transforms.results import border_uncertainty

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["area_shares", "class_overlay", "frame_figure", "pair_figure"]

_TINT = 0.35
"""Share of the class colour inside an outline: what lies below must stay visible."""

_OUTLINE = 400
"""Pixels of the longer side for each pixel of an outline's width."""

_HANDLE_IN, _LETTER_IN, _LINE_IN = 0.7, 0.065, 0.18
"""Room of a legend: beside and for each letter of an entry, and for each line."""


def area_shares(mask: Tensor, classes: Sequence[str] | Mapping[str, Any]) -> dict[str, float]:
    """Share of the frame that each class covers.

    Args:
        mask: class indices of the pixels.
        classes: names in order of the index, or what has them as keys.

    Raises:
        DataError: if the mask has an index without a name.

    Example:
        >>> area_shares(torch.tensor([[[0, 0], [0, 1]]]), ["background", "instrument"])
        {'background': 0.75, 'instrument': 0.25}
    """
    names = list(classes)
    counts = torch.bincount(plain(mask).flatten().long(), minlength=len(names))
    if len(counts) > len(names):
        raise DataError(
            f"the mask has class {len(counts) - 1}, but only {len(names)} have names; set classes"
        )
    return {
        name: round(float(count) / mask.numel(), 6)
        for name, count in zip(names, counts.tolist(), strict=True)
    }


def class_overlay(image: Tensor, mask: Tensor) -> Tensor:
    """A frame with its classes in colour: a tint, and a full outline inside each region.

    The colours are those of Okabe and Ito, which all kinds of colour vision tell apart, in order of the class index.
    ``monai.visualize.blend_images`` was considered: it scales the image by its own range, takes colours from a map
    over the range of the mask, so that they differ from frame to frame, and draws no outline.

    Args:
        image: intensities in [0, 1].
        mask: class indices, 0 is the background and stays as it is.

    Shape:
        - image: ``(C, H, W)``, C = 1 or 3;
        - mask: ``(1, H, W)``;
        - result: ``(3, H, W)``, float32.

    Example:
        >>> mask = torch.zeros(1, 9, 9)
        >>> mask[:, 2:7, 2:7] = 1
        >>> drawn = class_overlay(torch.zeros(3, 9, 9), mask)
        >>> [round(float(drawn[2, 4, column]), 2) for column in (0, 2, 4)]  # outside, outline, inside
        [0.0, 0.91, 0.32]
    """
    image, index = plain(image).float(), plain(mask)[0].long()
    palette = torch.tensor(
        [[int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in CLASS_COLOURS]
    )
    colours = palette[(index - 1) % len(palette)].permute(2, 0, 1)
    width = max(1, round(max(index.shape) / _OUTLINE))
    values = index[None, None].float()
    highest, lowest = (
        sign * F.max_pool2d(sign * values, 2 * width + 1, stride=1, padding=width)[0] for sign in (1, -1)
    )
    strength = torch.where(highest != lowest, 1.0, _TINT) * (index > 0)
    return image.expand(3, -1, -1) * (1 - strength) + colours * strength


def frame_figure(
    item: Mapping[str, Any], facts: Mapping[str, Any], *, classes: Sequence[str] | Mapping[str, Any]
) -> Figure:
    """Figure of a segmented frame: the input, its classes in colour, and where two classes were nearly as likely.

    Args:
        item: ``image`` of the input in [0, 1], ``pred`` with the class indices, ``probability`` of all classes and
            ``case``.
        facts: what the inferer says; ``network_size`` is printed.
        classes: names in order of the index, or what has them as keys.

    Shape:
        - image: ``(C, H, W)``, C = 1 or 3;
        - pred: ``(1, H, W)``, probability: ``(K, H, W)``.

    Raises:
        DataError: if the mask has another size than the frame, or an index without a name.

    Example:
        >>> item = {"image": torch.rand(3, 24, 30), "pred": torch.ones(1, 24, 30).byte(), "case": "a"}
        >>> item["probability"] = torch.full((2, 24, 30), 0.5)
        >>> figure = frame_figure(item, {}, classes=["background", "instrument"])
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['input', 'classes', 'uncertainty']
    """
    image, mask = plain(item["image"]), plain(item["pred"])
    if image.shape[1:] != mask.shape[1:]:
        raise DataError(f"a mask of {tuple(mask.shape)} does not belong to a frame of {tuple(image.shape)}")
    height, width = image.shape[1:]
    small = _every(max(height, width))
    unsure = border_uncertainty(plain(item["probability"])[small].float())
    panels = ("input", image[small]), ("classes", class_overlay(image[small], mask[small]))

    figure, axes, foot = _page(1, panel_shape(height, width), {"": mask}, classes=classes, legend_columns=2)
    for axis, (name, values) in zip(axes[0], panels, strict=False):
        show(axis, values)
        axis.set_title(name, fontsize=9)
    drawn = show(axes[0][2], unsure, top=1.0)
    axes[0][2].set_title("uncertainty", fontsize=9)
    room = figure.add_subplot(foot[2])
    room.set_axis_off()
    bar = figure.colorbar(drawn, cax=room.inset_axes((0.1, 0.7, 0.8, 0.15)), orientation="horizontal")
    bar.ax.tick_params(labelsize=7)
    seen = facts.get("network_size")
    note = "" if seen is None else f"segmented at {seen[1]} x {seen[0]}; "
    figure.suptitle(f"{item['case']}: {width} x {height}", fontsize=10)
    figure.supxlabel(note + footer(facts), fontsize=7, color="#555555")
    return figure


def pair_figure(
    item: Mapping[str, Any], facts: Mapping[str, Any], *, classes: Sequence[str] | Mapping[str, Any]
) -> Figure:
    """Figure of a pair that was enlarged and segmented: of each view the input, the result, and its classes in colour.

    Args:
        item: ``image`` of the input and ``superres``, pairs in [0, 1]; ``seg_left`` and ``seg_right`` with the class
            indices; ``case``.
        facts: what the inferer says; ``data_consistency_db`` is printed.
        classes: names in order of the index, or what has them as keys.

    Shape:
        - image: ``(2C, H, W)``, left before right, C = 1 or 3;
        - superres: ``(2C, s H, s W)``, masks: ``(1, s H, s W)``.

    Raises:
        DataError: if the result is not the input times a whole number, or is no pair, or the mask has an index
            without a name.

    Example:
        >>> item = {"image": torch.rand(6, 24, 30), "superres": torch.rand(6, 48, 60), "case": "a"}
        >>> item |= dict.fromkeys(("seg_left", "seg_right"), torch.ones(1, 48, 60).byte())
        >>> len(pair_figure(item, {}, classes=["background", "instrument"]).axes)  # 6 panels and the legend
        7
    """
    low, high = plain(item["image"]), plain(item["superres"])
    if len(low) % 2 or len(high) != len(low):
        raise DataError(f"{len(low)} channels and a result of {len(high)} are no pairs")
    scale = scale_between(low, high)
    height, width = high.shape[1:]
    masks = {side: plain(item[f"seg_{side}"]) for side in ("left", "right")}
    figure, axes, _ = _page(2, panel_shape(height, width), masks, classes=classes, legend_columns=3)
    coarse, small = _every(max(low.shape[1:])), _every(max(height, width))
    for row, (side, mask), before, after in zip(
        axes, masks.items(), low.chunk(2), high.chunk(2), strict=True
    ):
        after = after[small].float()
        panels = (
            (f"{side}, input", before[coarse]),
            (f"result x{scale}", after),
            ("classes", class_overlay(after, mask[small])),
        )
        for axis, (name, values) in zip(row, panels, strict=True):
            show(axis, values)
            axis.set_title(name, fontsize=9)
    figure.suptitle(f"{item['case']}: {low.shape[2]} x {low.shape[1]} to {width} x {height}", fontsize=10)
    figure.supxlabel(footer(facts), fontsize=7, color="#555555")
    return figure


def _every(longest: int) -> tuple[slice, slice, slice]:
    """As many rows and columns as are drawn."""
    step = max(1, -(-longest // LARGEST))
    return slice(None), slice(None, None, step), slice(None, None, step)


def _page(
    rows: int,
    aspect: float,
    masks: Mapping[str, Tensor],
    *,
    classes: Sequence[str] | Mapping[str, Any],
    legend_columns: int,
) -> tuple[Figure, list[list[Any]], Any]:
    """A page of three panels a row, their axes, and the grid below, where the legend takes the first columns.

    The legend has colour and area share of each class, that of each view if there are several.
    """
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpecFromSubplotSpec
    from matplotlib.patches import Patch

    shares = [area_shares(mask, classes) for mask in masks.values()]
    handles = [
        Patch(
            facecolor=CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)],
            label=f"{name} " + " / ".join(f"{100 * of[name]:.1f} %" for of in shares),
        )
        for index, name in enumerate(classes)
        if index
    ]
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    beside = max(1, int(WIDTH_IN * legend_columns / 3 / (_HANDLE_IN + _LETTER_IN * longest)))
    title = f"share of the {' / '.join(masks)} view" if len(masks) > 1 else None
    lines = -(-len(handles) // beside) + (title is not None)

    panel_in, foot_in = WIDTH_IN / 3 * aspect + 0.25, 0.25 + _LINE_IN * max(lines, 2)
    figure = Figure(
        figsize=(WIDTH_IN, rows * panel_in + foot_in + 0.55),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    grid = figure.add_gridspec(rows + 1, 3, height_ratios=[*[panel_in] * rows, foot_in])
    axes = [[figure.add_subplot(grid[row, column]) for column in range(3)] for row in range(rows)]
    foot = GridSpecFromSubplotSpec(1, 3, grid[rows, :])
    below = figure.add_subplot(foot[:legend_columns])
    below.legend(
        handles=handles, loc="center", ncols=beside, fontsize=8, title=title, title_fontsize=8, frameon=False
    )
    for axis in (*(axis for row in axes for axis in row), below):
        axis.set_axis_off()
    return figure, axes, foot
