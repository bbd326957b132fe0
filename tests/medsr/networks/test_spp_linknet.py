from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from medsr.errors import DataError, SettingError, WeightsError
from medsr.export import export_onnx
from medsr.networks import spp_linknet
from medsr.networks.layout import channels_last
from medsr.networks.spp_linknet import SPPLinkNet, adaptive_means, load_encoder
from torch import Tensor, nn
from torch.nn import functional as F

PYRAMIDS = ("pooling", "max", "none")


def tiny(classes: int = 3, **settings: Any) -> SPPLinkNet:
    torch.manual_seed(0)
    return SPPLinkNet(classes, **{"encoder": "resnet18", "width": 8, **settings}).eval()


def trained(network: SPPLinkNet) -> SPPLinkNet:
    """As after some training: statistics and affine parameters of normalisation are not where they start."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.weight, 0.7, 1.3), (module.running_var, 0.7, 1.3)):
                nn.init.uniform_(value, low, high)
            for value in (module.bias, module.running_mean):
                nn.init.normal_(value, std=0.1)
    nn.init.normal_(network.out.bias, std=0.1)
    return network


def frame(height: int = 64, width: int = 96, *, batch: int = 1, channels: int = 3) -> Tensor:
    made = torch.Generator().manual_seed(2)
    coarse = torch.rand(batch, channels, 8, 12, generator=made)
    return F.interpolate(coarse, (height, width), mode="bilinear")


# --- form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "pyramid", "millions", "expected"),
    [
        ("resnet34", "none", 21.80, 21_793_729),
        ("resnet34", "pooling", 22.58, 22_582_209),
        ("resnet34", "max", 22.12, 22_122_689),
        ("resnet18", "none", 11.69, 11_685_569),
        ("resnet18", "pooling", 12.48, 12_474_049),
        ("resnet18", "max", 12.02, 12_014_529),
    ],
)
def test_the_size_is_that_of_the_specification(encoder, pyramid, millions, expected):
    with torch.device("meta"):
        network = SPPLinkNet(encoder=encoder, pyramid=pyramid)
    found = sum(p.numel() for p in network.parameters())
    assert found == expected
    # The specification counts a thousand biases more, which normalisation takes away.
    assert found / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_default_is_the_network_of_the_publication():
    with torch.device("meta"):
        network = SPPLinkNet()
    assert sum(p.numel() for p in network.parameters()) == 22_582_209
    assert (network.scale, network.in_channels, network.out_channels) == (1, 3, 1)
    assert (network.size_multiple, network.exact_halo, network.half_precision_safe) == (32, None, True)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize(("classes", "channels", "size"), [(1, 3, (32, 32)), (4, 1, (64, 96))])
@torch.inference_mode()
def test_logits_have_the_size_of_the_frame(pyramid, classes, channels, size):
    network = tiny(classes, channels=channels, pyramid=pyramid)
    found = network(frame(*size, channels=channels, batch=2))
    assert found.shape == (2, classes, *size)
    assert found.isfinite().all()
    assert float(found.std()) > 0


def test_the_encoder_has_the_names_and_shapes_of_torchvision():
    with torch.device("meta"):
        own = SPPLinkNet(encoder="resnet18").encoder.state_dict()
    assert {name: tuple(value.shape) for name, value in own.items()} == published_shapes()


@torch.inference_mode()
def test_the_stages_are_four_eight_sixteen_and_thirty_two_times_coarser():
    found = tiny().encoder(frame(64, 96))
    assert [tuple(stage.shape[1:]) for stage in found] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]


@torch.inference_mode()
def test_each_decoder_gets_the_stage_of_its_size_as_a_sum():
    network, image = tiny(pyramid="none"), frame()
    *skips, deepest = network.encoder((image - network.mean) / network.std)
    features = network.decoders[0](deepest) + skips[2]
    features = network.decoders[1](features) + skips[1]
    features = network.decoders[3](network.decoders[2](features) + skips[0])
    assert torch.equal(network(image), network.out(network.head(features)))


@torch.inference_mode()
def test_the_head_lies_centred_on_the_frame():
    head = tiny().head
    for convolution in (head[0], head[2]):
        nn.init.constant_(convolution.weight, 1.0)
    impulse = torch.zeros(1, 8, 7, 7)
    impulse[:, :, 3, 3] = 1
    found = F.conv2d(head(impulse), torch.ones(1, 4, 2, 2), padding=1)[0, 0]
    assert found.shape == (14, 14)
    torch.testing.assert_close(found.flip(0, 1), found)


# --- colours ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_colours_are_standardised_inside():
    image = frame()
    network, plain = trained(tiny()), trained(tiny(mean=(0, 0, 0), std=(1, 1, 1)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    standardised = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(network(image), plain(standardised))
    grey = tiny(channels=1)
    assert (float(grey.mean), float(grey.std)) == pytest.approx((0.449, 0.226))


# --- the pyramids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_means_are_those_of_adaptive_pooling(bins):
    made = torch.Generator().manual_seed(1)
    for size in ((32, 40), (1, 1), (2, 3), (5, 7), (13, 6), (17, 64)):
        x = torch.randn(2, 3, *size, generator=made, dtype=torch.float64)
        torch.testing.assert_close(
            adaptive_means(x, bins), F.adaptive_avg_pool2d(x, bins), rtol=0, atol=1e-14
        )


def test_means_pass_gradients_and_are_float32_under_autocast():
    x = torch.randn(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: adaptive_means(y, 3), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = adaptive_means(x.detach().bfloat16(), 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(x.detach().bfloat16().float(), 3))


@torch.inference_mode()
def test_the_maxima_are_over_five_nine_and_thirteen():
    pyramid = spp_linknet._MaxPyramid(8).eval()
    x = torch.randn(1, 8, 11, 17)
    given: list[Tensor] = []
    pyramid.fuse.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pyramid(x)
    reduced = pyramid.reduce(x)
    expected = [reduced, *(F.max_pool2d(reduced, k, stride=1, padding=k // 2) for k in (5, 9, 13))]
    assert torch.equal(given[0], torch.cat(expected, 1))


@torch.inference_mode()
def test_only_the_pooled_pyramid_sees_the_whole_frame():
    far = torch.rand(1, 3, 32, 2048)
    changed = far.clone()
    changed[..., :32] = 1 - changed[..., :32]

    def seen(**settings: Any) -> float:
        network = trained(tiny(1, **settings)).double()
        return float((network(changed.double()) - network(far.double()))[..., -32:].abs().max())

    assert seen(pyramid="pooling", bins=(1,)) > 1e-6
    assert seen(pyramid="max") == seen(pyramid="none") == 0


@torch.inference_mode()
def test_the_number_of_levels_is_free():
    network = tiny(bins=(1, 4))
    assert len(network.pyramid.reduce) == 2
    assert network(frame()).shape == (1, 3, 64, 96)


# --- training -----------------------------------------------------------------------------------------------------


def test_convolutions_start_with_he_weights_and_logits_near_zero():
    torch.manual_seed(0)
    network = SPPLinkNet(1, encoder="resnet18", width=32)
    for layer, inputs in (
        (network.encoder.layer2[1].conv1, 9 * 64),
        (network.decoders[0][0], 256),
        (network.decoders[0][3], 64 * 16 / 4),
        (network.head[0], 32 * 9 / 4),
        (network.head[2], 16 * 9),
    ):
        assert float(layer.weight.detach().std()) == pytest.approx((2 / inputs) ** 0.5, rel=0.05)
    biases = [network.head[0].bias, network.head[2].bias, network.out.bias]
    assert not any(bool(bias.detach().any()) for bias in biases)
    with torch.no_grad():
        found = network(frame(batch=2))
    assert 0.1 < float(found.std()) < 2


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_gradients_reach_every_parameter_and_the_frame(pyramid):
    network = tiny(pyramid=pyramid).train()
    image = frame(batch=3).requires_grad_()
    F.cross_entropy(network(image), torch.randint(3, (3, 64, 96))).backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert silent == []
    assert float(image.grad.abs().max()) > 0


def test_some_steps_learn_a_bright_square():
    network = tiny(1, width=16).train()
    image = 0.3 * torch.rand(4, 3, 32, 32)
    mask = torch.zeros(4, 1, 32, 32)
    for item, corner in enumerate((2, 6, 10, 14)):
        mask[item, :, corner : corner + 14, corner : corner + 14] = 1
    image = image + 0.6 * mask
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = F.binary_cross_entropy_with_logits(network(image), mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_one_frame_is_trained_on_only_where_its_mean_needs_no_normalisation():
    with pytest.raises(SettingError, match="set batch_size to 2 or more") as error:
        tiny().train()(frame())
    assert "\n" not in str(error.value)
    for settings in ({"pyramid": "max"}, {"bins": (2, 3)}):
        assert tiny(**settings).train()(frame()).isfinite().all()


# --- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@torch.inference_mode()
def test_frames_of_a_batch_do_not_see_each_other_and_nothing_is_random(pyramid):
    network, images = trained(tiny(pyramid=pyramid)), frame(batch=3)
    together = network(images)
    assert torch.equal(network(images), together)
    alone = torch.cat([network(one[None]) for one in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_order_in_memory_changes_nothing():
    network, image = trained(tiny()), frame()
    expected = network(image)
    found = channels_last(network)(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@torch.inference_mode()
def test_bfloat16_changes_the_logits_little(pyramid):
    network, image = trained(tiny(pyramid=pyramid)), frame()
    exact = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(image)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().mean()) < 0.05 * float(exact.std())
    whole = network.bfloat16()(image.bfloat16())
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()


@pytest.mark.parametrize("pyramid", ["pooling", "max"])
@torch.inference_mode()
def test_onnx_runtime_agrees_at_every_size(pyramid, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    network = trained(tiny(pyramid=pyramid))
    file = export_onnx(network, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for image in (frame(32, 32), frame(160, 224), frame(256, 64, batch=2)):
        (found,) = session.run(["pred"], {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network(image), rtol=0, atol=1e-4)


# --- published weights of the encoder ------------------------------------------------------------------------------


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ResNet-18 without its classifier."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{part}": (channels,) for part in ("weight", "bias")})
        shapes.update({f"{name}.running_{part}": (channels,) for part in ("mean", "var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, before, 3, 3)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            norm(f"{name}.bn1", width)
            norm(f"{name}.bn2", width)
            if before != width:
                shapes[f"{name}.downsample.0.weight"] = (width, before, 1, 1)
                norm(f"{name}.downsample.1", width)
            before = width
    return shapes


def published(path: Path, *, counters: bool = False, classifier: bool = True) -> OrderedDict[str, Tensor]:
    """Save a file as torchvision's, for the tiny encoder; older ones have no counters."""
    torch.manual_seed(5)
    state = OrderedDict(
        (name, torch.rand(value.shape) if value.is_floating_point() else torch.tensor(7))
        for name, value in tiny().encoder.state_dict().items()
        if counters or not name.endswith("num_batches_tracked")
    )
    if classifier:
        state |= {"fc.weight": torch.rand(1000, 64), "fc.bias": torch.rand(1000)}
    torch.save(state, path)
    return state


@pytest.mark.parametrize("form", [{}, {"counters": True}, {"classifier": False}])
def test_the_encoder_starts_with_published_weights(tmp_path, form):
    state = published(tmp_path / "resnet18.pth", **form)
    network = tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert load_encoder(network, tmp_path / "resnet18.pth") is network
    own = network.state_dict()
    for name, value in state.items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(own[f"encoder.{name}"], value)
    others = [name for name in own if not name.startswith("encoder.")]
    assert all(torch.equal(own[name], before[name]) for name in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("layer2.0.downsample.0.weight"),
            "1 tensors are missing, the first is 'layer2.0.down",
        ),
        (
            lambda s: s.pop("layer4.1.bn2.running_var"),
            "1 tensors are missing, the first is 'layer4.1.bn2.runn",
        ),
        (
            lambda s: s.update({"layer1.2.conv1.weight": torch.zeros(8, 8, 3, 3)}),
            r"unexpected tensor 'layer1\.2\.conv1\.weight': not a ResNet of this encoder's depth",
        ),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 7, 7)}),
            r"tensor 'conv1.weight' has shape \(64, 3, 7, 7\), expected \(8, 3, 7, 7\)",
        ),
        (lambda s: s.update({"epoch": 3}), "'epoch' is no tensor"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, change, message):
    state = published(tmp_path / "resnet18.pth")
    change(state)
    torch.save(state, tmp_path / "resnet18.pth")
    network = tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=f"^resnet18.pth: {message}") as error:
        load_encoder(network, tmp_path / "resnet18.pth")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 33, 64), (1, 3, 64, 48), (1, 1, 64, 64), (3, 64, 64), (64,)])
def test_frames_that_do_not_fit_are_refused(shape):
    with pytest.raises(
        DataError, match=r"^frames are \(B, 3, H, W\), H and W multiples of 32, got .*; pad them$"
    ):
        tiny()(torch.rand(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "resnet50"}, "encoder must be one of resnet18, resnet34, got 'resnet50'"),
        ({"encoder": []}, "encoder must be one of .*, got '\\[\\]'"),
        ({"pyramid": "aspp"}, "pyramid must be one of pooling, max, none, got 'aspp'"),
        ({"classes": 0}, "classes must be a whole number >= 1, got 0"),
        ({"width": "wide"}, "width must be a whole number >= 1, got 'wide'"),
        ({"width": 6}, "width must be a multiple of 4, got 6"),
        ({"bins": ()}, r"bins must hold at least one number >= 1, got \[\]"),
        ({"bins": (0, 2)}, r"bins must be a list of whole numbers >= 1, got \(0, 2\)"),
        ({"mean": (0.5,)}, r"mean must hold one number per channel, 3, got \[0.5\]"),
        ({"std": (0.2, 0, 0.2)}, "std must be larger than 0"),
    ],
)
def test_settings_that_make_no_sense_are_explained(settings, message):
    with pytest.raises(SettingError, match=message):
        tiny(**settings)


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(same_as_released):
    networks = {pyramid: trained(tiny(pyramid=pyramid)) for pyramid in PYRAMIDS}
    found = {pyramid: network(frame()) for pyramid, network in networks.items()}
    more = {f"{name}_mean": [float(v) for v in found[name].mean(dim=(0, 2, 3))] for name in ("max", "none")}
    same_as_released("spp_linknet", networks, found["pooling"], centre=(30, 21), **more)
