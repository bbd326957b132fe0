"""Fidelity of a volume: PSNR and SSIM inside a mask, on edges, and against the observed slices.

Every function takes NumPy arrays or torch tensors (any device) and sums in float64. ``data_range`` has no
default on purpose: the same volume gains or loses several dB with another range, so the caller states it.
Volumes hold one channel; call once per channel.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter

from medsr.errors import DataError, SettingError

__all__ = [
    "data_consistency",
    "edge_band",
    "edge_psnr",
    "head_columns",
    "head_mask",
    "percentile_range",
    "psnr",
    "ssim_3d",
    "ssim_map",
]

Volume: TypeAlias = Any
"""A NumPy array or a torch tensor."""

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float64]

SSIM_TAPS = 11
SSIM_K1, SSIM_K2 = 0.01, 0.03
BACKGROUND_SHARE = 0.05
"""Share of all voxels that a histogram bin must hold to be taken for the background."""

_COUNTED = 65_536
"""Voxels that are counted at a time."""


def psnr(pred: Volume, target: Volume, *, data_range: float, mask: Volume | None = None) -> float:
    """Peak signal-to-noise ratio in dB over the voxels of a mask; infinite for identical volumes.

    Background is easy and plentiful, so a PSNR over the whole array mostly tells how large the head is.
    MONAI's ``PSNRMetric`` was considered; it has no mask and averages in the precision of its input.

    Args:
        pred: volume to judge.
        target: reference volume of the same shape.
        data_range: peak value of the formula, in image units, for example the reference's 99.9 percentile.
        mask: voxels that count (non-zero is inside); default all. Values outside have no influence, NaN
            included.

    Raises:
        DataError: if shapes differ, the mask is empty or a value inside it is not finite.
        SettingError: if ``data_range`` is not positive.

    Example:
        >>> round(psnr(np.full((4, 4, 4), 0.1), np.zeros((4, 4, 4)), data_range=1.0), 6)
        20.0
    """
    peak = _checked_range(data_range)
    first, second = masked_values({"pred": pred, "target": target}, mask=mask)
    mse = float(np.square(first - second).mean())
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


def ssim_3d(
    pred: Volume, target: Volume, *, data_range: float, mask: Volume | None = None, sigma: float = 1.5
) -> float:
    """Mean structural similarity with a 3D Gaussian window, over the voxels of a mask.

    The window is that of Wang et al.: 11 taps per axis, population covariance. At the border the volume is
    mirrored, so the map covers every voxel and equals, voxel by voxel, scikit-image's
    ``structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)``;
    scikit-image's scalar leaves out a rim of 5 voxels, for which a mask may be given here.
    MONAI's ``SSIMMetric`` was considered; it has no mask, convolves without padding (the map loses 5 voxels
    on each side and no longer lies on the grid of a mask), needs a dense 11 x 11 x 11 kernel and works in
    float32.

    The map is computed on the whole volume and only then averaged in the mask: a window at the edge of the
    mask still sees 5 voxels of the outside. The luminance term presumes non-negative intensities; shift a
    z-scored volume by its minimum first.

    Args:
        pred: volume to judge.
        target: reference volume of the same shape.
        data_range: range of the intensities, in image units.
        mask: voxels over which the map is averaged; default all.
        sigma: standard deviation of the window, in voxels.

    Shape:
        - pred, target, mask: (X, Y, Z)

    Raises:
        DataError: if the volumes are not 3D, shapes differ, the mask is empty or a value is not finite.
        SettingError: if ``data_range`` or ``sigma`` is not positive.

    Example:
        >>> volume = np.random.default_rng(0).random((12, 12, 12))
        >>> round(ssim_3d(volume, volume, data_range=1.0), 6)
        1.0

    Reference:
        Wang et al., Image quality assessment: from error visibility to structural similarity, 2004,
        https://doi.org/10.1109/TIP.2003.819861
    """
    peak = _checked_range(data_range)
    if not (math.isfinite(sigma) and sigma > 0):
        raise SettingError(f"ssim_3d: sigma must be a positive number of voxels, got {sigma}")
    first, second = (np.asarray(as_array(value), dtype=np.float64) for value in (pred, target))
    if first.ndim != 3:
        raise DataError(f"ssim_3d: volumes must be (X, Y, Z), got shape {first.shape}; pass one channel")
    _check_shapes({"pred": first, "target": second})
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("ssim_3d: the volumes hold NaN or infinite values; repair them first")
    found = ssim_map(first / peak, second / peak, sigma=sigma)
    (inside,) = masked_values({"the SSIM map": found}, mask=mask)
    return float(inside.mean())


def ssim_map(first: FloatArray, second: FloatArray, *, sigma: float) -> FloatArray:
    """Structural similarity around every pixel or voxel, for a range of 1, with mirrored borders.

    Args:
        first: image or volume.
        second: another of the same shape.
        sigma: standard deviation of the window of 11, in pixels.

    Shape:
        any number of axes; the map has the shape of both.

    Example:
        >>> float(ssim_map(np.zeros((3, 3)), np.zeros((3, 3)), sigma=1.5).min())
        1.0
    """

    def smooth(values: FloatArray) -> FloatArray:
        return np.asarray(gaussian_filter(values, sigma, radius=SSIM_TAPS // 2))

    mean_first, mean_second = smooth(first), smooth(second)
    var_first = smooth(first * first) - mean_first**2
    var_second = smooth(second * second) - mean_second**2
    covariance = smooth(first * second) - mean_first * mean_second
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_first * mean_second + c1) / (mean_first**2 + mean_second**2 + c1)
    return np.asarray(luminance * (2 * covariance + c2) / (var_first + var_second + c2))


def edge_band(
    volume: Volume,
    *,
    mask: Volume | None = None,
    percentile: float = 80,
    spacing_mm: tuple[float, ...] | None = None,
) -> BoolArray:
    """Voxels whose gradient magnitude lies above a percentile of the gradient inside the mask.

    Flat regions hide what super-resolution is for; this band is where it shows. Take it from the reference,
    never from the prediction, or a blurred prediction chooses its own questions.

    Args:
        volume: image whose edges are sought.
        mask: voxels that may belong to the band; default all.
        percentile: 0 to 100; 80 keeps the steepest fifth.
        spacing_mm: voxel size in mm per axis; default isotropic.

    Raises:
        DataError: if the mask is empty or an axis has fewer than two voxels.
        SettingError: if ``percentile`` lies outside 0 to 100.

    Example:
        >>> step = np.repeat([0.0, 1.0], 5)[:, None, None] * np.ones((1, 4, 4))
        >>> np.flatnonzero(edge_band(step)[:, 0, 0]).tolist()
        [4, 5]
    """
    if not 0 <= percentile <= 100:
        raise SettingError(f"edge_band: percentile must lie in 0 to 100, got {percentile}")
    array = as_array(volume)
    if min(array.shape, default=0) < 2:
        raise DataError(f"edge_band: every axis needs two voxels or more, got shape {array.shape}")
    steps = (1.0,) * array.ndim if spacing_mm is None else tuple(float(s) for s in spacing_mm)
    if len(steps) != array.ndim:
        raise SettingError(f"edge_band: spacing_mm needs one value per axis ({array.ndim}), got {spacing_mm}")
    magnitude = np.zeros(array.shape)
    for axis, step in enumerate(steps):
        magnitude += np.square(np.gradient(array, step, axis=axis))
    magnitude = np.sqrt(magnitude)
    (inside,) = masked_values({"the gradient": magnitude}, mask=mask)
    band = magnitude > np.percentile(inside, percentile)
    return band if mask is None else band & (as_array(mask) != 0)


def edge_psnr(
    pred: Volume, target: Volume, *, data_range: float, mask: Volume | None = None, percentile: float = 80
) -> float:
    """PSNR in dB on the edge band of the target: sharpness, with the flat regions left out.

    Args:
        pred: volume to judge.
        target: reference volume; its gradient chooses the voxels.
        data_range: peak value, in image units.
        mask: voxels that may belong to the band; default all.
        percentile: see :func:`edge_band`.

    Raises:
        DataError: as :func:`psnr`, and if the target has no edges inside the mask.
        SettingError: as :func:`psnr`.

    Example:
        >>> target = np.random.default_rng(0).random((8, 8, 8))
        >>> round(edge_psnr(target + 0.1, target, data_range=1.0), 6)
        20.0
    """
    band = edge_band(target, mask=mask, percentile=percentile)
    if not band.any():
        raise DataError("edge_psnr: the target is constant inside the mask and has no edges; use psnr")
    return psnr(pred, target, data_range=data_range, mask=band)


def head_mask(volume: Volume, *, threshold: float = 0.02) -> BoolArray:
    """Voxels that stand out of the background by a share of the volume's range.

    A voxel is inside when ``value - background > threshold * (P99.9 - background)``. The background is the
    most crowded value (histogram of 256 bins) in the lowest quarter of the range, provided that its bin holds
    5 % of the voxels; otherwise it is the minimum. So zero-filled, skull-stripped and z-scored volumes
    (negative minimum) get the same mask, a few voxels of spline undershoot below the background do not turn
    the whole field of view into head, and in a crop without any background everything but the darkest voxels
    counts. Holes are not filled.

    Args:
        volume: image of any intensity scale.
        threshold: share of the range between background and 99.9 percentile.

    Raises:
        DataError: if the volume is constant, empty or not finite.
        SettingError: if ``threshold`` lies outside [0, 1).

    Example:
        >>> volume = np.pad(np.full((4, 4, 4), 100.0), 4) - 30.0
        >>> int(head_mask(volume).sum())
        64
    """
    if not 0 <= threshold < 1:
        raise SettingError(f"head_mask: threshold must lie in [0, 1), got {threshold}")
    # For a threshold float32 is exact enough, and copies of a whole volume cost an inferer memory.
    array = as_array(volume, widen=False)
    array = array.astype(np.float32) if array.dtype == np.bool_ else array
    flat = array.ravel()
    _check_values("volume", flat)
    background, top = _background_and_top(flat)
    # As a Python number it would be rounded to the type of the array.
    return np.asarray(array > np.float64(background + threshold * (top - background)), dtype=bool)


def head_columns(volume: Volume) -> BoolArray:
    """Voxels with head in front of or behind them along the last axis: to crop the plane and keep every slice.

    Args:
        volume: image, slices last.

    Raises:
        DataError: as :func:`head_mask`.

    Example:
        >>> head_columns(np.pad(np.full((1, 1, 1), 5.0), 1)).sum(axis=(0, 1)).tolist()
        [1, 1, 1]
    """
    mask = head_mask(volume)
    return np.broadcast_to(mask.any(axis=-1, keepdims=True), mask.shape)


def percentile_range(volume: Volume) -> tuple[float, float]:
    """The 0.1 and 99.9 percentiles of the voxels above the background, in image units.

    The pair that maps a volume to [0, 1] and that gives ``data_range``: robust to hot voxels, and independent of how
    much air was scanned around the head where the air is constant, as after skull-stripping. Of noisy air the half
    that lies above the background counts, so that both percentiles fall a little with more of it. Background as in
    :func:`head_mask`.

    Raises:
        DataError: if the volume is constant, empty or not finite.

    Example:
        >>> low, high = percentile_range(np.pad(np.linspace(1, 2, 512).reshape(8, 8, 8), 8))
        >>> round(low, 2), round(high, 2)
        (1.0, 2.0)
    """
    array = as_array(volume)
    low, high = np.percentile(array[head_mask(array, threshold=0.0)], [0.1, 99.9])
    return float(low), float(high)


def data_consistency(pred: Volume, observed: Volume, matrix: Volume, *, data_range: float) -> float:
    """PSNR in dB between the prediction, degraded once more, and the slices that were measured.

    Needs no reference: a result that does not reproduce its own input under the slice profile has invented
    or lost signal. A high value is necessary, not sufficient (infinitely many volumes reproduce the input).

    Args:
        pred: super-resolved volume, slice axis last.
        observed: measured volume, slice axis last.
        matrix: degradation along the slice axis, dense or SciPy sparse; its rows are slice profiles.
        data_range: peak value, in image units.

    Shape:
        - pred: (..., n_hr)
        - observed: (..., n_lr)
        - matrix: (n_lr, n_hr)

    Raises:
        DataError: if the shapes do not fit together or a value is not finite.
        SettingError: if ``data_range`` is not positive.

    Example:
        >>> pred, mean_of_two = np.ones((3, 3, 4)), np.kron(np.eye(2), [[0.5, 0.5]])
        >>> data_consistency(pred, np.ones((3, 3, 2)), mean_of_two, data_range=1.0)
        inf
    """
    high, low = as_array(pred), as_array(observed)
    degrade = as_array(matrix.toarray() if hasattr(matrix, "toarray") else matrix)
    if high.ndim < 1 or low.ndim < 1 or degrade.shape != (low.shape[-1], high.shape[-1]):
        raise DataError(
            f"data_consistency: the matrix must be (n_lr, n_hr) for observed {low.shape} and "
            f"pred {high.shape}, got {degrade.shape}"
        )
    return psnr(high @ degrade.T, low, data_range=data_range)


def as_array(value: Volume, *, widen: bool = True) -> npt.NDArray[Any]:
    """NumPy view or copy of an array or tensor: float64, or bool where it was bool.

    Args:
        value: array or tensor.
        widen: copy float32 to float64, too; else it stays as it is.

    Example:
        >>> as_array(torch.ones(2, dtype=torch.bfloat16)).dtype
        dtype('float64')
    """
    if isinstance(value, torch.Tensor):
        # float64 and NumPy exist on the CPU only for some accelerators; bfloat16 does not exist in NumPy.
        value = value.detach().cpu()
        value = np.asarray(value if value.dtype in (torch.bool, torch.float32) else value.to(torch.float64))
    array = np.asarray(value)
    stays = array.dtype == np.bool_ or (array.dtype == np.float32 and not widen)
    return array if stays else array.astype(np.float64, copy=False)


def masked_values(volumes: dict[str, Volume], *, mask: Volume | None) -> tuple[FloatArray, ...]:
    """Flat float64 values of several equally shaped volumes inside a mask, checked.

    Args:
        volumes: what an error message calls the volume -> volume.
        mask: voxels that count (non-zero is inside); None for all.

    Raises:
        DataError: if shapes differ, nothing is inside the mask or a value inside is not finite.

    Example:
        >>> masked_values({"pred": np.arange(4)}, mask=np.array([0, 1, 1, 0]))[0].tolist()
        [1.0, 2.0]
    """
    arrays = {name: as_array(volume).astype(np.float64, copy=False) for name, volume in volumes.items()}
    inside = None if mask is None else as_array(mask) != 0
    _check_shapes(arrays if inside is None else {**arrays, "mask": inside})
    chosen = {name: array.ravel() if inside is None else array[inside] for name, array in arrays.items()}
    for name, values in chosen.items():
        _check_values(name, values)
    return tuple(chosen.values())


def _check_values(name: str, values: npt.NDArray[Any]) -> None:
    if values.size == 0:
        raise DataError(f"{name}: no voxel to measure; the volume or the mask is empty")
    if not np.isfinite(values).all():
        raise DataError(f"{name}: NaN or infinite values inside the mask; repair or mask them")


def _check_shapes(volumes: dict[str, Any]) -> None:
    shapes = {name: tuple(volume.shape) for name, volume in volumes.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(f"shapes differ: {listed}; bring the volumes to one grid first")


def _checked_range(data_range: float) -> float:
    peak = float(data_range)
    if not (math.isfinite(peak) and peak > 0):
        raise SettingError(f"data_range must be a positive number in image units, got {data_range}")
    return peak


def _background_and_top(flat: npt.NDArray[Any]) -> tuple[float, float]:
    minimum, top = float(flat.min()), float(np.percentile(flat, 99.9))
    if top <= minimum:
        # A head of less than a thousandth of the field of view; the maximum is the only scale left.
        top = float(flat.max())
    if top <= minimum:
        raise DataError(f"volume: constant (value {minimum:.6g}), no foreground to find; check the input")
    edges = np.linspace(minimum, top, 257)
    # In float32 there may be fewer steps than bins; a part at a time, as a copy of the whole costs memory.
    parts = (flat[k : k + _COUNTED].astype(np.float64) for k in range(0, flat.size, _COUNTED))
    counts = sum(np.histogram(part, bins=256, range=(minimum, top))[0] for part in parts)
    crowded = int(np.argmax(counts[: len(counts) // 4]))
    if counts[crowded] < BACKGROUND_SHARE * flat.size:
        return minimum, top
    in_bin = flat[(flat >= edges[crowded]) & (flat <= edges[crowded + 1])]
    return float(np.median(in_bin)), top
