from __future__ import annotations

from typing import Any

import pytest
import torch
from medsr.errors import DataError, MedsrError, SettingError
from medsr.inferers import precision
from medsr.inferers.frame_segmentation import FrameSegmentationInferer
from medsr.networks.spp_linknet import SPPLinkNet
from medsr.transforms.bicubic import bicubic_resize
from medsr.transforms.frame_labels import ResizeFramed
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F


class Colour(nn.Module):
    """Logits are a linear map of the colour of each pixel: every result can be told in advance."""

    in_channels, size_multiple, half_precision_safe = 3, 32, True

    def __init__(self, classes: int = 1, gain: float = 20) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain * (torch.arange(classes).float() - 0.5)[:, None] * torch.ones(3) / 3)
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        assert not image.shape[-2] % 32
        assert not image.shape[-1] % 32
        self.seen.append(image)
        logits = torch.einsum("kc,bchw->bkhw", self.weight, image)
        return logits if len(self.weight) > 1 else -(logits + 5)


def inferer(**settings: Any) -> FrameSegmentationInferer:
    return FrameSegmentationInferer(**{"amp": "float32", **settings})


def frame(height: int = 45, width: int = 70, channels: int = 3) -> Tensor:
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def linknet(classes: int = 1) -> SPPLinkNet:
    torch.manual_seed(1)
    return SPPLinkNet(classes, encoder="resnet18", width=8).eval()


@pytest.mark.parametrize("size", [(45, 70), (64, 96), (1, 1), (3, 200)])
def test_every_size_goes_in_and_comes_out(size):
    network, infer = Colour(), inferer()
    image = frame(*size)
    found = infer(image, network)
    assert found.shape == (1, 2, *size)
    (seen,) = network.seen
    assert torch.equal(seen[..., : size[0], : size[1]], image)
    assert infer.facts["padding"] == [seen.shape[-2] - size[0], seen.shape[-1] - size[1]]
    # Filled with the last row and column: no edge where the frame ends.
    assert torch.equal(seen[..., -1, : size[1]], image[..., -1, :])
    assert torch.equal(seen[..., : size[0], -1], image[..., -1])


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_probabilities_are_those_of_the_logits(classes):
    image, network = frame(), Colour(classes)
    found = inferer()(image, network)
    with torch.no_grad():
        logits = network(F.pad(image, (0, 26, 0, 19)))[..., :45, :70]
    assert found.shape[1] == max(2, classes)
    assert torch.allclose(found.sum(1), torch.ones(1, 45, 70), atol=1e-6)
    if classes > 1:
        assert torch.allclose(found, logits.softmax(1), atol=1e-6)
    else:
        assert torch.allclose(found[:, 1], logits[:, 0].sigmoid(), atol=1e-6)
        assert torch.equal(found.argmax(1), (logits[:, 0] > 0).long())


@pytest.mark.parametrize("longest", [40, 130])
def test_the_network_sees_the_scale_of_its_training(longest):
    image, network, infer = frame(), Colour(), inferer(longest=longest)
    found = infer(image, network)
    expected = ResizeFramed("image", longest=longest)({"image": image[0]})["image"]
    assert infer.facts["network_size"] == list(expected.shape[1:])
    assert max(infer.facts["network_size"]) == longest
    assert torch.equal(network.seen[0][0, :, : expected.shape[1], : expected.shape[2]], expected)
    assert found.shape == (1, 2, 45, 70)
    assert torch.allclose(found.sum(1), torch.ones(1, 45, 70), atol=1e-5)


def test_masks_stay_where_they_are_when_the_scale_changes():
    # A bright rectangle, whose mask is known at any scale.
    image = torch.full((1, 3, 120, 160), 0.1)
    image[..., 31:77, 52:118] = 0.9
    truth = image[:, 0] > 0.5
    for longest in (80, 97, 320):
        mask = inferer(longest=longest)(image, Colour()).argmax(1) > 0
        overlap = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        assert overlap > 0.98, longest
        places = [torch.nonzero(one[0]).float().mean(0) for one in (mask, truth)]
        assert (places[0] - places[1]).abs().max() < 0.2, longest


def test_several_sizes_are_averaged():
    network, image = linknet(), frame(90, 128)
    alone = [inferer(longest=longest)(image, network) for longest in (64, 96)]
    infer = inferer(longest=96, sizes=[2 / 3, 1.0])
    found = infer(image, network)
    assert (alone[0] - alone[1]).abs().max() > 1e-4
    assert torch.allclose(found, (alone[0] + alone[1]) / 2, atol=1e-6)
    assert infer.facts["network_size"] == [68, 96]
    assert infer.facts["sizes"] == [1.0, 2 / 3]


def test_without_a_longest_side_sizes_are_shares_of_the_frame():
    network, image = Colour(), frame(64, 96)
    inferer(sizes=[0.5, 1.0])(image, network)
    assert torch.equal(network.seen[0], image)
    assert network.seen[1].shape == (1, 3, 32, 64)  # 32 x 48, filled to a multiple of 32


@pytest.mark.parametrize("sizes", [[], [0.0, 1.0], [1.0, -0.5], 0.5, "1.0", [True], [float("nan")]])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(SettingError, match="sizes must be"):
        inferer(sizes=sizes)


def test_mirror_averages_over_the_flips():
    network, image = linknet(), frame(64, 64)
    once, infer = inferer()(image, network), inferer(mirror=True)
    found = infer(image, network)
    assert (found - once).abs().max() > 1e-4
    assert torch.allclose(infer(image.flip(-1), network), found.flip(-1), atol=1e-5)
    assert torch.allclose(infer(image.flip((-2, -1)), network), found.flip((-2, -1)), atol=1e-5)
    assert infer.facts["mirror"]


@pytest.mark.parametrize("classes", [1, 4])
def test_the_real_network_fits(classes):
    network, infer = linknet(classes).train(), inferer(longest=64)
    found = infer(MetaTensor(frame(45, 90)), network)
    assert type(found) is Tensor
    assert found.shape == (1, max(2, classes), 45, 90)
    assert infer.facts["network_size"] == [32, 64]
    assert not network.training


def test_frames_of_one_size_share_a_batch():
    network, images = linknet(), torch.cat([frame(), frame().flip(-1)])
    found = inferer()(images, network)
    alone = torch.cat([inferer()(image, network) for image in images.split(1)])
    assert torch.allclose(found, alone, atol=1e-5)


def test_grey_frames_pass_a_network_for_colour():
    infer, grey = inferer(), frame(channels=1)
    found = infer(grey, Colour())
    assert torch.equal(found, inferer()(grey.repeat(1, 3, 1, 1), Colour()))
    assert "grey" in infer.facts["warnings"][0]


def test_bfloat16_is_used_where_it_changes_little():
    infer = FrameSegmentationInferer(amp="bfloat16")
    found = infer(frame(), linknet())
    assert infer.facts["precision"] == "bfloat16"
    assert (found - inferer()(frame(), linknet())).abs().mean() < 0.02
    assert found.dtype == torch.float32


def test_bfloat16_is_not_used_where_it_changes_much_or_is_unsafe(monkeypatch):
    class Rough(Colour):
        """Logits that rounding turns over."""

        def forward(self, image: Tensor) -> Tensor:
            rounding = torch.is_autocast_enabled("cpu")
            return super().forward(image) * (-1 if rounding else 1)

    infer = FrameSegmentationInferer(amp="bfloat16")
    infer(frame(), Rough())
    assert infer.facts["precision"] == "float32"
    unsafe = Colour()
    unsafe.half_precision_safe = False
    infer(frame(), unsafe)
    assert infer.facts["precision"] == "float32"
    assert "not safe" in infer.facts["warnings"][0]
    # The trial is a part of the frame, not all of it.
    monkeypatch.setattr(precision, "native_bfloat16", lambda device: True)
    network = Colour()
    FrameSegmentationInferer()(frame(300, 400), network)
    assert network.seen[0].shape[-2:] == (128, 128)


def test_bad_settings_and_frames_are_refused():
    with pytest.raises(SettingError, match="amp must be one of"):
        FrameSegmentationInferer(amp="half")
    with pytest.raises(SettingError, match="mirror must be true or false, got 'off'"):
        FrameSegmentationInferer(mirror="off")
    for longest in (0, 64.5, "abc"):
        with pytest.raises(SettingError, match="longest"):
            FrameSegmentationInferer(longest=longest)
    with pytest.raises(DataError, match="2 channels, the network takes 3"):
        inferer()(frame(channels=2), Colour())
    with pytest.raises(DataError, match="with pixels"):
        inferer()(frame()[..., :0], Colour())
    with pytest.raises(MedsrError, match="not finite"):
        inferer()(frame(), Colour(gain=float("nan")))


def test_a_resized_frame_stays_in_range():
    network = Colour()
    inferer(longest=200)((frame() > 0.5).float(), network)
    assert bicubic_resize((frame() > 0.5).float(), (129, 200)).max() > 1
    assert 0 <= float(network.seen[0].min()) <= float(network.seen[0].max()) <= 1
