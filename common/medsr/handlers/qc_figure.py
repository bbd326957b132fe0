"""One page that shows whether a super-resolved volume may be trusted."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, SettingError
from medsr.metrics.volume import as_array, head_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_qc"]

FloatArray = npt.NDArray[np.float64]

WIDTH_IN, MIN_WIDTH_IN, PANEL_IN, DPI = 8.0, 4.5, 2.6, 150  # 1200 pixels wide when full
LEFT, RIGHT, GAP = 0.30, 0.10, 0.05
TITLE_PT, LABEL_PT, SMALL_PT = 10, 8.5, 7
LINE_IN = 0.14  # one line of small text
TITLE_CHARS, FOOTER_CHARS = 11.0, 17.5  # per inch, for wrapping
BAR_IN, BAR_BLOCK = 0.07, 0.46  # thickness of a colour bar; the bar with its tick labels and caption
MARGIN_MM = 3.0
ZOOM_SHARE, ZOOM_ASPECT = 0.36, 0.80

GREY_MAP, VALUE_MAP = "gray", "magma"
ACCENT = "#56B4E9"  # sky blue of Okabe and Ito: told apart from grey and magma by every kind of colour vision
TEXT, FAINT = "#1a1a1a", "#555555"

FloatPair = tuple[float, float]


@dataclass(frozen=True)
class _Window:
    """The same stretch of the world for every panel of a row, in mm; may reach beyond the volume."""

    horizontal: FloatPair
    vertical: FloatPair

    @property
    def width(self) -> float:
        return self.horizontal[1] - self.horizontal[0]

    @property
    def height(self) -> float:
        return self.vertical[1] - self.vertical[0]


@dataclass(frozen=True)
class _Row:
    """One plane through the volume: the array axis shown horizontally and the index along the hidden one."""

    name: str
    axis: int
    index: int
    window: _Window
    is_detail: bool = False

    def cut(self, volume: FloatArray) -> FloatArray:
        """The plane as an image with the slice axis as rows."""
        return np.asarray(np.take(volume, self.index, axis=1 - self.axis).T)


def draw_qc(
    volumes: Mapping[str, np.ndarray],
    *,
    spacing_mm: tuple[float, float, float],
    title: str = "",
    footer: str = "",
    maps: Sequence[str] = ("uncertainty", "absolute error"),
    planes: tuple[str, str] = ("first plane", "second plane"),
) -> Figure:
    """Quality-control figure: what went in, what came out, where it is unsure, in two planes and a detail.

    One column per volume, in the given order. The first two rows show planes that hold the slice axis (drawn
    upwards), where super-resolution acts; they cut near the middle of the foreground, where there is most to
    see. The third row enlarges the most detailed region of the first without interpolation. All images share
    one grey window, the 0.5 and 99.5 percentiles of the first volume's foreground, and all maps share one
    colour scale from zero: a panel with its own window can make any method look sharp, and a map with its own
    scale can make any error look small. Values beyond a scale are drawn in its end colour. The figure is
    built without pyplot, so nothing stays open and nothing depends on a display; save it with
    ``figure.savefig(path)``.

    Args:
        volumes: column caption -> volume, all on the same grid with the slice axis last. The first one is the
            input, repeated to that grid. The volume called ``reference`` chooses planes and detail, or the
            last image where there is none.
        spacing_mm: voxel size along each array axis.
        title: headline; wrapped.
        footer: protocol in words (kernel, mask, data range, software); wrapped.
        maps: captions of the volumes that are not images but values to be read off, in the unit of the image.
        planes: captions of the first two rows: the plane of axes 0 and 2, the plane of axes 1 and 2.

    Shape:
        - volumes: (X, Y, Z)

    Raises:
        DataError: if there is no image, a volume is not 3D or not finite, or the shapes differ.
        SettingError: if a spacing is not positive.

    Example:
        >>> from medsr.phantoms import head
        >>> len(draw_qc({"input": head(16)[0]}, spacing_mm=(1, 1, 1)).axes)  # 3 panels, 1 colour bar
        4
    """
    from matplotlib.figure import Figure

    arrays, spacing = _checked(volumes, spacing_mm, maps)
    images = [name for name in arrays if name not in maps]
    source = arrays[images[0]]
    foreground = head_mask(source)
    low, high = (float(p) for p in np.percentile(source[foreground], [0.5, 99.5]))
    top = max((float(np.percentile(arrays[n][foreground], 99.5)) for n in arrays if n in maps), default=0.0)
    scales = {name: (0.0, top or 1.0) if name in maps else (low, max(high, low + 1e-12)) for name in arrays}

    guide = arrays["reference"] if "reference" in images else arrays[images[-1]]
    rows = _planes(foreground, guide, spacing=spacing, names=planes)
    detail = _detail_window(rows[0].cut(guide), rows[0], spacing, rows[0].cut(foreground))
    rows.append(_Row("detail", rows[0].axis, rows[0].index, detail, is_detail=True))

    # Everything is placed in inches: the panels' shapes follow from the anatomy and no layout engine may
    # squeeze.
    columns = len(arrays)
    panel = min((WIDTH_IN - LEFT - RIGHT - GAP * (columns - 1)) / columns, PANEL_IN)
    content = columns * panel + (columns - 1) * GAP
    width = max(LEFT + content + RIGHT, MIN_WIDTH_IN)
    left = LEFT + (width - LEFT - RIGHT - content) / 2
    heights = [panel * row.window.height / row.window.width for row in rows]
    headline = textwrap.wrap(title, width=int((width - LEFT - RIGHT) * TITLE_CHARS))
    notes = textwrap.wrap(footer, width=int((width - LEFT - RIGHT) * FOOTER_CHARS))
    head_in = 0.28 + 0.18 * len(headline) + (0.08 if headline else 0.0)
    foot_in = BAR_BLOCK + 0.12 + LINE_IN * len(notes) + (0.08 if notes else 0.0)
    height = head_in + sum(heights) + GAP * (len(rows) - 1) + foot_in

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    style: dict[str, Any] = {"color": TEXT, "fontfamily": "sans-serif"}

    def place(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / width, y / height, w / width, h / height))

    upper = height - head_in
    for number, (row, tall) in enumerate(zip(rows, heights, strict=True)):
        upper -= tall
        for column, (name, volume) in enumerate(arrays.items()):
            axes = place(left + column * (panel + GAP), upper, panel, tall)
            _show(axes, row, volume, spacing=spacing, scale=scales[name], is_map=name in maps)
            if number == 0:
                axes.set_title(name, fontsize=LABEL_PT, pad=4, **style)
                _frame(axes, detail)
            if row.is_detail:
                for spine in axes.spines.values():
                    spine.set(visible=True, color=ACCENT, linewidth=1.2)
            if column == 0:
                _scale_bar(axes, row.window, length_mm=10.0 if row.is_detail else 20.0, panel=(panel, tall))
        x, y = (left - 0.10) / width, (upper + tall / 2) / height
        figure.text(x, y, row.name, rotation=90, ha="center", va="center", fontsize=LABEL_PT, **style)
        upper -= GAP
    for first, last in _runs([name in maps for name in arrays]):
        name = list(arrays)[first]
        span = (last - first) * (panel + GAP) + panel
        # A bar as wide as four panels is no easier to read than a short one.
        wide = min(span, 2.2)
        axes = place(left + first * (panel + GAP) + (span - wide) / 2, upper - 0.05 - BAR_IN, wide, BAR_IN)
        _colour_bar(axes, scales[name], is_map=name in maps)
    if headline:
        figure.text(
            LEFT / width, 1 - 0.08 / height, "\n".join(headline), ha="left", va="top", fontsize=TITLE_PT,
            weight="bold", **style,
        )  # fmt: skip
    if notes:
        figure.text(
            LEFT / width, 0.08 / height, "\n".join(notes), ha="left", va="bottom", fontsize=SMALL_PT,
            fontfamily="sans-serif", color=FAINT, linespacing=1.35,
        )  # fmt: skip
    return figure


def _checked(
    volumes: Mapping[str, Any], spacing_mm: Sequence[float], maps: Sequence[str]
) -> tuple[dict[str, FloatArray], tuple[float, float, float]]:
    arrays = {name: as_array(volume).astype(np.float64, copy=False) for name, volume in volumes.items()}
    if not any(name not in maps for name in arrays):
        raise DataError("draw_qc: no image among the volumes; give at least the input slices")
    expected = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        if array.ndim != 3 or array.shape != expected:
            raise DataError(
                f"draw_qc: '{name}' must be (X, Y, Z) on one grid, got {array.shape}, expected {expected}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"draw_qc: '{name}' holds NaN or infinite values; repair it before drawing")
    if len(spacing_mm) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise SettingError(f"draw_qc: spacing_mm must be three positive values, got {tuple(spacing_mm)}")
    first, second, third = (float(s) for s in spacing_mm)
    return arrays, (first, second, third)


def _planes(
    foreground: npt.NDArray[np.bool_],
    guide: FloatArray,
    *,
    spacing: tuple[float, float, float],
    names: tuple[str, str],
) -> list[_Row]:
    """The two planes near the middle of the foreground that hold the slice axis, in equal windows.

    The exact middle of a brain is the gap between its halves; of the middle fifth, the plane with the most
    change along the slice axis is taken. Equal windows make the two rows equal in scale, so that one scale
    bar is true for both.
    """
    bounds = []
    for axis in range(3):
        used = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        bounds.append((int(used[0]), int(used[-1])))
    extents = [((b - a + 1) * s, (a + b + 1) / 2 * s) for (a, b), s in zip(bounds, spacing, strict=True)]
    half_width = max(extents[0][0], extents[1][0]) / 2 + MARGIN_MM
    half_height = extents[2][0] / 2 + MARGIN_MM
    # Very flat or very tall stacks keep a panel that can be printed; the surplus is background.
    half_height = max(half_height, 0.25 * half_width)
    half_width = max(half_width, half_height / 1.6)
    vertical = (extents[2][1] - half_height, extents[2][1] + half_height)
    rows = []
    for axis, name in enumerate(names):
        first, last = bounds[1 - axis]
        reach = (last - first) // 10
        middle = range((first + last) // 2 - reach, (first + last) // 2 + reach + 1)
        hidden = np.take(guide, middle, axis=1 - axis)
        change = np.abs(np.diff(hidden, axis=2)).sum(axis=(axis, 2))
        index = middle[int(np.argmax(change))]
        horizontal = (extents[axis][1] - half_width, extents[axis][1] + half_width)
        rows.append(_Row(name, axis, index, _Window(horizontal, vertical)))
    return rows


def _detail_window(
    image: FloatArray, row: _Row, spacing: tuple[float, float, float], foreground: npt.NDArray[np.bool_]
) -> _Window:
    """The part of the plane with the most change along the slice axis, away from the rim of the head."""
    from scipy.ndimage import uniform_filter

    step_h, step_v = spacing[row.axis], spacing[2]
    width = ZOOM_SHARE * row.window.width
    height = min(ZOOM_ASPECT * width, row.window.height)
    change = np.abs(np.gradient(image, axis=0)) if image.shape[0] > 1 else np.abs(image)
    # The skull is the strongest edge of a head and the least interesting one.
    change = np.minimum(change, np.percentile(change[foreground], 90)) if foreground.any() else change
    score = uniform_filter(change, size=(max(1, round(height / step_v)), max(1, round(width / step_h))))
    v = (np.arange(image.shape[0]) + 0.5) * step_v
    h = (np.arange(image.shape[1]) + 0.5) * step_h
    middle_h, middle_v = sum(row.window.horizontal) / 2, sum(row.window.vertical) / 2
    away = ((h[None, :] - middle_h) / row.window.width) ** 2 + (
        (v[:, None] - middle_v) / row.window.height
    ) ** 2
    score = score * np.exp(-away / (2 * 0.22**2))
    at_v, at_h = np.unravel_index(int(np.argmax(score)), score.shape)
    centre_h = _within(h[at_h], row.window.horizontal, width)
    centre_v = _within(v[at_v], row.window.vertical, height)
    return _Window(
        (centre_h - width / 2, centre_h + width / 2), (centre_v - height / 2, centre_v + height / 2)
    )


def _within(centre: float, limits: FloatPair, size: float) -> float:
    return float(np.clip(centre, limits[0] + size / 2, limits[1] - size / 2))


def _show(
    axes: Axes,
    row: _Row,
    volume: FloatArray,
    *,
    spacing: tuple[float, float, float],
    scale: FloatPair,
    is_map: bool,
) -> None:
    import matplotlib

    colours = matplotlib.colormaps[VALUE_MAP if is_map else GREY_MAP]
    image = row.cut(volume)
    extent = (0, image.shape[1] * spacing[row.axis], 0, image.shape[0] * spacing[2])
    axes.imshow(
        image,
        cmap=colours,
        vmin=scale[0],
        vmax=scale[1],
        origin="lower",
        extent=extent,
        aspect="equal",
        # The detail shows voxels as they are; overviews are reduced in size and would alias.
        interpolation="nearest" if row.is_detail else "antialiased",
        interpolation_stage="data",
    )
    axes.set(xlim=row.window.horizontal, ylim=row.window.vertical, xticks=[], yticks=[])
    # Beyond the volume the panel goes on in the colour of the background.
    axes.set_facecolor(colours(0))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frame(axes: Axes, window: _Window) -> None:
    from matplotlib.patches import Rectangle

    corner = (window.horizontal[0], window.vertical[0])
    axes.add_patch(
        Rectangle(corner, window.width, window.height, fill=False, edgecolor=ACCENT, linewidth=0.9)
    )


def _scale_bar(axes: Axes, window: _Window, *, length_mm: float, panel: FloatPair) -> None:
    """White bar and its length on a dark plate, lower left; ``panel`` is the panel's size in inches."""
    from matplotlib.patches import Rectangle

    while length_mm > 0.5 * window.width:
        length_mm /= 2
    inch = 1 / panel[0], 1 / panel[1]
    bar = length_mm / window.width * panel[0]
    plate = max(bar, 0.36) + 0.08
    middle = (0.03 + plate / 2) * inch[0]
    fixed: dict[str, Any] = {"transform": axes.transAxes, "linewidth": 0}
    axes.add_patch(
        Rectangle(
            (0.03 * inch[0], 0.03 * inch[1]), plate * inch[0], 0.21 * inch[1],
            facecolor="black", alpha=0.6, zorder=3, **fixed,
        )
    )  # fmt: skip
    axes.add_patch(
        Rectangle(
            (middle - bar / 2 * inch[0], 0.065 * inch[1]), bar * inch[0], 0.025 * inch[1],
            facecolor="white", zorder=4, **fixed,
        )
    )  # fmt: skip
    axes.text(
        middle, 0.11 * inch[1], f"{length_mm:g} mm", transform=axes.transAxes, ha="center", va="bottom",
        fontsize=SMALL_PT, color="white", fontfamily="sans-serif", zorder=4,
    )  # fmt: skip


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last index of every run of equal flags: neighbours with one scale share one bar."""
    starts = [i for i, flag in enumerate(flags) if i == 0 or flag != flags[i - 1]]
    return [(a, b - 1) for a, b in zip(starts, [*starts[1:], len(flags)], strict=True)]


def _colour_bar(axes: Axes, scale: FloatPair, *, is_map: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.imshow(
        np.linspace(*scale, 256)[None, :],
        cmap=VALUE_MAP if is_map else GREY_MAP,
        extent=(*scale, 0.0, 1.0),
        aspect="auto",
    )
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="x", labelsize=SMALL_PT, length=2, width=0.6, pad=1.5, colors=TEXT)
    axes.set_xlabel(
        "same unit as image" if is_map else "intensity",
        fontsize=SMALL_PT,
        labelpad=1.5,
        color=TEXT,
        fontfamily="sans-serif",
    )
    for spine in axes.spines.values():
        spine.set(linewidth=0.6, color=TEXT)
