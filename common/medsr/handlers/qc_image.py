"""One page that shows what super-resolution made of a 2D image, and how far it may be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import medsr
from medsr.errors import DataError
from medsr.transforms.bicubic import bicubic_resize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["superres_image_figure"]

WIDTH_IN, DPI = 10.0, 130
LARGEST = 1000
"""Pixels of a panel's longer side that are drawn at most: more would not be seen."""

DETAIL_SHARE, DETAIL_LEAST = 6, 24
"""The detail is a square of a sixth of the shorter side, and of at least so many pixels of the input."""

CHANGE_CAPTION = "change against bicubic"
FloatArray = npt.NDArray[np.float32]


def superres_image_figure(item: Mapping[str, Any], facts: Mapping[str, Any]) -> Figure:
    """Figure of a super-resolved image: input, bicubic interpolation, result, and where to look twice.

    The last column is the uncertainty, if there is one, else how far the result is from the interpolation: what the
    network added. The second row is the detail with the strongest edges in the interpolation, hence no choice of the
    network or of an author. Nothing is smoothed: the input is shown as its pixels are.

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

    low, high = (_plain(item[key]) for key in ("image", "pred"))
    scale = high.shape[-1] // low.shape[-1]
    if scale < 1 or tuple(high.shape[1:]) != tuple(scale * n for n in low.shape[1:]):
        raise DataError(f"a result of {tuple(high.shape)} does not belong to an input of {tuple(low.shape)}")
    between = bicubic_resize(low, high.shape[1:]).clamp(0, 1)
    unsure = item.get("uncertainty")
    last = (high - between).abs().mean(0) if unsure is None else _plain(unsure)[0]
    top = max(float(last.max()), 1 / 255)
    panels = (
        ("input", low.repeat_interleave(scale, 1).repeat_interleave(scale, 2)),
        ("bicubic", between),
        (f"result x{scale}", high),
        (CHANGE_CAPTION if unsure is None else "uncertainty", last[None]),
    )
    row, column, side = _detail(between, scale)

    height, width = high.shape[1:]
    panel = WIDTH_IN / len(panels)
    figure = Figure(
        figsize=(WIDTH_IN, panel * (height / width + 1) + 1.0),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(2, len(panels), gridspec_kw={"height_ratios": (height / width, 1)})
    step = max(1, -(-max(height, width) // LARGEST))
    drawn = None
    for number, (name, values) in enumerate(panels):
        parts = (values[:, ::step, ::step], values[:, row : row + side, column : column + side])
        for axis, part in zip(axes[:, number], parts, strict=True):
            axis.set_axis_off()
            drawn = _show(axis, part, top=top if number == len(panels) - 1 else None)
        axes[0, number].set_title(name, fontsize=9)
        frame = [v / step for v in (column, row, side, side)]
        axes[0, number].add_patch(_frame(*frame))
    bar = figure.colorbar(drawn, ax=axes[1, -1], orientation="horizontal", fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"{item['case']}: {low.shape[2]} x {low.shape[1]} to {width} x {height}", fontsize=10)
    figure.supxlabel(_footer(facts), fontsize=7, color="#555555")
    return figure


def _footer(facts: Mapping[str, Any]) -> str:
    notes = []
    if facts.get("data_consistency_db") is not None:
        notes.append(f"made small again it differs from the input by {facts['data_consistency_db']:.1f} dB")
    return "; ".join([*notes, f"medsr {medsr.__version__}. Not for diagnosis."])


def _detail(image: Tensor, scale: int) -> tuple[int, int, int]:
    """First row, first column and side of the square with the strongest edges."""
    height, width = image.shape[1:]
    side = min(height, width, max(min(height, width) // DETAIL_SHARE, DETAIL_LEAST * scale))
    grey = image.mean(0)
    edges = torch.zeros_like(grey)
    edges[1:] += grey.diff(dim=0).square()
    edges[:, 1:] += grey.diff(dim=1).square()
    step = max(1, side // 4)
    energy = torch.nn.functional.avg_pool2d(edges[None, None], side, stride=step)[0, 0]
    row, column = divmod(int(energy.argmax()), energy.shape[1])
    return row * step, column * step, side


def _show(axis: Any, values: Tensor, *, top: float | None) -> Any:
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


def _frame(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, edgecolor="#56B4E9", linewidth=0.8)


def _plain(image: Any) -> Tensor:
    values = image.as_tensor() if hasattr(image, "as_tensor") else torch.as_tensor(image)
    return values.detach().cpu().float()
