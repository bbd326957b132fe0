from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from medsr.errors import SettingError
from medsr.geometry import rescaled_size, slice_positions
from medsr.networks.plane_prior import PlanePrior
from medsr.resampling import interpolation_matrix
from torch import Tensor

RATIOS = (1.5, 2, 2.5, 3, 3.3, 4, 6, 8)


def tiny(*, trained: bool = False) -> PlanePrior:
    torch.manual_seed(0)
    network = PlanePrior(channels=8, hidden=[16, 16], basis=6)
    if trained:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


def planes(depth: int = 6, height: int = 17) -> Tensor:
    return torch.rand(3, 1, height, depth, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_output_covers_the_field_of_view_and_starts_as_the_cubic_interpolation(ratio):
    image = planes()
    positions = slice_positions(6, rescaled_size(6, ratio), ratio)
    with torch.inference_mode():
        found = tiny()(image, scale=ratio)
    cubic = image @ torch.as_tensor(interpolation_matrix(6, positions), dtype=torch.float32).T
    assert found.shape == (3, 1, 17, rescaled_size(6, ratio))
    assert torch.allclose(found, cubic, atol=1e-6)


@torch.inference_mode()
def test_bfloat16_touches_the_residual_only():
    image = 1000 + planes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiny()(image, scale=2.5)
    assert torch.allclose(found, tiny()(image, scale=2.5), atol=1e-3)


@pytest.mark.parametrize("ratio", RATIOS)
def test_some_positions_alone_are_what_they_are_among_all(ratio):
    network, image = tiny(trained=True), planes()
    positions = slice_positions(6, rescaled_size(6, ratio), ratio)
    with torch.inference_mode():
        whole = network(image, ratio, 0.9)
        for part in (slice(0, 1), slice(2, 5), slice(-2, None)):
            assert torch.allclose(network(image, ratio, 0.9, positions[part]), whole[..., part], atol=1e-5)
        assert float((whole - tiny()(image, ratio)).abs().max()) > 1e-3


@pytest.mark.parametrize("ratio", [2.5, 4])
def test_positions_may_come_in_any_order(ratio):
    network, image = tiny(trained=True), planes()
    positions = slice_positions(6, rescaled_size(6, ratio), ratio)
    order = np.random.default_rng(0).permutation(len(positions))
    with torch.inference_mode():
        whole = network(image, ratio, 0.9, positions)
        for chosen in (order, order[::-1], np.repeat(order[:4], 2)):
            found = network(image, ratio, 0.9, positions[chosen])
            assert torch.allclose(found, whole[..., chosen.copy()], atol=1e-5)


def test_a_tile_with_the_stated_halo_is_exact():
    network = tiny(trained=True)
    image = planes(height=40)
    halo = network.exact_halo
    with torch.inference_mode():
        whole = network(image, 3.0)
        part = network(image[:, :, 10 - halo : 26 + halo], 3.0)
    assert torch.allclose(part[:, :, halo:-halo], whole[:, :, 10:26], atol=1e-5)


def test_weights_and_results_are_those_of_the_last_release(golden):
    network = tiny(trained=True)
    state = network.state_dict()
    names = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    with torch.inference_mode():
        result = network(planes(), 2.5, 0.8).double()
    found = {
        "tensors": hashlib.sha256(names.encode()).hexdigest(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "mean": float(result.mean()),
        "std": float(result.std()),
        "corner": float(result[0, 0, 0, 0]),
        "roughness": float(result.diff(dim=-1).abs().mean()),
    }
    expected = golden("plane_prior", found)
    assert found["tensors"] == expected["tensors"], "released weights would no longer load"
    assert found["parameters"] == expected["parameters"]
    for key in ("mean", "std", "corner", "roughness"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


def test_a_few_steps_learn_something_that_the_cubic_interpolation_misses():
    torch.manual_seed(0)
    grid = torch.linspace(0, 40, 96)
    fine = torch.stack([torch.sign(torch.sin(grid * f + p)) for f, p in ((1.0, 0.3), (0.7, 1.0), (1.3, 2.0))])
    fine = fine[:, None, None].expand(-1, 1, 16, -1) * 0.3 + 0.5
    thick = fine.unflatten(-1, (24, 4)).mean(-1)
    network = PlanePrior(channels=16, hidden=[32, 32])
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    before = float((network(thick) - fine).abs().mean().detach())
    for _ in range(100):
        optimizer.zero_grad()
        loss = (network(thick) - fine).abs().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.85 * before


def test_sizes_out_of_range_are_named():
    with pytest.raises(SettingError, match="0"):
        PlanePrior(hidden=[0])


def test_channels_that_never_answer_can_be_taken_out():
    network, image = tiny(trained=True), planes()
    with torch.no_grad():
        for block in network.blocks:
            # Channels 3 to 8 are at zero whatever they see.
            block[0].weight[3:9] *= 1e-3
            block[0].bias[3:9] = -10
        smaller = network.pruned([10, 12], [(image, 3.0, 1.0), (image, 4.0, 0.8)]).eval()
        found, expected = smaller(image, 2.5), network(image, 2.5)
    assert [block[0].out_channels for block in smaller.blocks] == [10, 12]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_channel_that_always_answers_alike_leaves_its_mean():
    network, image = tiny(trained=True), planes()
    with torch.no_grad():
        for block in network.blocks:
            block[0].weight[5:] = 0
            block[0].bias[5:] = 0.3
            block[2].weight[:, 5:] *= 0.01
        smaller = network.pruned([5, 5], [(image, 3.0, 1.0)]).eval()
        # Beside the border, where convolutions see zeros.
        found, expected = (one(image, 3.0)[:, :, 5:-5] for one in (smaller, network))
    torch.testing.assert_close(found[..., 6:-6], expected[..., 6:-6], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("hidden", [[16], [17, 16], [4, 4, 4]])
def test_only_smaller_blocks_can_be_left(hidden):
    with pytest.raises(SettingError, match=r"at most \[16, 16\]"):
        tiny().pruned(hidden, [])


def test_positions_may_be_numpy_or_a_list():
    image = planes()
    positions = np.array([0.0, 1.5, 4.2])
    network = tiny(trained=True)
    with torch.inference_mode():
        assert torch.equal(network(image, 3.0, 1.0, positions), network(image, 3.0, 1.0, positions.tolist()))


def test_labels_start_as_their_linear_interpolation_and_learn_with_the_image():
    torch.manual_seed(0)
    network = PlanePrior(8, [16], label_classes=2)
    planes = torch.cat([torch.rand(3, 1, 12, 5), (torch.rand(3, 2, 12, 5) > 0.5).float()], dim=1)
    found = network(planes, scale=3.5)
    assert found.shape == (3, 3, 12, 18)
    positions = slice_positions(5, 18, 3.5)
    linear = torch.as_tensor(interpolation_matrix(5, positions, kind="linear"), dtype=torch.float32)
    expected = (planes[:, 1:] @ linear.T).clamp(0.01, 0.99)
    assert torch.allclose(found[:, 1:].sigmoid(), expected, atol=1e-5)
    # Each output has a read-out of its own.
    torch.nn.init.normal_(network.readout.weights.weight)
    changed = network(planes, scale=3.5) - found
    assert not torch.allclose(changed[:, 0], changed[:, 1], atol=1e-2)
    assert not torch.allclose(changed[:, 1], changed[:, 2], atol=1e-2)
