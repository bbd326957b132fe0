from __future__ import annotations

import pytest
import torch
from medsr.errors import SettingError
from medsr.networks.segsrnet import SEGSRNet
from medsr.networks.spp_linknet import SPPLinkNet
from medsr.networks.superres_segmentation import SuperResSegmentation
from torch import Tensor, nn
from torch.nn import functional as F

TINY = {"features": 8, "growth": 4, "fusion_growth": 4, "blocks": 1, "reduction": 4, "rates": (1,)}


def made(classes: int = 1, **settings: str) -> SuperResSegmentation:
    torch.manual_seed(0)
    segmenter = SPPLinkNet(classes, encoder="resnet18", width=8)
    return SuperResSegmentation(SEGSRNet(2, **TINY), segmenter, **settings)


def pair(height: int = 20, width: int = 28, batch: int = 2) -> Tensor:
    return torch.rand(batch, 6, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("classes", [1, 4])
def test_each_part_gives_what_it_gives_alone(classes):
    network = made(classes).eval()
    with torch.no_grad():
        found = network(pair())
        image = network.superres(pair())
        alone = [
            network.segmenter(F.pad(view, (0, 8, 0, 24), mode="replicate"))[..., :40, :56]
            for view in image.chunk(2, 1)
        ]
    assert torch.equal(found.image, image)
    assert torch.allclose(found.logits, torch.cat(alone, 1), atol=1e-5)


def test_the_left_view_alone():
    both, left = made().eval(), made(views="left").eval()
    with torch.no_grad():
        assert torch.allclose(left(pair()).logits, both(pair()).logits[:, :1], atol=1e-5)


@pytest.mark.parametrize("views", ["both", "left"])
def test_the_loss_of_the_masks_reaches_the_super_resolution(views):
    network = made(views=views)
    for parameter in network.superres.parameters():
        nn.init.normal_(parameter, std=0.1)
    network.segmenter.requires_grad_(False)
    network.segmenter.eval()
    logits = network(pair()).logits
    F.binary_cross_entropy_with_logits(logits, (torch.rand_like(logits) > 0.5).float()).backward()
    gradients = [parameter.grad for parameter in network.superres.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert sum(gradient.abs().sum() > 0 for gradient in gradients) > 0.9 * len(gradients)
    assert network.superres.head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.segmenter.parameters())


def test_a_step_against_that_gradient_makes_better_masks():
    network = made(views="left").eval()
    network.segmenter.requires_grad_(False)
    with torch.no_grad():
        target = (network(pair().flip(0)).logits > 0).float()

    def loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(network(pair()).logits, target)

    optimizer = torch.optim.Adam(network.superres.parameters(), lr=1e-3)
    before = loss()
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < before


def test_facts_are_those_of_the_parts():
    network = made()
    assert (network.scale, network.in_channels, network.size_multiple) == (2, 6, 1)
    assert network.half_precision_safe
    assert network.exact_halo is None
    assert {name.split(".")[0] for name in network.state_dict()} == {"superres", "segmenter"}


def test_what_does_not_fit_is_refused():
    with pytest.raises(SettingError, match="views must be one of"):
        made(views="right")
    with pytest.raises(SettingError, match=r"of 6 channels .* of 1$"):
        SuperResSegmentation(SEGSRNet(2, **TINY), SPPLinkNet(1, 1, encoder="resnet18", width=8))
