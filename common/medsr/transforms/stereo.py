"""Transforms of stereo pairs: from files to pairs, rows brought to one height, augmentation, EndoVis 2017.

A pair is one tensor ``(2C, H, W)``, the left view before the right one. What treats both views alike then needs no
class of ours: ``monai.transforms.RandFlipd(spatial_axis=0)`` flips upside down, ``RandSpatialCropSamplesd`` takes
crops of both views at one place, :class:`~medsr.transforms.bicubic.BicubicDownsampled` degrades. Crops should be as
wide as the largest disparity and half as much again: 32 x 160 pixels of the coarse pair at x4, 48 x 256 at x2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import ensure_tuple
from torch import Tensor
from torch.nn import functional as F

from medsr.errors import DataError, SettingError
from medsr.io.loading import loaded_name
from medsr.settings import as_flag, as_number, as_whole, as_wholes

__all__ = [
    "FRAME_LAYOUTS",
    "ROW_RESIDUAL_LIMIT_PX",
    "AlignRowsd",
    "EndoVis17Framed",
    "JoinViewsd",
    "RandChannelOrderd",
    "RandDisparityd",
    "RandSwapFlipd",
    "RowMatch",
    "SplitFramed",
    "SplitViewsd",
    "match_rows",
    "refuse_unequal_views",
    "shift_rows",
]

_log = logging.getLogger(__name__)

FRAME_LAYOUTS = ("side_by_side", "top_bottom")

_PATCHES, _LIKE, _ENOUGH = 64, 0.8, 5
"""Patches that are looked for in the other view, correlation from which one counts as found, and how many must be."""

_RELIEF_PX = 64
"""Distance of the places between which the disparity of a made-up scene changes linearly."""

ROW_RESIDUAL_LIMIT_PX = 1.0
"""Vertical disparity above which a pair counts as not rectified: attention along rows misses its matches."""

_ENDOVIS17_FRAME, _ENDOVIS17_IMAGE, _ENDOVIS17_CLEAN = (
    (1080, 1920),
    (28, 320, 1024, 1280),
    (37, 328, 1009, 1263),
)
"""Size of a frame; first row and column, height and width of the image in it, and of what has no border."""


class JoinViewsd(MapTransform):
    """Join two views to a pair.

    ``monai.transforms.ConcatItemsd`` was considered; it does not tell which views do not fit together. The pair
    keeps the metadata of the left view. An image without a second view becomes a pair of the same view twice, which
    is noted; so are two views that are the same image, and a right view of another bit depth, since both are written
    as the left one.

    Args:
        keys: left views; each is replaced by its pair.
        right_keys: right views, one for each key; they are removed.
        channels: channels of a view; grey views are repeated if these are 3. None leaves the views as they are.

    Shape:
        two ``(C, H, W)`` to ``(2 * channels, H, W)``.

    Raises:
        DataError: if the views differ in size or in colour, or have another number of channels.

    Example:
        >>> JoinViewsd()({"image": torch.zeros(3, 4, 5), "image_right": torch.zeros(3, 4, 5)})["image"].shape
        torch.Size([6, 4, 5])
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        right_keys: KeysCollection = "image_right",
        *,
        channels: int | None = 3,
    ) -> None:
        super().__init__(keys)
        self.right_keys, self.channels = ensure_tuple(right_keys), channels
        if len(self.right_keys) != len(self.keys):
            raise SettingError(
                f"as many right_keys as keys are needed, got {self.right_keys} for {self.keys}"
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Join the views."""
        result = dict(data)
        for key, right_key in self.key_iterator(result, self.right_keys):
            left = result[key]
            alone = right_key not in result
            right = left if alone else result.pop(right_key)
            refuse_unequal_views(loaded_name(left, key), left.shape, right.shape)
            channels = len(left) if self.channels is None else self.channels
            if len(left) not in (1, channels):
                raise DataError(
                    f"{loaded_name(left, key)}: views of {len(left)} channels; {channels} are needed"
                )
            pair = torch.cat([one.expand(channels, -1, -1) for one in (left, right)])
            notes = _notes_of(left, None if alone else right)
            result[key] = _noted(pair, notes) if notes else pair
        return result


def refuse_unequal_views(name: str, left: Sequence[int], right: Sequence[int]) -> None:
    """Refuse views that are no pair.

    Args:
        name: what to call the left view.
        left: channels, rows and columns of the left view.
        right: those of the right view.

    Raises:
        DataError: if they differ in size or in colour.

    Example:
        >>> refuse_unequal_views("a_left.png", (3, 4, 5), (3, 4, 5))
    """
    if tuple(left) != tuple(right):
        sizes = [" x ".join(str(n) for n in one) for one in (left, right)]
        raise DataError(
            f"{name}: the left view is {sizes[0]}, the right one {sizes[1]}; both must be of one size and colour"
        )


class SplitViewsd(MapTransform):
    """Give the views of a pair keys of their own, ``<key>_left`` and ``<key>_right``.

    ``monai.transforms.SplitDimd`` was considered; it makes one item per channel. The pair itself stays.

    Args:
        keys: pairs.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(2C, H, W)`` to two of ``(C, H, W)``.

    Raises:
        DataError: for an odd number of channels.

    Example:
        >>> sorted(SplitViewsd("pred")({"pred": torch.zeros(6, 4, 5)}))
        ['pred', 'pred_left', 'pred_right']
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split every pair."""
        result = dict(data)
        for key in self.key_iterator(result):
            pair = result[key]
            if len(pair) % 2:
                raise DataError(f"{loaded_name(pair, key)}: {len(pair)} channels are no pair")
            result[f"{key}_left"], result[f"{key}_right"] = pair.chunk(2)
        return result


class SplitFramed(MapTransform):
    """Cut frames that hold both views into pairs.

    Args:
        keys: frames.
        layout: ``side_by_side`` or ``top_bottom``.
        right_first: the right view is on the left, or on top.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(C, H, W)`` to ``(2C, H, W / 2)`` or ``(2C, H / 2, W)``.

    Raises:
        SettingError: for an unknown layout.
        DataError: if a frame cannot be halved.

    Example:
        >>> SplitFramed("image")({"image": torch.zeros(3, 4, 10)})["image"].shape
        torch.Size([6, 4, 5])
    """

    def __init__(
        self,
        keys: KeysCollection,
        layout: str = "side_by_side",
        *,
        right_first: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if layout not in FRAME_LAYOUTS:
            raise SettingError(f"layout must be one of {', '.join(FRAME_LAYOUTS)}, got '{layout}'")
        self.layout, self.right_first = layout, as_flag("right_first", right_first)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Cut every frame."""
        result = dict(data)
        axis = 2 if self.layout == "side_by_side" else 1
        for key in self.key_iterator(result):
            frame = result[key]
            if frame.shape[axis] % 2:
                raise DataError(
                    f"{loaded_name(frame, key)}: a frame of {_size(frame)} is not two views "
                    f"{self.layout.replace('_', ' ')}"
                )
            views = frame.chunk(2, axis)
            result[key] = torch.cat(views[::-1] if self.right_first else views)
        return result


class RandSwapFlipd(RandomizableTransform, MapTransform):
    """Mirror pairs left to right at random, and swap the views, so that disparities keep their sign.

    ``monai.transforms.RandFlipd`` alone would turn a pair into one that no stereo camera takes.

    Args:
        keys: pairs, which all get the same.
        prob: how often.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(2C, H, W)`` to the same.

    Example:
        >>> RandSwapFlipd("image", prob=1)({"image": torch.tensor([[[1, 2]], [[3, 4]]])})["image"].tolist()
        [[[4, 3]], [[2, 1]]]
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.5, *, allow_missing_keys: bool = False) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Mirror all pairs, or none."""
        result = dict(data)
        self.randomize(None)
        for key in self.key_iterator(result):
            if self._do_transform:
                result[key] = torch.cat(result[key].flip(2).chunk(2)[::-1])
        return result


class RandDisparityd(RandomizableTransform, MapTransform):
    """Move the right view of a pair of equal views to a random side, as if a scene had been seen by two cameras.

    Stereo pairs are scarce. Single images teach a network to enlarge, and so moved to look for its matches as well.
    Pairs of two cameras stay as they are. What leaves the view on one side comes back on the other, so that nothing
    is made up; crops rarely show both. MONAI has no such transform.

    A scene without relief has one disparity, and matching is guessing a number. With relief, disparities change
    smoothly over the image. As whole pixels they leave the moved view as sharp as the other one, but show the same
    places: two cameras never do. With ``subpixel`` the moved view is interpolated, by Keys' cubic convolution.

    Args:
        keys: pairs, which all get the same.
        largest: largest disparity that is drawn, in pixels of the pair; both signs are.
        relief: by how many pixels disparities may differ from the one that was drawn, on either side.
        subpixel: disparities are any numbers, not whole ones.
        rows: by how many pixels the rows of the right view may lie higher or lower: rectified to a fraction of a
            pixel is what real pairs are. Rows beyond the image repeat its first or last one.
        exposure: by which share the right view may become brighter or darker, as two cameras differ; values stay in
            [0, 1].
        noise: largest standard deviation of the noise that only the right view has: two cameras have noise of their
            own, and a moved copy has that of the other.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(2C, H, W)`` to the same.

    Raises:
        SettingError: if ``largest``, ``relief``, ``rows`` or ``noise`` is negative, or ``exposure`` is not in [0, 1).

    Example:
        >>> single = torch.arange(8.0).repeat(2, 1, 1)
        >>> moved = RandDisparityd("image", 3).set_random_state(1)({"image": single})["image"]
        >>> torch.equal(moved[0], single[0]), torch.equal(moved[1], single[1])
        (True, False)

    Reference:
        doi:10.1109/TASSP.1981.1163711 (cubic convolution)
    """

    def __init__(
        self,
        keys: KeysCollection,
        largest: int,
        *,
        relief: int = 0,
        subpixel: bool = False,
        rows: float = 0.0,
        exposure: float = 0.0,
        noise: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.largest, self.relief = as_wholes(0, largest=largest, relief=relief)
        self.subpixel, self.rows = as_flag("subpixel", subpixel), as_number("rows", rows)
        self.exposure, self.noise = as_number("exposure", exposure), as_number("noise", noise)
        if not 0 <= self.exposure < 1:
            raise SettingError(f"exposure must be in [0, 1), got {exposure}")
        for name, value in {"rows": self.rows, "noise": self.noise}.items():
            if value < 0:
                raise SettingError(f"{name} must be >= 0, got {value:g}")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Move the right views."""
        result = dict(data)
        disparity = self._disparity()
        seed = self.R.randint(2**31) if self.relief or self.noise else 0
        down = self.R.uniform(-self.rows, self.rows) if self.rows else 0.0
        gain = 1 + self.R.uniform(-self.exposure, self.exposure) if self.exposure else 1.0
        sigma = self.R.uniform(0, self.noise) if self.noise else 0.0
        for key in self.key_iterator(result):
            left, right = result[key].chunk(2)
            if not torch.equal(left, right):
                continue
            height, width = right.shape[1:]
            columns = torch.full((height, width), float(disparity))
            if self.relief:
                field = _relief(self.relief, (height, width), seed)
                columns += field if self.subpixel else field.round()
            right = _moved(right, columns, down)
            if gain != 1 or sigma:
                seeded = torch.Generator().manual_seed(int(seed))
                own = sigma * torch.randn(right.shape, generator=seeded).to(right) if sigma else 0
                right = (gain * right + own).clamp(0, 1)
            result[key] = torch.cat([left, right])
        return result

    def _disparity(self) -> float:
        if self.subpixel:
            return self.R.uniform(-self.largest, self.largest)
        return self.R.randint(-self.largest, self.largest + 1)


def _moved(view: Tensor, columns: Tensor, rows: float) -> Tensor:
    """The view at places so many columns further right, around its sides, and rows further down, to its last one.

    Between pixels nothing becomes darker or brighter than the view is. ``torch.nn.functional.grid_sample`` was
    considered; its sides do not meet.
    """
    height, width = view.shape[1:]
    across, below = columns.floor(), math.floor(rows)
    moved = view
    if rows:
        first = torch.arange(height) + below
        moved = torch.zeros_like(view)
        for step, weight in enumerate(_cubic(torch.tensor(rows - below)), -1):
            moved += weight * view[:, (first + step).clamp(0, height - 1)]
        moved = moved.clamp(view.amin(), view.amax())
    start = torch.arange(width) + across.long()
    if torch.equal(across, columns):
        return moved.gather(2, (start % width).to(view.device).expand_as(view))
    result = torch.zeros_like(view)
    for step, weight in enumerate(_cubic(columns - across), -1):
        result += weight.to(view) * moved.gather(2, ((start + step) % width).to(view.device).expand_as(view))
    return result.clamp(view.amin(), view.amax())


def _cubic(part: Tensor) -> tuple[Tensor, ...]:
    """Weights of the sample before a place, of the one it is past by a part of a pixel, and of the two after."""
    square, cube = part**2, part**3
    before = (-cube + 2 * square - part) / 2
    own = (3 * cube - 5 * square + 2) / 2
    after = (-3 * cube + 4 * square + part) / 2
    return before, own, after, 1 - before - own - after


def _relief(largest: int, size: tuple[int, int], seed: int) -> Tensor:
    """Numbers from ``-largest`` to ``largest`` that change smoothly from row to row and column to column."""
    seeded = torch.Generator().manual_seed(int(seed))
    knots = [2 + length // _RELIEF_PX for length in size]
    heights = torch.rand(1, 1, *knots, generator=seeded).mul_(2).sub_(1)
    field = F.interpolate(heights, size=size, mode="bilinear", align_corners=True)
    return largest * field[0, 0]


class RandChannelOrderd(RandomizableTransform, MapTransform):
    """Permute the colours at random, in both views alike; MONAI has no such transform.

    Args:
        keys: pairs, which all get the same.
        prob: how often.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(2C, H, W)`` to the same.

    Example:
        >>> RandChannelOrderd("image")({"image": torch.zeros(6, 2, 2)})["image"].shape
        torch.Size([6, 2, 2])
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.5, *, allow_missing_keys: bool = False) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Permute the colours of all pairs, or of none."""
        result = dict(data)
        self.randomize(None)
        # The seed decides alike for every pair, whatever the number of its channels.
        seed = self.R.randint(2**31)
        for key in self.key_iterator(result):
            if self._do_transform:
                count = len(result[key]) // 2
                order = torch.randperm(count, generator=torch.Generator().manual_seed(int(seed)))
                result[key] = result[key][torch.cat([order, order + count])]
        return result


class RowMatch(NamedTuple):
    """How the views of a pair lie to each other, as medians over the patches that were found in both.

    Args:
        offset_px: row in the right view minus row in the left view.
        spread_px: distance of the patches from this offset.
        disparity_px: column in the left view minus column in the right view.
        patches: number of patches that were found.

    Example:
        >>> RowMatch(6.5, 0.3, 12.0, 40).offset_px
        6.5
    """

    offset_px: float
    spread_px: float
    disparity_px: float
    patches: int


def match_rows(pair: Tensor, *, max_rows: int = 24, max_columns: int | None = None) -> RowMatch | None:
    """Look for patches of the left view in the right one, to see whether rows lie at one height.

    The patches with the most vertical detail, at most one per cell of a grid, are moved over the right view; the
    place of the highest normalised correlation counts, to a fraction of a row. ``skimage.registration`` was
    considered: it compares whole images, which a scene with depth is not a shift of.

    Args:
        pair: intensities.
        max_rows: largest vertical disparity that is looked for, in pixels.
        max_columns: the same for the horizontal one; default a quarter of the width.

    Shape:
        ``(2C, H, W)``.

    Returns:
        what was found, or None if too little was found to tell.

    Raises:
        SettingError: for a negative range.

    Example:
        >>> view = torch.rand(1, 40, 60, generator=torch.Generator().manual_seed(0))
        >>> found = match_rows(torch.cat([view, view.roll((2, -5), (1, 2))]))
        >>> round(found.offset_px), found.disparity_px
        (2, 5.0)
    """
    height, width = pair.shape[1:]
    columns = width // 4 if max_columns is None else int(max_columns)
    if min(max_rows, columns) < 0:
        raise SettingError(f"max_rows and max_columns must be >= 0, got {max_rows} and {columns}")
    values = pair.as_tensor() if isinstance(pair, MetaTensor) else pair
    left, right = values.double().unflatten(0, (2, -1)).mean(1)
    side = max(8, min(32, min(height, width) // 8))
    if min(height, width) < side:
        return None
    corners = _detailed(left, side)
    if len(corners) < _ENOUGH:
        return None
    rows = min(int(max_rows), height - side)
    columns = min(columns, width - side)
    likeness = _likeness(left, right, corners, (side, rows, columns))
    best, where = likeness.flatten(1).max(1)
    wide = likeness.shape[2]
    found = torch.stack([where // wide, where % wide], 1)
    # At the end of the range nobody knows what lies beyond.
    inside = (found > 0).all(1) & (found[:, 0] < 2 * rows) & (found[:, 1] < 2 * columns)
    chosen = torch.nonzero((best > _LIKE) & inside)[:, 0]
    if len(chosen) < _ENOUGH:
        return None
    place = found[chosen]
    shifts = (
        place[:, 0]
        - rows
        + _vertex(*(likeness[chosen, place[:, 0] + step, place[:, 1]] for step in (-1, 0, 1)))
    )
    offset = shifts.median()
    return RowMatch(
        offset_px=round(float(offset), 2),
        spread_px=round(float((shifts - offset).abs().median()), 2),
        disparity_px=float((columns - place[:, 1]).median()),
        patches=len(chosen),
    )


def shift_rows(pair: Tensor, rows: int) -> Tensor:
    """Bring the rows of a pair to one height; those without a partner are cut off.

    Args:
        pair: left view before right view.
        rows: row in the right view minus row in the left view.

    Shape:
        ``(2C, H, W)`` to ``(2C, H - |rows|, W)``.

    Raises:
        SettingError: if no row is left.

    Example:
        >>> shift_rows(torch.arange(3.0).view(1, 3, 1).repeat(2, 1, 1), 1)[:, :, 0].tolist()
        [[0.0, 1.0], [1.0, 2.0]]
    """
    kept = pair.shape[1] - abs(rows)
    if kept < 1:
        raise SettingError(f"a shift of {rows} rows leaves nothing of {pair.shape[1]}")
    left, right = pair.chunk(2)
    return torch.cat([left[:, max(0, -rows) :][:, :kept], right[:, max(0, rows) :][:, :kept]])


class AlignRowsd(MapTransform):
    """Bring the rows of pairs to one height by a constant shift of whole rows, and say how well they match.

    Attention along rows finds nothing where the views are not rectified. Cameras that stand a little apart in height,
    as on many endoscopes, differ by a constant that a shift removes: rows without a partner are cut off. Rotations
    and lenses need :class:`~medsr.transforms.rectification.Rectifyd`.

    The metadata get ``row_offset_px`` (what was removed), ``row_residual_px`` (vertical disparity that is left, the
    median of its size), ``row_patches`` and ``disparity_px``. A residual above 1 px, a negative disparity, and views in
    which nothing was found in common are noted as warnings. Disparities of both signs are normal for cameras that look
    inwards: only where ``parallel`` is set does a negative one mean swapped views for sure.

    Args:
        keys: pairs.
        rows: row in the right view minus row in the left view; ``estimate`` measures it with :func:`match_rows`.
        max_rows: see :func:`match_rows`.
        max_columns: the same.
        parallel: the cameras are parallel or rectified, so that all disparities are positive.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(2C, H, W)`` to ``(2C, H - shift, W)``.

    Raises:
        SettingError: for another word than ``estimate``, or a fraction.
        DataError: if the shift leaves no row.

    Example:
        >>> pair = AlignRowsd("image", rows=2)({"image": torch.rand(6, 40, 60)})["image"]
        >>> pair.shape, pair.meta["row_offset_px"]
        (torch.Size([6, 38, 60]), 2)
    """

    def __init__(
        self,
        keys: KeysCollection,
        rows: int | str = "estimate",
        *,
        max_rows: int = 24,
        max_columns: int | None = None,
        parallel: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if isinstance(rows, str) and rows != "estimate":
            raise SettingError(f"row_shift must be a whole number or 'estimate', got '{rows}'")
        self.rows = rows if isinstance(rows, str) else as_whole("row_shift", rows)
        self.max_rows, self.max_columns, self.parallel = max_rows, max_columns, parallel

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Align every pair."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._aligned(result[key], key)
        return result

    def _aligned(self, pair: Any, key: Hashable) -> MetaTensor:
        pair = pair if isinstance(pair, MetaTensor) else MetaTensor(pair)
        found = match_rows(pair, max_rows=self.max_rows, max_columns=self.max_columns)
        shift = self.rows if isinstance(self.rows, int) else round(found.offset_px) if found else 0
        # One view twice, as an image without a partner is, lies where it lies.
        shift = 0 if torch.equal(*pair.as_tensor().chunk(2)) else shift
        try:
            aligned = shift_rows(pair, shift)
        except SettingError as error:
            raise DataError(f"{loaded_name(pair, key)}: {error}") from None
        aligned.meta["row_offset_px"] = shift
        warnings = []
        if found is None:
            warnings.append("the views have too little in common to tell whether they are rectified")
        else:
            residual = max(abs(found.offset_px - shift), found.spread_px)
            aligned.meta.update(
                row_residual_px=residual, row_patches=found.patches, disparity_px=found.disparity_px
            )
            if residual > ROW_RESIDUAL_LIMIT_PX:
                warnings.append(
                    f"rows of the views differ by {residual:.1f} px after a shift of {shift}; rectify the pair"
                )
            if found.disparity_px < 0:
                meaning = (
                    "the views look swapped"
                    if self.parallel
                    else "cameras that look inwards, or swapped views"
                )
                warnings.append(f"the disparity is {found.disparity_px:g} px: {meaning}")
        for warning in warnings:
            _log.warning("%s: %s", loaded_name(pair, key), warning)
        return _noted(aligned, warnings)


class EndoVis17Framed(MapTransform):
    """Make a usable picture of a frame of EndoVis 2017: interlacing removed, borders cut off.

    The frames come from interlaced video: where something moves, odd and even rows show it at two places. The odd
    rows are replaced by the mean of those above and below. Of 1920 x 1080 pixels the image is 1280 x 1024, with a
    black border inside still; 1263 x 1009 are free of it. The first pixel is kept in ``meta["frame_origin_px"]``.
    ``monai.transforms.SpatialCropd`` was considered; it would cut before the rows can be told apart.

    Args:
        keys: frames, or pairs of them.
        deinterlace: replace the odd rows.
        border: keep the black border inside the image, to fit the calibration that comes with the data.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(C, 1080, 1920)`` to ``(C, 1009, 1263)``, or ``(C, 1024, 1280)`` with border.

    Raises:
        DataError: for frames of another size.

    Example:
        >>> EndoVis17Framed("image")({"image": torch.zeros(3, 1080, 1920)})["image"].shape
        torch.Size([3, 1009, 1263])

    Reference:
        arXiv 1902.06426
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        deinterlace: bool = True,
        border: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.deinterlace, self.window = deinterlace, _ENDOVIS17_IMAGE if border else _ENDOVIS17_CLEAN

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Treat every frame."""
        result = dict(data)
        row, column, height, width = self.window
        for key in self.key_iterator(result):
            frame = result[key]
            if tuple(frame.shape[1:]) != _ENDOVIS17_FRAME:
                raise DataError(
                    f"{loaded_name(frame, key)}: frames of EndoVis 2017 are 1080 x 1920 pixels, got {_size(frame)}"
                )
            if self.deinterlace:
                even = frame[:, ::2]
                below = torch.cat([even[:, 1:], even[:, -1:]], 1)
                frame = torch.stack([even, (even + below) / 2], 2).flatten(1, 2)
            frame = frame[:, row : row + height, column : column + width].clone()
            if isinstance(frame, MetaTensor):
                frame.meta["frame_origin_px"] = [row, column]
            result[key] = frame
        return result


def _detailed(view: Tensor, side: int) -> Tensor:
    """First row and column of the patches with the most vertical detail, at most one per cell, ``(N, 2)``."""
    detail = view.diff(dim=0, append=view[-1:]).square()
    energy = F.avg_pool2d(detail[None, None], side)[0, 0]
    order = energy.flatten().argsort(descending=True)[:_PATCHES]
    order = order[energy.flatten()[order] > 1e-8]
    return side * torch.stack([order // energy.shape[1], order % energy.shape[1]], 1)


def _likeness(left: Tensor, right: Tensor, corners: Tensor, ranges: tuple[int, int, int]) -> Tensor:
    """Normalised correlation of patches with all places of their ranges, ``(N, 2 rows + 1, 2 columns + 1)``."""
    side, rows, columns = ranges
    padded = F.pad(right[None], (columns, columns, rows, rows))[0]
    real = F.pad(torch.ones_like(right)[None], (columns, columns, rows, rows))[0]
    size = (side + 2 * rows, side + 2 * columns)
    patches = torch.stack([left[r : r + side, c : c + side] for r, c in corners.tolist()])
    windows, inside = (
        torch.stack([one[r : r + size[0], c : c + size[1]] for r, c in corners.tolist()])
        for one in (padded, real)
    )
    patches = patches - patches.mean((1, 2), keepdim=True)
    ones = torch.ones_like(patches[:1])

    def moved(windows: Tensor, patches: Tensor) -> Tensor:
        """Sums of products with the patches at every place."""
        product = torch.fft.rfft2(windows) * torch.fft.rfft2(patches, s=size).conj()
        return torch.fft.irfft2(product, s=size)[:, : 2 * rows + 1, : 2 * columns + 1]

    area = side**2
    sums = moved(windows, ones)
    variance = (moved(windows.square(), ones) - sums.square() / area).clamp_min(1e-9 * area)
    likeness = moved(windows, patches) / (patches.square().sum((1, 2))[:, None, None] * variance).sqrt()
    # Places that reach beyond the view do not count.
    return likeness.masked_fill(moved(inside, ones) < area - 0.5, -1)


def _vertex(before: Tensor, top: Tensor, after: Tensor) -> Tensor:
    """Where the parabola through three values has its top, from -0.5 to 0.5; 0 where a neighbour does not count."""
    bend = before - 2 * top + after
    found = 0.5 * (before - after) / bend.clamp_max(-1e-12)
    return torch.where((before > -1) & (after > -1), found, 0).clamp(-0.5, 0.5)


def _notes_of(left: Tensor, right: Tensor | None) -> list[str]:
    """What the report should say of a pair, beside the notes of its left view."""
    if right is None:
        return ["there is no second view: the image was taken for both"]
    metas = [getattr(one, "meta", {}) for one in (left, right)]
    known = str(metas[0].get("notes", "")).splitlines()
    notes = [line for line in str(metas[1].get("notes", "")).splitlines() if line and line not in known]
    notes = [f"right view: {line}" for line in notes]
    bits = [meta.get("encoding_bits") for meta in metas]
    if bits[0] != bits[1]:
        notes.append(
            f"the left view has {bits[0]} bits, the right one {bits[1]}: both are written as the left one"
        )
    # Black frames are equal as well, and tell nothing.
    if torch.equal(left, right) and left.max() > left.min():
        notes.append("both views are the same image, pixel by pixel")
    return notes


def _noted(image: Tensor, warnings: Sequence[str]) -> MetaTensor:
    """The image with warnings added to the notes of its metadata."""
    noted = image if isinstance(image, MetaTensor) else MetaTensor(image)
    known = [line for line in str(noted.meta.get("notes", "")).splitlines() if line]
    noted.meta["notes"] = "\n".join([*known, *warnings])
    return noted


def _size(image: Tensor) -> str:
    return " x ".join(str(n) for n in image.shape)
