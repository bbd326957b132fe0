from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from medsr.errors import SettingError
from medsr.inferers.tiles import TileInferer
from medsr.networks.interpolation import BicubicUpsample
from medsr.networks.segsrnet import SEGSRNet, ipassr
from torch import Tensor
from torch.nn import functional as F

TINY = {"features": 8, "growth": 4, "fusion_growth": 4, "blocks": 2, "reduction": 4}
PAIR = torch.zeros(1, 6, 8, 12)


def tiny(scale: int = 2, **settings: Any) -> SEGSRNet:
    torch.manual_seed(0)
    return SEGSRNet(scale, **{**TINY, **settings}).eval()


@pytest.mark.parametrize(
    ("make", "settings", "expected"),
    [
        (SEGSRNet, {"scale": 2}, 1_575_602),
        (SEGSRNet, {"scale": 4}, 1_625_522),
        (ipassr, {"scale": 2}, 1_377_931),
        (ipassr, {"scale": 4}, 1_427_851),
        (ipassr, {"scale": 4, "cross_view": False}, 1_427_851 - 304_256),
        (SEGSRNet, {"scale": 4, "tied": True}, 1_625_522 - 4_160),
        (SEGSRNet, {"scale": 4, "attention_blocks": 2}, 1_625_522 + 74_535),
        (SEGSRNet, {"scale": 4, "rates": ()}, 1_625_522 - 123_136),
    ],
)
def test_the_size_is_that_of_the_specification(make, settings, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in make(**settings).parameters()) == expected


@torch.inference_mode()
def test_training_starts_from_the_bicubic_image(pair):
    image = pair()
    assert torch.equal(tiny(4)(image), BicubicUpsample(4)(image))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tiny(4)(image), BicubicUpsample(4)(image))
    expected = F.interpolate(image, scale_factor=4, mode="bicubic", align_corners=False)
    torch.testing.assert_close(ipassr(4, **TINY).eval()(image), expected)
    assert not torch.allclose(expected, BicubicUpsample(4)(image), atol=1e-3)


def test_weights_start_as_published():
    torch.manual_seed(0)
    network = SEGSRNet(2)
    layer = network.attention[0].conv1
    assert float(layer.weight.detach().std()) == pytest.approx((2 / (2 * 9 * 64)) ** 0.5, rel=0.05)
    biases = [p for name, p in network.named_parameters() if name.endswith("bias") and "norm" not in name]
    assert not any(bool(bias.detach().any()) for bias in biases)


# --- what is exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "halo"), [(SEGSRNet, 53), (ipassr, 40)])
def test_the_halo_is_that_of_the_specification(make, halo):
    with torch.device("meta"):
        network = make(4)
    assert (network.gated_row_halo, network.exact_halo) == (halo, None)


FORMS = [{}, {"attention_blocks": 0, "rates": ()}, {"cross_view": False}]


@pytest.mark.parametrize("settings", FORMS)
@torch.inference_mode()
def test_a_band_of_rows_with_statistics_and_halo_is_exact(settings, trained, pair):
    network, image = trained(tiny(**settings)).double(), pair(95, 9).double()
    statistics, whole = network.squeeze(image), network(image)
    expected = whole[:, :, 2 * 44 : 2 * 50]

    def error(halo: int, given: list[Tensor] | None) -> float:
        found = network(image[:, :, 44 - halo : 50 + halo], given)
        return float((found[:, :, 2 * halo : 2 * halo + 12] - expected).abs().max())

    assert error(network.gated_row_halo, statistics) < 1e-13
    assert error(network.gated_row_halo, None) > 1e-6


@pytest.mark.parametrize("settings", FORMS)
def test_the_halo_is_no_wider_than_what_a_row_depends_on(settings, trained, pair):
    network, image = trained(tiny(**settings)).double(), pair(95, 9).double()
    with torch.no_grad():
        statistics = network.squeeze(image)
    image.requires_grad_()
    network(image, statistics)[:, :, 2 * 44 : 2 * 50].abs().sum().backward()
    # The farthest row moves the result by less than rounding; its gradient is not zero all the same.
    rows = image.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    assert max(44 - int(rows[0]), int(rows[-1]) - 49) == network.gated_row_halo


@torch.inference_mode()
def test_the_means_of_bands_add_up_to_those_of_the_pair(trained, pair):
    network, image = trained(tiny()).double(), pair(90, 5, batch=2).double()
    statistics = network.squeeze(image)
    assert [tuple(one.shape) for one in statistics] == [(2, 16), (2, 32)]
    halo = network.gated_row_halo
    upper = network.squeeze(image[:, :, : 45 + halo], statistics, border=(0, halo, 0, 0))
    lower = network.squeeze(image[:, :, 45 - halo :], statistics, border=(halo, 0, 0, 0))
    for one, other, expected in zip(upper, lower, statistics, strict=True):
        torch.testing.assert_close((one + other) / 2, expected)


@torch.inference_mode()
def test_the_tile_inferer_runs_pairs_whole_and_refuses_to_cut_them(trained, pair):
    network, image = trained(tiny()), pair()
    torch.testing.assert_close(TileInferer(amp="float32")(image, network), network(image))
    in_bands = TileInferer(amp="float32", max_whole=1)
    torch.testing.assert_close(in_bands(image, network), network(image))
    assert in_bands.facts["mode"] == "gated bands"


@torch.inference_mode()
def test_bfloat16_changes_the_image_little(trained, pair):
    network, image = trained(tiny()), pair()
    exact = network(image)
    residual = exact - BicubicUpsample(2)(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(image, parallax="disparity")
    assert found.image.dtype == found.parallax.valid.dtype == torch.float32
    assert float((found.image - exact).abs().mean()) < 0.1 * float(residual.abs().mean())
    whole = network.bfloat16()(image.bfloat16())
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(skip="lanczos"), "skip must be one of matlab, pytorch, got 'lanczos'"),
        (lambda: tiny(1), "scale must be a whole number >= 2, got 1"),
        (lambda: tiny("four"), "scale must be a whole number >= 2, got 'four'"),
        (lambda: tiny(growth=0), "growth must be a whole number >= 1, got 0"),
        (lambda: tiny(rates=3), "rates must be a list of whole numbers >= 1, got 3"),
        (lambda: tiny(rates=["a"]), r"rates must be a list .*, got \['a'\]"),
        (lambda: tiny(reduction=0), "reduction must be a whole number >= 1, got 0"),
        (lambda: tiny(features=8, blocks=3), "features must be a multiple of blocks, got 8 and 3"),
        (lambda: tiny().squeeze(PAIR, border=4), "that leave pixels of 8 x 12, got 4"),
        (
            lambda: tiny()(PAIR, [torch.zeros(1, 16)]),
            r"statistics must be \(1 or 1, n\) for n in \[16, 32\]",
        ),
        (lambda: tiny()(PAIR, [torch.zeros(2, 16), torch.zeros(2, 32)]), "statistics must be"),
    ],
)
def test_settings_that_make_no_sense_are_explained(call, message):
    with pytest.raises(SettingError, match=message):
        call()


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(golden, trained, pair):
    statistics: dict[str, Any] = {}
    for name, network in (("segsrnet", tiny(4)), ("ipassr", ipassr(4, **TINY).eval())):
        tensors = "\n".join(f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items())
        statistics[f"{name}_tensors"] = hashlib.sha256(tensors.encode()).hexdigest()
        found = trained(network)(pair(), parallax="disparity")
        for what, image in (("image", found.image), ("valid", found.parallax.valid)):
            statistics[f"{name}_{what}"] = [
                *(float(v) for v in image.double().mean(dim=(0, 2, 3))),
                *(float(image.double().diff(dim=axis).abs().mean()) for axis in (-2, -1)),
            ]
        statistics[f"{name}_disparity"] = [float(one.mean()) for one in found.parallax.disparity]
    expected = golden("segsrnet", statistics)
    assert set(statistics) == set(expected)
    for key in sorted(statistics):
        if key.endswith("_tensors"):
            assert statistics[key] == expected[key], "released weights would no longer load"
        else:
            # Kernels differ between machines in the last bits of a float32.
            assert statistics[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("shift", [0, 4, 9])
def test_views_match_before_anything_is_learnt(shift: int) -> None:
    torch.manual_seed(0)
    net = SEGSRNet(4, features=32, growth=16).train()
    scene = torch.rand(1, 3, 10, 60)
    columns = scene.shape[-1] - shift
    with torch.no_grad():
        maps = net(
            torch.cat([scene[..., :columns], scene[..., shift:]], 1), parallax="maps"
        ).parallax.to_left[0]
    inside = slice(shift + 3, columns - 3)
    disparity = torch.arange(columns) - maps.argmax(-1)
    assert (disparity[:, inside] == shift).float().mean() > 0.85
    # Softmax that has a gradient: by random weights the largest is near 1 nowhere but at some matches.
    assert maps.amax(-1).mean() < 0.8
