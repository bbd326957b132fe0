from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from medsr.engines.training import start_from
from medsr.errors import DataError, SettingError
from medsr.handlers.training import save_weights
from medsr.inferers.tiles import TileInferer
from medsr.networks.fmen import FMEN
from medsr.networks.layout import channels_last
from medsr.networks.parallax import StereoPrediction
from medsr.networks.stereo_fmen import StereoFMEN
from torch import Tensor, nn

TINY = {"features": 8, "mid_features": 6, "down_blocks": 2, "up_blocks": (1, 1, 1), "fused": True}


def tiny(scale: int = 2, **settings: Any) -> StereoFMEN:
    torch.manual_seed(0)
    return StereoFMEN(scale, **{**TINY, **settings}).eval()


def trained(network: nn.Module, std: float = 0.15) -> Any:
    """As after some training: every parameter has a say."""
    torch.manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return network


def pair(height: int = 8, width: int = 12, *, batch: int = 1, channels: int = 3) -> Tensor:
    made = torch.Generator().manual_seed(2)
    return torch.rand(batch, 2 * channels, height, width, generator=made)


def swapped(image: Tensor) -> Tensor:
    return torch.cat(image.chunk(2, 1)[::-1], 1)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(("channels", "size"), [(3, (5, 9)), (1, (1, 1))])
@torch.inference_mode()
def test_both_views_become_scale_times_as_large(scale, channels, size):
    network = tiny(scale, channels=channels)
    assert (network.scale, network.in_channels, network.size_multiple) == (scale, 2 * channels, 1)
    found = network(pair(*size, channels=channels, batch=2))
    assert found.shape == (2, 2 * channels, *(scale * n for n in size))


@torch.inference_mode()
def test_weights_for_single_images_are_a_start_that_enlarges_each_view_as_before(tmp_path):
    single, image = trained(FMEN(4, **TINY)).eval(), pair(batch=2)
    save_weights(single.state_dict(), tmp_path / "single.pt")
    network = start_from(tmp_path / "single.pt", tiny(4))
    expected = torch.cat([single(view) for view in image.chunk(2, 1)], 1)
    torch.testing.assert_close(network(image), expected, atol=1e-5, rtol=1e-4)
    # Of another scale all but the last convolution is a start.
    other = start_from(tmp_path / "single.pt", tiny(2))
    assert torch.equal(other.head.weight, single.head.weight)
    assert torch.equal(other.tail.weight, tiny(2).tail.weight)


@torch.inference_mode()
def test_the_merged_form_is_the_same_network():
    training_form = tiny(2, fused=False, expand=2)
    trained(training_form.merge)
    image = pair()
    merged = training_form.fuse()
    assert isinstance(merged, StereoFMEN)
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in training_form.parameters())
    torch.testing.assert_close(merged(image), training_form(image), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_each_view_sees_the_other_along_its_row_only_through_the_exchange():
    image = pair(9)
    changed = image.clone()
    changed[:, 3:, 4] = 1 - changed[:, 3:, 4]
    together, alone = trained(tiny()), trained(tiny(cross_view=False))
    assert not torch.allclose(together(changed)[:, :3], together(image)[:, :3], atol=1e-4)
    torch.testing.assert_close(alone(changed)[:, :3], alone(image)[:, :3])
    assert not torch.allclose(alone(changed)[:, 3:], alone(image)[:, 3:], atol=1e-4)
    assert not hasattr(alone, "merge")


@torch.inference_mode()
def test_one_network_serves_both_views():
    image = pair(batch=2)
    for network in (trained(tiny(cross_view=False)), trained(tiny(tied=True))):
        torch.testing.assert_close(network(swapped(image)), swapped(network(image)), atol=1e-5, rtol=1e-4)
    untied = trained(tiny())
    assert not torch.allclose(untied(swapped(image)), swapped(untied(image)), atol=1e-4)


@torch.inference_mode()
def test_pairs_of_a_batch_do_not_see_each_other():
    network, images = trained(tiny()), pair(batch=3)
    alone = torch.cat([network(one[None]) for one in images])
    torch.testing.assert_close(network(images), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "image", [pair()[:, :3].repeat(1, 2, 1, 1), torch.zeros(1, 6, 5, 7), torch.ones(1, 6, 5, 7)]
)
@torch.inference_mode()
def test_one_image_twice_stays_finite(image):
    found = trained(tiny(), 0.3)(image, parallax="disparity")
    assert found.image.isfinite().all()
    assert found.parallax.valid.isfinite().all()
    assert found.parallax.disparity.isfinite().all()


@torch.no_grad()
def test_the_training_form_returns_maps_masks_and_the_pair_and_the_same_image():
    network, image = trained(tiny()), pair(batch=2)
    plain, found = network(image), network(image, parallax="maps")
    assert isinstance(plain, Tensor)
    assert isinstance(found, StereoPrediction)
    torch.testing.assert_close(found.image, plain, atol=1e-5, rtol=1e-4)
    assert found.low is image
    assert found.parallax.to_left.shape == (2, 8, 12, 12)
    assert found.parallax.valid.shape == (4, 1, 8, 12)
    full = network(image, parallax="disparity")
    assert full.parallax.to_left is None
    columns = torch.arange(12.0)
    expected = columns - (found.parallax.to_left * columns).sum(3)
    torch.testing.assert_close(full.parallax.disparity[:2, 0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", ["fused", "reference"])
@torch.inference_mode()
def test_the_path_does_not_change_the_image(path):
    image = pair(9, 37)
    expected = trained(tiny())(image)
    torch.testing.assert_close(trained(tiny(path=path))(image), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_band_reaches_the_exchange():
    found = trained(tiny(band=(1, 3)))(pair(), parallax="disparity").parallax
    assert not found.valid[0, ..., 0].any()
    matched = found.disparity[0, ..., 1:]
    assert 1 <= float(matched.min()) <= float(matched.max()) <= 3


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_reach_every_parameter(fused):
    network = trained(tiny(fused=fused), 0.3).train()
    (network(pair()) - 0.5).square().mean().backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    # Whitening takes away what a bias adds to a whole row, but for rounding.
    assert [name for name in silent if not name.startswith("exchange.project_")] == []


# --- what is exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2])
@torch.inference_mode()
def test_a_band_of_rows_with_its_halo_is_exact(levels):
    network, image = trained(tiny(levels=levels), 0.2).double(), pair(95, 9).double()
    assert network.exact_halo is None
    expected = network(image)[:, :, 2 * 44 : 2 * 50]

    def error(halo: int) -> float:
        found = network(image[:, :, 44 - halo : 50 + halo])
        return float((found[:, :, 2 * halo : 2 * halo + 12] - expected).abs().max())

    assert error(network.row_halo) < 1e-11
    assert error(network.row_halo - 1) > 1e-9


@torch.inference_mode()
def test_columns_cannot_be_cut():
    network, image = trained(tiny(), 0.3).double(), pair(6, 80).double()
    assert float((network(image[..., :70]) - network(image)[..., :140]).abs()[..., :2].max()) > 1e-9


@torch.inference_mode()
def test_large_pairs_run_in_bands_and_single_views_in_tiles():
    image = pair(120, 40)
    for network, mode in ((trained(tiny()), "bands"), (trained(tiny(cross_view=False)), "tiles")):
        whole = TileInferer(amp="float32")(image, network)
        torch.testing.assert_close(whole, network(image))
        infer = TileInferer(amp="float32", max_whole=1)
        torch.testing.assert_close(infer(image, network), whole, atol=1e-5, rtol=1e-4)
        assert (infer.facts["mode"], infer.facts["passes"]) == (mode, 1)
        assert infer.facts["tiles"] > 1


@torch.inference_mode()
def test_the_order_in_memory_changes_nothing():
    network, image = trained(tiny()), pair()
    expected = network(image)
    found = channels_last(network)(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 8, 4, 4), (6, 4, 4)])
def test_what_is_no_pair_is_refused(shape):
    with pytest.raises(DataError, match=r"a pair is \(B, 6, H, W\), left before right, got") as error:
        tiny()(torch.rand(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(0), "scale must be a whole number >= 1, got 0"),
        (lambda: tiny(levels=0), "levels must be a whole number >= 1, got 0"),
        (lambda: tiny(levels=4), "there are 3 attention blocks; got 4"),
        (lambda: tiny(levels=3), r"levels must divide features \(8\)"),
        (lambda: tiny(path="quick"), "path must be one of"),
        (lambda: tiny()(pair(), parallax="all"), "parallax must be one of none, disparity, maps, got 'all'"),
        (
            lambda: tiny(cross_view=False)(pair(), parallax="maps"),
            "cross_view=False has no parallax to return",
        ),
    ],
)
def test_settings_that_make_no_sense_are_explained(call, message):
    with pytest.raises(SettingError, match=message):
        call()


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(golden):
    network = tiny(4)
    tensors = "\n".join(f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items())
    found = trained(network)(pair(), parallax="disparity")
    statistics: dict[str, Any] = {"tensors": hashlib.sha256(tensors.encode()).hexdigest()}
    for what, image in (("image", found.image), ("valid", found.parallax.valid)):
        statistics[what] = [
            *(float(v) for v in image.double().mean(dim=(0, 2, 3))),
            *(float(image.double().diff(dim=axis).abs().mean()) for axis in (-2, -1)),
        ]
    expected = golden("stereo_fmen", statistics)
    assert statistics.pop("tensors") == expected.pop("tensors"), "released weights would no longer load"
    for key in sorted(statistics):
        assert statistics[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key
