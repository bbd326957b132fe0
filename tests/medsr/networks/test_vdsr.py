from __future__ import annotations

from typing import Any

import pytest
import torch
from medsr.errors import SettingError
from medsr.inferers.tiles import TileInferer
from medsr.networks.interpolation import BicubicUpsample
from medsr.networks.layout import channels_last
from medsr.networks.vdsr import VDSR
from torch import Tensor, nn


def tiny(scale: int = 4, **settings: Any) -> VDSR:
    torch.manual_seed(0)
    return VDSR(scale, **{"features": 8, "layers": 4, **settings}).eval()


def picture(height: int = 8, width: int = 6, *, channels: int = 3, batch: int = 1) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 667_008),
        ({"scale": 2}, 667_008),
        ({"channels": 1}, 664_704),
        ({"bias": True}, 668_227),
        ({"channels": 1, "bias": True}, 665_921),
    ],
)
def test_the_size_is_the_published_one(settings, expected):
    assert sum(p.numel() for p in VDSR(**settings).parameters()) == expected


def test_the_state_tells_the_scale_though_no_weight_depends_on_it():
    states = [tiny(scale).state_dict() for scale in (2, 3)]
    assert [state.pop("trained_scale").item() for state in states] == [2, 3]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("channels", "size"), [(3, (5, 8)), (1, (1, 1))])
@torch.inference_mode()
def test_the_result_is_scale_times_as_large(scale, channels, size):
    network = tiny(scale, channels=channels)
    assert (network.scale, network.in_channels, network.size_multiple) == (scale, channels, 1)
    assert network(picture(*size, channels=channels, batch=2)).shape == (
        2,
        channels,
        *(scale * n for n in size),
    )


@torch.inference_mode()
def test_without_a_residual_it_is_the_bicubic_enlargement_in_every_precision():
    network, image = tiny(3), picture()
    assert not torch.allclose(network(image), BicubicUpsample(3)(image), atol=1e-3)
    nn.init.zeros_(network.body[-1].weight)
    assert torch.equal(network(image), BicubicUpsample(3)(image))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(image), BicubicUpsample(3)(image))


@torch.inference_mode()
def test_the_weights_start_as_in_the_paper():
    torch.manual_seed(0)
    network = VDSR(2, bias=True, layers=4)
    for conv in (m for m in network.body if isinstance(m, nn.Conv2d)):
        assert float(conv.weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.08)
        assert not conv.bias.detach().any()


def spreads(network: VDSR, image: Tensor) -> tuple[list[float], list[int]]:
    """Standard deviation after each ReLU, and how many of its channels are zero everywhere."""
    x, found, dead = network.upsample(image), [], []
    for module in network.body:
        x = module(x)
        if isinstance(module, nn.ReLU):
            found.append(float(x.std()))
            dead.append(int((x.amax(dim=(0, 2, 3)) <= 0).sum()))
    return found, dead


@torch.inference_mode()
def test_a_start_as_interpolation_leaves_every_layer_alive():
    torch.manual_seed(0)
    image = 0.5 + 0.2 * picture(16, 16)
    network = VDSR(interpolation_start=True)
    assert torch.equal(network(image), BicubicUpsample(4)(image))
    found, dead = spreads(network, image)
    assert max(found) < 2.5 * min(found)
    assert sum(dead) == 0
    # What the paper's start does on the same image.
    assert sum(spreads(VDSR(), image)[1]) > 20


@torch.inference_mode()
def test_a_start_as_interpolation_is_blind_to_constants():
    network = VDSR(features=8, layers=4, interpolation_start=True)
    assert float(network.body[0](torch.full((1, 3, 5, 5), 0.7))[..., 1:-1, 1:-1].abs().max()) < 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_reach_every_parameter(bias):
    network = tiny(2, bias=bias).train()
    (network(picture()) - 0.5).square().mean().backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert silent == []


@torch.inference_mode()
def test_bfloat16_changes_the_residual_little():
    network, image = tiny(features=16), picture()
    exact, residual = network(image), network(image) - BicubicUpsample(4)(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = network(image)
    whole = network.bfloat16()(image.bfloat16())
    for found, expected in ((fast, exact), (whole, exact)):
        assert found.dtype == torch.float32
        assert 0 < float((found - expected).abs().mean()) < 0.05 * float(residual.std())


@torch.inference_mode()
def test_the_order_in_memory_changes_nothing():
    network, image = tiny(), picture()
    expected = network(image)
    found = channels_last(network)(image.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("scale", "halo"), [(2, 12), (3, 8), (4, 7), (8, 4)])
def test_the_halo_is_that_of_twenty_layers_and_the_interpolation(scale, halo):
    assert VDSR(scale).exact_halo == halo


@pytest.mark.parametrize("scale", [2, 3, 4])
@torch.inference_mode()
def test_tiles_with_the_halo_are_exact_and_with_one_pixel_less_are_not(scale):
    network, image = tiny(scale), picture(27, 24, channels=3)
    for parameter in network.parameters():
        # Every pixel in sight shall matter.
        parameter.abs_().mul_(1.5)
    whole, infer = network(image), TileInferer(tile=8, max_whole=1, amp="float32")
    unit = float(whole.std())
    assert float((infer(image, network) - whole).abs().max()) < 3e-5 * unit
    assert infer.facts["tiles"] > 4
    network.exact_halo -= 1
    assert float((infer(image, network) - whole).abs().max()) > 1e-4 * unit


@pytest.mark.slow
def test_an_exported_graph_serves_every_size(exported_for_every_size):
    others = [picture(*size, batch=3) for size in ((2, 3), (9, 5))]
    exported_for_every_size(tiny(2, layers=2), picture(6, 8, batch=2), others)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"scale": 1}, r"whole number .* got 1$"),
        ({"scale": 2.5}, r"got 2\.5$"),
        ({"scale": "four"}, r"^scale .* got 'four'$"),
        ({"layers": 1}, r"got 1$"),
        ({"features": 0}, r"^features .* got 0$"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, word):
    with pytest.raises(SettingError, match=word) as error:
        VDSR(**settings)
    assert "\n" not in str(error.value)


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(same_as_released):
    network = tiny(bias=True)
    same_as_released("vdsr", {"": network}, network(picture()), centre=(15, 10))
