"""Thin slices of a mask that was drawn on thick ones: shape-based interpolation, the baseline of fine masks.

MONAI was considered: ``Spacing`` resamples a mask by its nearest neighbour, which leaves the staircase of thick
slices, and the signed distances of ``BoundaryLoss`` are 3D and in voxels.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.transforms.utils import distance_transform_edt
from monai.utils import convert_to_dst_type, convert_to_numpy

from medsr.errors import DataError, SettingError
from medsr.geometry import (
    RATIO_LIMIT,
    rescaled_affine,
    spacing_of,
    thin_positions,
    through_plane_ratio,
)
from medsr.resampling import interpolation_matrix, resample_last_axis

__all__ = ["LabelThroughPlaned", "signed_distance_interpolation"]

Label: TypeAlias = Any
"""A NumPy array or a torch tensor."""

FloatArray: TypeAlias = npt.NDArray[np.float64]

_TIE_MM = 1e-4
"""Distances between pixel centres are often equal; rounding must not decide between classes."""


def signed_distance_interpolation(
    label: Label,
    ratio: float | None = None,
    positions: Sequence[float] | npt.NDArray[np.float64] | None = None,
    *,
    spacing_mm: Sequence[float],
    kind: str = "linear",
    limit_mm: float | None = None,
) -> Label:
    """Thin slices of a thick mask: the distance to each class's outline is interpolated, and the nearest inside wins.

    In every thick slice each class, background included, gets its signed 2D distance to its own outline in mm,
    positive inside. The distances are interpolated along the slice axis, and a voxel takes the class with the
    largest value (with one class and background: the class where its distance is above 0). Equal values go to the
    lower class. At the centre of a thick slice the mask is reproduced exactly.

    Distances end at ``limit_mm`` on either side, and a slice without a class lies ``-limit_mm`` outside of it
    everywhere. By default that is half the slice spacing, the distance to the neighbouring slab, and one pixel more:
    a class that ends between two slices ends at the face of its last slab at the latest (linear), tapered at the rim.
    Without a limit, as published, an object that the next slice does not show fades sooner the farther away that
    slice shows another one; the cubic kind then also rings. Mean Dice for slices of 4 mm made from 1 mm by area
    average, nearest / linear / cubic / linear without limit: 13 structures of a brain 0.889 / 0.906 / 0.910 / 0.899,
    4 gliomas 0.958 / 0.964 / 0.964 / 0.959, lesions of 2 patients with multiple sclerosis 0.669 / 0.602 / 0.626 /
    0.430. So ``nearest`` keeps best what is one or two pixels wide; for slices of 2 mm nothing beat it on these data.

    Args:
        label: mask on thick slices, slices last.
        ratio: slice spacing divided by the new slice spacing; the same field of view is covered.
        positions: instead of a ratio, the centres of the new slices in units of old slices.
        spacing_mm: voxel size in mm along the three array axes of the thick mask.
        kind: interpolation of the distances: ``linear``, ``cubic``, or ``nearest``, which repeats the mask.
        limit_mm: largest distance in mm; default half the slice spacing and one in-plane pixel.

    Shape:
        - label: class map of integers, ``(H, W, D)`` or ``(1, H, W, D)``, or one-hot ``(K, H, W, D)``;
        - returns: the same form, type and device with ``round(D * ratio)`` or ``len(positions)`` slices.

    Raises:
        DataError: if the label is neither a class map nor one-hot.
        GeometryError: if the ratio is not positive.
        SettingError: if not exactly one of ``ratio`` and ``positions`` is given, or another setting is wrong.

    Example:
        >>> thick = np.zeros((7, 7, 2), dtype=np.uint8)
        >>> thick[1:6, 1:6, 0] = thick[3, 3, 1] = 1
        >>> thin = signed_distance_interpolation(thick, 3.0, spacing_mm=(1, 1, 6))
        >>> thin.sum(axis=(0, 1)).tolist()
        [25, 25, 9, 5, 1, 1]

    Reference:
        Raya and Udupa, Shape-based interpolation of multidimensional objects, 1990,
        https://doi.org/10.1109/42.52980
    """
    if (ratio is None) == (positions is None):
        raise SettingError("give either the ratio of slice spacings or the positions of the new slices")
    *in_plane, through_plane = _positive("spacing_mm", spacing_mm, count=3)
    limit_mm = through_plane / 2 + max(in_plane) if limit_mm is None else limit_mm
    (limit,) = _positive("limit_mm", [limit_mm], count=1)
    values = convert_to_numpy(label)
    classes = _class_map(values)
    size = classes.shape[-1]
    if positions is None:
        positions = thin_positions(size, ratio)
    matrix = interpolation_matrix(size, positions, kind=kind)

    found = np.zeros((*classes.shape[:-1], len(matrix)), dtype=classes.dtype)
    largest = np.full(found.shape, -np.inf, dtype=np.float32)
    for value in np.unique(classes):
        distance = resample_last_axis(_signed_distance(classes == value, in_plane, limit), matrix)
        deeper = distance > largest + _TIE_MM
        found[deeper], largest[deeper] = value, distance[deeper]

    if values.ndim == 4:
        found = found[None] if len(values) == 1 else found == np.arange(len(values))[:, None, None, None]
    # The affine of a MetaTensor does not hold any more; LabelThroughPlaned gives the new one.
    like = label.as_tensor() if isinstance(label, MetaTensor) else label
    return convert_to_dst_type(found, like)[0]


class LabelThroughPlaned(MapTransform):
    """Bring a slices-last mask to thin slices on the same field of view, shape-based, with the affine they deserve.

    The counterpart of :class:`~medsr.transforms.through_plane.ResampleThroughPlaned` for masks: the same slices for
    the same spacing. A near-isotropic mask passes unchanged.

    Args:
        keys: masks, slices last.
        spacing_mm: new slice spacing; default the in-plane spacing.
        kind: see :func:`signed_distance_interpolation`; ``nearest`` repeats the thick slices.

    Shape:
        ``(1, H, W, D)`` class map or ``(K, H, W, D)`` one-hot, to ``round(D * ratio)`` slices.

    Raises:
        DataError: if a mask is neither a class map nor one-hot.
        SettingError: if ``kind`` is unknown.

    Example:
        >>> item = {"label": MetaTensor(torch.ones(1, 8, 8, 5), affine=torch.diag(torch.tensor([1.0, 1, 3, 1])))}
        >>> LabelThroughPlaned("label")(item)["label"].shape
        torch.Size([1, 8, 8, 15])
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing_mm: float | None = None,
        kind: str = "linear",
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spacing_mm, self.kind = spacing_mm, kind

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Interpolate every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            label = result[key]
            affine = np.asarray(label.affine, dtype=np.float64)
            ratio = through_plane_ratio(affine, self.spacing_mm, axis=2)
            if ratio < RATIO_LIMIT:
                continue
            values = signed_distance_interpolation(
                label.as_tensor(), ratio, spacing_mm=spacing_of(affine), kind=self.kind
            )
            size, new_size = label.shape[-1], values.shape[-1]
            new_affine = rescaled_affine(affine, 2, size=size, new_size=new_size, ratio=ratio)
            meta = {k: v for k, v in label.meta.items() if k != "affine"}
            result[key] = MetaTensor(values, affine=torch.as_tensor(new_affine), meta=meta)
        return result


def _signed_distance(
    mask: npt.NDArray[np.bool_], in_plane_mm: Sequence[float], limit_mm: float
) -> FloatArray:
    """Signed distance in mm of every pixel to the outline of the mask within its slice, ``(H, W, D)``.

    The outline runs half a pixel beyond the centre of the last pixel inside (exactly so for square pixels).
    """
    # MONAI's transform treats the first axis as channels: every slice by itself.
    slices = np.moveaxis(mask, -1, 0)
    sampling, half = [float(s) for s in in_plane_mm], min(in_plane_mm) / 2
    inside = distance_transform_edt(slices, sampling=sampling)
    outside = distance_transform_edt(~slices, sampling=sampling)
    distance = np.where(slices, inside - half, half - outside)
    # Without an outline in the slice the distances above are meaningless.
    distance[slices.all(axis=(1, 2))] = limit_mm
    distance[~slices.any(axis=(1, 2))] = -limit_mm
    return np.moveaxis(distance.clip(-limit_mm, limit_mm), 0, -1)


def _class_map(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Class of every voxel, ``(H, W, D)``."""
    if values.ndim == 4 and len(values) > 1:
        if not (np.isin(values, (0, 1)).all() and (values.sum(axis=0) == 1).all()):
            raise DataError(
                "the channels of a mask must be one-hot, background included; take the argmax first"
            )
        return values.argmax(axis=0)
    classes = values[0] if values.ndim == 4 and len(values) else values
    if classes.ndim != 3 or classes.size == 0:
        raise DataError(f"a mask must be (H, W, D) or (K, H, W, D), got shape {values.shape}")
    if not np.equal(classes, np.round(classes)).all():
        raise DataError("a class map holds only whole numbers; threshold or take the argmax first")
    return classes


def _positive(name: str, values: Sequence[float], *, count: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise SettingError(f"{name} must be {count} positive number{'s' * (count > 1)} of mm, got {numbers}")
    return numbers
