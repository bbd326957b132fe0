"""Slice profiles: how much each thin slice contributes to a thick one, by FWHM, integrated over voxels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, SettingError
from medsr.resampling import keys_matrix
from medsr.settings import as_numbers

__all__ = ["PROFILES", "acquisition_matrix", "as_profile", "fwhm_in_voxels", "read_taps"]

FloatArray = npt.NDArray[np.float64]

PROFILES = ("slr", "gaussian", "box", "slr-legacy")

_GRID = np.linspace(-1.5, 1.5, 6001)
"""Offsets from the slice centre, in FWHM, on which a continuous profile is tabulated before integration."""


def fwhm_in_voxels(slice_thickness_mm: float, voxel_mm: float) -> float:
    """Width of the blur that turns voxels of ``voxel_mm`` into slices of ``slice_thickness_mm``.

    The thin voxels are blurred already, so the widths subtract in quadrature: ``sqrt(T^2 - h^2) / h``. Not less
    than one voxel: a thinner slice is linear interpolation.

    Example:
        >>> round(fwhm_in_voxels(4.0, 1.0), 3)
        3.873
    """
    if slice_thickness_mm <= 0 or voxel_mm <= 0:
        raise SettingError(
            f"thickness and voxel size must be > 0 mm, got {slice_thickness_mm:g} and {voxel_mm:g}"
        )
    return max(1.0, float(np.sqrt(max(slice_thickness_mm**2 - voxel_mm**2, 0.0)) / voxel_mm))


def acquisition_matrix(
    size: int,
    new_size: int,
    *,
    ratio: float,
    fwhm: float,
    profile: str | npt.ArrayLike = "slr",
    phase: float = 0.0,
) -> FloatArray:
    """Matrix that acquires ``new_size`` thick slices from ``size`` thin ones on the same field of view.

    Thick slice ``i`` is centred at ``(size - 1) / 2 + (i - (new_size - 1) / 2) * ratio + phase`` and weighs each
    thin slice by the integral of the profile over that slice. Weight that falls outside the volume is given back
    to the slices inside.

    Args:
        size: number of thin slices.
        new_size: number of thick slices.
        ratio: thick spacing divided by thin spacing; the stride, whatever the thickness.
        fwhm: width of the profile in thin slices, see :func:`fwhm_in_voxels`.
        profile: ``slr`` (Shinnar-Le Roux excitation, time-bandwidth 16), ``gaussian``, ``box``, ``slr-legacy``
            (point-sampled taps, then PyTorch's bicubic: what REHRSeg's code does, kept for comparison), or an odd
            number of taps in thin slices.
        phase: shift of all thick slices, in thin slices.

    Shape:
        ``(new_size, size)``; every row sums to 1.

    Raises:
        SettingError: for an unknown profile, unusable taps or a width that is not positive.

    Example:
        >>> acquisition_matrix(8, 2, ratio=4, fwhm=4, profile="box")[0].round(2).tolist()
        [0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]
    """
    if fwhm <= 0 or ratio <= 0:
        raise SettingError(f"profile width and ratio must be > 0, got {fwhm:g} and {ratio:g}")
    centres = (size - 1) / 2 + (np.arange(new_size) - (new_size - 1) / 2) * ratio + phase
    if isinstance(profile, str) and profile not in PROFILES:
        raise SettingError(f"slice profile must be one of {', '.join(PROFILES)} or taps, got '{profile}'")
    if not isinstance(profile, str):
        taps = np.asarray(profile, dtype=np.float64)
        if taps.ndim != 1 or taps.size % 2 == 0 or not taps.sum() > 0:
            raise SettingError(
                f"taps must be an odd number of values with a positive sum, got {taps.tolist()}"
            )
        return _sampled(size, centres, taps)
    if profile == "slr-legacy":
        reach = round(fwhm)
        offsets = np.arange(-reach, reach + 1) / fwhm
        return _sampled(size, centres, np.interp(offsets, _GRID, _profile("slr")))
    cumulative = _cumulative(profile)
    edges = (np.arange(size + 1) - 0.5 - centres[:, None]) / fwhm
    weights = np.diff(np.interp(edges, _GRID, cumulative), axis=1)
    totals = weights.sum(axis=1, keepdims=True)
    if (totals <= 0).any():
        raise SettingError(f"{new_size} slices with stride {ratio:g} do not lie inside {size} thin slices")
    return np.asarray(weights / totals)


def as_profile(value: str | Sequence[float]) -> str | tuple[float, ...]:
    """The name of a profile, or the taps that are given or lie in the named file.

    Raises:
        SettingError: if the text is neither a profile nor a file.
        DataError: if the file holds no profile.

    Example:
        >>> as_profile("box"), as_profile([1, 2, 1])
        ('box', (1.0, 2.0, 1.0))
    """
    if isinstance(value, (list, tuple)):
        return tuple(as_numbers("slice_profile", value))
    if value in PROFILES:
        return value
    if not isinstance(value, str) or (not Path(value).suffix and not Path(value).is_file()):
        raise SettingError(
            f"slice profile must be one of {', '.join(PROFILES)} or a file of taps, got '{value}'"
        )
    return tuple(float(tap) for tap in read_taps(value))


def read_taps(path: str | Path) -> FloatArray:
    """Read a measured profile: a text file of an odd number of taps, one thin slice apart, in any scale.

    Raises:
        DataError: if the file cannot be read, or holds an even number, negative sums or non-finite values.
    """
    file = Path(path)
    try:
        taps = np.atleast_1d(np.loadtxt(file, dtype=np.float64)).ravel()
    except (OSError, ValueError) as error:
        # NumPy names a missing file with its whole path.
        reason = str(error).replace(str(file), file.name)
        raise DataError(f"{file.name}: not a readable list of profile taps ({reason})") from None
    if taps.size % 2 == 0 or not np.isfinite(taps).all() or taps.sum() <= 0:
        raise DataError(
            f"{file.name}: a profile needs an odd number of finite taps with a positive sum, got {taps.size}"
        )
    return np.asarray(taps / taps.sum())


def _sampled(size: int, centres: FloatArray, taps: FloatArray) -> FloatArray:
    """Convolve with taps on the thin grid, then interpolate at the centres with PyTorch's bicubic."""
    reach = len(taps) // 2
    blur = np.zeros((size, size))
    for offset, tap in zip(range(-reach, reach + 1), taps, strict=True):
        blur[np.arange(size), np.clip(np.arange(size) + offset, 0, size - 1)] += tap
    rows = keys_matrix(size, centres, a=-0.75) @ blur
    return np.asarray(rows / rows.sum(axis=1, keepdims=True))


@lru_cache(maxsize=8)
def _cumulative(profile: str) -> FloatArray:
    if profile == "box":
        # Tabulating a jump would smear it over a step of the grid.
        return np.clip(_GRID + 0.5, 0.0, 1.0)
    values = _profile(profile)
    step = _GRID[1] - _GRID[0]
    total = np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2 * step)])
    return np.asarray(total / total[-1])


@lru_cache(maxsize=8)
def _profile(profile: str) -> FloatArray:
    shapes: dict[str, Callable[[FloatArray], FloatArray]] = {
        "gaussian": lambda x: np.exp(-4 * np.log(2) * x**2),
        "slr": _slr,
    }
    return np.asarray(shapes[profile](_GRID))


def _slr(x: FloatArray) -> FloatArray:
    """Magnitude profile of a 90-degree least-squares SLR pulse (128 samples, time-bandwidth 16, ripples 1 %).

    The beta polynomial is a linear-phase FIR filter; the transverse magnetisation is ``2 |a| |b|`` with
    ``|a|^2 = 1 - |b|^2``.

    Reference:
        J. Pauly et al., IEEE Trans. Med. Imaging 10 (1991) 53-65, doi:10.1109/42.75611
    """
    from scipy.signal import firls

    samples, time_bandwidth = 128, 16.0
    ripple_in, ripple_out = np.sqrt(0.01 / 2), 0.01 / np.sqrt(2)
    l1, l2 = np.log10(ripple_in), np.log10(ripple_out)
    transition = (5.309e-3 * l1**2 + 7.114e-2 * l1 - 4.761e-1) * l2 + (
        -2.66e-3 * l1**2 - 5.941e-1 * l1 - 4.278e-1
    )
    relative = transition / time_bandwidth
    bands = np.array(
        [0, (1 - relative) * time_bandwidth / 2, (1 + relative) * time_bandwidth / 2, samples / 2]
    )
    taps = firls(samples + 1, bands / (samples / 2), [1, 1, 0, 0], weight=[1, ripple_in / ripple_out])
    lags = np.arange(samples + 1) - samples / 2

    def magnitude(cycles: FloatArray) -> FloatArray:
        beta = np.sqrt(0.5) * np.clip(
            np.abs(np.cos(2 * np.pi * np.outer(cycles, lags / samples)) @ taps), 0, 1.4
        )
        return np.asarray(2 * beta * np.sqrt(1 - beta**2))

    grid = np.linspace(0, time_bandwidth, 4001)
    half = float(grid[np.argmax(magnitude(grid) < 0.5 * magnitude(np.zeros(1)))])
    return magnitude(x * 2 * half)
