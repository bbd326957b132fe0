from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from medsr.errors import SettingError
from medsr.networks.plane_fusion import JoinedPlanes, PlaneFusion, estimate_from_planes
from medsr.networks.plane_prior import PlanePrior
from torch import Tensor, nn


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


def stack(*size: int) -> Tensor:
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1))


def test_it_starts_as_the_mean_of_both_axes():
    joined = JoinedPlanes(channels=4)
    randomised(joined.prior)
    image = stack(9, 11, 5)
    with torch.inference_mode():
        rows = joined.prior(image[0].permute(1, 0, 2, 3), 2.5)
        columns = joined.prior(image[0].permute(2, 0, 1, 3), 2.5)
        mean = (rows.permute(1, 0, 2, 3) + columns.permute(1, 2, 0, 3)) / 2
        assert torch.allclose(joined(image, 2.5)[0], mean, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (12, 64), (27, 131), (41, 65)])
@pytest.mark.parametrize("channels", [0, 3])
def test_bands_without_gradients_give_what_the_whole_gives(height, width, channels):
    prior = randomised(PlanePrior(channels=4, hidden=[8]))
    fusion = randomised(PlaneFusion(channels, layers=4)) if channels else None
    image, arguments = stack(height, width, 4), {"scale": 2.5, "thickness": 0.9}
    positions = [-0.3, 0.1, 0.5, 0.9, 1.3, 1.7, 2.1, 2.5, 2.9, 3.3]
    whole = estimate_from_planes(prior, fusion, image, positions=positions, **arguments).detach()
    out = torch.full((1, 1, height, width, 10), torch.nan)
    with torch.inference_mode():
        found = estimate_from_planes(prior, fusion, image, positions=positions, out=out, **arguments)
    assert found is out
    assert torch.allclose(found, whole, atol=1e-5)
    if fusion is not None:
        mean = estimate_from_planes(prior, None, image, positions=positions, **arguments)
        assert float((mean - whole).detach().abs().max()) > 1e-3


def test_turning_the_volume_about_its_slice_axis_swaps_the_readings():
    prior, image = randomised(PlanePrior(channels=4, hidden=[8])), stack(10, 7, 4)
    arguments = {"scale": 2.0, "thickness": 1.0, "positions": [0.25, 0.75, 1.25]}
    found = estimate_from_planes(prior, None, image, **arguments)
    turned = estimate_from_planes(prior, None, image.transpose(2, 3), **arguments)
    assert torch.allclose(turned.transpose(2, 3), found, atol=1e-6)


def test_the_mean_takes_positions_in_any_order_and_a_fusion_refuses_it():
    prior, fusion = randomised(PlanePrior(channels=4, hidden=[8])), PlaneFusion(2)
    arguments = {"scale": 2.0, "thickness": 1.0}
    image, positions, order = stack(6, 7, 4), np.array([-0.25, 0.25, 0.75, 1.25, 1.75]), [3, 0, 4, 1, 2]
    with torch.inference_mode():
        whole = estimate_from_planes(prior, None, image, positions=positions, **arguments)
        found = estimate_from_planes(prior, None, image, positions=positions[order], **arguments)
    assert torch.allclose(found, whole[..., order], atol=1e-6)
    for wrong in (positions[order], positions[::-1], [0.25, 0.25]):
        with pytest.raises(SettingError, match="must ascend"):
            estimate_from_planes(prior, fusion, image, positions=wrong, **arguments)


def test_a_block_with_the_stated_halo_is_exact():
    fusion = randomised(PlaneFusion(4, layers=4))
    first, second = stack(30, 12, 6)[0], stack(30, 12, 6)[0].flip(1)
    conditions = torch.rand(6, 3)
    halo = fusion.exact_halo
    with torch.inference_mode():
        whole = fusion(first, second, conditions)
        rows = slice(10 - halo, 20 + halo)
        part = fusion(first[:, rows], second[:, rows], conditions)
    assert torch.allclose(part[:, halo:-halo], whole[:, 10:20], atol=1e-6)


def test_labels_are_averaged_and_the_image_is_joined():
    joined = randomised(JoinedPlanes(channels=4, label_classes=2, hidden=[8]))
    image = torch.rand(1, 3, 8, 9, 5)
    with torch.inference_mode():
        found = joined(image, 2.0)
        joined.fusion = PlaneFusion(4)
        mean = joined(image, 2.0)
    assert found.shape == (1, 3, 8, 9, 10)
    assert torch.equal(found[:, 1:], mean[:, 1:])
    assert not torch.equal(found[:, :1], mean[:, :1])


def test_it_learns_which_reading_to_trust():
    torch.manual_seed(0)
    fusion = PlaneFusion(8)
    truth = nn.functional.avg_pool3d(torch.rand(4, 1, 18, 18, 18), 3, 1)[:, 0]
    first, second = truth + 0.02 * torch.randn_like(truth), truth + 0.2 * torch.randn_like(truth)
    conditions = torch.zeros(truth.shape[-1], 3)
    start = float((fusion(first, second, conditions) - truth).detach().abs().mean())
    optimizer = torch.optim.Adam(fusion.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (fusion(first, second, conditions) - truth).abs().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * start


def test_a_frozen_prior_lets_the_fusion_learn():
    joined = randomised(JoinedPlanes(channels=2, hidden=[8]))
    joined.prior.requires_grad_(False)
    joined(stack(8, 8, 4), 2.0).square().mean().backward()
    assert all(p.grad is None for p in joined.prior.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in joined.fusion.parameters())


def test_weights_and_results_are_those_of_the_last_release(golden):
    joined = randomised(JoinedPlanes(channels=4, hidden=[8]))
    names = "\n".join(f"{key} {tuple(value.shape)}" for key, value in joined.state_dict().items())
    with torch.inference_mode():
        result = joined(stack(16, 12, 5), 3.0)
    found = {
        "tensors": hashlib.sha256(names.encode()).hexdigest(),
        "parameters": sum(p.numel() for p in PlaneFusion(16).parameters()),
        "mean": float(result.mean()),
        "std": float(result.std()),
    }
    expected = golden("plane_fusion", found)
    assert found["tensors"] == expected["tensors"], "released weights would no longer load"
    assert found["parameters"] == expected["parameters"]
    for key in ("mean", "std"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("settings", [{"channels": 0}, {"layers": 1}])
def test_sizes_must_make_a_network(settings):
    with pytest.raises(SettingError, match="channels must be"):
        PlaneFusion(**settings)
