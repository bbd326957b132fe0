from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from medsr.errors import SettingError, WeightsError
from medsr.losses.feature import FeatureLoss
from torch import Tensor, nn
from torch.nn import functional as F

# Places of the convolutions in torchvision's VGG19, and their output channels; a pool follows every block.
BLOCKS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256), (16, 256)),
    ((19, 512), (21, 512), (23, 512), (25, 512)),
    ((28, 512), (30, 512), (32, 512), (34, 512)),
)
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)


def vgg19_tensors(blocks: int = 5, *, random: bool = False) -> dict[str, Tensor]:
    """Tensors under torchvision's names; unless random, constants that need no space."""
    generator, channels, state = torch.Generator().manual_seed(0), 3, {}
    for block in BLOCKS[:blocks]:
        for place, width in block:
            shape = (width, channels, 3, 3)
            weight = torch.randn(shape, generator=generator) if random else torch.ones(1).expand(shape)
            state[f"features.{place}.weight"] = weight * (2 / (9 * channels)) ** 0.5 if random else weight
            state[f"features.{place}.bias"] = torch.zeros(width)
            channels = width
    return state


def reference(state: dict[str, Tensor], image: Tensor, last: int) -> Tensor:
    """Output of the convolution at a place, layer by layer."""
    image = (image - MEAN) / DEVIATION
    for block in BLOCKS:
        for place, _ in block:
            image = F.conv2d(
                image, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1
            )
            if place == last:
                return image
            image = F.relu(image)
        image = F.max_pool2d(image, 2)
    raise AssertionError


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A file with random weights of the first two blocks."""
    path, state = tmp_path_factory.mktemp("vgg") / "vgg.pth", vgg19_tensors(2, random=True)
    torch.save(state, path)
    return path, state


def images(size: int = 12, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    both = torch.rand(2, 2, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return both[0].requires_grad_(), both[1]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vgg(path: Path, layers="conv2_2", **settings) -> FeatureLoss:
    return FeatureLoss("vgg19", path, **{"layers": layers, "sha256": sha256(path), **settings})


# --- none ---------------------------------------------------------------------------------------------------------


def test_without_a_backbone_the_loss_is_zero_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        loss = FeatureLoss()
    pred, target = images()
    for _ in range(3):
        assert loss(pred, target).item() == 0.0
    assert [record.getMessage() for record in caplog.records] == [
        "no feature loss: its backbone is 'none', the term is exactly 0"
    ]
    assert loss.describe() == {"perceptual": "none"}


# --- vgg19 --------------------------------------------------------------------------------------------------------


def test_default_layer_reads_the_whole_published_file(tmp_path, caplog):
    path = tmp_path / "vgg19.pth"
    torch.save(
        {**vgg19_tensors(), "classifier.0.weight": torch.ones(1), "classifier.0.bias": torch.ones(1)}, path
    )
    loss = FeatureLoss("vgg19", path, sha256=sha256(path).upper())
    assert caplog.records == []
    # Up to and with the last convolution.
    assert sum(parameter.numel() for parameter in loss.parameters()) == 20_024_384
    assert loss.describe() == {
        "perceptual": "vgg19",
        "weights": "vgg19.pth",
        "sha256": sha256(path),
        "verified": True,
        "layers": {"conv5_4": 1.0},
        "criterion": "l1",
    }


@pytest.mark.parametrize(
    ("layer", "place", "activation"), [("conv3_4", 16, None), ("conv2_1", 5, None), ("relu2_1", 5, F.relu)]
)
def test_features_are_those_of_the_stack_before_or_after_the_activation(tmp_path, layer, place, activation):
    state = vgg19_tensors(3, random=True)
    torch.save(state, tmp_path / "vgg.pth")
    pred, target = images()
    maps = [reference(state, image, place) for image in (pred, target)]
    if activation:
        maps = [activation(one) for one in maps]
    expected = (maps[0] - maps[1]).abs().mean()
    torch.testing.assert_close(vgg(tmp_path / "vgg.pth", layer)(pred, target), expected, rtol=1e-4, atol=0)


def test_layers_are_weighted_and_squared_errors_can_be_asked_for(small):
    path, state = small
    pred, target = images()
    loss = vgg(path, {"conv1_2": 0.1, "conv2_2": 2.0}, criterion="mse")
    maps = [[reference(state, image, place) for image in (pred, target)] for place in (2, 7)]
    expected = 0.1 * F.mse_loss(*maps[0]) + 2.0 * F.mse_loss(*maps[1])
    torch.testing.assert_close(loss(pred, target), expected, rtol=1e-4, atol=0)


def test_equal_images_cost_nothing_and_only_the_prediction_learns(small):
    loss = vgg(small[0])
    pred, target = images()
    target.requires_grad_()
    assert loss(target, target).item() == 0
    loss(pred, target).backward()
    assert pred.grad.abs().min() > 0
    assert target.grad is None
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loss.parameters())


def test_the_images_of_the_caller_stay_as_they_are(small):
    loss = vgg(small[0], {"conv1_1": 1.0, "relu1_1": 1.0})
    pred, target = images()
    before = pred.detach().clone(), target.clone()
    loss(pred, target)
    assert torch.equal(pred.detach(), before[0])
    assert torch.equal(target, before[1])


def test_grey_images_are_repeated(small):
    loss = vgg(small[0])
    pred, target = images(channels=1)
    torch.testing.assert_close(loss(pred, target), loss(pred.repeat(1, 3, 1, 1), target.repeat(1, 3, 1, 1)))


def test_half_precision_weights_and_autocast_give_a_float32_loss(tmp_path):
    state = vgg19_tensors(1, random=True)
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "half.pth")
    loss = vgg(tmp_path / "half.pth", "conv1_2")
    assert {parameter.dtype for parameter in loss.parameters()} == {torch.float32}
    pred, target = images()
    exact = loss(pred, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(pred, target)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


def test_building_the_loss_draws_no_random_numbers(small):
    state = torch.get_rng_state()
    vgg(small[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_without_a_digest_is_taken_only_when_asked_for(small):
    with pytest.raises(SettingError, match="needs the sha256 of its file; or set allow_any_file"):
        vgg(small[0], sha256=None)
    described = vgg(small[0], sha256=None, allow_any_file=True).describe()
    assert (described["verified"], described["sha256"]) == (False, sha256(small[0]))


def test_a_wrong_digest_is_refused_also_if_any_file_would_do(small):
    path = small[0]
    for settings in ({}, {"allow_any_file": True}):
        with pytest.raises(
            WeightsError, match=rf"^vgg\.pth: its SHA-256 is {sha256(path)}, not 00ff; get"
        ) as error:
            vgg(path, sha256="00ff", **settings)
        assert "\n" not in str(error.value)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_no_weights_are_explained_in_one_line(tmp_path, capsys):
    with pytest.raises(
        WeightsError, match=r"^none\.pth: cannot be read \(No such file or directory\); correct"
    ):
        FeatureLoss("vgg19", tmp_path / "none.pth", sha256="00")
    path = tmp_path / "bad.pth"
    path.write_bytes(b"not a weight file")
    with pytest.raises(WeightsError, match=r"^bad\.pth: damaged or not plain weights"):
        vgg(path)
    torch.save({"features.0.weight": Malicious()}, path)
    with pytest.raises(WeightsError, match=r"^bad\.pth: damaged or not plain weights \(UnpicklingError\)$"):
        vgg(path)
    assert capsys.readouterr().out == ""
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match=r"tensor 'features\.0\.weight' is missing"):
        vgg(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.7.bias": None}, r"^other\.pth: tensor 'features\.7\.bias' is missing; VGG19"),
        (
            {"features.3.weight": torch.ones(1)},
            r"unexpected tensor 'features\.3\.weight'; VGG19 without batch",
        ),
        (
            {"features.5.weight": torch.ones(1)},
            r"'features\.5\.weight' has shape \(1,\), VGG19 has \(128, 64, 3, 3\)",
        ),
    ],
)
def test_files_of_other_networks_are_refused(tmp_path, change, message):
    state = {key: value for key, value in {**vgg19_tensors(2), **change}.items() if value is not None}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=message):
        vgg(tmp_path / "other.pth")


def test_what_lies_behind_the_last_layer_is_not_looked_at(tmp_path):
    torch.save({**vgg19_tensors(1), "features.5.weight": torch.ones(1)}, tmp_path / "vgg.pth")
    assert vgg(tmp_path / "vgg.pth", "conv1_2").describe()["layers"] == {"conv1_2": 1.0}


@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 3, 16, 1), (3, 16, 16)])
def test_images_that_vgg_cannot_take_are_refused(small, shape):
    with pytest.raises(SettingError, match=r"images \(B, 1 or 3, H, W\) of at least 2 pixels a side"):
        vgg(small[0])(torch.rand(shape), torch.rand(shape))


# --- bundle -------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A network with an activation in place, a dropout, and a layer that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dropout = nn.Conv2d(1, 4, 3), nn.Dropout(0.5)
        self.act, self.pair, self.unused = nn.ReLU(inplace=True), nn.GRU(4, 2), nn.Conv2d(1, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.act(self.first(image))
        self.pair(features.mean((2, 3)))
        return self.dropout(features)


def test_features_of_another_network_in_evaluation_mode():
    network = Encoder().train()
    loss = FeatureLoss("bundle", network=network, layers="dropout").train()
    pred, target = images(channels=1)
    expected = (F.relu(network.first(pred)) - F.relu(network.first(target))).abs().mean()
    torch.testing.assert_close(loss(pred, target), expected)
    assert loss.describe() == {
        "perceptual": "bundle",
        "network": "Encoder",
        "layers": {"dropout": 1.0},
        "criterion": "l1",
    }


def test_the_map_before_an_activation_in_place_is_the_one_before():
    network = Encoder()
    pred, target = images(channels=1)
    value = FeatureLoss("bundle", network=network, layers="first")(pred, target)
    torch.testing.assert_close(value, (network.first(pred) - network.first(target)).abs().mean())
    value.backward()
    assert pred.grad.abs().max() > 0


def test_the_network_of_the_caller_stays_trainable_and_without_hooks():
    network = Encoder().train()
    loss = FeatureLoss("bundle", network=network, layers="first")
    pred, target = images(channels=1)
    before = loss(pred, target).item()
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    nn.init.zeros_(network.first.weight)
    assert loss(pred, target).item() == before
    assert not any(module._forward_hooks for module in loss.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "vgg16"}, "backbone must be one of none, vgg19, bundle, got 'vgg16'"),
        ({"criterion": "l3"}, "criterion must be l1 or mse, got 'l3'"),
        ({"backbone": "vgg19"}, "needs weights, a file that you have"),
        (
            {"backbone": "vgg19", "weights": "w.pth", "sha256": "00", "layers": "conv3_5"},
            "no layer 'conv3_5'",
        ),
        ({"backbone": "bundle", "layers": "first"}, "needs a network and the names of its layers"),
        ({"backbone": "bundle", "network": Encoder()}, "needs a network and the names of its layers"),
        ({"backbone": "bundle", "network": Encoder(), "layers": "last"}, "Encoder has no layer 'last'"),
    ],
)
def test_settings_that_do_not_fit_are_explained(settings, message):
    with pytest.raises(SettingError, match=message):
        FeatureLoss(**settings)


@pytest.mark.parametrize("layer", ["unused", "pair"])
def test_a_layer_without_one_tensor_is_refused(layer):
    loss = FeatureLoss("bundle", network=Encoder(), layers=layer)
    with pytest.raises(SettingError, match=f"layer '{layer}' of the feature network gave no tensor"):
        loss(*images(channels=1))
    assert not any(module._forward_hooks for module in loss.modules())


def test_images_of_different_shapes_are_refused():
    with pytest.raises(SettingError, match="images of one shape"):
        FeatureLoss()(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4))
