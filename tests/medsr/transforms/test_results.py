from __future__ import annotations

import pytest
import torch
from medsr.transforms.orientation import SliceAxisLastd
from medsr.transforms.results import SplitUncertaintyd
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
