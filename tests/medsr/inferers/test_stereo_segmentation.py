from __future__ import annotations

import pytest
import torch
from medsr.errors import DataError
from medsr.inferers.frame_segmentation import FrameSegmentationInferer
from medsr.inferers.stereo_segmentation import StereoSegmentationInferer
from medsr.inferers.stereo_superres import StereoSuperResInferer
from medsr.networks.segsrnet import SEGSRNet
from medsr.networks.spp_linknet import SPPLinkNet
from medsr.networks.superres_segmentation import SuperResSegmentation
from monai.data import MetaTensor
from torch import Tensor

TINY = {"features": 8, "growth": 4, "fusion_growth": 4, "blocks": 1, "reduction": 4, "rates": (1,)}


@pytest.fixture(scope="module")
def network() -> SuperResSegmentation:
    torch.manual_seed(0)
    return SuperResSegmentation(SEGSRNet(2, **TINY), SPPLinkNet(3, encoder="resnet18", width=8)).eval()


def pair(channels: int = 3) -> Tensor:
    return torch.rand(1, 2 * channels, 20, 28, generator=torch.Generator().manual_seed(0))


def inferer(**settings: int) -> StereoSegmentationInferer:
    superres = StereoSuperResInferer(amp="float32", **settings)
    return StereoSegmentationInferer(superres, FrameSegmentationInferer(amp="float32", longest=48))


def test_each_part_gives_what_it_gives_alone(network):
    infer = inferer()
    found = infer(MetaTensor(pair()), network)
    superres, segmentation = (
        StereoSuperResInferer(amp="float32"),
        FrameSegmentationInferer(amp="float32", longest=48),
    )
    enlarged = superres(pair(), network.superres)
    assert torch.equal(found["superres"], enlarged)
    for side, view in zip(("left", "right"), enlarged.chunk(2, 1), strict=True):
        expected = segmentation(view, network.segmenter).argmax(1, keepdim=True)
        assert found[f"seg_{side}"].dtype == torch.uint8
        assert torch.equal(found[f"seg_{side}"].long(), expected)
    assert found["seg_left"].unique().numel() > 1
    assert (found["seg_left"] != found["seg_right"]).any()


def test_facts_tell_both_parts(network):
    infer = inferer()
    infer(pair(channels=1), network)
    assert infer.facts["scale"] == 2
    assert "data_consistency_left_db" in infer.facts
    assert infer.facts["segmentation"]["network_size"] == [34, 48]
    assert [line.split(",")[0] for line in infer.facts["warnings"]] == ["grey image", "grey frame"]
    infer(pair(), network)
    assert not infer.facts["warnings"]


def test_bands_of_a_large_pair_give_the_same_masks(network):
    whole, bands = inferer(), inferer(max_whole=1)
    first, second = (infer(pair().repeat(1, 1, 8, 1), network) for infer in (whole, bands))
    assert bands.facts["mode"] == "gated bands"
    assert (first["seg_left"] == second["seg_left"]).float().mean() > 0.999


def test_what_is_no_pair_is_refused(network):
    with pytest.raises(DataError, match="3 channels are no pair"):
        inferer()(pair()[:, :3], network)
