"""One page that shows whether a super-resolved volume or a mask on thin slices may be trusted."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import medsr
from medsr.errors import DataError, SettingError
from medsr.geometry import slice_axis, slice_positions, spacing_of, to_slice_last
from medsr.metrics.volume import as_array, head_mask
from medsr.resampling import interpolation_matrix, resample_last_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_qc", "segmentation_figure", "superres_figure"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

WIDTH_IN, MIN_WIDTH_IN, PANEL_IN, DPI = 8.0, 4.5, 2.6, 150  # 1200 pixels wide when full
LEFT, RIGHT, GAP = 0.30, 0.10, 0.05
TITLE_PT, LABEL_PT, SMALL_PT = 10, 8.5, 7
LINE_IN, LEGEND_LINE_IN = 0.14, 0.16  # one line of small text
TITLE_CHARS, FOOTER_CHARS, LEGEND_CHARS = 11.0, 17.5, 15.0  # per inch, for wrapping
BAR_IN, BAR_BLOCK = 0.07, 0.46  # thickness of a colour bar; the bar with its tick labels and caption
MARGIN_MM = 3.0
ZOOM_SHARE, ZOOM_ASPECT = 0.36, 0.80
MASK_ROOM, MASK_SHARE = 1.6, 0.45  # window over mask; smallest window over head
OUTLINE_PT, OUTLINE_RIM_PT = 1.1, 2.2

GREY_MAP, VALUE_MAP = "gray", "magma"
ACCENT = "#56B4E9"  # sky blue of Okabe and Ito: told apart from grey and magma by every kind of colour vision
CLASS_COLOURS = (
    ACCENT,
    "#E69F00",
    "#009E73",
    "#F0E442",
    "#CC79A7",
    "#D55E00",
    "#0072B2",
)  # Okabe and Ito too
TEXT, FAINT = "#1a1a1a", "#555555"
STYLE: dict[str, Any] = {"color": TEXT, "fontfamily": "sans-serif"}

_PLANES = {"LR": "sagittal", "PA": "coronal", "IS": "axial"}
"""Both ends of an anatomical axis, that of smaller world coordinates first, and the plane that hides it."""
_TURNED = "LPI"
"""Ends that are drawn on the left or below: right is on the right, as if one looked at the patient from behind."""

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
    """One plane through the volume: the array axes shown and the index along the hidden one."""

    name: str
    axis: int
    index: int
    window: _Window
    is_detail: bool = False
    upwards: int = 2
    codes: tuple[str, str, str] | None = None

    @property
    def limits(self) -> tuple[FloatPair, FloatPair]:
        """Of the axes of the panel: what points left, back or down in the file is turned."""
        turned = [
            self.codes is not None and self.codes[axis] in _TURNED for axis in (self.axis, self.upwards)
        ]
        first, second = (
            limits[::-1] if turn else limits
            for limits, turn in zip((self.window.horizontal, self.window.vertical), turned, strict=True)
        )
        return first, second

    def cut(self, volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The plane as an image with the axis that points upwards as rows."""
        return np.asarray(np.take(volume, self.index, axis=3 - self.axis - self.upwards).T)


class _Page:
    """White page of panels in rows and columns, with room for colour bars, a legend and text.

    Everything is placed in inches: the panels' shapes follow from the anatomy and no layout engine may squeeze.
    """

    def __init__(
        self, rows: Sequence[_Row], columns: int, *, title: str, footer: str, legend_in: float = 0.0
    ) -> None:
        from matplotlib.figure import Figure

        self.width_in = min((WIDTH_IN - LEFT - RIGHT - GAP * (columns - 1)) / columns, PANEL_IN)
        self.heights_in = [self.width_in * row.window.height / row.window.width for row in rows]
        content = columns * self.width_in + (columns - 1) * GAP
        width = max(LEFT + content + RIGHT, MIN_WIDTH_IN)
        self._left = LEFT + (width - LEFT - RIGHT - content) / 2
        headline = textwrap.wrap(title, width=int((width - LEFT - RIGHT) * TITLE_CHARS))
        notes = textwrap.wrap(footer, width=int((width - LEFT - RIGHT) * FOOTER_CHARS))
        head_in = 0.28 + 0.18 * len(headline) + (0.08 if headline else 0.0)
        text_in = 0.12 + LINE_IN * len(notes) + (0.08 if notes else 0.0)
        self.legend_top_in = text_in + legend_in
        foot_in = BAR_BLOCK + self.legend_top_in
        height = head_in + sum(self.heights_in) + GAP * (len(rows) - 1) + foot_in
        self.size_in = width, height
        self.figure = Figure(figsize=self.size_in, dpi=DPI, facecolor="white")

        self._lower = []
        upper = height - head_in
        for row, tall in zip(rows, self.heights_in, strict=True):
            upper -= tall
            self._lower.append(upper)
            self.text(
                self._left - 0.10, upper + tall / 2, row.name, rotation=90, ha="center", va="center",
                fontsize=LABEL_PT, **STYLE,
            )  # fmt: skip
            upper -= GAP
        if headline:
            self.text(
                LEFT, height - 0.08, "\n".join(headline), ha="left", va="top", fontsize=TITLE_PT,
                weight="bold", **STYLE,
            )  # fmt: skip
        if notes:
            self.text(
                LEFT, 0.08, "\n".join(notes), ha="left", va="bottom", fontsize=SMALL_PT,
                fontfamily="sans-serif", color=FAINT, linespacing=1.35,
            )  # fmt: skip

    def text(self, x_in: float, y_in: float, text: str, **settings: Any) -> None:
        self.figure.text(x_in / self.size_in[0], y_in / self.size_in[1], text, **settings)

    def panel(self, row: int, column: int) -> Axes:
        x = self._left + column * (self.width_in + GAP)
        return self._place(x, self._lower[row], self.width_in, self.heights_in[row])

    def bar(self, first: int, last: int) -> Axes:
        """Place of a colour bar below some columns; as wide as four panels it would be no easier to read."""
        span = (last - first) * (self.width_in + GAP) + self.width_in
        wide = min(span, 2.2)
        x = self._left + first * (self.width_in + GAP) + (span - wide) / 2
        return self._place(x, self._lower[-1] - GAP - 0.05 - BAR_IN, wide, BAR_IN)

    def _place(self, x: float, y: float, w: float, h: float) -> Axes:
        width, height = self.size_in
        return self.figure.add_axes((x / width, y / height, w / width, h / height))


class _Stack:
    """The input of an item, its unit restored, and the thin grid of the result on which everything is drawn.

    The input comes with its slices last; results come in the axis order of the file.
    """

    def __init__(self, item: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        source, pred = item["image"], item["pred"]
        meta = source.meta
        self.order = to_slice_last(slice_axis(meta["original_affine"], force=True))
        # Of the first channel, which is drawn.
        scale, offset = (
            float(np.ravel(meta.get(f"intensity_{name}", default))[0])
            for name, default in (("scale", 1), ("offset", 0))
        )
        self.slices = np.asarray(source.as_tensor()[0].cpu().float()) * scale + offset
        size, new_size = self.slices.shape[2], pred.shape[1 + self.order[2]]
        self.ratio = float(facts.get("ratio", new_size / size))
        self._positions = slice_positions(size, new_size, self.ratio)
        self.affine = np.asarray(pred.affine, dtype=np.float64)[:, [*self.order, 3]]
        first, second, third = (float(s) for s in spacing_of(self.affine))
        self.spacing_mm = first, second, third

    @property
    def codes(self) -> tuple[str, str, str]:
        """Towards what the axes point, slices last."""
        return _codes(self.affine)

    def result(self, image: Any) -> npt.NDArray[np.float32]:
        """First channel of a result, its slices last."""
        return np.asarray(image.as_tensor()[0].permute(self.order).cpu().float())

    def thin(self, values: npt.NDArray[Any], kind: str) -> npt.NDArray[np.float32]:
        """Values of the thick grid on the thin one."""
        return resample_last_axis(
            values, interpolation_matrix(self.slices.shape[2], self._positions, kind=kind)
        )


def draw_qc(
    volumes: Mapping[str, np.ndarray],
    *,
    spacing_mm: tuple[float, float, float],
    title: str = "",
    footer: str = "",
    maps: Sequence[str] = ("uncertainty", "absolute error"),
    affine: npt.ArrayLike | None = None,
) -> Figure:
    """Quality-control figure: what went in, what came out, where it is unsure, in two planes and a detail.

    One column per volume, in the given order. The first two rows show planes that hold the slice axis (drawn
    vertically), where super-resolution acts; they cut near the middle of the foreground, where there is most to
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
        affine: voxel to world (RAS+) of the volumes. With it, planes have anatomical names, and whatever way the file
            is stored, right is right, anterior and superior are right or up, and letters say so; without, axes are
            drawn as they are stored.

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
    arrays, spacing = _checked(volumes, spacing_mm, maps)
    images = [name for name in arrays if name not in maps]
    source = arrays[images[0]]
    foreground = head_mask(source)
    window = _grey_window(source, foreground)
    top = max((float(np.percentile(arrays[n][foreground], 99.5)) for n in arrays if n in maps), default=0.0)
    scales = {name: (0.0, top or 1.0) if name in maps else window for name in arrays}

    guide = arrays["reference"] if "reference" in images else arrays[images[-1]]
    codes = None if affine is None else _codes(affine)
    names = ("second plane", "first plane") if codes is None else (_anatomy(codes[0]), _anatomy(codes[1]))
    rows = [replace(row, codes=codes) for row in _planes(foreground, guide, spacing=spacing, names=names)]
    detail = _detail_window(rows[0].cut(guide), rows[0], spacing, rows[0].cut(foreground))
    rows.append(replace(rows[0], name="detail", window=detail, is_detail=True))

    page = _Page(rows, len(arrays), title=title, footer=footer)
    for number, row in enumerate(rows):
        for column, (name, volume) in enumerate(arrays.items()):
            axes = page.panel(number, column)
            _show(axes, row, volume, spacing=spacing, scale=scales[name], is_map=name in maps)
            if number == 0:
                axes.set_title(name, fontsize=LABEL_PT, pad=4, **STYLE)
                _frame(axes, detail)
            if row.is_detail:
                for spine in axes.spines.values():
                    spine.set(visible=True, color=ACCENT, linewidth=1.2)
            if column == 0:
                size = page.width_in, page.heights_in[number]
                _scale_bar(axes, row.window, length_mm=10.0 if row.is_detail else 20.0, panel=size)
                if not row.is_detail:
                    _letters(axes, row)
    for first, last in _runs([name in maps for name in arrays]):
        name = list(arrays)[first]
        caption = "same unit as image" if name in maps else "intensity"
        _colour_bar(page.bar(first, last), scales[name], is_map=name in maps, caption=caption)
    return page.figure


def superres_figure(item: Mapping[str, Any], facts: Mapping[str, Any]) -> Figure:
    """Figure of a super-resolved case: its slices, their cubic interpolation, the result and its uncertainty.

    What :func:`draw_qc` needs, taken from an item as a :class:`~medsr.engines.case_evaluator.CaseEvaluator` leaves it.

    Args:
        item: ``image`` with its slices last, ``pred`` and perhaps ``uncertainty`` in the axis order of the file, and
            ``case``.
        facts: what the inferer says about the case.

    Shape:
        - image: (1, H, W, D), pred and uncertainty: (1, X, Y, Z)

    Raises:
        DataError: if a volume is constant or not finite.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> image = MetaTensor(torch.rand(1, 8, 8, 8), meta={"original_affine": torch.eye(4)})
        >>> len(superres_figure({"image": image, "pred": image, "case": "a"}, {}).axes)  # 9 panels, 1 colour bar
        10
    """
    stack = _Stack(item, facts)
    volumes = {
        "input slices": stack.thin(stack.slices, "nearest"),
        "cubic": stack.thin(stack.slices, "cubic"),
        "super-resolved": stack.result(item["pred"]),
    }
    if "uncertainty" in item:
        volumes["uncertainty"] = stack.result(item["uncertainty"])
    thin_mm = stack.spacing_mm[2]
    return draw_qc(
        volumes,
        spacing_mm=stack.spacing_mm,
        affine=stack.affine,
        title=f"{item['case']}: slices of {thin_mm * stack.ratio:.3g} mm to {thin_mm:.3g} mm",
        footer=(
            f"ratio {stack.ratio:g}; slice profile {facts.get('slice_profile', '-')}, thickness / spacing "
            f"{facts.get('slice_thickness_per_spacing', '-')}; data consistency {facts.get('data_consistency_db')} dB; "
            f"uncertainty = expected absolute error, unit of the image; medsr {medsr.__version__}. Not for diagnosis."
        ),
    )


def segmentation_figure(item: Mapping[str, Any], facts: Mapping[str, Any]) -> Figure:
    """Figure of a segmented case: the masks on thick and thin slices as outlines, and where the borders are unsure.

    One row per viewing plane, through the largest sections of the thin mask: two planes that hold the slice axis
    (drawn upwards), where the thick mask is a staircase, and one slice. Outlines run along the edges of the voxels,
    so that nothing is drawn that is not in the mask. All panels have one scale, and show the surroundings of the
    mask; without a mask, the middle of the whole head. Of adjacent classes the smaller one has its outline on top.

    Args:
        item: ``image`` with its slices last; in the axis order of the file the masks ``pred`` on thin and
            ``pred_thick`` on thick slices, ``probability`` of each foreground class and ``uncertainty`` in [0, 1];
            ``case``.
        facts: what the inferer says about the case.

    Shape:
        - image: (1, H, W, D)
        - pred, uncertainty: (1, X, Y, Z), probability: (K - 1, X, Y, Z), pred_thick: (1, X, Y, Z) of the input

    Raises:
        DataError: if the image is constant or not finite, or a mask or the uncertainty lies on another grid.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> image = MetaTensor(torch.rand(1, 8, 8, 8), meta={"original_affine": torch.eye(4)})
        >>> item = {key: (image > 0.9).byte() for key in ("pred", "pred_thick")}
        >>> item.update(image=image, probability=image, uncertainty=image, case="a")
        >>> len(segmentation_figure(item, {}).axes)  # 9 panels, 2 colour bars
        11
    """
    stack = _Stack(item, facts)
    thick_mask, thin, unsure = (stack.result(item[key]) for key in ("pred_thick", "pred", "uncertainty"))
    _check_volume("pred_thick", thick_mask, stack.slices.shape)
    inside = head_mask(stack.slices)
    window = _grey_window(stack.slices, inside)
    source, thick, foreground = (
        stack.thin(values, "nearest") for values in (stack.slices, thick_mask, inside)
    )
    _check_volume("pred", thin, source.shape)
    _check_volume("uncertainty", unsure, source.shape)
    spacing = stack.spacing_mm
    found = _mask_planes(
        thin if thin.any() else thick, foreground > 0, spacing=spacing, names=_plane_names(stack)
    )
    rows = [replace(row, codes=stack.codes) for row in found]
    columns = (
        ("thick slices, thick mask", source, thick),
        ("cubic between slices, thin mask", stack.thin(stack.slices, "cubic"), thin),
        ("uncertainty", unsure, None),
    )
    sizes = {k: int((thin == k).sum() + (thick == k).sum()) for k in range(1, 1 + len(item["probability"]))}

    labels = _class_labels(sizes)
    per_line = max(1, int((WIDTH_IN - LEFT - RIGHT) / (0.4 + max(map(len, labels.values())) / LEGEND_CHARS)))
    thin_mm = spacing[2]
    page = _Page(
        rows,
        len(columns),
        title=f"{item['case']}: slices of {thin_mm * stack.ratio:.3g} mm, mask on slices of {thin_mm:.3g} mm",
        footer=(
            f"ratio {stack.ratio:g}; uncertainty = 1 - margin of the two likeliest classes; "
            f"voxels i, j, k from 0; medsr {medsr.__version__}. Not for diagnosis."
        ),
        legend_in=0.06 + LEGEND_LINE_IN * math.ceil(len(labels) / per_line),
    )
    for number, row in enumerate(rows):
        for column, (name, volume, mask) in enumerate(columns):
            axes, is_map = page.panel(number, column), mask is None
            scale = (0.0, 1.0) if is_map else window
            _show(axes, row, volume, spacing=spacing, scale=scale, is_map=is_map)
            if number == 0:
                axes.set_title(name, fontsize=LABEL_PT, pad=4, **STYLE)
            if mask is not None:
                for k in sorted(sizes, key=lambda k: -sizes[k]):
                    _outline(axes, row, mask == k, spacing=spacing, colour=_class_colour(k))
                if number == 0 and not mask.any():
                    _note(axes, "no foreground found")
            if column == 0:
                size = page.width_in, page.heights_in[number]
                _scale_bar(axes, row.window, length_mm=20.0, panel=size)
                _letters(axes, row)
    _colour_bar(page.bar(0, 1), window, is_map=False, caption="intensity")
    _colour_bar(page.bar(2, 2), (0.0, 1.0), is_map=True, caption="0 sure, 1 undecided")
    _legend(page, labels, per_line)
    return page.figure


def _grey_window(source: npt.NDArray[Any], foreground: BoolArray) -> FloatPair:
    low, high = (float(p) for p in np.percentile(source[foreground], [0.5, 99.5]))
    return low, max(high, low + 1e-12)


def _checked(
    volumes: Mapping[str, Any], spacing_mm: Sequence[float], maps: Sequence[str]
) -> tuple[dict[str, FloatArray], tuple[float, float, float]]:
    arrays = {name: as_array(volume).astype(np.float64, copy=False) for name, volume in volumes.items()}
    if not any(name not in maps for name in arrays):
        raise DataError("no image among the volumes; give at least the input slices")
    expected = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        _check_volume(name, array, expected)
    if len(spacing_mm) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise SettingError(f"spacing_mm must be three positive values, got {tuple(spacing_mm)}")
    first, second, third = (float(s) for s in spacing_mm)
    return arrays, (first, second, third)


def _check_volume(name: str, array: npt.NDArray[Any], expected: tuple[int, ...]) -> None:
    if array.ndim != 3 or array.shape != expected:
        raise DataError(f"'{name}' must be (X, Y, Z) on one grid, got {array.shape}, expected {expected}")
    if not np.isfinite(array).all():
        raise DataError(f"'{name}' holds NaN or infinite values; repair it before drawing")


def _planes(
    foreground: BoolArray,
    guide: FloatArray,
    *,
    spacing: tuple[float, float, float],
    names: Sequence[str],
) -> list[_Row]:
    """The two planes near the middle of the foreground that hold the slice axis, in equal windows.

    The exact middle of a brain is the gap between its halves; of the middle fifth, the plane with the most
    change along the slice axis is taken. Equal windows make the two rows equal in scale, so that one scale
    bar is true for both. ``names`` are by the hidden axis.
    """
    bounds = _bounds(foreground)
    extents = _extents(bounds, spacing)
    half_width = max(extents[0][0], extents[1][0]) / 2 + MARGIN_MM
    half_height = extents[2][0] / 2 + MARGIN_MM
    # Very flat or very tall stacks keep a panel that can be printed; the surplus is background.
    half_height = max(half_height, 0.25 * half_width)
    half_width = max(half_width, half_height / 1.6)
    vertical = (extents[2][1] - half_height, extents[2][1] + half_height)
    rows = []
    for axis in (0, 1):
        first, last = bounds[1 - axis]
        reach = (last - first) // 10
        # As many on either side, so that a flipped file shows the same planes.
        middle = range((first + last) // 2 - reach, (first + last + 1) // 2 + reach + 1)
        hidden = np.take(guide, middle, axis=1 - axis)
        change = np.abs(np.diff(hidden, axis=2)).sum(axis=(axis, 2))
        index = middle[int(np.argmax(change))]
        horizontal = (extents[axis][1] - half_width, extents[axis][1] + half_width)
        rows.append(_Row(names[1 - axis], axis, index, _Window(horizontal, vertical)))
    return rows


def _bounds(mask: BoolArray) -> list[tuple[int, int]]:
    """First and last index of what is inside along each axis."""
    used = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return [(int(inside[0]), int(inside[-1])) for inside in used]


def _extents(bounds: Sequence[tuple[int, int]], spacing: Sequence[float]) -> list[FloatPair]:
    """Size and centre of the bounds along each axis, in mm."""
    return [((b - a + 1) * s, (a + b + 1) / 2 * s) for (a, b), s in zip(bounds, spacing, strict=True)]


def _mask_planes(
    classes: npt.NDArray[np.float32],
    foreground: BoolArray,
    *,
    spacing: tuple[float, float, float],
    names: Sequence[str],
) -> list[_Row]:
    """Three planes through the largest sections of the mask, in windows of one scale around it.

    A small lesion in a panel that holds the whole head is a dot; a panel that holds only the lesion could be
    anywhere. Sections of a class count relative to its largest one: otherwise a large class would hide the small
    ones. ``names`` holds a format with the index for each hidden axis.
    """
    mask = classes > 0
    found = [classes == k for k in np.unique(classes[mask])]
    bounds = _bounds(foreground | mask)
    whole = _extents(bounds, spacing)
    part = _extents(_bounds(mask), spacing) if found else whole
    share = max(MASK_ROOM * p[0] / w[0] for p, w in zip(part, whole, strict=True))
    share = float(np.clip(share, MASK_SHARE, 1.0))
    half = [share * size / 2 + MARGIN_MM for size, _ in whole]
    half_width = max(half[0], half[1])
    # As for the planes of a volume: panels neither very flat nor very tall.
    half_height = max(half[2], 0.25 * half_width)
    half_width = max(half_width, half_height / 1.6)

    def stretch(axis: int, half_size: float) -> FloatPair:
        # Around the mask, but no farther beyond the head than its size asks for.
        slack = max(0.0, whole[axis][0] / 2 + MARGIN_MM - half_size)
        centre = float(np.clip(part[axis][1], whole[axis][1] - slack, whole[axis][1] + slack))
        return centre - half_size, centre + half_size

    rows = []
    for axis, upwards in ((0, 2), (1, 2), (0, 1)):
        hidden = 3 - axis - upwards
        index = sum(bounds[hidden]) // 2
        if found:
            areas = [own.sum(axis=(axis, upwards)) for own in found]
            area = np.sum([own / own.max() for own in areas], axis=0)
            largest = np.flatnonzero(area == area.max())
            index = int(largest[len(largest) // 2])
        vertical = stretch(2, half_height) if upwards == 2 else stretch(1, max(half[1], 0.25 * half_width))
        window = _Window(stretch(axis, half_width), vertical)
        rows.append(_Row(names[hidden].format(index), axis, index, window, upwards=upwards))
    return rows


def _plane_names(stack: _Stack) -> list[str]:
    """How a plane is called whose hidden axis is the first, second or third: anatomy and voxel of the mask file."""
    return [
        f"{_anatomy(code)}, {'ijk'[axis]} = {{}}" for code, axis in zip(stack.codes, stack.order, strict=True)
    ]


def _codes(affine: npt.ArrayLike) -> tuple[str, str, str]:
    """Towards what the axes of an array point: letters of L, R, P, A, I, S."""
    from nibabel.orientations import aff2axcodes

    first, second, third = aff2axcodes(np.asarray(affine, dtype=np.float64))
    return str(first), str(second), str(third)


def _anatomy(code: str) -> str:
    """What a plane is called whose hidden axis points there."""
    return next(name for letters, name in _PLANES.items() if code in letters)


def _detail_window(
    image: FloatArray, row: _Row, spacing: tuple[float, float, float], foreground: BoolArray
) -> _Window:
    """The part of the plane with the most change along the slice axis, away from the rim of the head."""
    from scipy.ndimage import uniform_filter

    step_h, step_v = spacing[row.axis], spacing[2]
    width = ZOOM_SHARE * row.window.width
    height = min(ZOOM_ASPECT * width, row.window.height)
    change = np.abs(np.gradient(image, axis=0)) if image.shape[0] > 1 else np.abs(image)
    # The skull is the strongest edge of a head and the least interesting one.
    change = np.minimum(change, np.percentile(change[foreground], 90)) if foreground.any() else change
    # Odd sizes have a middle.
    score = uniform_filter(change, size=(round(height / step_v) | 1, round(width / step_h) | 1))
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
    volume: npt.NDArray[Any],
    *,
    spacing: tuple[float, float, float],
    scale: FloatPair,
    is_map: bool,
) -> None:
    import matplotlib

    colours = matplotlib.colormaps[VALUE_MAP if is_map else GREY_MAP]
    image = row.cut(volume)
    extent = (0, image.shape[1] * spacing[row.axis], 0, image.shape[0] * spacing[row.upwards])
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
    horizontal, vertical = row.limits
    axes.set(xlim=horizontal, ylim=vertical, xticks=[], yticks=[])
    # Beyond the volume the panel goes on in the colour of the background.
    axes.set_facecolor(colours(0))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _outline(
    axes: Axes, row: _Row, mask: BoolArray, *, spacing: tuple[float, float, float], colour: str
) -> None:
    """The edges of the pixels at which the mask ends, in mm, with a dark rim that parts them from bright tissue."""
    from matplotlib.collections import LineCollection

    inside = np.pad(row.cut(mask), 1)
    across, along = np.nonzero(inside[1:] != inside[:-1])
    horizontal = [[along - 1, across], [along, across]]
    across, along = np.nonzero(inside[:, 1:] != inside[:, :-1])
    vertical = [[along, across - 1], [along, across]]
    edges = np.concatenate([np.transpose(ends, (2, 0, 1)) for ends in (horizontal, vertical)])
    edges = edges * (spacing[row.axis], spacing[row.upwards])
    if len(edges):
        for width, shade in ((OUTLINE_RIM_PT, "black"), (OUTLINE_PT, colour)):
            axes.add_collection(
                LineCollection(list(edges), colors=shade, linewidths=width, capstyle="round"), autolim=False
            )


def _note(axes: Axes, text: str) -> None:
    """A remark on a dark plate, upper middle."""
    axes.text(
        0.5, 0.93, text, transform=axes.transAxes, ha="center", va="top", fontsize=LABEL_PT, color="white",
        fontfamily="sans-serif", bbox={"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 3}, zorder=4,
    )  # fmt: skip


def _class_colour(number: int) -> str:
    return CLASS_COLOURS[(number - 1) % len(CLASS_COLOURS)]


def _class_labels(sizes: Mapping[int, int]) -> dict[str, str]:
    """Colour to the classes that have it, beyond the palette more than one, and which were not found."""
    labels: dict[str, list[str]] = {}
    for k, size in sizes.items():
        name = f"class {k}" if len(sizes) > 1 else "foreground"
        labels.setdefault(_class_colour(k), []).append(name if size else f"{name} (not found)")
    return {colour: ", ".join(names) for colour, names in labels.items()}


def _legend(page: _Page, labels: Mapping[str, str], columns: int) -> None:
    from matplotlib.lines import Line2D

    page.figure.legend(
        handles=[Line2D([], [], color=colour, linewidth=2, label=label) for colour, label in labels.items()],
        loc="upper left",
        bbox_to_anchor=(LEFT / page.size_in[0], (page.legend_top_in - 0.06) / page.size_in[1]),
        ncols=columns,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        columnspacing=1.4,
        prop={"family": "sans-serif", "size": SMALL_PT},
        labelcolor=TEXT,
    )


def _frame(axes: Axes, window: _Window) -> None:
    from matplotlib.patches import Rectangle

    corner = (window.horizontal[0], window.vertical[0])
    axes.add_patch(
        Rectangle(corner, window.width, window.height, fill=False, edgecolor=ACCENT, linewidth=0.9)
    )


def _letters(axes: Axes, row: _Row) -> None:
    """What the left and the upper edge of a panel are; the other two are the opposite."""
    if row.codes is None:
        return
    left, upper = (
        next(letters for letters in _PLANES if row.codes[axis] in letters)[end]
        for axis, end in ((row.axis, 0), (row.upwards, 1))
    )
    for letter, x, y, ha, va in ((left, 0.02, 0.5, "left", "center"), (upper, 0.5, 0.98, "center", "top")):
        axes.text(
            x, y, letter, transform=axes.transAxes, ha=ha, va=va, fontsize=SMALL_PT, color="white",
            fontfamily="sans-serif", bbox={"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1}, zorder=4,
        )  # fmt: skip


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


def _colour_bar(axes: Axes, scale: FloatPair, *, is_map: bool, caption: str) -> None:
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
        caption,
        fontsize=SMALL_PT,
        labelpad=1.5,
        color=TEXT,
        fontfamily="sans-serif",
    )
    for spine in axes.spines.values():
        spine.set(linewidth=0.6, color=TEXT)
