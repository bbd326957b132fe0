"""Interpolation along one axis as one matrix: the baselines, the skip of the networks, the bicubic degradation.

Resampling the slice axis is linear in the voxels, so a whole volume is one matrix product with a small matrix of
shape ``(new slices, old slices)``. For 40 -> 200 slices that is about a hundred times faster than
``scipy.ndimage.map_coordinates`` of the volume, which makes the matrix, and equal to it within rounding.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates

from medsr.errors import SettingError
from medsr.geometry import slice_positions

__all__ = [
    "INTERPOLATORS",
    "antialiased_bicubic_matrix",
    "interpolation_matrix",
    "keys_matrix",
    "resample_last_axis",
]

FloatArray = npt.NDArray[np.float64]

INTERPOLATORS = ("nearest", "linear", "cubic")

_CACHED = 2**20
"""Numbers in a bicubic matrix that is remembered, at most."""


def interpolation_matrix(size: int, positions: npt.ArrayLike, *, kind: str = "cubic") -> FloatArray:
    """Matrix that evaluates an interpolant of ``size`` slices at fractional slice ``positions``.

    ``cubic`` is the interpolating cubic B-spline with replicated ends, the same as
    ``scipy.ndimage.map_coordinates(order=3, mode="nearest")``.

    Args:
        size: number of slices.
        positions: where to evaluate, in slices; values outside ``[0, size - 1]`` extrapolate from replicas.
        kind: ``nearest``, ``linear`` or ``cubic``.

    Shape:
        ``(len(positions), size)``; every row sums to 1.

    Raises:
        SettingError: if ``kind`` is unknown.

    Example:
        >>> interpolation_matrix(3, [0.5], kind="linear").tolist()
        [[0.5, 0.5, 0.0]]
    """
    if kind not in INTERPOLATORS:
        raise SettingError(f"interpolation must be one of {', '.join(INTERPOLATORS)}, got '{kind}'")
    places = tuple(float(p) for p in np.asarray(positions, dtype=np.float64).ravel())
    return _interpolation_matrix(int(size), places, kind).copy()


@lru_cache(maxsize=256)
def _interpolation_matrix(size: int, positions: tuple[float, ...], kind: str) -> FloatArray:
    places = np.asarray(positions)
    if kind == "nearest":
        # A position half-way between two slices belongs to the slab that it opens.
        index = np.clip(np.floor(places + 0.5).astype(int), 0, size - 1)
        return np.eye(size)[index]
    if kind == "linear":
        return _kernel_matrix(size, places, lambda t: np.clip(1 - np.abs(t), 0, None), reach=1)
    # What the spline makes of each slice alone; between slices, and at the slices themselves.
    at, of = np.meshgrid(places, np.arange(size), indexing="ij")
    return np.asarray(map_coordinates(np.eye(size), [at, of], order=3, mode="nearest"))


def keys_matrix(size: int, positions: npt.ArrayLike, *, a: float = -0.5) -> FloatArray:
    """Matrix of Keys' local cubic convolution, ends replicated; ``a = -0.75`` is what PyTorch's bicubic uses.

    Example:
        >>> keys_matrix(4, [1.5]).round(4).tolist()
        [[-0.0625, 0.5625, 0.5625, -0.0625]]

    Reference:
        R. Keys, IEEE Trans. ASSP 29 (1981) 1153-1160, doi:10.1109/TASSP.1981.1163711
    """
    places = np.asarray(positions, dtype=np.float64).ravel()
    return _kernel_matrix(int(size), places, lambda t: _keys(t, a), reach=2)


def antialiased_bicubic_matrix(size: int, new_size: int, rows: slice | None = None) -> FloatArray:
    """Matrix of MATLAB's ``imresize(..., "bicubic")`` along one axis, the degradation of the benchmarks.

    Keys' kernel with a = -0.5, widened by ``size / new_size`` when the axis shrinks so that nothing folds back,
    half-pixel centres, edges mirrored with the edge pixel repeated, rows normalised. Pillow's ``BICUBIC`` and
    ``torch.nn.functional.interpolate(antialias=True)`` agree in the interior; at the border they cut the kernel
    off instead of mirroring the image. SciPy's and MONAI's resampling do not widen the kernel.

    Args:
        size: number of pixels.
        new_size: number of pixels afterwards, on the same field of view.
        rows: only these; the whole matrix of a large photograph takes hundreds of megabytes.

    Shape:
        ``(new_size or as many as rows, size)``; every row sums to 1.

    Raises:
        SettingError: if a size is not positive.

    Example:
        >>> antialiased_bicubic_matrix(2, 1).tolist()
        [[0.5, 0.5]]

    Reference:
        R. Keys, IEEE Trans. ASSP 29 (1981) 1153-1160, doi:10.1109/TASSP.1981.1163711
    """
    if min(size, new_size) < 1:
        raise SettingError(f"an axis cannot go from {size} to {new_size} pixels; both must be 1 or more")
    wanted = range(int(new_size))[rows or slice(None)]
    make = _antialiased_bicubic_rows
    if len(wanted) * size > _CACHED:
        return make.__wrapped__(int(size), int(new_size), wanted)
    return make(int(size), int(new_size), wanted).copy()


@lru_cache(maxsize=8)
def _antialiased_bicubic_rows(size: int, new_size: int, wanted: range) -> FloatArray:
    stretch = max(1.0, size / new_size)
    rows = _kernel_matrix(
        size,
        slice_positions(size, new_size)[wanted.start : wanted.stop : wanted.step],
        lambda t: _keys(t / stretch, -0.5),
        reach=math.ceil(2 * stretch),
        mirrored=True,
    )
    return np.asarray(rows / rows.sum(axis=1, keepdims=True))


def resample_last_axis(volume: npt.ArrayLike, matrix: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Apply a ``(new, old)`` matrix to the last axis of a volume, in float32.

    Example:
        >>> resample_last_axis(np.ones((2, 2, 3)), interpolation_matrix(3, [0.5])).shape
        (2, 2, 1)
    """
    values = np.asarray(volume, dtype=np.float32)
    return np.asarray(values @ np.asarray(matrix, dtype=np.float32).T, dtype=np.float32)


def _keys(t: FloatArray, a: float) -> FloatArray:
    t = np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.asarray(np.where(t < 1, near, np.where(t < 2, far, 0.0)))


def _kernel_matrix(  # type: ignore[no-untyped-def]
    size: int, places: FloatArray, kernel, reach: int, *, mirrored: bool = False
) -> FloatArray:
    rows = np.zeros((len(places), size))
    first = np.floor(places).astype(int)
    for tap in range(-reach + 1, reach + 1):
        weight = kernel(places - (first + tap))
        index = np.clip(first + tap, 0, size - 1)
        if mirrored:
            index = (first + tap) % (2 * size)
            index = np.minimum(index, 2 * size - 1 - index)
        np.add.at(rows, (np.arange(len(places)), index), weight)
    return rows
