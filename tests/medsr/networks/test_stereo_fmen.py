from __future__ import annotations

from typing import Any

import pytest
import torch
from medsr.engines.training import start_from
from medsr.errors import SettingError
from medsr.handlers.training import save_weights
from medsr.inferers.tiles import TileInferer
from medsr.networks.fmen import FMEN
from medsr.networks.stereo_fmen import StereoFMEN
from torch.nn import functional as F

TINY = {"features": 8, "mid_features": 6, "down_blocks": 2, "up_blocks": (1, 1, 1), "fused": True}


def tiny(scale: int = 2, **settings: Any) -> StereoFMEN:
    torch.manual_seed(0)
    return StereoFMEN(scale, **{**TINY, **settings}).eval()


@torch.inference_mode()
def test_weights_for_single_images_are_a_start_that_enlarges_each_view_as_before(tmp_path, trained, pair):
    single, image = trained(FMEN(4, **TINY)).eval(), pair(batch=2)
    save_weights(single.state_dict(), tmp_path / "single.pt")
    network = start_from(tmp_path / "single.pt", tiny(4))
    expected = torch.cat([single(view) for view in image.chunk(2, 1)], 1)
    torch.testing.assert_close(network(image), expected, atol=1e-5, rtol=1e-4)
    # At half the scale four pixels become their mean.
    other = start_from(tmp_path / "single.pt", tiny(2))
    torch.testing.assert_close(other(image), F.avg_pool2d(expected, 2), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_bfloat16_does_not_touch_the_image_itself(pair):
    network, image = tiny(interpolation_start=True), pair()
    exact = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(network(image), exact, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_the_merged_form_is_the_same_network(trained, pair):
    training_form = tiny(2, fused=False, expand=2)
    trained(training_form.merge)
    image = pair()
    merged = training_form.fuse()
    assert isinstance(merged, StereoFMEN)
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in training_form.parameters())
    torch.testing.assert_close(merged(image), training_form(image), atol=1e-5, rtol=1e-4)


# --- what is exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2])
@torch.inference_mode()
def test_a_band_of_rows_with_its_halo_is_exact(levels, trained, pair):
    network, image = trained(tiny(levels=levels), 0.2).double(), pair(95, 9).double()
    assert network.exact_halo is None
    expected = network(image)[:, :, 2 * 44 : 2 * 50]

    def error(halo: int) -> float:
        found = network(image[:, :, 44 - halo : 50 + halo])
        return float((found[:, :, 2 * halo : 2 * halo + 12] - expected).abs().max())

    assert error(network.row_halo) < 1e-11
    assert error(network.row_halo - 1) > 1e-9


@torch.inference_mode()
def test_large_pairs_run_in_bands_and_single_views_in_tiles(trained, pair):
    image = pair(120, 40)
    for network, mode in ((trained(tiny()), "bands"), (trained(tiny(cross_view=False)), "tiles")):
        whole = TileInferer(amp="float32")(image, network)
        torch.testing.assert_close(whole, network(image))
        infer = TileInferer(amp="float32", max_whole=1)
        torch.testing.assert_close(infer(image, network), whole, atol=1e-5, rtol=1e-4)
        assert (infer.facts["mode"], infer.facts["passes"]) == (mode, 1)
        assert infer.facts["tiles"] > 1


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(0), "scale must be a whole number >= 1, got 0"),
        (lambda: tiny(levels=0), "levels must be a whole number >= 1, got 0"),
        (lambda: tiny(levels=4), r"at most the number of attention blocks \(3\), got 4"),
        (lambda: tiny(levels=3), r"levels must divide features \(8\) .*, got 3"),
        (lambda: tiny(path="quick"), "path must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_explained(call, message):
    with pytest.raises(SettingError, match=message):
        call()


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(same_as_released, trained, pair):
    network = trained(tiny(4))
    found = network(pair(), parallax="disparity")
    maps = {"valid": found.parallax.valid, "disparity": found.parallax.disparity}
    more = {
        f"{name}_{statistic}": values
        for name, one in maps.items()
        for statistic, values in (
            ("mean", [float(view.mean()) for view in one]),
            ("roughness", [float(one.double().diff(dim=axis).abs().mean()) for axis in (-2, -1)]),
        )
    }
    same_as_released("stereo_fmen", {"": network}, found.image, centre=(16, 24), **more)
