from __future__ import annotations

import pytest
import torch
from medsr.inferers.planes import PlaneAverageInferer
from medsr.networks.wdsr import PlaneSRNet
from torch import Tensor


def doubled(planes: Tensor) -> Tensor:
    return planes.repeat_interleave(2, dim=-1)


def test_every_voxel_keeps_its_place():
    volume = torch.arange(6.0 * 5 * 4).reshape(1, 1, 6, 5, 4)
    found = PlaneAverageInferer()(volume, doubled)
    assert torch.equal(found, volume.repeat_interleave(2, dim=-1))


def test_both_planes_are_averaged():
    # Adds the mean along the in-plane axis of a plane: over H in the first pass, over W in the second.
    volume = torch.rand(1, 1, 6, 5, 4)
    found = PlaneAverageInferer()(volume, lambda planes: planes.mean(dim=2, keepdim=True).expand_as(planes))
    expected = (volume.mean(2, keepdim=True) + volume.mean(3, keepdim=True)) / 2
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("planes", [1, 3, 16])
def test_the_batch_size_does_not_matter_and_bounds_the_memory(planes):
    sizes = []

    def network(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return doubled(batch)

    volume = torch.rand(1, 1, 7, 5, 4)
    found = PlaneAverageInferer(planes)(volume, network)
    assert torch.equal(found, volume.repeat_interleave(2, dim=-1))
    assert max(sizes) <= planes
    assert sum(sizes) == 7 + 5


def test_exchanging_the_in_plane_axes_exchanges_those_of_the_result():
    torch.manual_seed(0)
    network = PlaneSRNet(2.5, channels=8, blocks=1).train()
    torch.nn.init.normal_(network.tail.weight, std=0.1)
    volume = torch.rand(1, 1, 7, 6, 5)
    found = PlaneAverageInferer()(volume, network)
    assert found.shape == (1, 1, 7, 6, 13)
    assert not network.training
    turned = PlaneAverageInferer()(volume.transpose(2, 3), network)
    assert torch.allclose(turned.transpose(2, 3), found, atol=1e-5)


def test_the_result_may_be_changed():
    found = PlaneAverageInferer()(torch.rand(1, 1, 6, 5, 4), doubled)
    assert not found.is_inference()
    found += 1
