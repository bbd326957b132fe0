from __future__ import annotations

from typing import Any

import pytest
import torch
from medsr.errors import SettingError
from medsr.inferers.tiles import TileInferer
from medsr.networks.interpolation import BicubicUpsample
from medsr.networks.srcnn import SRCNN
from torch import Tensor, nn


def seeded(scale: int = 4, channels: int = 3, **settings: Any) -> SRCNN:
    torch.manual_seed(0)
    return SRCNN(scale, channels, **settings).eval()


def picture(height: int = 8, width: int = 6, *, channels: int = 3, batch: int = 1) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("channels", "kernels", "expected"),
    [(1, (9, 1, 5), 8_129), (1, (9, 5, 5), 57_281), (3, (9, 1, 5), 20_099), (3, (9, 5, 5), 69_251)],
)
def test_the_size_is_the_published_one(channels, kernels, expected):
    assert sum(p.numel() for p in SRCNN(4, channels, kernels=kernels).parameters()) == expected


def test_the_state_tells_the_scale():
    assert [seeded(scale).state_dict()["trained_scale"].item() for scale in (2, 3)] == [2, 3]


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("channels", "size"), [(3, (5, 8)), (1, (1, 1))])
@torch.inference_mode()
def test_the_result_is_scale_times_as_large(scale, channels, size):
    network = seeded(scale, channels)
    assert (network.scale, network.in_channels, network.size_multiple) == (scale, channels, 1)
    found = network(picture(*size, channels=channels, batch=2))
    assert found.shape == (2, channels, *(scale * n for n in size))


@torch.inference_mode()
def test_with_kernels_that_pass_the_image_on_it_is_the_bicubic_enlargement():
    network, image = seeded(3), picture()
    for conv in (network.extract, network.map, network.reconstruct):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    # Of what overshoots the range, the ReLUs cut off what is negative.
    assert torch.allclose(network(image), BicubicUpsample(3)(image).relu(), atol=1e-6)


@torch.inference_mode()
def test_weights_of_one_scale_fit_another():
    small, large = seeded(2), SRCNN(3)
    large.load_state_dict(small.state_dict())
    found = [network(torch.full((1, 3, 12, 12), 0.3))[..., 12, 12] for network in (small, large)]
    assert torch.allclose(*found, atol=1e-6)


def test_gradients_reach_every_parameter():
    network = seeded(2).train()
    (network(picture()) - 0.5).square().mean().backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert silent == []


@torch.inference_mode()
def test_bfloat16_is_refused_because_it_rounds_the_image_itself():
    network = seeded(2)
    infer = TileInferer(amp="bfloat16")
    assert torch.equal(infer(picture(), network), network(picture()))
    assert infer.facts["precision"] == "float32"
    for conv in (network.extract, network.map, network.reconstruct):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = network(picture()).float() - BicubicUpsample(2)(picture()).relu()
    assert float(error.abs().max()) > 0.3 / 255


@pytest.mark.parametrize(
    ("scale", "kernels", "halo"), [(2, (9, 1, 5), 5), (3, (9, 1, 5), 4), (4, (9, 1, 5), 3), (4, (9, 5, 5), 4)]
)
@torch.inference_mode()
def test_tiles_with_the_halo_are_exact_and_with_one_pixel_less_are_not(scale, kernels, halo):
    network, image = seeded(scale, 1, kernels=kernels), picture(27, 24, channels=1)
    assert network.exact_halo == halo
    whole, infer = network(image), TileInferer(tile=12, max_whole=1, amp="float32")
    unit = float(whole.std())
    assert float((infer(image, network) - whole).abs().max()) < 1e-5 * unit
    assert infer.facts["tiles"] > 4
    network.exact_halo -= 1
    assert float((infer(image, network) - whole).abs().max()) > 1e-4 * unit


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"scale": 1}, r"whole number .* got 1$"),
        ({"kernels": (9, 5)}, r"three odd numbers.* got \[9, 5\]$"),
        ({"kernels": (9, 2, 5)}, r"got \[9, 2, 5\]$"),
        ({"kernels": (9, -1, 5)}, r"got \[9, -1, 5\]$"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, word):
    with pytest.raises(SettingError, match=word) as error:
        SRCNN(**settings)
    assert "\n" not in str(error.value)


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(same_as_released):
    network = seeded()
    same_as_released("srcnn", {"": network}, network(picture()), centre=(15, 10))
