from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.metrics.image import (
    SET5_X4,
    ImageProtocol,
    MeanScore,
    luma,
    mean_score,
    psnr,
    round_to_8_bits,
    ssim,
)
from monai.metrics import SSIMMetric
from skimage.metrics import structural_similarity


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng) -> tuple[np.ndarray, np.ndarray]:
    """A smooth RGB image with texture, and the same with noise."""
    rows, columns = np.mgrid[:40, :44] / 40
    target = np.stack([0.4 + 0.3 * np.sin(9 * rows * k) * np.cos(7 * columns) for k in (1, 2, 3)])
    return np.clip(target + rng.normal(scale=0.05, size=target.shape), 0, 1), target


# -- luma and rounding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("colour", "level"),
    [((0, 0, 0), 16), ((1, 1, 1), 235), ((1, 0, 0), 81.481), ((0, 1, 0), 144.553), ((0, 0, 1), 40.966)],
)
def test_luma_of_the_primaries(colour, level):
    image = np.asarray(colour, dtype=float)[:, None, None] * np.ones((3, 2, 4))
    found = luma(image)
    assert found.shape == (1, 2, 4)
    np.testing.assert_allclose(found * 255, level, atol=1e-9)


def test_luma_of_a_batch_of_tensors_passes_the_gradient():
    image = torch.rand(2, 3, 4, 5, requires_grad=True)
    found = luma(image)
    assert found.shape == (2, 1, 4, 5)
    assert found.dtype == torch.float32
    found.sum().backward()
    np.testing.assert_allclose(image.grad[0, :, 0, 0] * 255, [65.481, 128.553, 24.966], rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4, 4), (4, 4)])
def test_luma_needs_three_channels(shape):
    with pytest.raises(DataError, match="luma"):
        luma(np.zeros(shape))


def test_studio_luma_reads_132_hundredths_of_a_decibel_more_than_full_range_luma(pair):
    pred, target = pair
    weights = np.array([0.299, 0.587, 0.114])
    full = [np.tensordot(weights, image, axes=1)[None] for image in pair]
    difference = psnr(pred, target, channel="y") - psnr(*full)
    assert difference == pytest.approx(20 * math.log10(255 / 219), abs=1e-3)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_rounding_takes_halves_up_and_clips(kind):
    values = kind(np.array([-1, 0, 0.49, 0.5, 1.5, 254.5, 300], dtype=np.float32) / 255)
    found = round_to_8_bits(values)
    assert found.dtype == values.dtype
    np.testing.assert_allclose(np.asarray(found) * 255, [0, 0, 0, 1, 2, 255, 255], atol=1e-4)


def test_rounding_keeps_what_is_round_already():
    levels = torch.arange(256) / 255
    assert torch.equal(round_to_8_bits(levels), levels)


# -- PSNR ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda a: torch.as_tensor(a).float()])
@pytest.mark.parametrize(("error", "decibel"), [(0.1, 20.0), (0.01, 40.0)])
def test_psnr_of_a_constant_error(kind, error, decibel):
    target = np.full((3, 16, 16), 0.5)
    assert psnr(kind(target + error), kind(target)) == pytest.approx(decibel, abs=1e-4)


def test_identical_images_are_infinitely_good_and_equal(pair):
    _, target = pair
    assert psnr(target, target) == math.inf
    assert ssim(target, target) == pytest.approx(1, abs=1e-12)
    # Equal as 8-bit files is equal.
    file = round_to_8_bits(target)
    assert psnr(file + 0.3 / 255, file, rounded=True) == math.inf
    assert psnr(file + 0.3 / 255, file) < 60


def test_the_border_is_left_out(pair):
    pred, target = pair
    spoiled = target.copy()
    spoiled[:, :4] = spoiled[:, -4:] = spoiled[:, :, :4] = spoiled[:, :, -4:] = 0
    assert psnr(spoiled, target, border=4) == math.inf
    assert psnr(spoiled, target, border=3) < 40
    assert ssim(spoiled, target, border=4) == pytest.approx(1, abs=1e-12)
    assert ssim(spoiled, target, border=3) < 0.999
    assert psnr(pred, target, border=4) == psnr(pred[:, 4:-4, 4:-4], target[:, 4:-4, 4:-4])


def test_only_the_mask_counts(pair):
    pred, target = pair
    mask = np.zeros((40, 44), dtype=bool)
    mask[10:30, 8:36] = True
    spoiled = np.where(mask, pred, 0.0)
    expected = 10 * math.log10(1 / np.square(pred - target)[:, mask].mean())
    for form in (mask, mask[None], torch.as_tensor(mask), mask.astype(np.uint8)):
        assert psnr(spoiled, target, mask=form) == pytest.approx(expected, abs=1e-9)
    assert psnr(pred, target, mask=mask, border=12) == psnr(pred[:, 12:28, 12:32], target[:, 12:28, 12:32])


def test_luma_is_compared_for_colour_and_taken_as_it_is_for_one_channel(pair):
    pred, target = pair
    assert psnr(pred, target, channel="y") == psnr(luma(pred), luma(target))
    assert psnr(luma(pred), luma(target), channel="y") == psnr(luma(pred), luma(target))
    rounded = [luma(round_to_8_bits(image)) for image in pair]
    assert psnr(pred, target, channel="y", rounded=True) == pytest.approx(psnr(*rounded), abs=1e-12)


def test_rounding_clips_what_no_file_can_hold(pair):
    _, target = pair
    bright = np.where(target > 0.6, 1.0, target)
    over = np.where(target > 0.6, 1.5, target)
    assert psnr(over, bright, rounded=True) == psnr(bright, bright, rounded=True)
    assert psnr(over, bright) < 30


# -- SSIM ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_monai(pair, channels):
    pred, target = (torch.as_tensor(image[None, :channels]).float() for image in pair)
    expected = SSIMMetric(spatial_dims=2, data_range=1.0)(pred, target).item()
    assert ssim(pred[0], target[0]) == pytest.approx(expected, abs=1e-5)
    assert 0.3 < expected < 0.95


def test_ssim_is_that_of_scikit_image_also_inside_a_mask(pair):
    pred, target = pair
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected, full = structural_similarity(pred, target, channel_axis=0, full=True, **settings)
    assert ssim(pred, target) == pytest.approx(expected, abs=1e-12)
    mask = np.hypot(*np.mgrid[-20:20, -22:22]) < 12
    assert ssim(pred, target, mask=mask) == pytest.approx(full[:, mask].mean(), abs=1e-12)


def test_ssim_falls_with_noise_and_blur_and_ignores_nothing(pair, rng):
    _, target = pair
    noise = rng.normal(size=target.shape)
    scores = [ssim(target + sigma * noise, target) for sigma in (0, 0.02, 0.05, 0.1)]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.7


def test_ssim_needs_room_for_one_window():
    image = np.random.default_rng(0).random((3, 11, 19))
    assert ssim(image, image) == pytest.approx(1)
    with pytest.raises(DataError, match="11 pixels"):
        ssim(image, image, border=1)


# -- faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [psnr, ssim])
def test_faults_are_named(score):
    image = np.full((3, 16, 16), 0.5)
    with pytest.raises(DataError, match=r"two equal \(C, H, W\).*\(3, 16, 15\)"):
        score(image[..., 1:], image)
    with pytest.raises(DataError, match=r"two equal \(C, H, W\)"):
        score(image[None], image[None])
    with pytest.raises(DataError, match="pred holds NaN"):
        score(np.where(image > 0, np.nan, 0), image)
    with pytest.raises(DataError, match=r"target must lie in \[0, 1\], got 127.5"):
        score(image * 255, image * 255)
    with pytest.raises(DataError, match="target must lie"):
        score(image, image * np.nan)
    with pytest.raises(DataError, match="border of 8 leaves nothing"):
        score(image, image, border=8)
    with pytest.raises(DataError, match=r"mask must be \(H, W\)"):
        score(image, image, mask=np.ones((3, 16, 16)))
    with pytest.raises(DataError, match="mask is empty"):
        score(image, image, mask=np.zeros((16, 16)))
    with pytest.raises(SettingError, match="rgb, y, got 'lab'"):
        score(image, image, channel="lab")
    with pytest.raises(SettingError, match="border"):
        score(image, image, border=-1)


# -- protocol and means -------------------------------------------------------------------------------------


def test_every_choice_of_a_protocol_is_in_its_identifier():
    protocols = [
        ImageProtocol(channel, border, rounded, mask)
        for channel in ("rgb", "y")
        for border in (0, 4, 8)
        for rounded in (False, True)
        for mask in ("full", "fov")
    ]
    assert len({protocol.identifier for protocol in protocols}) == len(protocols)
    # Numbers are stored under these names: renaming one orphans them.
    assert ImageProtocol().identifier == "psnr-v1:rgb:border0:full:u8"
    assert ImageProtocol("y", 8, rounded=False, mask="fov").identifier == "psnr-v1:y:border8:fov:float"
    assert SET5_X4.identifier == "psnr-v1:y:border4:full:u8"


def test_a_protocol_scores_as_the_functions_do(pair):
    pred, target = pair
    mask = np.hypot(*np.mgrid[-20:20, -22:22]) < 14
    found = ImageProtocol("y", 2, rounded=True, mask="fov").score(pred, target, mask)
    settings = {"channel": "y", "border": 2, "rounded": True, "mask": mask}
    assert found == {
        "psnr_db": psnr(pred, target, **settings),
        "ssim": ssim(pred, target, **settings),
        "protocol": "psnr-v1:y:border2:fov:u8",
    }


def test_the_region_is_what_the_identifier_says(pair):
    pred, target = pair
    mask = np.zeros((40, 44), dtype=bool)
    mask[:12] = True
    assert ImageProtocol().score(pred, target, mask) == ImageProtocol().score(pred, target)
    with pytest.raises(DataError, match="counts the field of view"):
        ImageProtocol(mask="fov").score(pred, target)
    with pytest.raises(SettingError, match="full, fov, got 'lesion'"):
        ImageProtocol(mask="lesion")


def test_perfect_images_do_not_poison_a_mean():
    assert mean_score([20, 30, 40]) == MeanScore(30.0, 3, 0)
    assert mean_score(iter([math.inf, 20.0, math.inf])) == MeanScore(20.0, 1, 2)
    assert mean_score([math.inf]) == MeanScore(math.inf, 0, 1)


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], [-math.inf]])
def test_a_mean_of_nothing_or_of_nan_is_refused(scores):
    with pytest.raises(DataError, match="mean_score"):
        mean_score(scores)
