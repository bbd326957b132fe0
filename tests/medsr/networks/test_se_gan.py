from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from medsr.errors import SettingError
from medsr.networks import se_gan
from medsr.networks.blocks import channel_means
from medsr.networks.layout import channels_last
from medsr.networks.se_gan import FusionDiscriminator, ImprovedSE, SEGenerator
from medsr.resampling import antialiased_bicubic_matrix
from torch import Tensor, nn
from torch.nn import functional as F


def tiny(scale: int = 4, **settings: Any) -> SEGenerator:
    torch.manual_seed(0)
    return SEGenerator(scale, **{"features": 8, "blocks": 2, **settings}).eval()


def trained(network: SEGenerator) -> SEGenerator:
    """As after some training, in float64: gates that differ between regions, and every pixel in sight matters."""
    with torch.no_grad():
        if network.image_skip is not None:
            nn.init.normal_(network.out.weight, std=0.1)
        for name, parameter in network.named_parameters():
            parameter.mul_(6.0 if ".expand." in name or ".reduce." in name else 2.0)
    return network.double()


def picture(height: int = 16, width: int = 12, *, channels: int = 3, batch: int = 1) -> Tensor:
    """Noise that is brighter towards one corner, so that regions have different means."""
    noise = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(2))
    return noise * torch.linspace(0.2, 1, height)[:, None] * torch.linspace(0.2, 1, width)


def parameters_of(kind: type[nn.Module], *arguments: Any, **settings: Any) -> int:
    # Shapes are enough to count.
    with torch.device("meta"):
        return sum(p.numel() for p in kind(*arguments, **settings).parameters())


# --- the gate -----------------------------------------------------------------------------------------------------


def test_a_neutral_gate_changes_nothing():
    gate = ImprovedSE(6, 2).double()
    for parameter in gate.expand.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    x -= x.mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(gate(x), x, rtol=0, atol=1e-15)
    assert not torch.allclose(gate(x + 1), x + 1, rtol=0, atol=1e-3)


def test_the_gate_is_its_formula():
    gate = ImprovedSE(4, 2).double()
    x = torch.randn(2, 4, 3, 7, dtype=torch.float64)
    y = x.mean(dim=(2, 3))
    w1, b1, w2, b2 = (p.detach() for p in gate.parameters())
    logits = torch.einsum("oh,bh->bo", w2, (torch.einsum("hc,bc->bh", w1, y) + b1).clamp_min(0)) + b2
    scale = 2 * (0.8 / (1 + torch.exp(-logits)) + 0.2 / (1 + torch.exp(-y)))
    assert torch.allclose(gate(x), scale[:, :, None, None] * x, rtol=0, atol=1e-14)
    assert torch.allclose(gate.gate(x), scale[:, :, None, None], rtol=0, atol=1e-14)


def test_gates_lie_between_nothing_and_twice():
    gate = ImprovedSE(8, 2)
    scale = gate.gate(torch.zeros(1, 8, 1, 1), 50 * torch.randn(200, 8))
    assert float(scale.detach().min()) >= 0
    assert float(scale.detach().max()) <= 2
    assert float(scale.detach().max() - scale.detach().min()) > 1.5


def test_the_squeezed_means_have_a_path_of_their_own():
    gate = ImprovedSE(3).double()
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    mean = torch.tensor([[0.0, 1.0, -20.0]], dtype=torch.float64)
    found = gate.gate(mean[..., None, None], mean).flatten()
    expected = torch.tensor([1.0, 0.8 + 0.4 / (1 + 2.718281828459045**-1), 0.8], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=0, atol=1e-8)


def test_means_may_come_from_elsewhere():
    gate, x = ImprovedSE(8, 4), torch.randn(3, 8, 6, 5)
    assert torch.equal(gate(x, x.mean(dim=(2, 3))), gate(x))
    other = torch.randn(1, 8)
    torch.testing.assert_close(gate(x, other), gate(x, other.expand(3, 8)))
    assert torch.equal(gate(x, other)[:1, :, :2, :2], gate(x[:1, :, :2, :2], other))


@pytest.mark.parametrize(
    ("channels", "reduction", "expected"), [(64, 16, 580), (512, 16, 33_312), (8, 16, 8 + 1 + 8 + 8)]
)
def test_sizes_of_the_gate(channels, reduction, expected):
    assert parameters_of(ImprovedSE, channels, reduction) == expected


# --- the generator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scale": 2}, 1_380_299),
        ({}, 1_528_591),
        ({"scale": 8}, 1_676_883),
        ({"scale": 16}, 1_825_175),
        ({"channels": 1}, 1_526_285),
        ({"body_tail": False}, 1_528_591 - 36_928),
    ],
)
def test_the_generator_has_the_published_size(settings, expected):
    assert parameters_of(SEGenerator, **settings) == expected


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@pytest.mark.parametrize(("channels", "size"), [(3, (5, 8)), (1, (1, 1))])
@torch.inference_mode()
def test_the_result_is_scale_times_as_large(scale, channels, size):
    network = tiny(scale, channels=channels)
    assert (network.scale, network.in_channels, network.size_multiple) == (scale, channels, 1)
    found = network(picture(*size, channels=channels, batch=2))
    assert found.shape == (2, channels, scale * size[0], scale * size[1])
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [1, 0, -4, 3, 6])
def test_a_scale_that_is_no_power_of_two_is_refused(scale):
    with pytest.raises(SettingError, match=rf"power of two.* got {scale}$"):
        tiny(scale)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "four"}, "scale must be a whole number, got 'four'"),
        ({"blocks": 0}, "blocks must be a whole number >= 1, got 0"),
        ({"features": None}, "features must be a whole number >= 1, got None"),
        ({"reduction": 0}, "reduction must be a whole number >= 1, got 0"),
    ],
)
def test_settings_that_make_no_network_are_named(settings, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        SEGenerator(**settings)


@pytest.mark.parametrize("scale", [2, 4, 8])
@torch.inference_mode()
def test_with_the_image_skip_a_network_starts_as_bicubic_interpolation(scale):
    image, network = picture(), tiny(scale, image_skip=True)
    matrices = (torch.from_numpy(antialiased_bicubic_matrix(n, n * scale)).float() for n in image.shape[-2:])
    rows, columns = matrices
    assert torch.allclose(network(image), rows @ image @ columns.T, atol=1e-6)
    assert parameters_of(SEGenerator, image_skip=True) == parameters_of(SEGenerator)
    assert set(network.state_dict()) == set(tiny(scale).state_dict())


@torch.inference_mode()
def test_nothing_is_clamped():
    network = tiny()
    network.out.bias.fill_(3.0)
    assert float(network(picture()).min()) > 1


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shuffle_is_that_of_torch_with_the_groups_of_channels_apart(order, dtype):
    x = torch.randn(2, 4 * 5, 3, 7).to(dtype).contiguous(memory_format=order)
    side_by_side = x.unflatten(1, (4, 5)).transpose(1, 2).flatten(1, 2)
    found = se_gan._shuffled(x)
    assert torch.equal(found, nn.PixelShuffle(2)(side_by_side))
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_a_doubling_starts_as_nearest_neighbour():
    doubling, x = tiny().doublings[0], torch.randn(1, 8, 5, 6)
    found = doubling(x, channel_means)
    assert torch.equal(found, found[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert float(found.std()) > 0.1


@torch.inference_mode()
def test_the_order_in_memory_changes_nothing():
    network, image = tiny(), picture()
    expected = network(image)
    found = channels_last(network)(image.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("body_tail", [True, False])
def test_gradients_reach_every_parameter_of_the_generator(body_tail):
    network = tiny(body_tail=body_tail, reduction=2)
    (network(picture()) - 0.5).square().mean().backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert silent == []


@torch.inference_mode()
def test_bfloat16_changes_little_and_the_result_is_float32():
    network, image = tiny(features=16), picture()
    exact = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = network(image)
        assert torch.equal(network(image, network.squeeze(image)), fast)
    whole = network.bfloat16()(image.bfloat16())
    for found in (fast, whole):
        assert found.dtype == torch.float32
        assert float((found - exact).abs().mean()) < 0.02 * float(exact.std())
        # Not merely converted in the end.
        assert not torch.equal(found.bfloat16().float(), found)


@pytest.mark.slow
def test_an_exported_graph_serves_every_size(exported_for_every_size):
    network = tiny(2, features=4, blocks=1)
    exported_for_every_size(network, picture(6, 8, batch=2), [picture(9, 5, batch=3)])


# --- gates with the statistics of another image -------------------------------------------------------------------


def cut(image: Tensor, core: tuple[slice, slice], halo: int) -> tuple[Tensor, list[int]]:
    """A tile with its halo, and how wide that is at the top, bottom, left and right: nothing lies beyond the image."""
    sizes = image.shape[-2:]
    around = [
        slice(max(0, one.start - halo), min(n, one.stop + halo)) for one, n in zip(core, sizes, strict=True)
    ]
    border = [
        w
        for one, wide in zip(core, around, strict=True)
        for w in (one.start - wide.start, wide.stop - one.stop)
    ]
    return image[..., around[0], around[1]], border


def inner(result: Tensor, border: Sequence[int], scale: int) -> Tensor:
    top, bottom, left, right = (scale * one for one in border)
    return result[..., top : result.shape[-2] - bottom, left : result.shape[-1] - right]


def squeezed_in_tiles(network: SEGenerator, image: Tensor, statistics: list[Tensor] | None) -> list[Tensor]:
    """Four tiles of different sizes: means of their cores, weighted by the area."""
    height, width = image.shape[-2:]
    sums: list[Tensor] | None = None
    for rows in (slice(0, 13), slice(13, height)):
        for columns in (slice(0, 9), slice(9, width)):
            tile, border = cut(image, (rows, columns), network.gated_halo)
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            found = [area * one for one in network.squeeze(tile, statistics, border=border)]
            sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    assert sums is not None
    return [one / (height * width) for one in sums]


@pytest.mark.parametrize("scale", [2, 4, 8])
@torch.inference_mode()
def test_statistics_are_those_of_the_gates_in_forward_order(scale):
    network, image = tiny(scale), picture(batch=2)
    seen: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, ImprovedSE):
            module.reduce.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = network.squeeze(image)
    assert len(found) == 1 + 2 + (scale.bit_length() - 1)
    assert {tuple(one.shape) for one in found} == {(2, 8)}
    assert all(torch.equal(a, b) for a, b in zip(found, seen, strict=True))
    seen.clear()
    assert torch.equal(network(image, found), network(image))
    assert all(torch.equal(a, b) for a, b in zip([*found, *found], seen, strict=True))


@pytest.mark.parametrize(("settings", "halo"), [({}, 8), ({"body_tail": False}, 7), ({"blocks": 16}, 36)])
def test_the_halo_is_the_radius_of_what_a_pixel_sees(settings, halo):
    network = tiny(**settings)
    assert network.gated_halo == halo
    assert network.exact_halo is None


@pytest.mark.parametrize("image_skip", [False, True])
@pytest.mark.parametrize("scale", [2, 4, 8])
@torch.inference_mode()
def test_a_tile_with_the_statistics_and_the_halo_is_exact(scale, image_skip):
    network, image = trained(tiny(scale, image_skip=image_skip)), picture(30, 26).double()
    statistics, whole = network.squeeze(image), network(image)
    core = (slice(11, 19), slice(10, 16))
    expected = whole[..., 11 * scale : 19 * scale, 10 * scale : 16 * scale]

    def error(halo: int, given: list[Tensor] | None) -> float:
        tile, border = cut(image, core, halo)
        return float((inner(network(tile, given), border, scale) - expected).abs().max() / expected.std())

    assert error(network.gated_halo, statistics) < 1e-12
    assert error(network.gated_halo - 1, statistics) > 1e-9
    assert error(network.gated_halo, None) > 1e-2


@torch.inference_mode()
def test_a_tile_is_exact_in_float32_at_the_corner_of_an_image_and_in_a_batch():
    network, image = tiny(), picture(30, 26)
    statistics, whole = network.squeeze(image), network(image)
    tile, border = cut(image, (slice(0, 12), slice(16, 26)), network.gated_halo)
    assert border == [0, 8, 8, 0]
    found = inner(network(tile.expand(2, -1, -1, -1), statistics), border, 4)
    assert torch.allclose(found, whole[..., :48, 64:].expand_as(found), rtol=0, atol=1e-6)


@torch.inference_mode()
def test_the_means_of_tiles_add_up_to_those_of_the_image():
    network, image = trained(tiny()), picture(30, 26).double()
    statistics = network.squeeze(image)
    found = squeezed_in_tiles(network, image, statistics)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, statistics, strict=True))
    wrong = squeezed_in_tiles(network, image, [one + 0.3 for one in statistics])
    # The first gate sees what no gate has touched.
    assert torch.allclose(wrong[0], statistics[0], rtol=0, atol=1e-12)
    assert not any(
        torch.allclose(a, b, rtol=0, atol=1e-3) for a, b in zip(wrong[1:], statistics[1:], strict=True)
    )


@torch.inference_mode()
def test_passes_over_tiles_find_the_statistics_one_gate_after_the_other():
    network, image = trained(tiny()), picture(30, 26).double()
    statistics = network.squeeze(image)
    found = squeezed_in_tiles(network, image, None)
    errors = []
    for right in range(1, len(statistics) + 1):
        assert torch.allclose(found[right - 1], statistics[right - 1], rtol=0, atol=1e-12)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, statistics, strict=True)))
        found = squeezed_in_tiles(network, image, found)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-12


@torch.inference_mode()
def test_a_border_is_left_out_at_every_stage():
    network, image = tiny(), picture()
    maps: list[Tensor] = [network.head(image)]
    network.doublings[1].conv.register_forward_hook(lambda _, __, found: maps.append(se_gan._shuffled(found)))
    found = network.squeeze(image, network.squeeze(image), border=(1, 2, 3, 0))
    assert torch.allclose(found[0], maps[0][..., 1:-2, 3:].mean(dim=(2, 3)), atol=1e-6)
    assert torch.allclose(found[-1], maps[1][..., 4:-8, 12:].mean(dim=(2, 3)), atol=1e-6)
    same = zip(network.squeeze(image, border=2), network.squeeze(image, border=[2, 2, 2, 2]), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("border", [-1, 8, (0, 0, 6, 6), (1, 1), (0, 16, 0, 0)])
def test_a_border_that_leaves_nothing_is_refused(border):
    with pytest.raises(SettingError, match=r"border must be .* 16 x 12, got") as error:
        tiny().squeeze(picture(), border=border)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda s: s[:-1], lambda s: [*s, s[0]], lambda s: [one[:, :4] for one in s], lambda s: []]
)
def test_statistics_of_another_network_are_refused(damage):
    network, image = tiny(), picture(batch=3)
    statistics = damage(network.squeeze(image[:2]))
    with pytest.raises(SettingError, match=r"statistics must hold 5 tensors \(3, 8\), got") as error:
        network(image, statistics)
    assert "\n" not in str(error.value)
    with pytest.raises(SettingError, match="statistics must hold"):
        network.squeeze(image, network.squeeze(image[:2]))


# --- the discriminator --------------------------------------------------------------------------------------------


def judge(**settings: Any) -> FusionDiscriminator:
    torch.manual_seed(0)
    return FusionDiscriminator(**{"features": 8, **settings})


@pytest.mark.parametrize(
    ("norm", "expected"), [("none", 8_480_277), ("batch", 8_485_013), ("spectral", 8_480_277)]
)
def test_the_discriminator_has_the_size_of_its_specification(norm, expected):
    assert parameters_of(FusionDiscriminator, norm=norm) == expected


def test_the_maps_of_the_discriminator_are_those_of_its_specification():
    with torch.device("meta"):
        network, image = FusionDiscriminator(), torch.empty(2, 3, 192, 192)
    shapes: list[tuple[int, ...]] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, found: shapes.append(tuple(found.shape[1:])))
    fused: list[tuple[int, ...]] = []
    network.fuse.register_forward_pre_hook(lambda _, given: fused.append(tuple(given[0].shape)))
    assert network(image).shape == (2, 1)
    widths, sizes = (64, 128, 128, 256, 256, 512, 512, 512), (96, 96, 48, 48, 24, 24, 12, 12)
    assert shapes == [(width, size, size) for width, size in zip(widths, sizes, strict=True)]
    assert fused == [(2, 1536, 12, 12)]


@pytest.mark.parametrize("norm", ["none", "batch", "spectral"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_images_of_any_size_have_one_logit_each(norm, size):
    found = judge(norm=norm, channels=1)(picture(*size, channels=1, batch=3))
    assert found.shape == (3, 1)
    assert found.isfinite().all()


def test_the_finer_map_is_averaged_where_the_strided_convolution_looks():
    x = torch.randn(1, 2, 24, 24)
    # For even sizes the average that adapts to the size is the same.
    assert torch.allclose(F.avg_pool2d(x, 2, ceil_mode=True), F.adaptive_avg_pool2d(x, 12))
    network = judge()
    given: list[Tensor] = []
    network.fuse.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    maps: list[Tensor] = []
    network.blocks[5].register_forward_hook(lambda _, __, found: maps.append(found))
    network(picture(100, 72))
    assert maps[0].shape[-2:] == (13, 9)
    assert given[0].shape[-2:] == (7, 5)
    assert torch.allclose(given[0][:, :64, 1, 2], maps[0][..., 2:4, 4:6].mean(dim=(2, 3)), atol=1e-6)
    assert torch.allclose(given[0][:, :64, 6, 4], maps[0][..., 12, 8], atol=1e-6)


@torch.no_grad()
def test_the_verdict_depends_on_the_image_from_the_start():
    images = torch.cat([picture(32, 32), picture(32, 32).flip(1), torch.rand(2, 3, 32, 32)])
    network = judge(features=16)
    assert float(network(images).std()) > 1e-3
    # With PyTorch's initialisation it would not.
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    assert float(network(images).std()) < 1e-4


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other_without_normalisation():
    images = torch.rand(3, 3, 32, 32)
    together, alone = judge()(images), torch.cat([judge()(one[None]) for one in images])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(judge(norm="batch")(images)[:1], judge(norm="batch")(images[:2])[:1], atol=1e-3)


@torch.no_grad()
def test_spectral_normalisation_bounds_the_blocks():
    network = judge(norm="spectral")
    for _ in range(15):
        network(picture(32, 32))
    for block in network.blocks:
        assert float(torch.linalg.matrix_norm(block.conv.weight.flatten(1), 2)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("norm", ["none", "batch", "spectral"])
def test_gradients_reach_the_image_and_every_parameter_of_the_discriminator(norm):
    network = judge(norm=norm, reduction=2)
    image = picture(32, 32, batch=2).requires_grad_()
    F.softplus(network(image)).mean().backward()
    assert image.grad is not None
    assert float(image.grad.abs().max()) > 0
    parameters = dict(network.named_parameters())
    silent = [k for k, p in parameters.items() if p.grad is None or not float(p.grad.abs().max()) > 0]
    # Batch normalisation takes away what the bias before it adds.
    assert [k for k in silent if not (norm == "batch" and k.endswith("conv.bias"))] == []


@torch.no_grad()
def test_each_of_the_fused_maps_has_a_say():
    network, image = judge(), picture(32, 32)
    expected = network(image)
    for first in (0, 64, 128):
        part = network.fuse.weight[:, first : first + 64]
        kept = part.clone()
        part.zero_()
        assert not torch.allclose(network(image), expected, atol=1e-5)
        part.copy_(kept)
    assert torch.equal(network(image), expected)


def test_an_unknown_norm_is_named():
    with pytest.raises(SettingError, match=r"'spectral', got 'instance'$"):
        judge(norm="instance")


# --- both ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(same_as_released):
    networks = {"generator": tiny(), "discriminator": judge()}
    squeezed = [float(one.double().mean()) for one in networks["generator"].squeeze(picture())]
    logits = [float(v) for v in networks["discriminator"](picture(33, 40, batch=2)).flatten()]
    found = networks["generator"](picture())
    same_as_released("se_gan", networks, found, centre=(30, 21), squeezed=squeezed, logits=logits)
