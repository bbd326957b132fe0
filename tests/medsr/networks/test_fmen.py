from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from medsr.cli import main
from medsr.errors import SettingError, WeightsError
from medsr.inferers.tiles import TileInferer
from medsr.networks.fmen import FMEN, convert_fmen
from medsr.networks.layout import channels_last
from torch import Tensor, nn
from torch.nn import functional as F


def tiny(scale: int = 4, **settings: Any) -> FMEN:
    torch.manual_seed(0)
    sizes = {"features": 8, "mid_features": 7, "down_blocks": 1, "up_blocks": (1, 2)}
    return FMEN(scale, **{**sizes, **settings}).eval()


def trained(network: FMEN) -> FMEN:
    """As after some training: statistics and factors of batch normalisation that are not those of the start."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-1, 1)
    return network


def picture(height: int = 13, width: int = 10, *, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(2))


def written_out(network: FMEN, image: Tensor, *, zeros: bool = False) -> Tensor:
    """The training form in the words of the specification, with every border laid around by hand."""

    def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    def valid(layer: nn.Conv2d, x: Tensor, border: Tensor) -> Tensor:
        border = torch.zeros_like(border) if zeros else border
        wide = border[:, None, None].repeat(len(x), 1, x.shape[-2] + 2, x.shape[-1] + 2)
        wide[..., 1:-1, 1:-1] = x
        return F.conv2d(wide, layer.weight, layer.bias)

    def rrrb(block: Any, x: Tensor) -> Tensor:
        hidden = conv(block.expand, x)
        return conv(block.reduce, valid(block.conv, hidden, block.expand.bias) + hidden) + x

    def erb(block: Any, x: Tensor) -> Tensor:
        return rrrb(block.conv2, F.leaky_relu(rrrb(block.conv1, x), 0.1))

    def normed(block: Any, x: Tensor) -> Tensor:
        x, norm = block.norm(x), block.norm
        return valid(
            block.conv, x, norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        )

    def hfab(block: Any, x: Tensor) -> Tensor:
        attention = F.leaky_relu(normed(block.squeeze, x), 0.1)
        for one in block.erbs:
            attention = erb(one, attention)
        attention = normed(block.excite, F.leaky_relu(attention, 0.1))
        return torch.sigmoid(block.excite.after(attention)) * x

    first, warm_up, *blocks, last = network.body
    head = conv(network.head, image)
    x = hfab(warm_up, conv(first, head))
    for residual, attention in zip(blocks[::2], blocks[1::2], strict=True):
        x = hfab(attention, erb(residual, x))
    return nn.PixelShuffle(network.scale)(conv(network.tail, conv(last, x) + head))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"fused": True}, 341_066),
        ({}, 1_045_866),
        ({"collapsed": True}, 1_045_866),
        ({"fused": True, "scale": 2}, 324_830),
        ({"fused": True, "scale": 3}, 331_595),
        ({"fused": True, "scale": 8}, 406_010),
        ({"fused": True, "scale": 16}, 665_786),
        ({"fused": True, "channels": 1}, 325_734),
    ],
)
def test_the_network_has_the_published_size(settings, expected):
    with torch.device("meta"):
        network = FMEN(**settings)
    assert sum(p.numel() for p in network.parameters()) == expected
    assert network.exact_halo == 34
    if network.fused:
        assert len(network.state_dict()) == 2 * sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 68


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(("channels", "size"), [(3, (5, 8)), (1, (1, 1))])
@pytest.mark.parametrize(
    "form", [{}, {"fused": True}, {"collapsed": True}], ids=["layers", "fused", "collapsed"]
)
@torch.inference_mode()
def test_the_result_is_scale_times_as_large(scale, channels, size, form):
    network = tiny(scale, channels=channels, **form)
    assert (network.scale, network.in_channels, network.size_multiple) == (scale, channels, 1)
    found = network(picture(*size, channels=channels))
    assert found.shape == (2, channels, scale * size[0], scale * size[1])
    assert found.isfinite().all()


@torch.inference_mode()
def test_the_shuffle_is_that_of_torch_and_nothing_is_clamped_or_added():
    network = tiny(2, fused=True)
    network.tail.weight.zero_()
    network.tail.bias.copy_(torch.arange(12))
    found = network(picture(3, 4))
    expected = torch.arange(12.0).reshape(3, 2, 2).repeat(2, 1, 3, 4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"scale": 0}, "^scale must be a whole number >= 1, got 0"),
        ({"scale": "four"}, "^scale must be .*, got 'four'"),
        ({"features": None}, "^features must be .*, got None"),
        ({"channels": 1.5}, "^channels must be .*, got 1.5"),
        ({"expand": 0}, "^expand must be .*, got 0"),
        ({"mid_features": 4}, "^mid_features must be a whole number >= 5, got 4"),
        ({"up_blocks": (1,)}, r"^up_blocks must hold down_blocks \+ 1 = 2 numbers, got \[1\]"),
        ({"up_blocks": [1, 0]}, r"^up_blocks must be a list of whole numbers >= 1, got \[1, 0\]"),
        ({"up_blocks": 3}, "^up_blocks must be a list of whole numbers >= 1, got 3"),
        ({"down_blocks": -1, "up_blocks": ()}, "^down_blocks must be a whole number >= 0, got -1"),
    ],
)
def test_sizes_that_make_no_network_are_refused(settings, word):
    with pytest.raises(SettingError, match=word) as error:
        tiny(**settings)
    assert "\n" not in str(error.value)


# --- the training form and its merging ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(13, 10), (5, 1)])
@torch.inference_mode()
def test_the_plain_form_is_the_training_form_only_with_its_borders(size):
    network, image = trained(tiny()), picture(*size)
    plain, expected = network.fuse(), written_out(network, image)
    assert difference(network(image), expected) < 1e-5
    assert difference(plain(image), expected) < 1e-5
    assert difference(plain(image), written_out(network, image, zeros=True)) > 1e-3


@torch.inference_mode()
def test_the_published_size_merges_in_float32():
    torch.manual_seed(0)
    network, image = trained(FMEN().eval()), picture(9, 7)
    assert difference(network.fuse()(image), network(image)) < 1e-5


@torch.inference_mode()
def test_merging_loses_nothing_in_float64():
    network, image = trained(tiny()).double(), picture().double()
    plain = network.fuse()
    assert plain.head.weight.dtype == torch.float64
    assert difference(plain(image), written_out(network, image)) < 1e-12


def test_merging_leaves_the_network_as_it_is():
    network = trained(tiny()).train()
    before, random = deepcopy(network.state_dict()), torch.get_rng_state()
    plain = network.fuse()
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert not network.fused
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert plain.fused
    assert not any(m.training for m in plain.modules())
    assert all(p.requires_grad for p in plain.parameters())


@torch.inference_mode()
def test_merged_weights_fit_the_plain_form_and_merge_no_further():
    plain, image = trained(tiny()).fuse(), picture()
    other = tiny(fused=True)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(image), plain(image))
    again = plain.fuse()
    assert torch.equal(again(image), plain(image))
    assert again.head.weight.data_ptr() != plain.head.weight.data_ptr()


def test_training_normalises_by_the_batch_and_pads_by_the_running_statistics():
    network = trained(tiny()).double().train()
    other, image = deepcopy(network), picture().double()
    assert difference(network(image), written_out(other, image)) < 1e-12
    statistics = zip(network.named_buffers(), other.buffers(), strict=True)
    assert all(torch.allclose(a, b) for (_, a), b in statistics)


@pytest.mark.parametrize("training", [True, False])
def test_collapsed_blocks_are_the_same_function_with_the_same_gradients(training):
    layered, collapsed = (trained(tiny(collapsed=one)).double().train(training) for one in (False, True))
    collapsed.load_state_dict(layered.state_dict())
    results = [network(picture().double()) for network in (layered, collapsed)]
    assert difference(*results) < 1e-12
    for result in results:
        (result - 0.5).square().mean().backward()
    pairs = zip(layered.named_parameters(), collapsed.parameters(), strict=True)
    assert [k for (k, a), b in pairs if not torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-14)] == []


@pytest.mark.parametrize("collapsed", [False, True])
def test_gradients_reach_every_parameter(collapsed):
    network = tiny(collapsed=collapsed).train()
    # Two batches before the gradient: the first one must not notice that the statistics went on.
    loss = sum((network(picture(batch=batch)) - 0.5).square().mean() for batch in (2, 3))
    loss.backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    # Batch normalisation takes away what the bias before it adds.
    assert [k for k in silent if not k.endswith("excite.conv.bias")] == []


@pytest.mark.parametrize("fused", [True, False])
def test_the_result_does_not_depend_on_whether_gradients_are_recorded(fused):
    network, image = tiny(fused=fused), picture()
    with torch.no_grad():
        expected = network(image)
    assert torch.equal(network(image), expected)


def test_the_plain_form_can_be_trained_further():
    network = trained(tiny()).fuse().train()
    (network(picture()) - 0.5).square().mean().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in network.parameters())


# --- half precision and memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{"fused": True}, {"collapsed": True}], ids=["fused", "collapsed"])
@torch.inference_mode()
def test_bfloat16_changes_little_and_the_result_is_float32(form):
    network, image = tiny(**form), picture()
    exact = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = network(image)
    assert fast.dtype == torch.float32
    assert 0 < float((fast - exact).abs().mean()) < 0.02 * float(exact.std())
    # Not merely converted in the end.
    assert not torch.equal(fast.bfloat16().float(), fast)


@torch.inference_mode()
def test_bfloat16_does_not_touch_the_image_itself():
    network, image = tiny(interpolation_start=True), picture()
    exact = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(network(image), exact, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_the_order_in_memory_changes_nothing():
    network, image = tiny(fused=True), picture()
    expected = network(image)
    found = channels_last(network)(image.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-6)


# --- tiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "halo"),
    [({}, 16), ({"down_blocks": 0, "up_blocks": (1,)}, 8), ({"down_blocks": 2, "up_blocks": (3, 1, 1)}, 24)],
)
@pytest.mark.parametrize("fused", [True, False])
def test_the_halo_is_the_radius_of_what_a_pixel_sees(settings, halo, fused):
    network, middle = trained(tiny(2, fused=fused, **settings)).double(), halo + 2
    assert network.exact_halo == halo
    image = picture(2 * middle + 1, 2 * middle + 1, batch=1).double().requires_grad_()
    network(image)[..., 2 * middle : 2 * middle + 2, 2 * middle : 2 * middle + 2].sum().backward()
    seen = image.grad.abs().amax(dim=(0, 1))
    inside = slice(2, -2)
    assert float(seen[inside, inside][[0, 0, -1, -1], [0, -1, 0, -1]].min()) > 0
    seen[inside, inside] = 0
    assert float(seen.max()) == 0


@torch.inference_mode()
def test_tiles_are_exact_with_the_halo_and_wrong_with_one_pixel_less():
    network, image = tiny(2, fused=True), picture(53, 60, batch=1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            # Only corners of the kernels, so that what is farthest matters most.
            layer.weight.mul_(torch.tensor([[6.0, 0, 0], [0, 0, 0], [0, 0, 6.0]]))
    infer = TileInferer(tile=14, max_whole=1, amp="float32")

    def error() -> float:
        found = difference(infer(image, network), network(image))
        assert infer.facts["mode"] == "tiles"
        assert infer.facts["tiles"] > 10
        return found

    assert error() < 1e-5
    network.exact_halo -= 1
    assert error() > 1e-4


@torch.inference_mode()
def test_tiles_of_the_training_form_are_exact_at_the_border_too():
    network, image = trained(tiny(2)), picture(44, 60, batch=1)
    assert difference(TileInferer(tile=14, max_whole=1, amp="float32")(image, network), network(image)) < 1e-5


# --- the authors' weights -----------------------------------------------------------------------------------------

PAIRS = range(4)


def original(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """The authors' plain form, by their names of its tensors; every image within zeros."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def erb(name: str, x: Tensor) -> Tensor:
        return conv(f"{name}.conv2.rep_conv", F.leaky_relu(conv(f"{name}.conv1.rep_conv", x), 0.1))

    def hfab(name: str, x: Tensor, count: int) -> Tensor:
        attention = F.leaky_relu(conv(f"{name}.squeeze", x), 0.1)
        for k in range(count):
            attention = erb(f"{name}.convs.{k}", attention)
        return torch.sigmoid(conv(f"{name}.excitate", F.leaky_relu(attention, 0.1))) * x

    head = conv("head", image)
    x = hfab("warmup.1", conv("warmup.0", head), 2)
    for pair in PAIRS:
        x = hfab(f"HFABs.{pair}", erb(f"ERBs.{pair}", x), 1)
    tail = conv("tail.0", conv("lr_conv", x) + head)
    return F.pixel_shuffle(tail, int((tail.shape[1] / image.shape[1]) ** 0.5))


def convolutions(scale: int = 4, channels: int = 3) -> dict[str, tuple[int, int]]:
    """Names of the authors' 34 convolutions with their outputs and inputs."""
    found = {"head": (50, channels), "warmup.0": (50, 50)}
    for name, mid, count in (("warmup.1", 12, 2), *((f"HFABs.{pair}", 16, 1) for pair in PAIRS)):
        found |= {f"{name}.squeeze": (mid, 50), f"{name}.excitate": (50, mid)}
        found |= {f"{name}.convs.{k}.conv{n}.rep_conv": (mid, mid) for k in range(count) for n in (1, 2)}
    found |= {f"ERBs.{pair}.conv{n}.rep_conv": (50, 50) for pair in PAIRS for n in (1, 2)}
    return {**found, "lr_conv": (50, 50), "tail.0": (channels * scale**2, 50)}


def published(scale: int = 4, channels: int = 3) -> dict[str, Tensor]:
    """A checkpoint of the authors' names and shapes with which the attention is neither open nor shut."""
    random, state = torch.Generator().manual_seed(5), {}
    for name, (outputs, inputs) in convolutions(scale, channels).items():
        # Grey levels make large features, which the squeezing convolutions take down.
        gain = 0.02 if name.endswith("squeeze") else 1.0
        noise = torch.randn(outputs, inputs, 3, 3, generator=random)
        state[f"{name}.weight"] = gain * (9 * inputs) ** -0.5 * noise
        state[f"{name}.bias"] = torch.randn(outputs, generator=random)
    return state


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def loaded(path: Path, *layout: int) -> FMEN:
    with torch.device("meta"):
        network = FMEN(*layout, fused=True)
    network.load_state_dict(convert_fmen(path), assign=True)
    return network.eval()


@pytest.mark.parametrize("layout", [(4, 3), (3, 1)])
@torch.inference_mode()
def test_the_converted_network_takes_and_gives_intensities(tmp_path, layout):
    state, image = published(*layout), picture(11, 7, channels=layout[1])
    assert len(state) == 68
    network = loaded(saved(tmp_path / "fmen.pt", state), *layout)
    expected = original(state, 255 * image) / 255
    assert difference(network(image), expected) < 1e-5
    # The network is not indifferent to the range.
    assert difference(original(state, image), expected) > 1e-2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"params": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: OrderedDict((f"module.{name}", value) for name, value in s.items()),
        lambda s: {name: value.double() for name, value in s.items()},
    ],
    ids=["params", "state_dict", "module", "float64"],
)
def test_checkpoints_are_found_where_frameworks_put_them(tmp_path, wrap):
    state = published(2)
    found = convert_fmen(saved(tmp_path / "fmen.pt", wrap(state)))
    assert {value.dtype for value in found.values()} == {torch.float32}
    plain = convert_fmen(saved(tmp_path / "plain.pt", state))
    assert all(torch.equal(value, plain[key]) for key, value in found.items())
    assert torch.equal(found["head.bias"], state["head.bias"])


def named_by_the_authors(network: FMEN) -> dict[str, Tensor]:
    """The tensors of the training form, by the authors' names."""
    stages = {"head": network.head, "lr_conv": network.body[10], "tail.0": network.tail}
    stages |= {"warmup.0": network.body[0], "warmup.1": network.body[1]}
    for pair in PAIRS:
        stages |= {f"ERBs.{pair}": network.body[2 + 2 * pair], f"HFABs.{pair}": network.body[3 + 2 * pair]}
    state: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module) -> None:
        state.update({f"{name}.{key}": value for key, value in module.state_dict().items()})

    def add_erb(name: str, block: Any) -> None:
        for n, conv in ((1, block.conv1), (2, block.conv2)):
            add(f"{name}.conv{n}.expand_conv", conv.expand)
            add(f"{name}.conv{n}.fea_conv", conv.conv)
            add(f"{name}.conv{n}.reduce_conv", conv.reduce)

    for name, stage in stages.items():
        if isinstance(stage, nn.Conv2d):
            add(name, stage)
        elif name.startswith("ERB"):
            add_erb(name, stage)
        else:
            add(f"{name}.bn1", stage.squeeze.norm)
            add(f"{name}.squeeze", stage.squeeze.conv)
            add(f"{name}.bn2", stage.excite.norm)
            add(f"{name}.excitate", stage.excite.conv)
            add(f"{name}.bn3", stage.excite.after)
            for k, block in enumerate(stage.erbs):
                add_erb(f"{name}.convs.{k}", block)
    return state


@torch.inference_mode()
def test_weights_of_the_authors_training_form_are_merged(tmp_path):
    torch.manual_seed(0)
    network, image = trained(FMEN(2).eval()), picture(7, 9)
    file = saved(tmp_path / "train.pt", named_by_the_authors(network))
    assert difference(loaded(file, 2)(image), network(255 * image) / 255) < 1e-5


class Code:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def without(state: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in names}


CONV = "HFABs.2.convs.0.conv1.rep_conv.weight"


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda s: without(s, [CONV]), r"1 tensors are missing.*HFABs\.2\.convs\.0\.conv1\.rep_conv\.weight"),
        (lambda s: without(s, ["tail.0.weight"]), r"'tail\.0\.weight' is missing"),
        (lambda s: {**s, CONV: s[CONV][:5]}, r"HFABs\.2.*shape \(5, 16, 3, 3\), expected \(16, 16, 3, 3\)"),
        (lambda s: {**s, "ERBs.4.conv1.rep_conv.bias": s["head.bias"]}, r"unexpected tensor 'ERBs\.4"),
        (lambda s: {**s, "tail.0.weight": s["tail.0.weight"][:45]}, r"\(45, 50, 3, 3\) fit no enlargement"),
        (lambda s: {**s, "head.weight": torch.zeros(())}, "fit no enlargement"),
        (lambda s: {**s, "head.weight": torch.zeros(50, 0, 3, 3)}, "fit no enlargement"),
        (lambda s: {**s, "epoch": 3}, "'epoch' is no tensor"),
        (lambda s: {}, "'head.weight' is missing"),
        (lambda s: [1, 2], "holds no state dict"),
    ],
)
def test_another_checkpoint_is_refused_in_one_line(tmp_path, damage, word):
    file = saved(tmp_path / "other.pt", damage(published()))
    with pytest.raises(WeightsError, match=rf"^other\.pt: .*{word}") as error:
        convert_fmen(file)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    file = saved(tmp_path / "evil.pt", {"params": Code(tmp_path / "made")})
    with pytest.raises(WeightsError, match=r"^evil\.pt: damaged or not plain weights") as error:
        convert_fmen(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_an_unreadable_file_is_a_weights_error(tmp_path, content):
    file = tmp_path / "broken.pt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"^broken\.pt: "):
        convert_fmen(file)


def test_the_command_line_converts(tmp_path, capsys):
    file, out = saved(tmp_path / "fmen.pt", published(2)), tmp_path / "new" / "model.pt"
    assert main(["convert", "fmen", str(file), "-o", str(out)]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["model.pt"]
    state, expected = torch.load(out, weights_only=True), convert_fmen(file)
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    capsys.readouterr()


# --- releases -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_weights_and_results_are_those_of_the_last_release(same_as_released):
    network = trained(tiny())
    plain = network.fuse()
    same_as_released("fmen", {"training": network, "fused": plain}, plain(picture()), centre=(25, 19))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_starts_as_linear_interpolation_if_asked(scale: int, channels: int) -> None:
    network, image = tiny(scale, channels=channels, interpolation_start=True), picture(channels=channels)
    wanted = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
    # At the border the convolution sees zeros where interpolation repeats the last pixel.
    inside = (..., slice(scale, -scale), slice(scale, -scale))
    torch.testing.assert_close(network(image)[inside], wanted[inside])
    random = tiny(scale, channels=channels)
    assert [p.shape for p in network.parameters()] == [p.shape for p in random.parameters()]


def test_interpolation_start_can_be_trained_everywhere() -> None:
    network = tiny(interpolation_start=True).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(picture()).square().mean().backward()
        optimizer.step()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # Normalised features do not feel the bias of the convolution before.
    assert [name for name in still if not name.endswith("bias")] == []
