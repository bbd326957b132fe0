from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.transforms.field_of_view import FieldOfViewd, field_of_view
from monai.data import MetaTensor

ROWS, COLUMNS = np.mgrid[:48, :64]
DISC = np.hypot(ROWS - 23.5, COLUMNS - 31.5) < 20


def fundus(*, channels: int = 3, disc: np.ndarray = DISC) -> np.ndarray:
    """A reddish disc on nearly black, with dark vessels, a hole that fills, and specks in the surround."""
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 0.04, (channels, *disc.shape))
    colour = np.array([0.6, 0.3, 0.1])[:channels, None, None]
    image = np.where(disc, colour + image, image)
    image[:, 20:28, 28:34] = 0.01
    image[:, 2:4, 2:4] = 0.9
    return image.astype(np.float32)


def test_the_disc_is_found_with_its_dark_spots_and_without_specks():
    np.testing.assert_array_equal(field_of_view(fundus()), DISC)


def test_grey_images_have_a_field_of_view():
    np.testing.assert_array_equal(field_of_view(fundus(channels=1)), DISC)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_give_tensors(dtype):
    image = torch.as_tensor(fundus()).to(dtype).requires_grad_()
    found = field_of_view(image)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), DISC)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_eight_bits_are_read_as_eight_bits(kind):
    levels = (fundus() * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(field_of_view(kind(levels))), DISC)


def test_the_threshold_is_a_mean_of_twenty_levels():
    frame = np.zeros((3, 10, 10), dtype=np.uint8)
    frame[0, :, 3:] = 60  # a mean of 20: not brighter
    frame[0, :, 5:] = 61
    expected = np.zeros((10, 10), dtype=bool)
    expected[:, 5:] = True
    np.testing.assert_array_equal(field_of_view(frame), expected)
    assert field_of_view(frame, threshold=0.07)[:, 3:].all()


@pytest.mark.parametrize(("width", "whole"), [(0, True), (1, True), (2, False)])
def test_without_a_dark_surround_the_whole_frame_counts(width, whole):
    # One column of 64 is 1.6 %, two are 3.1 %.
    frame = np.full((3, 48, 64), 0.5)
    frame[:, :, :width] = 0
    mask = field_of_view(frame)
    assert mask.all() == whole
    assert mask[:, width:].all()
    assert field_of_view(frame, erosion=5).all() == whole


@pytest.mark.parametrize("erosion", [1, 3, 8])
def test_no_window_inside_the_eroded_mask_touches_the_surround(erosion):
    found = field_of_view(fundus(), erosion=erosion)
    for row, column in np.argwhere(found):
        window = DISC[row - erosion : row + erosion + 1, column - erosion : column + erosion + 1]
        assert window.all()
    # And nothing more is taken away than that.
    assert found.sum() == sum(
        DISC[r - erosion : r + erosion + 1, c - erosion : c + erosion + 1].all()
        for r in range(erosion, 48 - erosion)
        for c in range(erosion, 64 - erosion)
    )


def test_the_edges_of_the_frame_do_not_erode():
    wide = np.hypot(ROWS - 23.5, COLUMNS - 31.5) < 27  # cut off above and below
    found = field_of_view(fundus(disc=wide), erosion=3)
    assert found[0, 31]
    assert found[-1, 31]
    assert not found[23, 5]
    assert wide[23, 5]


def test_faults_are_named():
    with pytest.raises(DataError, match="no pixel is brighter"):
        field_of_view(np.full((3, 8, 8), 0.05))
    with pytest.raises(DataError, match=r"\(C, H, W\), got shape \(8, 8\)"):
        field_of_view(np.ones((8, 8)))
    with pytest.raises(DataError, match="nothing is left after an erosion of 30"):
        field_of_view(fundus(), erosion=30)
    with pytest.raises(SettingError, match="threshold"):
        field_of_view(fundus(), threshold=20)
    with pytest.raises(SettingError, match="erosion"):
        field_of_view(fundus(), erosion=-1)
    with pytest.raises(SettingError, match="as many mask_keys"):
        FieldOfViewd(("image", "other"))


def test_the_dictionary_stores_a_channel_first_mask_with_the_metadata_of_its_image():
    affine = torch.diag(torch.tensor([0.1, 0.2, 1, 1], dtype=torch.float64))
    image = MetaTensor(torch.as_tensor(fundus()), affine=affine, meta={"name": "a"})
    item = {"image": image, "low": torch.as_tensor(fundus())[:, ::2, ::2]}
    found = FieldOfViewd(("image", "low"), ("fov", "low_fov"), erosion=2)(item)
    assert found["fov"].shape == (1, 48, 64)
    assert found["fov"].dtype == torch.bool
    assert found["fov"].meta["name"] == "a"
    assert torch.equal(found["fov"].affine, affine)
    np.testing.assert_array_equal(found["fov"][0].numpy(), field_of_view(fundus(), erosion=2))
    assert found["low_fov"].shape == (1, 24, 32)
    assert found["image"] is image
    assert set(item) == {"image", "low"}
    partial = FieldOfViewd(("image", "low"), ("fov", "low_fov"), allow_missing_keys=True)({"image": image})
    assert set(partial) == {"image", "fov"}
