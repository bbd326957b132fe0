"""Bicubic resizing as MATLAB does it: the degradation and the baseline of single-image super-resolution.

``monai.transforms.Resize(mode="bicubic")`` was considered: it does not widen the kernel when it shrinks, so that
fine detail aliases, and its ``anti_aliasing`` is a Gaussian. They match the degradation of the benchmarks to 32 and
37 dB only, and a network trained on that degradation loses 8 dB on aliased input.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform, Transform
from monai.transforms.utils import scale_affine
from monai.utils import ensure_tuple
from torch import Tensor

from medsr.errors import DataError, SettingError
from medsr.resampling import antialiased_bicubic_matrix

__all__ = [
    "ROUNDINGS",
    "BicubicDownsample",
    "BicubicDownsampled",
    "bicubic_bands",
    "bicubic_resize",
    "modcrop",
]

ROUNDINGS = ("none", "end", "between")

_COLUMNS = 1024
"""Columns of a block of a band."""

_ON_GRID = 1e-3
"""Grey levels within which a value counts as read from an 8-bit file; k/255 in float32 misses k by 1e-5."""
_TIE = 1e-9
"""Grey levels by which a float64 sum may miss a half and still count as one."""


def bicubic_resize(image: Tensor, size: tuple[int, int], *, rounding: str = "none") -> Tensor:
    """Resize the last two axes as MATLAB's ``imresize(..., "bicubic")``, antialiased when they shrink.

    Rows are resized first, then columns. The x2, x3 and x4 files of the standard benchmarks were rounded to 8
    bits in between, those for x8 only at the end; without rounding, gradients flow, which a check of data
    consistency needs. Computed in float32, in float64 for float64 images and where rounding has to hit halves,
    outside any autocast. ``torch.nn.functional.interpolate(antialias=True)`` was considered; it differs at the
    border and cannot round in between.

    Args:
        image: intensities in [0, 1], floating point, or uint8. The type of the result is the same.
        size: new height and width, in pixels; the field of view stays, so the affine of a MetaTensor follows.
        rounding: ``none``, ``end`` or ``between`` (after the rows, and at the end): clip to [0, 1] and round to
            255ths, halves up. uint8 images must be rounded.

    Shape:
        ``(..., H, W)`` to ``(..., *size)``.

    Raises:
        DataError: if the image is neither floating point nor uint8, or has less than two axes.
        SettingError: if ``rounding`` does not exist or does not fit the image, or ``size`` is not positive.

    Example:
        >>> bicubic_resize(torch.full((3, 8, 12), 0.25), (2, 3)).unique().tolist()
        [0.25]

    Reference:
        R. Keys, IEEE Trans. ASSP 29 (1981) 1153-1160, doi:10.1109/TASSP.1981.1163711
    """
    if rounding not in ROUNDINGS:
        raise SettingError(f"rounding must be one of {', '.join(ROUNDINGS)}, got '{rounding}'")
    is_integer = image.dtype == torch.uint8
    if image.ndim < 2 or not (is_integer or image.is_floating_point()):
        raise DataError(
            f"image must be (..., H, W), floating point in [0, 1] or uint8, got {image.dtype} of shape "
            f"{tuple(image.shape)}; scale it first"
        )
    if is_integer and rounding == "none":
        raise SettingError("a uint8 image cannot be resized without rounding; choose one or scale to [0, 1]")
    is_rounded = rounding != "none"
    # Apple's accelerator has no float64.
    precise = (is_rounded or image.dtype == torch.float64) and image.device.type != "mps"
    dtype = torch.float64 if precise else torch.float32
    values = (image.as_tensor() if isinstance(image, MetaTensor) else image).to(dtype)
    if is_rounded and not is_integer:
        values = _as_levels(values)
    height, width = values.shape[-2:]
    rows, columns = (
        torch.from_numpy(antialiased_bicubic_matrix(old, new)).to(device=image.device, dtype=dtype)
        for old, new in ((height, size[0]), (width, size[1]))
    )
    with torch.autocast(image.device.type, enabled=False):
        values = rows @ values
        if rounding == "between":
            values = _round_levels(values)
        values = values @ columns.T
    if is_rounded:
        values = _round_levels(values)
        values = values if is_integer else values / 255
    values = values.to(image.dtype)
    if not isinstance(image, MetaTensor):
        return values
    result = MetaTensor(values).copy_meta_from(image)
    step = to_affine_nd(image.affine.shape[-1] - 1, scale_affine((height, width), tuple(size)))
    result.affine = image.affine @ torch.as_tensor(step, dtype=image.affine.dtype, device=image.affine.device)
    return result


def bicubic_bands(image: Tensor, size: tuple[int, int], *, rows: int = 256) -> Iterator[tuple[int, Tensor]]:
    """The result of :func:`bicubic_resize` without rounding, some rows at a time: for photographs of many megapixels.

    Only the source pixels that a block of a band needs are taken up to float32, so that a large image may lie in half
    precision.

    Args:
        image: floating point, any precision.
        size: new height and width, in pixels.
        rows: rows of a band.

    Yields:
        the first row of a band, and the band, ``(..., rows or less, size[1])``, float32.

    Example:
        >>> [(first, tuple(band.shape)) for first, band in bicubic_bands(torch.rand(3, 8, 8), (5, 4), rows=3)]
        [(0, (3, 3, 4)), (3, (3, 2, 4))]
    """
    columns = [_needed(image.shape[-1], size[1], first, _COLUMNS) for first in range(0, size[1], _COLUMNS)]
    for first in range(0, size[0], rows):
        lines, down = _needed(image.shape[-2], size[0], first, rows)
        source = image[..., lines, :]
        yield (
            first,
            torch.cat([down @ source[..., part].float() @ across.T for part, across in columns], dim=-1),
        )


def _needed(size: int, new_size: int, first: int, count: int) -> tuple[slice, Tensor]:
    """Pixels of an axis that some new pixels are made of, and their weights ``(new, old)``."""
    matrix = antialiased_bicubic_matrix(size, new_size, slice(first, first + count))
    needed = np.flatnonzero(matrix.any(axis=0))
    part = slice(int(needed[0]), int(needed[-1]) + 1)
    return part, torch.from_numpy(matrix[:, part]).float()


def modcrop(image: Tensor, scale: int) -> Tensor:
    """Cut rows at the bottom and columns on the right until the size is a multiple of the scale.

    The first pixel stays, so an affine stays right. ``monai.transforms.DivisiblePad`` was considered; it adds
    pixels, and made-up pixels must not count as truth.

    Args:
        image: array or tensor.
        scale: factor of super-resolution.

    Shape:
        ``(..., H, W)`` to ``(..., H - H % scale, W - W % scale)``.

    Raises:
        DataError: if less than ``scale`` pixels lie along an axis.
        SettingError: if ``scale`` is no whole number of 1 or more.

    Example:
        >>> modcrop(torch.zeros(3, 9, 14), 4).shape
        torch.Size([3, 8, 12])
    """
    if int(scale) != scale or scale < 1:
        raise SettingError(f"scale must be a whole number >= 1, got {scale}")
    height, width = image.shape[-2:]
    if min(height, width) < scale:
        raise DataError(f"an image of {height} x {width} pixels is too small for x{scale}")
    return image[..., : height - height % scale, : width - width % scale]


class BicubicDownsample(Transform):
    """Degrade an image by a whole factor: crop to a multiple of it, then antialiased bicubic.

    The first pixel of the result is centred ``(scale - 1) / 2`` pixels further in; the affine of a MetaTensor
    says so.

    Args:
        scale: factor, such as 4.
        rounding: ``none``, ``end`` or ``between``, see :func:`bicubic_resize`.

    Shape:
        ``(..., H, W)`` to ``(..., H // scale, W // scale)``.

    Raises:
        DataError: if the image is smaller than ``scale`` pixels.
        SettingError: if ``scale`` or ``rounding`` does not exist.

    Example:
        >>> BicubicDownsample(4)(torch.rand(3, 33, 64)).shape
        torch.Size([3, 8, 16])
    """

    def __init__(self, scale: int, *, rounding: str = "none") -> None:
        if int(scale) != scale or scale < 1:
            raise SettingError(f"scale must be a whole number >= 1, got {scale}")
        if rounding not in ROUNDINGS:
            raise SettingError(f"rounding must be one of {', '.join(ROUNDINGS)}, got '{rounding}'")
        self.scale, self.rounding = int(scale), rounding

    def __call__(self, image: Tensor) -> Tensor:
        """Degrade the image."""
        cropped = modcrop(image, self.scale)
        height, width = (size // self.scale for size in cropped.shape[-2:])
        return bicubic_resize(cropped, (height, width), rounding=self.rounding)


class BicubicDownsampled(MapTransform):
    """Dictionary form of :class:`BicubicDownsample`, which keeps the truth beside the degraded image.

    Args:
        keys: truths; each is replaced by its crop to a multiple of the scale.
        scale: factor.
        low_keys: where the degraded images go, one for each key.
        rounding: as in :func:`bicubic_resize`.
        allow_missing_keys: skip items that a sample does not have.

    Raises:
        SettingError: if there are not as many ``low_keys`` as keys.

    Example:
        >>> pair = BicubicDownsampled("image", 4)({"image": torch.rand(3, 34, 64)})
        >>> pair["image"].shape, pair["low"].shape
        (torch.Size([3, 32, 64]), torch.Size([3, 8, 16]))
    """

    def __init__(
        self,
        keys: KeysCollection,
        scale: int,
        *,
        low_keys: str | Sequence[str] = "low",
        rounding: str = "none",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.low_keys = ensure_tuple(low_keys)
        if len(self.low_keys) != len(self.keys):
            raise SettingError(f"as many low_keys as keys are needed, got {self.low_keys} for {self.keys}")
        self.downsample = BicubicDownsample(scale, rounding=rounding)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop and degrade every key."""
        result = dict(data)
        for key, low_key in self.key_iterator(result, self.low_keys):
            result[key] = modcrop(result[key], self.downsample.scale)
            result[low_key] = self.downsample(result[key])
        return result


def _as_levels(values: Tensor) -> Tensor:
    """Grey levels, whole where an 8-bit file held them: otherwise float32 decides which way a half goes."""
    levels = values * 255
    whole = levels.round()
    return torch.where((levels - whole).abs() < _ON_GRID, whole, levels)


def _round_levels(levels: Tensor) -> Tensor:
    """Whole grey levels from 0 to 255, halves up; ``torch.round`` takes halves to the even neighbour."""
    return (levels.clamp(0, 255) + (0.5 + _TIE)).floor()
