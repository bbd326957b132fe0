from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.metrics import ause, coverage, reliability, spearman

SHAPE = (20, 20, 20)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def sigma(rng) -> np.ndarray:
    return rng.uniform(0.01, 1.0, size=SHAPE)


@pytest.fixture
def error(rng, sigma) -> np.ndarray:
    """Gaussian error whose standard deviation is exactly `sigma`."""
    return rng.normal(size=SHAPE) * sigma


def test_spearman_is_one_for_every_monotone_scale(error):
    for scale in (np.abs, np.square, lambda e: np.log1p(np.abs(e))):
        assert spearman(scale(error), error) == pytest.approx(1.0)
    assert spearman(-np.abs(error), error) == pytest.approx(-1.0)


def test_spearman_is_zero_for_an_unrelated_map(rng, error):
    assert abs(spearman(rng.random(SHAPE), error)) < 0.05


def test_spearman_agrees_with_scipy_with_ties(error, sigma):
    from scipy.stats import spearmanr

    coarse = sigma.round(1)
    expected = spearmanr(coarse.ravel(), np.abs(error).ravel()).statistic
    assert spearman(coarse, error) == pytest.approx(expected)


def test_spearman_of_a_sample_is_repeatable_and_close(sigma, error):
    full = spearman(sigma, error)
    drawn = spearman(sigma, error, samples=4000)
    assert drawn == spearman(sigma, error, samples=4000)
    assert drawn != full
    assert drawn == pytest.approx(full, abs=0.03)


def test_spearman_names_a_constant_map(error):
    with pytest.raises(DataError, match="uncertainty: constant"):
        spearman(np.ones(SHAPE), error)


def test_ause_is_zero_for_a_perfect_ranking(error):
    assert ause(np.abs(error), error) == 0.0
    assert ause(np.square(error) * 7, error) == 0.0


def test_ause_orders_perfect_good_random_and_reversed(rng, sigma, error):
    values = [ause(u, error) for u in (np.abs(error), sigma, rng.random(SHAPE), 1 / (np.abs(error) + 1e-3))]
    assert values == sorted(values)
    assert values[1] < 0.75 * values[2]


def test_ause_of_a_constant_map_is_that_of_a_random_one(rng, error):
    # Sorted errors in memory would fool a sort that breaks ties by position.
    ordered = np.sort(np.abs(error).ravel())
    constant = ause(np.ones(ordered.shape), ordered)
    assert constant == pytest.approx(ause(rng.random(ordered.shape), ordered), abs=0.02)
    assert constant == pytest.approx(ause(np.ones(ordered.shape), ordered[::-1]))


def test_ause_of_uniform_errors_has_a_closed_form():
    # Random keeps the mean 1/2, the oracle keeps (1 - t)/2: the normalised gap is t, its area 1/2 of 0.95^2.
    uniform = (np.arange(100_000) + 0.5) / 100_000
    assert ause(np.ones(uniform.shape), uniform, bins=20) == pytest.approx(0.95**2 / 2, abs=1e-4)


def test_ause_does_not_depend_on_units(sigma, error):
    assert ause(sigma * 1e3, error * 1e3) == pytest.approx(ause(sigma, error))
    assert ause(sigma, np.zeros(SHAPE)) == 0.0


@pytest.mark.parametrize(("factor", "share"), [(1.0, 0.6827), (2.0, 0.9545), (3.0, 0.9973)])
def test_coverage_of_gaussian_noise(sigma, error, factor, share):
    target = np.zeros(SHAPE)
    assert coverage(target + error, target, sigma, factor=factor) == pytest.approx(share, abs=0.01)


def test_coverage_of_laplacian_noise_as_documented(rng):
    error = rng.laplace(scale=0.3, size=SHAPE)
    assert coverage(error, np.zeros(SHAPE), np.full(SHAPE, 0.3)) == pytest.approx(0.865, abs=0.01)


def test_coverage_faults_are_named(sigma, error):
    with pytest.raises(DataError, match="negative"):
        coverage(error, error, -sigma)
    with pytest.raises(SettingError, match="factor"):
        coverage(error, error, sigma, factor=0)


def test_reliability_lies_on_the_diagonal_for_a_true_map(sigma, error):
    points = reliability(sigma, error)
    assert len(points) == 10
    means = [u for u, _ in points]
    assert means == sorted(means)
    for uncertainty, size in points:
        # The mean absolute value of a Gaussian is 0.798 standard deviations.
        assert size == pytest.approx(0.798 * uncertainty, rel=0.12)


def test_reliability_shows_a_map_that_is_too_small(sigma, error):
    assert all(size > 3 * u for u, size in reliability(sigma / 10, error))


def test_reliability_of_a_constant_map_is_flat(error):
    sizes = [size for _, size in reliability(np.ones(SHAPE), np.sort(error.ravel()).reshape(SHAPE))]
    assert sizes == pytest.approx([np.abs(error).mean()] * 10)


@pytest.mark.parametrize("measure", [spearman, ause, reliability])
def test_mask_tensor_and_sign_make_no_difference(measure, sigma, error):
    mask = np.zeros(SHAPE, dtype=bool)
    mask[3:12] = True
    expected = measure(sigma[mask], error[mask])
    outside = np.where(mask, error, np.nan)
    assert measure(sigma, outside, mask=mask) == expected
    assert measure(sigma, np.abs(outside), mask=mask) == expected
    assert measure(torch.tensor(sigma), torch.tensor(error), mask=torch.tensor(mask)) == expected


@pytest.mark.parametrize("measure", [spearman, ause, reliability])
def test_too_few_voxels_are_named(measure):
    with pytest.raises(DataError, match="1 voxels"):
        measure(np.ones(1), np.ones(1))


@pytest.mark.parametrize("measure", [ause, reliability])
def test_too_few_bins_are_named(measure, sigma, error):
    with pytest.raises(SettingError, match="bins"):
        measure(sigma, error, bins=1)
