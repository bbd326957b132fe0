from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.metrics import (
    data_consistency,
    edge_band,
    edge_psnr,
    head_columns,
    head_mask,
    percentile_range,
    psnr_3d,
    ssim_3d,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def target(rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(rng.normal(size=(24, 22, 20)), 1.5)
    return np.asarray((smooth - smooth.min()) / np.ptp(smooth))


# -- psnr ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_psnr_of_known_noise(rng, target, noise):
    big = np.zeros((64, 64, 64))
    noisy = big + rng.normal(scale=noise, size=big.shape)
    assert psnr_3d(noisy, big, data_range=1.0) == pytest.approx(-20 * math.log10(noise), abs=0.05)


def test_psnr_of_identical_volumes_is_infinite(target):
    assert psnr_3d(target, target, data_range=1.0) == math.inf


def test_psnr_does_not_depend_on_the_unit(rng, target):
    noisy = target + rng.normal(scale=0.05, size=target.shape)
    scaled = psnr_3d(noisy * 800 - 300, target * 800 - 300, data_range=800)
    assert scaled == pytest.approx(psnr_3d(noisy, target, data_range=1.0), abs=1e-9)


def test_psnr_ignores_what_is_outside_the_mask(rng, target):
    mask = np.zeros(target.shape, dtype=bool)
    mask[5:15, 5:15, 5:15] = True
    noisy = target + rng.normal(scale=0.05, size=target.shape)
    elsewhere = np.where(mask, noisy, np.nan)
    assert psnr_3d(elsewhere, target, data_range=1.0, mask=mask) == psnr_3d(
        noisy, target, data_range=1.0, mask=mask
    )
    assert psnr_3d(noisy, target, data_range=1.0, mask=mask) == psnr_3d(
        noisy[mask], target[mask], data_range=1.0
    )


def test_psnr_sums_large_float32_volumes_in_float64():
    # 1000 + 1e-3 squares and sums badly in float32.
    low = np.full((64, 64, 64), 1000, dtype=np.float32)
    high = low + np.float32(0.125)
    assert psnr_3d(high, low, data_range=0.125) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int16])
def test_psnr_takes_tensors(dtype):
    pred, target = torch.full((4, 4, 4), 3.0).to(dtype), torch.full((4, 4, 4), 1.0).to(dtype)
    assert psnr_3d(pred, target, data_range=20.0, mask=torch.ones(4, 4, 4) > 0) == pytest.approx(20.0)


def test_psnr_takes_meta_tensors_with_gradient(target):
    from monai.data import MetaTensor

    pred = MetaTensor(torch.tensor(target + 0.1), affine=torch.eye(4)).requires_grad_()
    assert psnr_3d(pred, target, data_range=1.0) == pytest.approx(20.0)
    assert ssim_3d(pred, target, data_range=1.0) == pytest.approx(
        ssim_3d(target + 0.1, target, data_range=1.0)
    )


@pytest.mark.parametrize("measure", [psnr_3d, ssim_3d, edge_psnr])
def test_faults_are_named(measure, target):
    with pytest.raises(SettingError, match="data_range"):
        measure(target, target, data_range=0)
    with pytest.raises(DataError, match=r"shapes differ.*pred \(23, 22, 20\)"):
        measure(target[:-1], target, data_range=1.0)
    with pytest.raises(DataError, match="empty"):
        measure(target, target, data_range=1.0, mask=np.zeros(target.shape))
    with pytest.raises(DataError, match="mask"):
        measure(target, target, data_range=1.0, mask=np.ones((2, 2, 2)))
    broken = target.copy()
    broken[3] = np.nan
    with pytest.raises(DataError, match="NaN"):
        measure(broken, target, data_range=1.0)


# -- ssim ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_range", [1.0, 0.3])
def test_ssim_agrees_with_scikit_image(rng, target, data_range):
    from skimage.metrics import structural_similarity

    noisy = target + rng.normal(scale=0.05, size=target.shape)
    setting = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    inner, full = structural_similarity(noisy, target, data_range=data_range, full=True, **setting)
    rim = np.zeros(target.shape, dtype=bool)
    rim[5:-5, 5:-5, 5:-5] = True
    assert ssim_3d(noisy, target, data_range=data_range, mask=rim) == pytest.approx(inner, abs=1e-6)
    assert ssim_3d(noisy, target, data_range=data_range) == pytest.approx(full.mean(), abs=1e-6)


def test_ssim_agrees_with_monai_in_the_interior(rng, target):
    from monai.metrics import SSIMMetric

    noisy = target + rng.normal(scale=0.05, size=target.shape)
    pair = (torch.tensor(v, dtype=torch.float32)[None, None] for v in (noisy, target))
    theirs = float(SSIMMetric(spatial_dims=3, data_range=1.0)(*pair))
    rim = np.zeros(target.shape, dtype=bool)
    rim[5:-5, 5:-5, 5:-5] = True
    assert ssim_3d(noisy, target, data_range=1.0, mask=rim) == pytest.approx(theirs, abs=1e-4)


def test_ssim_is_one_for_itself_symmetric_and_falls_with_noise(rng, target):
    noise = rng.normal(size=target.shape)
    values = [ssim_3d(target + s * noise, target, data_range=1.0) for s in (0, 0.02, 0.1, 0.5)]
    assert values[0] == pytest.approx(1.0)
    assert values == sorted(values, reverse=True)
    assert ssim_3d(target, target + noise, data_range=1.0) == pytest.approx(
        ssim_3d(target + noise, target, data_range=1.0)
    )


def test_ssim_ignores_what_lies_beyond_the_window_of_the_mask(target):
    mask = np.zeros(target.shape, dtype=bool)
    mask[:6] = True
    noisy = target + 0.1
    elsewhere = noisy.copy()
    elsewhere[6 + 5 :] = 7.0
    expected = ssim_3d(noisy, target, data_range=1.0, mask=mask)
    assert ssim_3d(elsewhere, target, data_range=1.0, mask=mask) == pytest.approx(expected, abs=1e-12)


def test_ssim_handles_axes_shorter_than_the_window(target):
    thin = target[:, :, :3]
    assert ssim_3d(thin, thin, data_range=1.0) == pytest.approx(1.0)


def test_ssim_does_not_change_its_inputs(target):
    pred, before = torch.tensor(target), torch.tensor(target)
    ssim_3d(pred, target, data_range=255.0)
    assert torch.equal(pred, before)


def test_ssim_wants_three_axes_and_a_window(target):
    with pytest.raises(DataError, match="one channel"):
        ssim_3d(target[None], target[None], data_range=1.0)
    with pytest.raises(SettingError, match="sigma"):
        ssim_3d(target, target, data_range=1.0, sigma=0)


# -- edges --------------------------------------------------------------------------------------------------


def test_edge_band_keeps_the_steepest_share_of_the_mask(target):
    mask = np.zeros(target.shape, dtype=bool)
    mask[4:-4, 4:-4] = True
    band = edge_band(target, mask=mask, percentile=80)
    assert not band[~mask].any()
    assert band[mask].mean() == pytest.approx(0.2, abs=0.01)


def test_edge_band_knows_anisotropic_voxels():
    # The same slope per voxel is four times gentler per mm along the last axis.
    i, _, k = np.meshgrid(np.arange(10.0), np.arange(4.0), np.arange(10.0), indexing="ij")
    volume = np.where(k < 5, i, k * 2)
    assert edge_band(volume, percentile=30)[:, :, 7:].all()
    assert not edge_band(volume, percentile=30, spacing_mm=(1, 1, 4))[:, :, 7:].any()


def test_edge_psnr_sees_blur_that_psnr_dilutes():
    from scipy.ndimage import gaussian_filter

    target = np.zeros((20, 20, 20))
    target[6:14, 6:14, 6:14] = 1.0
    blurred = gaussian_filter(target, 1.0)
    assert edge_psnr(blurred, target, data_range=1.0) < psnr_3d(blurred, target, data_range=1.0) - 2


def test_edge_faults_are_named(target):
    with pytest.raises(DataError, match="no edges"):
        edge_psnr(target, np.ones(target.shape), data_range=1.0)
    with pytest.raises(SettingError, match="percentile"):
        edge_band(target, percentile=101)
    with pytest.raises(DataError, match="two voxels"):
        edge_band(target[:, :, :1])
    with pytest.raises(SettingError, match="one value per axis"):
        edge_band(target, spacing_mm=(1.0, 1.0))


# -- foreground ---------------------------------------------------------------------------------------------


@pytest.fixture
def ball(rng) -> tuple[np.ndarray, np.ndarray]:
    grid = np.mgrid[-1:1:32j, -1:1:32j, -1:1:32j]
    inside = (grid**2).sum(axis=0) < 0.5
    return np.where(inside, rng.uniform(200, 900, size=inside.shape), 0.0), inside


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 0), (1, -1024), (0.01, -3.3), (4, 500)])
def test_head_mask_does_not_depend_on_the_intensity_scale(ball, scale, offset):
    volume, inside = ball
    np.testing.assert_array_equal(head_mask(volume * scale + offset), inside)


def test_head_mask_of_a_z_scored_volume(ball):
    volume, inside = ball
    np.testing.assert_array_equal(head_mask((volume - volume.mean()) / volume.std()), inside)


def test_head_mask_withstands_undershoot_hot_voxels_and_noise_floor(ball, rng):
    volume, inside = ball
    volume = volume + np.abs(rng.normal(scale=1.0, size=volume.shape))
    rim = np.flatnonzero(~inside)[::500]
    volume.flat[rim] = -150.0
    volume[16, 16, 16] = 1e5
    np.testing.assert_array_equal(head_mask(volume), inside)


def test_head_mask_of_a_crop_without_background_is_nearly_everything(rng):
    assert head_mask(rng.uniform(300, 900, size=(16, 16, 16))).mean() > 0.95


def test_head_mask_of_a_tiny_object():
    volume = np.zeros((32, 32, 32))
    volume[3, 3, 3] = 5.0
    assert head_mask(volume).sum() == 1


@pytest.mark.parametrize("kind", ["f4", ">f4", "f2", "i2", "u1", "tensor"])
def test_head_mask_is_the_same_for_all_types(ball, kind):
    volume, inside = ball
    values = np.rint(volume / 4).astype("f4" if kind == "tensor" else kind)
    given = torch.from_numpy(values) if kind == "tensor" else values
    np.testing.assert_array_equal(head_mask(given), inside)
    np.testing.assert_array_equal(head_mask(inside), inside)


@pytest.mark.parametrize(("scale", "offset"), [(0.1, 1e4), (1.0, 1e5), (0.002, 1e4)])
def test_head_mask_of_float32_with_fewer_steps_than_bins(rng, scale, offset):
    volume = (offset + scale * rng.random((16, 16, 16))).astype(np.float32)
    np.testing.assert_array_equal(head_mask(volume), head_mask(volume.astype(np.float64)))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int16, np.bool_])
def test_head_mask_faults_are_named(kind):
    with pytest.raises(DataError, match="constant"):
        head_mask(np.zeros((4, 4, 4), dtype=kind))
    with pytest.raises(SettingError, match="threshold"):
        head_mask(np.arange(8.0).reshape(2, 2, 2), threshold=1.0)


def test_percentile_range_does_not_depend_on_padding(ball):
    volume, inside = ball
    low, high = percentile_range(volume)
    assert (low, high) == pytest.approx(tuple(np.percentile(volume[inside], [0.1, 99.9])))
    assert percentile_range(np.pad(volume, 20)) == (low, high)


# -- data consistency ---------------------------------------------------------------------------------------


def test_data_consistency_is_infinite_for_the_truth_and_low_for_a_shift(rng):
    truth = rng.random((6, 5, 16))
    matrix = np.kron(np.eye(4), np.full((1, 4), 0.25))
    observed = truth @ matrix.T
    assert data_consistency(truth, observed, matrix, data_range=1.0) > 250
    shifted = data_consistency(np.roll(truth, 2, axis=-1), observed, matrix, data_range=1.0)
    assert shifted < 25


def test_data_consistency_takes_sparse_matrices_and_tensors(rng):
    from scipy.sparse import csr_array

    truth = rng.random((3, 8))
    matrix = np.kron(np.eye(2), np.full((1, 4), 0.25))
    observed = truth @ matrix.T + 0.1
    dense = data_consistency(truth, observed, matrix, data_range=1.0)
    assert dense == pytest.approx(20.0)
    assert data_consistency(truth, observed, csr_array(matrix), data_range=1.0) == dense
    assert data_consistency(*map(torch.tensor, (truth, observed, matrix)), data_range=1.0) == dense


def test_data_consistency_names_a_matrix_that_does_not_fit(rng):
    with pytest.raises(DataError, match=r"n_lr, n_hr.*\(4, 2\)"):
        data_consistency(np.ones((2, 4)), np.ones((2, 2)), np.ones((4, 2)), data_range=1.0)


def test_head_columns_keep_every_slice(ball):
    volume, inside = ball
    columns = head_columns(volume)
    assert columns.shape == volume.shape
    for k in range(volume.shape[-1]):
        np.testing.assert_array_equal(columns[..., k], inside.any(axis=-1))
