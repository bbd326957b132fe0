from __future__ import annotations

import pytest
import torch
from medsr.errors import SettingError
from medsr.geometry import rescaled_size, slice_positions
from medsr.networks.wdsr import PlaneSRNet
from medsr.resampling import interpolation_matrix


def tiny(scale: float, *, trained: bool = False) -> PlaneSRNet:
    torch.manual_seed(0)
    network = PlaneSRNet(scale, channels=8, blocks=2)
    if trained:
        torch.nn.init.normal_(network.tail.weight, std=0.05)
        torch.nn.init.normal_(network.tail.bias, std=0.05)
    return network.eval()


def planes(size: int = 7, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 1, 12, size)


@pytest.mark.parametrize("scale", [1.25, 2, 2.5, 3, 3.333, 4, 5, 6.5, 8])
@pytest.mark.parametrize("size", [1, 4, 7])
@torch.inference_mode()
def test_the_output_covers_the_field_of_view_exactly(scale, size):
    found = tiny(scale, trained=True)(planes(size))
    assert found.shape == (2, 1, 12, rescaled_size(size, scale))
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [2, 2.5, 4])
@torch.inference_mode()
def test_an_untrained_network_is_the_cubic_interpolation(scale):
    image = planes()
    positions = slice_positions(7, rescaled_size(7, scale), scale)
    exact = image @ torch.as_tensor(interpolation_matrix(7, positions), dtype=torch.float32).T
    assert torch.allclose(tiny(scale)(image), exact, atol=1e-6)


@torch.inference_mode()
def test_bfloat16_touches_the_residual_only():
    image = 1000 + planes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiny(2.5)(image)
    assert torch.allclose(found, tiny(2.5)(image), atol=1e-3)


@torch.inference_mode()
def test_the_residual_of_a_whole_ratio_is_the_shuffle_itself():
    # Row k of the result is channel k % 4 of coarse row k // 4: the same field of view needs no resampling.
    network, image = tiny(4, trained=True), planes()
    features = network.head(image)
    for block in network.blocks:
        features = features + block(features)
    channels = network.tail(features)
    residual = network(image) - tiny(4)(image)
    for k in (0, 5, 13, 27):
        assert torch.allclose(residual[:, 0, :, k], channels[:, k % 4, :, k // 4], atol=1e-5)


@torch.inference_mode()
def test_a_residual_lies_where_it_belongs_for_a_ratio_that_is_not_whole():
    # The shuffle channels encode their own place; after resampling each row must still hold the place it shows.
    network = tiny(2.5)
    network.tail.bias.data = (torch.arange(3) - 1) / 3
    residual = network(torch.zeros(1, 1, 4, 8))[0, 0, 0]
    places = torch.as_tensor(slice_positions(8, 20, 2.5), dtype=torch.float32)
    offsets = places - places.add(0.5).floor()
    # A saw-tooth is not linear at its jumps: rows in the middle of a slab are compared.
    inner = offsets.abs() < 0.15
    inner[:2] = inner[-2:] = False
    assert int(inner.sum()) >= 3
    assert torch.allclose(residual[inner], offsets[inner], atol=0.1)


@torch.inference_mode()
def test_positions_choose_among_the_rows_of_the_whole_result():
    network, image = tiny(2.5, trained=True), planes()
    positions = slice_positions(7, rescaled_size(7, 2.5), 2.5)
    part = network(image, positions=positions[3:9])
    assert torch.allclose(part, network(image)[..., 3:9], atol=1e-6)


@torch.inference_mode()
def test_beyond_the_halo_a_plane_has_no_influence():
    network, image = tiny(3, trained=True), planes()
    changed = image.clone()
    changed[:, :, 0] += 1.0
    difference = (network(changed) - network(image)).abs().amax(dim=(0, 1, 3))
    assert float(difference[0]) > 0.1
    assert float(difference[network.exact_halo + 1 :].max()) == 0.0


def test_gradients_reach_every_parameter():
    network = tiny(2.5, trained=True).train()
    network(planes()).square().sum().backward()
    assert [k for k, p in network.named_parameters() if not float(p.grad.abs().max()) > 0] == []


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.19])
def test_a_scale_too_small_is_named(scale):
    with pytest.raises(SettingError, match=f"{scale:g}"):
        PlaneSRNet(scale)


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(same_as_released):
    network = tiny(2.5, trained=True)
    same_as_released("wdsr", {"": network}, network(planes()), centre=(6, 9))
