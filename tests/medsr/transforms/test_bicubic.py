from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.metrics.image import SET5_X4, luma, mean_score, round_to_8_bits
from medsr.resampling import antialiased_bicubic_matrix
from medsr.transforms.bicubic import (
    ROUNDINGS,
    BicubicDownsample,
    BicubicDownsampled,
    bicubic_bands,
    bicubic_resize,
    modcrop,
)
from monai.data import MetaTensor
from monai.transforms import Resize
from PIL import Image


def photograph(channels: int = 3, height: int = 48, width: int = 32) -> torch.Tensor:
    """An image as a file holds it: whole 255ths, in float32."""
    return torch.randint(0, 256, (channels, height, width)).float() / 255


# -- resizing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 8), (48, 8), (24, 64), (96, 64), (48, 32)])
def test_both_axes_follow_their_matrix(size):
    image = photograph()
    found = bicubic_resize(image, size)
    expected = antialiased_bicubic_matrix(48, size[0]) @ image.double().numpy()
    expected = expected @ antialiased_bicubic_matrix(32, size[1]).T
    assert found.shape == (3, *size)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_it_is_the_bicubic_of_pillow_in_the_interior(scale):
    image = torch.rand(12 * scale, 15 * scale)
    picture = Image.fromarray(image.numpy())
    expected = np.asarray(picture.resize((15, 12), Image.Resampling.BICUBIC))
    found = bicubic_resize(image, (12, 15)).numpy()
    np.testing.assert_allclose(found[3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-6)
    enlarged = np.asarray(picture.resize((30 * scale, 24 * scale), Image.Resampling.BICUBIC))
    found = bicubic_resize(image, (24 * scale, 30 * scale)).numpy()
    np.testing.assert_allclose(found[4:-4, 4:-4], enlarged[4:-4, 4:-4], atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (1, 16, 16), (2, 3, 16, 16), (2, 1, 3, 16, 16)])
def test_any_leading_axes(shape):
    image = torch.rand(shape)
    found = bicubic_resize(image, (4, 8))
    assert found.shape == (*shape[:-2], 4, 8)
    single = bicubic_resize(image.reshape(-1, 16, 16)[-1], (4, 8))
    np.testing.assert_allclose(found.reshape(-1, 4, 8)[-1].numpy(), single.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
def test_the_type_stays_and_so_does_a_constant(dtype, tolerance):
    found = bicubic_resize(torch.full((3, 20, 20), 0.3, dtype=dtype), (5, 40))
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().numpy(), 0.3, atol=tolerance)


def test_autocast_does_not_cost_precision():
    image = photograph()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bicubic_resize(image, (12, 8))
    assert torch.equal(found, bicubic_resize(image, (12, 8)))


def test_gradients_flow_exactly():
    image = torch.rand(1, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bicubic_resize(x, (3, 2)), image)
    assert torch.autograd.gradcheck(lambda x: bicubic_resize(x, (7, 16)), image)


# -- rounding -----------------------------------------------------------------------------------------------


def matlab_levels(levels: np.ndarray, size: tuple[int, int], *, between: bool) -> np.ndarray:
    """Integer arithmetic on levels; exact for powers of two, whose weights are dyadic fractions."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.floor(np.clip(values, 0, 255) + 0.5)

    values = antialiased_bicubic_matrix(levels.shape[-2], size[0]) @ levels
    values = rounded(values) if between else values
    return rounded(values @ antialiased_bicubic_matrix(levels.shape[-1], size[1]).T)


@pytest.mark.parametrize("rounding", ["end", "between"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_rounded_levels_are_exact_for_files_in_every_type(rounding, scale):
    # Few levels, so that many sums fall on a half.
    levels = 255 * np.random.default_rng(0).integers(0, 2, (3, 64, 64)).astype(float)
    levels[1] = np.random.default_rng(1).integers(0, 256, (64, 64))
    size = (64 // scale, 64 // scale)
    expected = matlab_levels(levels, size, between=rounding == "between")
    for image in (torch.as_tensor(levels) / 255, (torch.as_tensor(levels) / 255).float()):
        found = bicubic_resize(image, size, rounding=rounding)
        assert found.dtype == image.dtype
        np.testing.assert_allclose((found * 255).numpy(), expected, atol=1e-4)
    found = bicubic_resize(torch.as_tensor(levels).to(torch.uint8), size, rounding=rounding)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), expected)


def test_halves_go_up_also_where_float32_misses_them():
    levels = torch.stack([torch.arange(255), torch.arange(1, 256)])
    exact = levels / 255
    for image in (
        exact,
        torch.nextafter(exact, torch.tensor(0.0)),
        torch.nextafter(exact, torch.tensor(1.0)),
    ):
        found = bicubic_resize(image, (1, 255), rounding="end")
        np.testing.assert_array_equal((found * 255).round().numpy()[0], np.arange(1, 256))


def test_the_two_roundings_differ_by_one_level_in_some_pixels():
    image = photograph(1, 96, 96)
    end, between = (
        (bicubic_resize(image, (32, 32), rounding=rounding) * 255).round() for rounding in ("end", "between")
    )
    difference = (end - between).abs()
    assert difference.max() == 1
    assert 0.05 < difference.bool().float().mean() < 0.3
    plain = bicubic_resize(image, (32, 32)) * 255
    assert (end - plain).abs().max() <= 0.5 + 1e-3


def test_the_rows_come_first():
    image = photograph(1, 96, 96)
    found = bicubic_resize(image, (32, 32), rounding="between")
    rows_only = bicubic_resize(image, (32, 96), rounding="end")
    assert torch.equal(found, bicubic_resize(rows_only, (32, 32), rounding="end"))


def test_overshoot_is_clipped_only_when_rounding():
    image = torch.zeros(1, 16, 16)
    image[..., 8:] = 1
    assert bicubic_resize(image, (16, 64)).max() > 1.01
    assert bicubic_resize(image, (16, 64)).min() < -0.01
    rounded = bicubic_resize(image, (16, 64), rounding="end")
    assert (rounded.min(), rounded.max()) == (0, 1)


# -- degradation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4, 8, 16])
def test_the_degradation_crops_and_shrinks(scale):
    image = photograph(3, 67, 50)
    cropped = modcrop(image, scale)
    assert [size % scale for size in cropped.shape[1:]] == [0, 0]
    assert torch.equal(cropped, image[:, : cropped.shape[1], : cropped.shape[2]])
    low = BicubicDownsample(scale)(image)
    assert low.shape == (3, 67 // scale, 50 // scale)
    assert torch.equal(low, bicubic_resize(cropped, tuple(low.shape[1:])))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_dictionary_keeps_the_truth_beside_the_degraded(rounding):
    item = {"image": photograph(3, 35, 33), "other": photograph(1, 32, 32), "name": "a"}
    transform = BicubicDownsampled(
        ("image", "other"), 4, low_keys=("low", "other_low"), rounding=rounding, allow_missing_keys=True
    )
    found = transform(item)
    assert torch.equal(found["image"], item["image"][:, :32, :32])
    for key, low_key in (("image", "low"), ("other", "other_low")):
        assert torch.equal(found[low_key], BicubicDownsample(4, rounding=rounding)(item[key]))
    assert found["name"] == "a"
    assert set(item) == {"image", "other", "name"}
    assert set(transform({"other": item["other"]})) == {"other", "other_low"}


def affine_of(rank: int) -> torch.Tensor:
    """Rotated, anisotropic pixels with an offset."""
    matrix = torch.eye(rank + 1, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[0.6, -0.4], [0.8, 0.3]])
    matrix[:2, -1] = torch.tensor([-7.0, 11.0])
    return matrix


@pytest.mark.parametrize("rank", [2, 3])
def test_the_affine_follows_the_pixel_centres(rank):
    affine = affine_of(rank)
    image = MetaTensor(photograph(1, 33, 66), affine=affine, meta={"name": "a"})
    low = BicubicDownsample(4)(image)
    # Centre of low pixel (3, 5) is the centre of the block of 4 x 4 pixels that it covers.
    point = torch.zeros(rank + 1, dtype=torch.float64)
    point[:2], point[-1] = torch.tensor([3.0, 5.0]), 1
    block = point.clone()
    block[:2] = point[:2] * 4 + 1.5
    np.testing.assert_allclose(low.affine @ point, affine @ block, atol=1e-9)
    assert low.meta["name"] == "a"
    assert torch.equal(image.affine, affine)
    back = bicubic_resize(low, (32, 64))
    np.testing.assert_allclose(back.affine, affine, atol=1e-9)


def test_the_affine_is_that_of_monai():
    image = MetaTensor(photograph(1, 32, 64), affine=affine_of(3))
    expected = Resize((8, 16), mode="bilinear")(image).affine
    np.testing.assert_allclose(BicubicDownsample(4)(image).affine, expected, atol=1e-9)


# -- faults -------------------------------------------------------------------------------------------------


def test_faults_are_named():
    image = photograph()
    with pytest.raises(SettingError, match="none, end, between, got 'up'"):
        bicubic_resize(image, (4, 4), rounding="up")
    with pytest.raises(SettingError, match="none, end, between"):
        BicubicDownsample(4, rounding="up")
    with pytest.raises(SettingError, match="uint8 image cannot"):
        bicubic_resize((image * 255).to(torch.uint8), (4, 4))
    with pytest.raises(DataError, match=r"torch\.int16"):
        bicubic_resize((image * 255).to(torch.int16), (4, 4), rounding="end")
    with pytest.raises(SettingError, match="0 pixels"):
        bicubic_resize(image, (0, 4))
    for scale in (0, 2.5):
        with pytest.raises(SettingError, match="whole number"):
            BicubicDownsample(scale)
        with pytest.raises(SettingError, match="whole number"):
            modcrop(image, scale)
    with pytest.raises(DataError, match="48 x 7 pixels is too small for x8"):
        BicubicDownsample(8)(image[..., :7])
    with pytest.raises(SettingError, match="as many low_keys"):
        BicubicDownsampled(("image", "other"), 4)


# -- the published number -----------------------------------------------------------------------------------


def test_set5_reads_what_was_published():
    if "MEDSR_DATA" not in os.environ:
        pytest.skip("MEDSR_DATA does not point to a folder that holds sisr/Set5")
    files = sorted((Path(os.environ["MEDSR_DATA"]) / "sisr" / "Set5").glob("*.png"))
    if len(files) != 5:
        pytest.skip("no Set5 in MEDSR_DATA")
    scores, colour = [], []
    for file in files:
        with Image.open(file) as picture:
            levels = torch.as_tensor(np.array(picture.convert("RGB"))).movedim(-1, 0)
        rgb = modcrop(levels.double() / 255, 4)
        truth = round_to_8_bits(luma(rgb))
        pred = bicubic_resize(BicubicDownsample(4)(truth), tuple(truth.shape[1:]))
        scores.append(SET5_X4.score(pred, truth))
        low = BicubicDownsample(4, rounding="between")(rgb)
        colour.append(SET5_X4.score(bicubic_resize(low, tuple(rgb.shape[1:])), rgb))

    def means(rows):
        return [mean_score(row[key] for row in rows).mean for key in ("psnr_db", "ssim")]

    assert means(scores) == [pytest.approx(28.42, abs=0.005), pytest.approx(0.8104, abs=5e-5)]
    assert means(colour) == [pytest.approx(28.43, abs=0.005), pytest.approx(0.8113, abs=5e-5)]


# -- in bands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 9), (192, 128), (48, 31), (1, 1)])
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_bands_make_up_the_whole_result(size, rows):
    image = photograph()
    bands = list(bicubic_bands(image, size, rows=rows))
    assert [first for first, _ in bands] == list(range(0, size[0], rows))
    assert torch.allclose(torch.cat([band for _, band in bands], -2), bicubic_resize(image, size), atol=1e-6)


def test_bands_of_a_half_precision_image_are_float32():
    image = photograph().half()
    ((_, band),) = bicubic_bands(image, (12, 8))
    assert band.dtype == torch.float32
    assert torch.allclose(band, bicubic_resize(image.float(), (12, 8)), atol=1e-6)


def test_bands_wider_than_a_block_have_no_seam():
    image = torch.rand(2, 6, 2600, generator=torch.Generator().manual_seed(0))
    bands = torch.cat([band for _, band in bicubic_bands(image, (3, 1300), rows=2)], dim=-2)
    assert torch.allclose(bands, bicubic_resize(image, (3, 1300)), atol=1e-6)
