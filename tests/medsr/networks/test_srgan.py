from __future__ import annotations

from typing import Any

import pytest
import torch
from medsr.engines.adversarial import AdversarialSRTrainer
from medsr.errors import SettingError
from medsr.inferers.tiles import TileInferer
from medsr.losses.fusion import FusionLoss
from medsr.networks.layout import channels_last
from medsr.networks.srgan import SRGANDiscriminator, SRResNet
from torch import Tensor, nn
from torch.nn import functional as F


def tiny(scale: int = 4, **settings: Any) -> SRResNet:
    torch.manual_seed(0)
    return SRResNet(scale, **{"features": 8, "blocks": 2, **settings}).eval()


def trained(network: SRResNet) -> SRResNet:
    """As after some training: statistics and slopes of their own in every layer, and weights that matter."""
    generator = torch.Generator().manual_seed(1)

    def drawn(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                drawn(module.running_mean, -0.2, 0.2)
                drawn(module.running_var, 0.2, 0.8)
                drawn(module.bias, -0.2, 0.2)
            elif isinstance(module, nn.PReLU):
                drawn(module.weight, 0.1, 0.5)
            elif isinstance(module, nn.Conv2d):
                module.weight.mul_(1.4)
    return network


def picture(height: int = 8, width: int = 6, *, channels: int = 3, batch: int = 1) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(2))


def parameters_of(kind: type[nn.Module], **settings: Any) -> int:
    # Shapes are enough to count.
    with torch.device("meta"):
        return sum(p.numel() for p in kind(**settings).parameters())


# --- the generator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1_549_462),
        ({"prelu": "channel"}, 1_550_659),
        ({"blocks": 5}, 734_219),
        ({"blocks": 5, "scale": 2}, 586_506),
        ({"blocks": 5, "scale": 8}, 881_932),
        # One sub-pixel convolution to 9 x 64 channels where x2 has one to 4 x 64.
        ({"blocks": 5, "scale": 3}, 586_506 + 5 * 64 * (9 * 64 + 1)),
    ],
)
def test_the_generator_has_the_published_size(settings, expected):
    assert parameters_of(SRResNet, **settings) == expected


def test_generator_and_discriminator_together_are_those_of_the_study():
    assert parameters_of(SRResNet, blocks=5) + parameters_of(SRGANDiscriminator) == 5_949_644


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize(("channels", "size"), [(3, (5, 8)), (1, (1, 1))])
@torch.inference_mode()
def test_the_result_is_scale_times_as_large(scale, channels, size):
    network = tiny(scale, channels=channels)
    assert (network.scale, network.in_channels, network.size_multiple) == (scale, channels, 1)
    found = network(picture(*size, channels=channels, batch=2))
    assert found.shape == (2, channels, *(scale * n for n in size))
    assert found.isfinite().all()


@torch.inference_mode()
def test_the_output_is_linear_or_squashed_into_the_range():
    linear, squashed = trained(tiny()), trained(tiny(output="tanh01"))
    for network in (linear, squashed):
        network.out.bias.copy_(torch.tensor([-3.0, 0.0, 3.0]))
    found = linear(picture())
    # Nothing is clamped.
    assert float(found.min()) < -1
    assert float(found.max()) > 2
    # (tanh + 1) / 2 is the logistic function of twice the value.
    assert torch.allclose(squashed(picture()), torch.sigmoid(2 * found), atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("scale", [2, 3, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_starts_as_linear_interpolation_if_asked(scale, channels):
    network = tiny(scale, channels=channels, blocks=1, interpolation_start=True).eval()
    # Doublings interpolate what was interpolated, and borders see zeros: only smooth images are the same, inside.
    ramp = torch.linspace(0, 1, 12).expand(1, channels, 12, 12)
    wanted = F.interpolate(ramp, scale_factor=scale, mode="bilinear", align_corners=False)
    inside = (..., slice(3 * scale, -3 * scale), slice(3 * scale, -3 * scale))
    torch.testing.assert_close(network(ramp)[inside], wanted[inside])
    with pytest.raises(SettingError, match="tanh01"):
        tiny(scale, interpolation_start=True, output="tanh01")


def test_interpolation_start_can_be_trained_everywhere():
    network = tiny(blocks=1, interpolation_start=True).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        network(picture(batch=2)).square().mean().backward()
        optimizer.step()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # Normalisation takes away the bias of the convolution before it.
    assert [name for name in still if not name.endswith("bias")] == []


def test_both_kinds_of_skip_carry_the_features():
    network, image = trained(tiny()), picture()
    head = network.head(image)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    assert torch.equal(network.blocks(head), head)
    assert torch.allclose(network(image), network.out(network.upsample(head)), atol=1e-6)


@torch.inference_mode()
def test_slopes_are_shared_or_one_per_channel():
    shared, each = trained(tiny()), tiny(prelu="channel")
    state = shared.state_dict()
    for key, value in each.state_dict().items():
        state[key] = state[key].expand(value.shape).clone()
    each.load_state_dict(state)
    assert torch.allclose(each(picture()), shared(picture()), atol=1e-6)
    assert {m.weight.numel() for m in each.modules() if isinstance(m, nn.PReLU)} == {8}


@torch.inference_mode()
def test_images_of_a_batch_do_not_see_each_other_in_evaluation_mode():
    network, images = trained(tiny(2)), picture(batch=3)
    alone = torch.cat([network(one[None]) for one in images])
    assert torch.allclose(network(images), alone, atol=1e-6)
    assert not torch.allclose(network.train()(images), alone, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"scale": 3, "prelu": "channel", "output": "tanh01"}])
def test_gradients_reach_every_parameter_of_the_generator(settings):
    network = trained(tiny(**settings))
    (network(picture()) - 0.5).square().mean().backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert silent == []


@pytest.mark.parametrize("output", ["linear", "tanh01"])
@torch.inference_mode()
def test_bfloat16_changes_little_and_the_result_is_float32(output):
    network, image = trained(tiny(features=16, output=output)), picture()
    exact = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = network(image)
    whole = network.bfloat16()(image.bfloat16())
    for found in (fast, whole):
        assert found.dtype == torch.float32
        assert float((found - exact).abs().mean()) < 0.03 * float(exact.std())
        # Not merely converted in the end.
        assert not torch.equal(found.bfloat16().float(), found)


@torch.inference_mode()
def test_the_order_in_memory_changes_nothing():
    network, image = trained(tiny()), picture()
    expected = network(image)
    found = channels_last(network)(image.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("blocks", "halo"), [(5, 18), (16, 40)])
@pytest.mark.parametrize("scale", [2, 3, 4, 16])
def test_the_halo_grows_with_the_blocks_and_not_with_the_scale(blocks, halo, scale):
    with torch.device("meta"):
        assert SRResNet(scale, blocks=blocks).exact_halo == halo


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@torch.inference_mode()
def test_tiles_with_the_halo_are_exact_and_with_one_pixel_less_are_not(scale):
    network, image = trained(tiny(scale, blocks=0, features=4)), picture(25, 10)
    for module in network.modules():
        # Every pixel in sight shall matter.
        if isinstance(module, nn.Conv2d):
            module.weight.abs_()
    assert network.exact_halo == 8
    whole, infer = network(image), TileInferer(tile=8, max_whole=1, amp="float32")
    unit = float(whole.std())
    assert float((infer(image, network) - whole).abs().max()) < 1e-5 * unit
    assert infer.facts["tiles"] == 4
    network.exact_halo -= 1
    assert float((infer(image, network) - whole).abs().max()) > 1e-4 * unit


@torch.inference_mode()
def test_tiles_are_exact_with_residual_blocks_too():
    network, image = trained(tiny(2)), picture(48, 12)
    found = TileInferer(tile=12, max_whole=1, amp="float32")(image, network)
    assert torch.allclose(found, network(image), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_exported_graph_serves_every_size(exported_for_every_size):
    network = tiny(2, features=4, blocks=1)
    exported_for_every_size(network, picture(6, 8, batch=2), [picture(9, 5, batch=3)])


# --- the discriminator --------------------------------------------------------------------------------------------


def judge(**settings: Any) -> SRGANDiscriminator:
    torch.manual_seed(0)
    return SRGANDiscriminator(**{"features": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 5_215_425),
        ({"size": 128}, 5_215_425),
        ({"head": "dense"}, 23_565_505),
        ({"head": "dense", "size": 128}, 38_245_569),
    ],
)
def test_the_discriminator_has_the_published_size(settings, expected):
    assert parameters_of(SRGANDiscriminator, **settings) == expected


def test_the_maps_of_the_discriminator_are_those_of_the_paper():
    with torch.device("meta"):
        network, image = SRGANDiscriminator(), torch.empty(2, 3, 96, 96)
    shapes: list[tuple[int, ...]] = []
    for conv in (m for m in network.body if isinstance(m, nn.Conv2d)):
        conv.register_forward_hook(lambda _, __, found: shapes.append(tuple(found.shape[1:3])))
    assert network(image).shape == (2, 1)
    widths, sizes = (64, 64, 128, 128, 256, 256, 512, 512), (96, 48, 48, 24, 24, 12, 12, 6)
    assert shapes == list(zip(widths, sizes, strict=True))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"channels": 1}, (32, 32)),
        ({"channels": 1}, (33, 47)),
        ({"channels": 1, "head": "dense", "size": 33}, (33, 33)),
    ],
)
def test_images_have_one_logit_each(settings, size):
    network = judge(**settings)
    found = network(picture(*size, channels=1, batch=3))
    assert found.shape == (3, 1)
    assert float(found.detach().std()) > 0
    # No sigmoid: the bias of the last layer moves the result by just as much.
    with torch.no_grad():
        network.head[-1].bias += 5
    moved = network(picture(*size, channels=1, batch=3))
    assert torch.allclose(moved, found + 5, atol=1e-5)


def test_a_dense_head_names_the_size_that_it_needs():
    with pytest.raises(SettingError, match=r"32 x 32 pixels, got 32 x 48: .*'pooled'$") as error:
        judge(head="dense", size=32)(picture(32, 48))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("head", ["pooled", "dense"])
def test_gradients_reach_the_image_and_every_parameter_of_the_discriminator(head):
    network = judge(head=head, size=32).eval()
    image = picture(32, 32, batch=2).requires_grad_()
    F.softplus(network(image)).mean().backward()
    assert float(image.grad.abs().max()) > 0
    parameters = dict(network.named_parameters())
    assert [k for k, p in parameters.items() if p.grad is None or not float(p.grad.abs().max()) > 0] == []


@pytest.mark.parametrize("head", ["pooled", "dense"])
def test_both_learn_in_the_adversarial_trainer(head):
    network, opponent = tiny(features=4, blocks=1).train(), judge(head=head, size=32)
    before = [{k: p.detach().clone() for k, p in one.named_parameters()} for one in (network, opponent)]
    data = [{"image": picture(8, 8, batch=2), "label": picture(32, 32, batch=2)}]
    loss = FusionLoss(feature_weight=0)
    AdversarialSRTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 1e-3),
        loss_function=loss,
        discriminator=opponent,
        discriminator_optimizer=torch.optim.Adam(opponent.parameters(), 1e-3),
    ).run()
    assert set(loss.last_terms) == {"l1", "mse", "adversarial", "discriminator"}
    assert all(torch.tensor(list(loss.last_terms.values())).isfinite())
    for one, old in zip((network, opponent), before, strict=True):
        # Of the biases, those before a normalisation have nothing to learn; nor has the last one, since the
        # relativistic loss compares logits.
        assert [k for k, p in one.named_parameters() if p.ndim > 1 and torch.equal(p, old[k])] == []


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "word"),
    [
        *((SRResNet, {"scale": scale}, rf"3 or a power of two.* got {scale}$") for scale in (1, 0, -4, 6)),
        *((SRResNet, {"scale": scale}, "^scale must be a whole number, got") for scale in (2.5, "four")),
        (SRResNet, {"blocks": -1}, "^blocks must be a whole number >= 0, got -1$"),
        (SRGANDiscriminator, {"features": "x"}, "^features must be .*, got 'x'$"),
        (SRResNet, {"prelu": "none"}, r"'shared' or 'channel', got 'none'$"),
        (SRResNet, {"output": "tanh"}, r"'linear' or 'tanh01', got 'tanh'$"),
        (SRGANDiscriminator, {"head": "patch"}, r"'pooled' or 'dense', got 'patch'$"),
        (SRGANDiscriminator, {"head": "dense", "size": 8}, r"^size must be a whole number >= 16, got 8$"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(kind, settings, word):
    with pytest.raises(SettingError, match=word) as error:
        kind(**settings)
    assert "\n" not in str(error.value)


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(same_as_released):
    networks = {"generator": tiny(), "pooled": judge().eval(), "dense": judge(head="dense", size=32).eval()}
    logits = [float(networks[name](picture(32, 32))) for name in ("pooled", "dense")]
    found = trained(networks["generator"])(picture())
    same_as_released("srgan", networks, found, centre=(15, 10), logits=logits)
