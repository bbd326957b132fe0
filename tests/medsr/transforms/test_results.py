from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from medsr.errors import SettingError
from medsr.transforms.orientation import SliceAxisLastd
from medsr.transforms.results import (
    AddUncertaintyd,
    MaskResultsd,
    PseudoUncertaintyd,
    SplitChannelsd,
    SplitUncertaintyd,
)
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd


@pytest.mark.parametrize("channels", [1, 3])
def test_the_second_half_is_the_uncertainty(channels):
    pred = torch.rand(2 * channels, 2, 3, 12)
    item = {"image": torch.rand(channels, 2, 3, 4), "pred": pred}
    found = SplitUncertaintyd("pred")(item)
    assert torch.equal(found["pred"].as_tensor(), pred[:channels])
    assert torch.equal(found["uncertainty"].as_tensor(), pred[channels:])
    assert item["pred"] is pred
    assert "uncertainty" not in item


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_without_such_a_head_leaves_no_uncertainty(channels):
    item = {"image": torch.rand(channels, 2, 3, 4), "pred": torch.rand(channels, 2, 3, 12)}
    found = SplitUncertaintyd("pred")(item)
    assert "uncertainty" not in found
    assert torch.equal(found["pred"].as_tensor(), item["pred"])


def test_the_source_key_says_how_many_images_there_are():
    item = {"image": torch.rand(1, 2, 2, 2), "stack": torch.rand(2, 2, 2, 2), "pred": torch.rand(4, 2, 2, 6)}
    found = SplitUncertaintyd("pred", source_key="stack")(item)
    assert len(found["pred"]) == len(found["uncertainty"]) == 2


def test_metadata_stay_with_the_result():
    pred = MetaTensor(torch.rand(2, 2, 2, 6), affine=2 * torch.eye(4), meta={"name": "a"})
    found = SplitUncertaintyd("pred")({"image": torch.rand(1, 2, 2, 2), "pred": pred})
    assert found["pred"].meta["name"] == "a"
    assert torch.equal(found["pred"].affine, pred.affine)
    found["pred"].meta["name"] = "b"
    assert pred.meta["name"] == "a"


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_invertd_restores_the_axes_of_what_was_taken_apart(channels, axis):
    # Invertd leaves plain tensors as they are, with no more than a warning.
    spacing = torch.tensor([1.0, 1, 1, 1], dtype=torch.float64)
    spacing[axis] = 4
    shape = [3, 4, 5]
    image = MetaTensor(torch.rand(1, *shape), affine=torch.diag(spacing))
    preprocessing = Compose([SliceAxisLastd("image")])
    item = preprocessing({"image": image})
    fine = item["image"].as_tensor().repeat_interleave(4, dim=-1)
    item["pred"] = torch.cat([fine, fine / 2][:channels])
    keys = ["pred", "uncertainty"]
    invert = Invertd(keys, preprocessing, "image", nearest_interp=False, allow_missing_keys=True)
    found = invert(SplitUncertaintyd("pred")(item))
    expected = image.as_tensor().repeat_interleave(4, dim=1 + axis)
    assert torch.equal(found["pred"].as_tensor(), expected)
    if channels == 2:
        assert torch.equal(found["uncertainty"].as_tensor(), expected / 2)


def test_a_missing_result_is_an_error():
    with pytest.raises(KeyError):
        SplitUncertaintyd("pred")({"image": torch.rand(1, 2, 2, 2)})


def test_channels_get_keys_of_their_own():
    pred = MetaTensor(torch.rand(4, 2, 2, 6), affine=2 * torch.eye(4), meta={"name": "a"})
    found = SplitChannelsd("pred", {"pred": 1, "label": 2, "uncertainty": 1})({"pred": pred})
    assert torch.equal(found["label"].as_tensor(), pred.as_tensor()[1:3])
    assert torch.equal(found["uncertainty"].as_tensor(), pred.as_tensor()[3:])
    assert torch.equal(found["label"].affine, pred.affine)
    found["label"].meta["name"] = "b"
    assert found["pred"].meta["name"] == "a"
    with pytest.raises(SettingError, match="pred: 4 channels cannot be split into"):
        SplitChannelsd("pred", {"pred": 1, "label": 2})({"pred": pred})


@pytest.mark.parametrize("axis", [0, 2])
def test_masks_of_both_grids_return_to_the_axes_of_the_file(axis):
    spacing = torch.tensor([1.0, 1, 1, 1], dtype=torch.float64)
    spacing[axis] = 4
    image = MetaTensor(torch.rand(1, 3, 4, 5), affine=torch.diag(spacing))
    preprocessing = Compose([SliceAxisLastd("image")])
    item = preprocessing({"image": image})
    thick = torch.stack([item["image"].as_tensor()[0], 1 - item["image"].as_tensor()[0]])
    item["pred"] = thick.repeat_interleave(4, dim=-1)
    keys = ["pred", "pred_thick", "probability", "uncertainty"]
    invert = Invertd(keys, preprocessing, "image", nearest_interp=False)
    found = invert(MaskResultsd("pred", SimpleNamespace(thick=thick[None]))(item))
    expected = image.as_tensor() < 0.5
    assert torch.equal(found["pred_thick"].as_tensor() > 0, expected)
    assert torch.equal(found["pred"].as_tensor() > 0, expected.repeat_interleave(4, dim=1 + axis))
    assert found["pred"].dtype == torch.uint8
    assert torch.allclose(
        found["probability"].as_tensor(), 1 - image.as_tensor().repeat_interleave(4, 1 + axis)
    )


def test_borders_are_where_two_classes_are_equally_likely():
    thin = torch.tensor([[0.0, 0.5, 0.9], [1.0, 0.5, 0.05], [0.0, 0.0, 0.05]]).view(3, 3, 1, 1)
    found = MaskResultsd("pred", SimpleNamespace(thick=thin[None]))({"pred": thin})
    assert found["uncertainty"].ravel().tolist() == pytest.approx([0, 1, 0.15], abs=1e-6)


def pseudo() -> dict[str, MetaTensor]:
    image = torch.tensor([0.0, 0.01, 0.02, 0.04]).view(1, 2, 2, 1)
    label = torch.tensor([[1.0, 0.5, 0.9, 0.2], [0.0, 0.0, 0.1, 0.2]]).view(2, 2, 2, 1)
    return {"uncertainty": MetaTensor(image, affine=2 * torch.eye(4)), "label": MetaTensor(label)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [("image", [0, 0.25, 0.5, 1]), ("label", [0, 1, 0.2, 0.6]), ("both", [0, 1, 0.5, 1])],
)
def test_pseudo_data_are_unsure_where_image_or_label_is(source, expected):
    item = pseudo()
    found = PseudoUncertaintyd("uncertainty", source=source, quantile=1.0)(item)["uncertainty"]
    assert found.shape == (1, 2, 2, 1)
    assert found.ravel().tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(found.affine, 2 * torch.eye(4, dtype=torch.float64))
    assert item["uncertainty"].max() == pytest.approx(0.04)


def test_few_wild_voxels_do_not_scale_the_uncertainty():
    values = torch.full((1, 10, 10, 100), 0.02)
    values[0, 0, 0, 0] = 1.0
    item = {"uncertainty": MetaTensor(values), "label": torch.zeros(1, 10, 10, 100)}
    found = PseudoUncertaintyd("uncertainty", source="image")(item)["uncertainty"]
    assert found.min() == found.max() == 1


def test_a_network_that_is_sure_of_everything_gives_no_uncertainty():
    item = {"uncertainty": MetaTensor(torch.zeros(1, 2, 2, 2)), "label": torch.ones(1, 2, 2, 2)}
    assert float(PseudoUncertaintyd("uncertainty")(item)["uncertainty"].max()) == 0


@pytest.mark.parametrize("settings", [{"source": "mask"}, {"quantile": 0.0}, {"quantile": 1.5}])
def test_settings_of_the_pseudo_uncertainty_are_checked(settings):
    with pytest.raises(SettingError, match="must"):
        PseudoUncertaintyd("uncertainty", **settings)


def test_the_uncertainty_of_an_inferer_joins_its_result():
    pred = MetaTensor(torch.zeros(3, 2, 2), affine=2 * torch.eye(4))
    found = AddUncertaintyd("pred", SimpleNamespace(uncertainty=torch.full((1, 1, 2, 2), 0.25)))(
        {"pred": pred}
    )
    assert found["uncertainty"].shape == (1, 2, 2)
    assert float(found["uncertainty"].max()) == 0.25
    assert torch.equal(found["uncertainty"].affine, pred.affine)
    assert "uncertainty" not in AddUncertaintyd("pred", SimpleNamespace(uncertainty=None))({"pred": pred})
