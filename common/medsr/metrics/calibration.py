"""Whether an uncertainty map may be believed: does it rank the errors, and is it as large as they are.

Ranking (:func:`spearman`, :func:`ause`) and size (:func:`coverage`, :func:`reliability`) are different
virtues: a map that is ten times too small can rank perfectly. Report at least one of each. All functions take
NumPy arrays or torch tensors and the absolute value of ``error``. MONAI was considered: its
``CalibrationErrorMetric`` scores class probabilities, not the error of a regression.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, SettingError
from medsr.metrics.volume import Volume, masked_values

__all__ = ["ause", "coverage", "reliability", "spearman"]

FloatArray: TypeAlias = npt.NDArray[np.float64]


def spearman(
    uncertainty: Volume,
    error: Volume,
    *,
    mask: Volume | None = None,
    samples: int = 200_000,
    seed: int = 0,
) -> float:
    """Rank correlation of uncertainty and absolute error: 1 when both grow together.

    Ranks need no common unit, so the map may have any monotone scale. Voxels are drawn without replacement,
    since the sampling error of 200 000 voxels (about 0.002) is below that of a subject.

    Args:
        uncertainty: map to judge, any unit.
        error: prediction minus reference, signed or absolute.
        mask: voxels that count; default all.
        samples: largest number of voxels to rank.
        seed: of the draw.

    Raises:
        DataError: if shapes differ, fewer than two voxels remain, a value is not finite or one input is
            constant.
        SettingError: if ``samples`` is below 2.

    Example:
        >>> round(spearman(np.arange(10.0), np.arange(10.0) ** 3), 6)
        1.0
    """
    from scipy.stats import rankdata

    if samples < 2:
        raise SettingError(f"spearman: samples must be 2 or more, got {samples}")
    sigma, size = _uncertainty_and_error(uncertainty, error, mask=mask, at_least=2)
    if sigma.size > samples:
        chosen = np.random.default_rng(seed).choice(sigma.size, samples, replace=False, shuffle=False)
        sigma, size = sigma[chosen], size[chosen]
    for name, values in (("uncertainty", sigma), ("error", size)):
        if values.min() == values.max():
            raise DataError(f"{name}: constant (value {values[0]:.6g}), a rank correlation does not exist")
    return float(np.corrcoef(rankdata(sigma), rankdata(size))[0, 1])


def ause(uncertainty: Volume, error: Volume, *, mask: Volume | None = None, bins: int = 20) -> float:
    """Area under the sparsification error: how far removing uncertain voxels is from removing the worst ones.

    Voxels are removed in steps, most uncertain first, and the mean absolute error of the rest is drawn
    against the removed share; the oracle removes the largest errors first. The area between the two curves,
    divided by the error before removal, is 0 for a perfect ranking. Voxels of equal uncertainty count with
    their mean error, so that a constant map scores like a random one whatever the order in memory. Where
    there is no error at all both curves are zero, and so is the area.

    Args:
        uncertainty: map to judge, any unit.
        error: prediction minus reference, signed or absolute.
        mask: voxels that count; default all.
        bins: number of steps; the last leaves ``1 / bins`` of the voxels.

    Raises:
        DataError: if shapes differ, fewer than ``bins`` voxels remain or a value is not finite.
        SettingError: if ``bins`` is below 2.

    Example:
        >>> error = np.random.default_rng(0).normal(size=1000)
        >>> ause(abs(error), error), ause(np.ones(1000), error) > 0.2
        (0.0, True)

    Reference:
        Ilg et al., Uncertainty Estimates and Multi-Hypotheses Networks for Optical Flow, 2018,
        https://doi.org/10.48550/arXiv.1802.07095
    """
    _check_bins("ause", bins)
    sigma, size = _uncertainty_and_error(uncertainty, error, mask=mask, at_least=bins)
    total = float(size.mean())
    if total == 0:
        return 0.0
    _, by_uncertainty = _sorted_with_ties_averaged(sigma, size)
    kept = np.round(size.size * (1 - np.arange(bins) / bins)).astype(int)
    # Ascending order: the first `kept` voxels are those that remain.
    model = np.cumsum(by_uncertainty)[kept - 1] / kept
    oracle = np.cumsum(np.sort(size))[kept - 1] / kept
    gap = np.maximum(model - oracle, 0) / total  # below zero by rounding only
    return float(((gap[1:] + gap[:-1]) / 2).sum() / bins)


def coverage(
    pred: Volume,
    target: Volume,
    uncertainty: Volume,
    *,
    factor: float = 2.0,
    mask: Volume | None = None,
) -> float:
    """Share of voxels whose reference lies within ``pred ± factor * uncertainty``.

    With a Gaussian error and the uncertainty as its standard deviation 0.954 is expected at factor 2; with a
    Laplacian error and the uncertainty as its mean absolute value, 0.865.

    Args:
        pred: predicted volume.
        target: reference volume.
        uncertainty: half width of the interval, in image units.
        factor: multiple of the uncertainty.
        mask: voxels that count; default all.

    Raises:
        DataError: if shapes differ, the mask is empty, a value is not finite or an uncertainty is negative.
        SettingError: if ``factor`` is not positive.

    Example:
        >>> coverage(np.array([0.0, 0.0]), np.array([1.0, 3.0]), np.ones(2))
        0.5
    """
    if not (np.isfinite(factor) and factor > 0):
        raise SettingError(f"coverage: factor must be positive, got {factor}")
    volumes = {"pred": pred, "target": target, "uncertainty": uncertainty}
    first, second, sigma = masked_values(volumes, mask=mask)
    if sigma.min() < 0:
        raise DataError(
            f"uncertainty: negative values (lowest {sigma.min():.6g}); an interval needs a width >= 0"
        )
    return float((np.abs(first - second) <= factor * sigma).mean())


def reliability(
    uncertainty: Volume, error: Volume, *, mask: Volume | None = None, bins: int = 10
) -> list[tuple[float, float]]:
    """Points of the reliability diagram: mean uncertainty and mean absolute error in bins of equal count.

    Bins of equal count, not width, since most voxels of a brain have a small uncertainty. On the diagonal the
    uncertainty equals the mean absolute error.

    Args:
        uncertainty: map to judge, in image units.
        error: prediction minus reference, signed or absolute.
        mask: voxels that count; default all.
        bins: number of points.

    Returns:
        ``bins`` pairs, in ascending uncertainty.

    Raises:
        DataError: if shapes differ, fewer than ``bins`` voxels remain or a value is not finite.
        SettingError: if ``bins`` is below 2.

    Example:
        >>> reliability(np.arange(4.0), -np.arange(4.0), bins=2)
        [(0.5, 0.5), (2.5, 2.5)]
    """
    _check_bins("reliability", bins)
    sigma, size = _uncertainty_and_error(uncertainty, error, mask=mask, at_least=bins)
    sigma, size = _sorted_with_ties_averaged(sigma, size)
    pairs = zip(np.array_split(sigma, bins), np.array_split(size, bins), strict=True)
    return [(float(s.mean()), float(e.mean())) for s, e in pairs]


def _check_bins(name: str, bins: int) -> None:
    if bins < 2:
        raise SettingError(f"{name}: bins must be 2 or more, got {bins}")


def _uncertainty_and_error(
    uncertainty: Volume, error: Volume, *, mask: Volume | None, at_least: int
) -> tuple[FloatArray, FloatArray]:
    sigma, signed = masked_values({"uncertainty": uncertainty, "error": error}, mask=mask)
    if sigma.size < at_least:
        raise DataError(f"uncertainty: {sigma.size} voxels inside the mask, {at_least} or more are needed")
    return sigma, np.abs(signed)


def _sorted_with_ties_averaged(key: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    order = np.argsort(key, kind="stable")
    key, values = key[order], values[order]
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    lengths = np.diff(np.r_[starts, key.size])
    if lengths.max() == 1:
        # Not only faster: sums of single values would be exact too, but a perfect ranking must give exactly
        # 0.
        return key, values
    return key, np.repeat(np.add.reduceat(values, starts) / lengths, lengths)
