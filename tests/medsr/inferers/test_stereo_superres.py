from __future__ import annotations

from typing import Any

import pytest
import torch
from medsr.errors import DataError
from medsr.inferers.stereo_superres import StereoSuperResInferer
from medsr.networks.segsrnet import SEGSRNet
from medsr.transforms.bicubic import bicubic_resize
from torch import Tensor, nn

TINY = {"features": 8, "growth": 4, "fusion_growth": 4, "blocks": 1, "reduction": 4, "rates": (1,)}


@pytest.fixture(scope="module")
def network() -> SEGSRNet:
    """As after some training: every parameter has a say, the gates too."""
    torch.manual_seed(3)
    made = SEGSRNet(2, **TINY).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.15)
    return made


def pair(height: int = 40, width: int = 24, channels: int = 3) -> Tensor:
    """Bright at the top and dark at the bottom, so that the gates of a band would not see what the image holds."""
    generator = torch.Generator().manual_seed(0)
    detail = torch.rand(1, 2 * channels, height, width, generator=generator)
    return (0.2 + 0.6 * detail) * torch.linspace(1, 0.1, height)[:, None]


def inferer(**settings: Any) -> StereoSuperResInferer:
    return StereoSuperResInferer(amp="float32", **settings)


def test_bands_of_rows_give_the_whole_image(network):
    image = pair(120)
    whole = inferer()(image, network)
    infer = inferer(max_whole=1, tolerance=1e-6)
    assert torch.allclose(infer(image, network), whole, atol=2e-5)
    assert infer.facts["mode"] == "gated bands"
    assert infer.facts["tiles"] == 4
    assert not infer.facts["warnings"]


def test_what_is_kept_of_a_band_fits_into_memory(network):
    image = pair(300, 16)
    halo = network.gated_row_halo
    infer = inferer(max_whole=(2 * halo + 75) * 16 * 4)
    infer(image, network)
    assert infer.facts["tiles"] == 4


def test_the_agreement_is_told_for_each_view():
    class Brighter(nn.Module):
        """Interpolates, and adds to the right view."""

        scale, in_channels, size_multiple, exact_halo, half_precision_safe = 2, 6, 1, 2, False

        def forward(self, image: Tensor) -> Tensor:
            result = bicubic_resize(image, tuple(2 * n for n in image.shape[-2:]))
            result[:, 3:] += 0.05
            return result

    image = bicubic_resize(pair(5, 6), (20, 24)).clamp(0.1, 0.8)
    infer = inferer()
    infer(image, Brighter())
    assert infer.facts["data_consistency_left_db"] > 35
    assert infer.facts["data_consistency_right_db"] == pytest.approx(26, abs=0.5)
    assert infer.facts["data_consistency_db"] == pytest.approx(29, abs=0.6)
    again = inferer(back_projection=2)
    again(image, Brighter())
    assert again.facts["data_consistency_right_db"] > 35


def test_grey_pairs_pass_a_network_for_colour(network):
    grey = pair(channels=1)
    colour = grey.repeat_interleave(3, 1)
    infer = inferer()
    found = infer(grey, network)
    with torch.no_grad():
        expected = network(colour).unflatten(1, (2, 3)).mean(2).clamp(0, 1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert "grey" in infer.facts["warnings"][-1]


def test_one_view_twice_stays_finite(network):
    view = pair()[:, :3]
    found = inferer()(torch.cat([view, view], 1), network)
    assert torch.isfinite(found).all()


def test_what_is_no_pair_is_refused(network):
    with pytest.raises(DataError, match="3 channels"):
        inferer()(pair()[:, :3], network)


def test_the_ensemble_keeps_a_map_for_each_view(network):
    image = pair()
    infer = inferer(ensemble=True)
    found = infer(image, network)
    assert infer.facts["members"] == 4
    assert infer.facts["ensemble"] is True
    assert infer.uncertainty.shape == (1, 2, 80, 48)
    left = infer.uncertainty[:, 0]
    assert float(left.min()) > 0
    # In a mirror, the left camera stands on the right.
    mirrored = infer(torch.cat([view.flip(-1) for view in image.chunk(2, 1)[::-1]], 1), network)
    assert torch.allclose(torch.cat(mirrored.chunk(2, 1)[::-1], 1).flip(-1), found, atol=1e-5)
    assert torch.allclose(infer.uncertainty[:, 1].flip(-1), left, atol=1e-5)


def test_the_ensemble_of_a_pair_in_bands_is_that_of_the_whole(network):
    image = pair(120)
    whole, bands = inferer(ensemble=True), inferer(ensemble=True, max_whole=1, tolerance=1e-6)
    assert torch.allclose(bands(image, network), whole(image, network), atol=2e-5)
    assert torch.allclose(bands.uncertainty, whole.uncertainty, atol=2e-5)
    assert bands.facts["mode"] == "gated bands"


def test_the_ensemble_of_grey_pairs_passes_a_network_for_colour(network):
    grey, infer = pair(channels=1), inferer(ensemble=True)
    assert infer(grey, network).shape == (1, 2, 80, 48)
    assert infer.uncertainty.shape == (1, 2, 80, 48)
