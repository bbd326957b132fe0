from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.errors import DataError
from medsr.phantoms import head
from medsr.transforms.intensity import PercentileToUnitd, RestoreIntensityd
from monai.data import MetaTensor


@pytest.fixture(scope="module")
def volume() -> torch.Tensor:
    return torch.as_tensor(head(32)[0])[None]


def z_scored(volume: torch.Tensor) -> torch.Tensor:
    return (volume - volume.mean()) / volume.std()


VARIANTS = {
    "mri": lambda v: v,
    "z-scored": z_scored,
    "ct": lambda v: v * 2 - 1024,
    "all negative": lambda v: v - 5000,
    "tiny": lambda v: v * 1e-6,
    "large offset": lambda v: v + 30000,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_map_is_undone_to_float_precision(volume, variant):
    image = MetaTensor(VARIANTS[variant](volume), meta={"name": "a"})
    unit = PercentileToUnitd("image")({"image": image})
    assert unit["image"].meta["name"] == "a"
    back = RestoreIntensityd("pred", "image")({**unit, "pred": unit["image"].clone()})["pred"]
    largest = float(image.abs().max())
    np.testing.assert_allclose(back.numpy(), image.numpy(), atol=4e-7 * largest)


@pytest.mark.parametrize("variant", ["mri", "z-scored", "ct", "all negative", "large offset"])
def test_the_foreground_fills_the_unit_interval_whatever_the_scale(volume, variant):
    unit = PercentileToUnitd("image")({"image": MetaTensor(VARIANTS[variant](volume))})["image"]
    plain = PercentileToUnitd("image")({"image": MetaTensor(volume)})["image"]
    np.testing.assert_allclose(unit.numpy(), plain.numpy(), atol=0.01)
    inside = unit[volume > 0].numpy()
    assert np.percentile(inside, 0.1) == pytest.approx(0, abs=0.02)
    assert np.percentile(inside, 99.9) == pytest.approx(1, abs=0.02)


def test_every_channel_fills_the_unit_interval_and_comes_back(volume):
    channels = torch.cat([volume, 1000 * volume + 50, torch.full_like(volume, 7)])
    item = PercentileToUnitd("image")({"image": MetaTensor(channels)})
    unit = item["image"]
    for one in unit[:2]:
        assert 0.9 < one.max() < 1.5
    assert torch.equal(unit[2], torch.zeros_like(unit[2]))
    restored = RestoreIntensityd(["pred", "error"], magnitude_keys="error")(
        {"image": unit, "pred": unit.as_tensor(), "error": torch.ones_like(unit.as_tensor())}
    )
    np.testing.assert_allclose(restored["pred"].numpy(), channels.numpy(), rtol=1e-4, atol=1e-2)
    sizes = restored["error"].amax((1, 2, 3)).tolist()
    assert sizes[1] == pytest.approx(1000 * sizes[0], rel=1e-3)


def test_a_volume_alone_without_contrast_is_refused():
    with pytest.raises(DataError):
        PercentileToUnitd("image")({"image": MetaTensor(torch.full((2, 8, 8, 8), 3.0))})


def test_nothing_is_clipped(volume):
    values = volume.clone()
    values[0, 16, 16, 16] = 50 * volume.max()
    values[0, 10, 10, 10] = -20 * volume.max()
    image = MetaTensor(values)
    unit = PercentileToUnitd("image")({"image": image})["image"]
    assert unit.max() > 20
    assert unit.min() < -10
    # Two outliers do not squeeze the rest.
    plain = PercentileToUnitd("image")({"image": MetaTensor(volume)})["image"]
    rest = torch.ones_like(volume, dtype=torch.bool)
    rest[0, 16, 16, 16] = rest[0, 10, 10, 10] = False
    np.testing.assert_allclose(unit[rest].numpy(), plain[rest].numpy(), atol=0.1)


def test_metadata_hold_the_map_and_the_input_is_untouched(volume):
    affine = torch.diag(torch.tensor([1.0, 1, 4, 1], dtype=torch.float64))
    image = MetaTensor(volume.clone(), affine=affine, meta={"slice_thickness_mm": 3.0})
    image.applied_operations = [{"class": "SliceAxisLast"}]
    unit = PercentileToUnitd("image")({"image": image})["image"]
    scale, offset = unit.meta["intensity_scale"], unit.meta["intensity_offset"]
    assert scale.shape == offset.shape == (1,)
    np.testing.assert_allclose(unit.numpy() * scale.item() + offset.item(), volume.numpy(), atol=1e-3)
    assert unit.meta["slice_thickness_mm"] == 3.0
    assert torch.equal(unit.affine, affine)
    assert unit.applied_operations == image.applied_operations
    assert "intensity_scale" not in image.meta
    assert torch.equal(image.as_tensor(), volume)


def test_every_key_has_its_own_map(volume):
    item = {"image": MetaTensor(volume), "other": MetaTensor(volume * 3 + 100)}
    found = PercentileToUnitd(("image", "other"))(item)
    np.testing.assert_allclose(found["image"].numpy(), found["other"].numpy(), atol=0.01)
    ratio = found["other"].meta["intensity_scale"] / found["image"].meta["intensity_scale"]
    assert ratio == pytest.approx(3, rel=0.01)


def test_integers_are_scaled_as_floats(volume):
    image = MetaTensor(volume.round().to(torch.int16))
    unit = PercentileToUnitd("image")({"image": image})["image"]
    assert unit.dtype == torch.float32
    assert unit.unique().numel() > 100


def test_the_foreground_mask_is_stored_on_request(volume):
    plain = PercentileToUnitd("image")({"image": MetaTensor(volume)})
    assert set(plain) == {"image"}
    found = PercentileToUnitd("image", foreground_key="foreground")({"image": MetaTensor(volume)})
    mask = found["foreground"]
    assert mask.dtype == torch.bool
    assert mask.shape == volume.shape[1:]
    assert (mask == (volume[0] > 0)).float().mean() > 0.9
    kept = PercentileToUnitd("image", foreground_key="foreground")(
        {"image": MetaTensor(volume), "foreground": 7}
    )
    assert kept["foreground"] == 7


def test_an_image_without_contrast_is_refused():
    with pytest.raises(DataError, match=r"constant|no contrast"):
        PercentileToUnitd("image")({"image": MetaTensor(torch.full((1, 8, 8, 8), 3.0))})


def test_missing_keys_are_an_error_unless_allowed(volume):
    item = {"image": MetaTensor(volume)}
    with pytest.raises(KeyError):
        PercentileToUnitd(("image", "other"))(item)
    found = PercentileToUnitd(("image", "other"), allow_missing_keys=True)(item)
    with pytest.raises(KeyError):
        RestoreIntensityd("pred")(found)
    assert set(RestoreIntensityd("pred", allow_missing_keys=True)(found)) == {"image"}


@pytest.mark.parametrize("magnitude_keys", ["uncertainty", ("uncertainty",), ["uncertainty"]])
def test_magnitudes_are_scaled_and_not_shifted(magnitude_keys):
    source = MetaTensor(
        torch.zeros(1, 2, 2, 2), meta={"intensity_offset": -1024.0, "intensity_scale": 2000.0}
    )
    item = {"image": source, "pred": torch.full((1, 4), 0.5), "uncertainty": torch.full((1, 4), 0.01)}
    transform = RestoreIntensityd(("pred", "uncertainty"), "image", magnitude_keys)
    found = transform(item)
    np.testing.assert_allclose(found["pred"], -24.0)
    np.testing.assert_allclose(found["uncertainty"], 20.0, rtol=1e-6)
    assert item["pred"][0, 0] == 0.5
    assert found["image"] is source


def test_restoring_keeps_metadata_and_accepts_batched_numbers():
    # After batching and decollating the numbers of the metadata are tensors.
    meta = {"intensity_offset": torch.tensor(5.0), "intensity_scale": torch.tensor(2.0, dtype=torch.float64)}
    source = MetaTensor(torch.zeros(1, 2, 2, 2), meta=meta)
    affine = torch.diag(torch.tensor([1.0, 2, 3, 1], dtype=torch.float64))
    pred = MetaTensor(torch.ones(1, 2, 2, 2), affine=affine)
    found = RestoreIntensityd("pred")({"image": source, "pred": pred})["pred"]
    assert found.dtype == torch.float32
    assert torch.equal(found.affine, affine)
    np.testing.assert_allclose(found.numpy(), 7)
