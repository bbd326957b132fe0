"""Resampling along the slice axis on the same field of view, and the affine that a finer result deserves."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medsr.geometry import (
    RATIO_LIMIT,
    rescaled_affine,
    rescaled_size,
    slice_axis,
    slice_positions,
    through_plane_ratio,
    to_slice_last,
)
from medsr.resampling import interpolation_matrix
from medsr.transforms.orientation import permute_spatial

__all__ = ["ResampleThroughPlaned", "UpdateGeometryd"]

_KEPT = ("sform_code", "qform_code", "filename_or_obj", "step", "step_unit")
"""What the file of a result needs of the metadata of its source."""


class ResampleThroughPlaned(MapTransform):
    """Interpolate a slices-last volume to thin slices on the same field of view, and note which axes are sharp.

    The interpolated axis holds no detail that could teach a network anything: ``meta["sharp_axes"]`` names the
    others. A near-isotropic volume passes unchanged, with three sharp axes. ``monai.transforms.Spacing`` was
    considered: its cubic mode resamples all three axes through SciPy, a hundred times slower.

    Args:
        keys: volumes, slices last.
        spacing_mm: new slice spacing; default the in-plane spacing.
        kind: ``nearest``, ``linear`` or ``cubic``.

    Shape:
        ``(C, H, W, D)`` to ``(C, H, W, round(D * ratio))``.

    Example:
        >>> item = {"image": MetaTensor(torch.rand(1, 8, 8, 5), affine=torch.diag(torch.tensor([1.0, 1, 3, 1])))}
        >>> ResampleThroughPlaned("image")(item)["image"].shape
        torch.Size([1, 8, 8, 15])
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing_mm: float | None = None,
        kind: str = "cubic",
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spacing_mm, self.kind = spacing_mm, kind

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            affine = np.asarray(image.affine, dtype=np.float64)
            ratio = through_plane_ratio(affine, self.spacing_mm, axis=2)
            meta = {k: v for k, v in image.meta.items() if k != "affine"}
            if ratio < RATIO_LIMIT:
                meta["sharp_axes"] = (0, 1, 2)
                result[key] = MetaTensor(image.as_tensor(), affine=torch.as_tensor(affine), meta=meta)
                continue
            size, new_size = image.shape[-1], rescaled_size(image.shape[-1], ratio)
            matrix = interpolation_matrix(size, slice_positions(size, new_size, ratio), kind=self.kind)
            values = image.as_tensor().float() @ torch.as_tensor(matrix.T, dtype=torch.float32)
            meta["sharp_axes"] = (0, 1)
            new_affine = rescaled_affine(affine, 2, size=size, new_size=new_size, ratio=ratio)
            result[key] = MetaTensor(values, affine=torch.as_tensor(new_affine), meta=meta)
        return result


class UpdateGeometryd(MapTransform):
    """Give a result with more slices than its source the affine of its own grid: the last step before saving.

    It must come *after* ``Invertd``, which puts the affine of the input back. ``SaveImaged`` alone would write
    four times the slices with the old spacing: a head four times too tall.

    Args:
        keys: results, in the axis order of the input file.
        source_key: the input as it was read; its ``original_affine`` and ``spatial_shape`` are used.
        spacing_mm: slice spacing of the result; default the in-plane spacing of the source.
        slices_last: exchange axes so that the slices come last, for files whose spacing no longer tells which axis
            they are on.

    Shape:
        ``(C, X, Y, Z)``, unchanged but for the order of the axes.

    Example:
        >>> affine = torch.diag(torch.tensor([1.0, 1, 4, 1], dtype=torch.float64))
        >>> image = MetaTensor(torch.zeros(1, 8, 8, 2), meta={"original_affine": affine, "spatial_shape": (8, 8, 2)})
        >>> UpdateGeometryd("pred")({"image": image, "pred": torch.zeros(1, 8, 8, 8)})["pred"].affine[2].tolist()
        [0.0, 0.0, 1.0, -1.5]
    """

    def __init__(
        self,
        keys: KeysCollection,
        source_key: str = "image",
        spacing_mm: float | None = None,
        *,
        slices_last: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source_key, self.spacing_mm, self.slices_last = source_key, spacing_mm, slices_last

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Set the affine of every key."""
        result = dict(data)
        meta = result[self.source_key].meta
        affine = np.asarray(meta["original_affine"], dtype=np.float64)
        axis = slice_axis(affine, force=True)
        size = int(meta["spatial_shape"][axis])
        ratio = through_plane_ratio(affine, self.spacing_mm)
        for key in self.key_iterator(result):
            image = result[key]
            values = image.as_tensor() if isinstance(image, MetaTensor) else image
            new = rescaled_affine(affine, axis, size=size, new_size=values.shape[1 + axis], ratio=ratio)
            kept = {k: v for k, v in meta.items() if k in _KEPT}
            result[key] = MetaTensor(values, affine=torch.as_tensor(new), meta=kept)
            if self.slices_last:
                result[key] = permute_spatial(result[key], to_slice_last(axis))
        return result
