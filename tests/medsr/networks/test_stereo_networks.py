"""What all networks for stereo pairs keep to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.networks.layout import channels_last
from medsr.networks.parallax import StereoPrediction
from medsr.networks.segsrnet import SEGSRNet
from medsr.networks.stereo_fmen import StereoFMEN
from torch import Tensor, nn

Make = Callable[..., nn.Module]

TINY: dict[Make, dict[str, Any]] = {
    SEGSRNet: {"features": 8, "growth": 4, "fusion_growth": 4, "blocks": 2, "reduction": 4},
    StereoFMEN: {
        **{"features": 8, "mid_features": 6, "down_blocks": 2, "up_blocks": (1, 1, 1)},
        "fused": True,
    },
}
SILENT = ("exchange.project_left.bias", "exchange.project_right.bias")
"""Whitening takes away what a bias adds to a whole row, but for rounding."""


@pytest.fixture(params=list(TINY), ids=lambda kind: kind.__name__)
def tiny(request: pytest.FixtureRequest) -> Make:
    def make(scale: int = 2, **settings: Any) -> nn.Module:
        torch.manual_seed(0)
        return request.param(scale, **{**TINY[request.param], **settings}).eval()

    return make


def swapped(image: Tensor) -> Tensor:
    return torch.cat(image.chunk(2, 1)[::-1], 1)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("channels", "size"), [(3, (5, 9)), (1, (1, 1))])
@torch.inference_mode()
def test_both_views_become_scale_times_as_large(tiny, scale, channels, size, pair):
    network = tiny(scale, channels=channels)
    assert (network.scale, network.in_channels, network.size_multiple) == (scale, 2 * channels, 1)
    found = network(pair(*size, channels=channels, batch=2))
    assert found.shape == (2, 2 * channels, *(scale * n for n in size))


@torch.inference_mode()
def test_each_view_sees_the_other_along_its_row_only_through_the_exchange(tiny, trained, pair):
    image = pair()
    changed = image.clone()
    changed[:, 3:, 4] = 1 - changed[:, 3:, 4]
    together, alone = trained(tiny()), trained(tiny(cross_view=False))
    assert not torch.allclose(together(changed)[:, :3], together(image)[:, :3], atol=1e-4)
    torch.testing.assert_close(alone(changed)[:, :3], alone(image)[:, :3])
    assert not torch.allclose(alone(changed)[:, 3:], alone(image)[:, 3:], atol=1e-4)


@torch.inference_mode()
def test_one_network_serves_both_views(tiny, trained, pair):
    image = pair(batch=2)
    for settings in ({"cross_view": False}, {"tied": True}):
        network = trained(tiny(**settings))
        torch.testing.assert_close(network(swapped(image)), swapped(network(image)), atol=1e-5, rtol=1e-4)
    untied = trained(tiny())
    assert not torch.allclose(untied(swapped(image)), swapped(untied(image)), atol=1e-4)


@torch.inference_mode()
def test_pairs_of_a_batch_do_not_see_each_other(tiny, trained, pair):
    network, images = trained(tiny()), pair(batch=3)
    alone = torch.cat([network(one[None]) for one in images])
    torch.testing.assert_close(network(images), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [None, 0.0, 1.0])
@torch.inference_mode()
def test_one_image_twice_stays_finite(tiny, value, trained, pair):
    """Also where nothing tells one column from another."""
    view = pair()[:, :3] if value is None else torch.full((1, 3, 5, 7), value)
    found = trained(tiny(), 0.5)(view.repeat(1, 2, 1, 1), parallax="disparity")
    assert found.image.isfinite().all()
    assert found.parallax.valid.isfinite().all()
    assert found.parallax.disparity.isfinite().all()


@torch.no_grad()
def test_the_training_form_returns_maps_masks_and_the_pair_and_the_same_image(tiny, trained, pair):
    network, image = trained(tiny()), pair(batch=2)
    plain, found = network(image), network(image, parallax="maps")
    assert isinstance(plain, Tensor)
    assert isinstance(found, StereoPrediction)
    torch.testing.assert_close(found.image, plain, atol=1e-5, rtol=1e-4)
    assert found.low is image
    assert found.parallax.to_left.shape == (2, 8, 12, 12)
    assert found.parallax.valid.shape == (4, 1, 8, 12)
    assert found.parallax.disparity is None
    full = network(image, parallax="disparity")
    assert full.parallax.to_left is None
    columns = torch.arange(12.0)
    expected = columns - (found.parallax.to_left * columns).sum(3)
    torch.testing.assert_close(full.parallax.disparity[:2, 0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", ["fused", "reference"])
@torch.inference_mode()
def test_the_path_does_not_change_the_image(tiny, path, trained, pair):
    image = pair(9, 37)
    expected = trained(tiny())(image)
    torch.testing.assert_close(trained(tiny(path=path))(image), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_band_reaches_the_exchange(tiny, trained, pair):
    found = trained(tiny(band=(1, 3)))(pair(), parallax="disparity").parallax
    assert not found.valid[0, ..., 0].any()
    matched = found.disparity[0, ..., 1:]
    assert 1 <= float(matched.min()) <= float(matched.max()) <= 3


def test_gradients_reach_every_parameter(tiny, trained, pair):
    network = trained(tiny(), 0.3).train()
    (network(pair()) - 0.5).square().mean().backward()
    idle = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert [name for name in idle if name not in SILENT] == []


@torch.inference_mode()
def test_columns_cannot_be_cut(tiny, trained, pair):
    network, image = trained(tiny(), 0.3).double(), pair(6, 80).double()
    given = [network.squeeze(image)] if hasattr(network, "squeeze") else []
    found = network(image[..., :70], *given)
    assert float((found - network(image)[..., :140]).abs()[..., :2].max()) > 1e-6


@torch.inference_mode()
def test_the_order_in_memory_changes_nothing(tiny, trained, pair):
    network, image = trained(tiny()), pair()
    expected = network(image)
    found = channels_last(network)(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 8, 4, 4), (6, 4, 4)])
def test_what_is_no_pair_is_refused(tiny, shape):
    with pytest.raises(DataError, match=r"a pair is \(B, 6, H, W\), left before right, got") as error:
        tiny()(torch.rand(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "parallax", "message"),
    [
        ({}, "all", "parallax must be one of none, disparity, maps, got 'all'"),
        ({"cross_view": False}, "maps", "cross_view=False has no parallax to return"),
    ],
)
def test_parallax_that_cannot_be_returned_is_explained(tiny, settings, parallax, message, pair):
    with pytest.raises(SettingError, match=message):
        tiny(**settings)(pair(), parallax=parallax)
