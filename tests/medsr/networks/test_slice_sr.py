from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr.cli import main
from medsr.errors import SettingError, WeightsError
from medsr.geometry import rescaled_size, slice_positions
from medsr.losses.uncertainty import UncertaintyAwareLoss
from medsr.networks.slice_sr import SliceSRNet, convert_flavr
from medsr.resampling import interpolation_matrix
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

RATIOS = (1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)


def tiny(head: str = "plain", label_classes: int = 0, *, scale: float = 4.0) -> SliceSRNet:
    torch.manual_seed(0)
    return SliceSRNet(0.125, label_classes, head, branches=4, scale=scale).eval()


def perturbed(network: SliceSRNet) -> SliceSRNet:
    """As after some training: no tensor is zero any more, and the read-outs do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return network


def stack(depth: int = 5, size: tuple[int, int] = (16, 16), *, channels: int = 1) -> Tensor:
    return torch.rand(1, channels, *size, depth, generator=torch.Generator().manual_seed(2))


def parameters_of(width: float, **settings) -> int:
    # Shapes are enough to count.
    with torch.device("meta"):
        return sum(p.numel() for p in SliceSRNet(width, **settings).parameters())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", [(16, 16), (13, 18), (9, 23)])
def test_the_output_covers_the_field_of_view_exactly(ratio, size):
    network = tiny("uncertainty")
    with torch.inference_mode():
        found = network(stack(5, size), scale=ratio)
    assert found.shape == (1, 2, *size, rescaled_size(5, ratio))
    assert found.isfinite().all()


def test_the_default_scale_is_the_network_s_own():
    assert tiny(scale=2.5)(stack(4)).shape[-1] == 10


def test_parameter_counts_are_those_of_the_published_layout():
    assert parameters_of(1.0) == pytest.approx(42.24e6, rel=0.02)
    assert parameters_of(0.25) == pytest.approx(2.7e6, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"head": "mean"}, "mean"),
        ({"width": 0.05}, "0.05"),
        ({"width": "x"}, "width must be a number, got 'x'"),
    ],
)
def test_settings_out_of_range_are_named(settings, word):
    with pytest.raises(SettingError, match=word) as error:
        SliceSRNet(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("head", ["plain", "uncertainty"])
def test_weights_and_results_are_those_of_the_last_release(head, golden):
    network = perturbed(tiny(head, 1))
    state = network.state_dict()
    names = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    image = stack(5, (13, 18), channels=2)
    with torch.inference_mode():
        result = network(image, scale=2.5, thickness=0.8).double()
    found = {
        "tensors": hashlib.sha256(names.encode()).hexdigest(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "mean": [float(v) for v in result.mean(dim=(0, 2, 3, 4))],
        "std": [float(v) for v in result.std(dim=(0, 2, 3, 4))],
        "min": float(result.min()),
        "max": float(result.max()),
        "ends": [float(result[..., 0].mean()), float(result[..., -1].mean())],
        "corner": float(result[0, 0, 0, 0, 0]),
        "centre": float(result[0, 0, 6, 9, 6]),
        "roughness": float(result.diff(dim=-1).abs().mean()),
    }
    expected = golden(f"slice_sr_{head}", found)
    assert set(found) == set(expected)
    assert found["tensors"] == expected["tensors"], "released weights would no longer load"
    assert found["parameters"] == expected["parameters"]
    for key in sorted(set(found) - {"tensors", "parameters"}):
        # Kernels differ between machines in the last bits of a float32.
        assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("ratio", [2, 2.5, 4])
def test_with_a_prior_the_residual_is_on_the_mean_of_both_planes(ratio):
    torch.manual_seed(0)
    network = SliceSRNet(0.125, prior=True).eval()
    with torch.no_grad():
        network.prior.readout.weights.weight.normal_(0, 0.3)
    image = stack(6, (11, 16))
    with torch.inference_mode():
        found = network(image, scale=ratio)[0, 0]
        rows = network.prior(image[0, 0].unsqueeze(1), ratio)[:, 0]
        columns = network.prior(image[0, 0].transpose(0, 1).unsqueeze(1), ratio)[:, 0].transpose(0, 1)
    assert not torch.allclose(rows, columns, atol=1e-3)
    assert torch.allclose(found, (rows + columns) / 2, atol=1e-6)


@pytest.mark.parametrize("settings", [{"head": "plain"}, {"head": "uncertainty", "label_classes": 2}])
@pytest.mark.parametrize("prior", [False, True])
def test_an_estimate_is_refined_in_place_to_the_same_result(prior, settings):
    torch.manual_seed(0)
    network = perturbed(SliceSRNet(0.125, branches=4, prior=prior, **settings)).eval()
    image = stack(5, channels=1 + settings.get("label_classes", 0))
    positions = slice_positions(5, 13, 2.6)
    with torch.inference_mode():
        estimate = network.first_estimate(image, 2.6, 0.9, positions=positions)
        before, part = estimate.clone(), slice(4, 9)
        network.refine(estimate[..., part], image, scale=2.6, thickness=0.9, positions=positions[part])
        assert torch.allclose(estimate[..., part], network(image, 2.6, 0.9)[..., part], atol=1e-5)
        assert torch.equal(estimate[..., 9:], before[..., 9:])


@pytest.mark.parametrize("size", [(24, 72), (21, 69)])
def test_the_part_of_the_plane_that_is_kept_is_that_of_the_whole(size):
    network, image = perturbed(tiny("uncertainty")), stack(5, size)
    whole = network(image, scale=3).detach()
    rows, columns = slice(3, 19), slice(7, 66)
    positions = slice_positions(5, 15, 3)
    with torch.inference_mode():
        estimate = network.first_estimate(image, 3, 1.0, positions=positions)[..., rows, columns, :]
        network.refine(estimate, image, scale=3, thickness=1.0, positions=positions, keep=(rows, columns))
    # Bands of columns, which their neighbours reach into, equal the whole plane with gradients.
    assert torch.allclose(estimate, whole[..., rows, columns, :], atol=1e-5)


@pytest.mark.parametrize("ratio", [2, 2.5, 4])
def test_an_untrained_network_is_the_cubic_interpolation(ratio):
    image = stack(6, (11, 16))
    positions = slice_positions(6, rescaled_size(6, ratio), ratio)
    with torch.inference_mode():
        found = tiny()(image, scale=ratio)
    exact = image[0, 0] @ torch.as_tensor(interpolation_matrix(6, positions), dtype=torch.float32).T
    assert torch.allclose(found[0, 0], exact, atol=1e-6)
    grid = np.stack(np.meshgrid(np.arange(11), np.arange(16), positions, indexing="ij"))
    reference = map_coordinates(image[0, 0].double().numpy(), grid, order=3, mode="nearest")
    # Along the planes the spline interpolates itself, hence only the slice axis remains.
    assert np.allclose(found[0, 0].numpy(), reference, atol=1e-4)


@pytest.mark.parametrize("head", ["plain", "uncertainty"])
def test_a_constant_image_stays_constant(head):
    with torch.inference_mode():
        found = tiny(head)(torch.full((1, 1, 13, 16, 5), 0.7), scale=3.5)
    assert torch.allclose(found[:, 0], torch.tensor(0.7), atol=1e-6)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("head", ["plain", "uncertainty"])
def test_labels_are_super_resolved_beside_the_image(head, classes):
    image = stack(5, channels=1 + classes)
    image[:, 1:] = (image[:, 1:] > 0.5).float()
    with torch.inference_mode():
        found = tiny(head, classes)(image, scale=3)
    assert found.shape == (1, 1 + classes + (head == "uncertainty"), 16, 16, 15)
    # The middle thin slice of three lies at the centre of its slab: there the label is what it was.
    middle = found[:, 1 : 1 + classes, ..., 1::3]
    assert torch.equal(middle > 0, image[:, 1:] > 0.5)
    probability = found[:, 1 : 1 + classes].sigmoid()
    assert float(probability.min()) > 0.009
    assert float(probability.max()) < 0.991


@pytest.mark.parametrize("gain", [0.1, 10.0, 1000.0])
def test_the_uncertainty_stays_within_its_bounds(gain):
    network = perturbed(tiny("uncertainty"))
    with torch.no_grad():
        network.log_uncertainty.weight.mul_(gain)
        network.attention.weights.weight.mul_(gain)
        found = network(stack(), scale=4)[:, -1]
    assert float(found.min()) >= 1e-3 * (1 - 1e-6)
    assert float(found.max()) <= 1 + 1e-6


@pytest.mark.parametrize("scale", [2.5, 4])
def test_plain_weights_serve_the_uncertainty_network(scale):
    plain, extended = perturbed(tiny()), tiny("uncertainty")
    result = extended.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {key.split(".")[0] for key in result.missing_keys} == {
        "candidates",
        "attention",
        "log_uncertainty",
    }
    with torch.inference_mode():
        expected, found = plain(stack(), scale=scale), extended(stack(), scale=scale)
    assert not torch.allclose(expected, tiny()(stack(), scale=scale), atol=1e-3)
    assert torch.allclose(found[:, :1], expected, atol=1e-6)


@pytest.mark.parametrize("head", ["plain", "uncertainty"])
def test_inference_in_chunks_equals_the_result_with_gradients(head):
    network = perturbed(tiny(head))
    whole = network(stack(6), scale=3.5)
    assert whole.requires_grad
    with torch.inference_mode():
        chunked = network(stack(6), scale=3.5)
    assert torch.allclose(chunked, whole.detach(), atol=1e-5)


def test_positions_choose_among_the_slices_of_the_whole_result():
    network = perturbed(tiny("uncertainty"))
    positions = slice_positions(6, 15, 2.5)
    with torch.inference_mode():
        whole = network(stack(6), scale=2.5)
        part = network(stack(6), scale=2.5, positions=positions[4:11])
    assert torch.allclose(part, whole[..., 4:11], atol=1e-5)


def test_ratio_and_thickness_are_conditions_of_the_result():
    network, positions = perturbed(tiny()), slice_positions(5, 10, 2)
    with torch.inference_mode():
        first, thin, other = (
            network(stack(), scale=scale, thickness=thickness, positions=positions)
            for scale, thickness in ((2, 1.0), (2, 0.6), (4, 1.0))
        )
    assert not torch.allclose(first, thin, atol=1e-4)
    assert not torch.allclose(first, other, atol=1e-4)


@pytest.mark.parametrize("head", ["plain", "uncertainty"])
def test_gradients_reach_every_parameter(head):
    network = perturbed(tiny(head, 1)).train()
    loss = UncertaintyAwareLoss(1, uncertainty=head == "uncertainty")
    loss(network(stack(channels=2), scale=3), stack(15, channels=2)).backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert silent == []


def test_the_condition_is_learnt_from_its_start_at_zero():
    network = tiny().train()
    assert not network.condition.weight.any()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (network(stack(), scale=3) - stack(15)).abs().mean().backward()
        optimizer.step()
    assert bool(network.condition.weight.detach().any())


def test_features_for_distillation_are_those_of_the_layout():
    levels = tiny().encoder_features(stack(5, (16, 24)))
    assert [tuple(level.shape[1:]) for level in levels] == [
        (8, 8, 12, 5),
        (8, 8, 12, 5),
        (16, 4, 6, 5),
        (32, 2, 3, 5),
        (64, 2, 3, 5),
    ]
    first = tiny().encoder_features(stack(5, (16, 24)), count=2)
    assert len(first) == 2
    assert torch.equal(first[1], levels[1])


@pytest.mark.parametrize(("height", "width"), [(12, 20), (28, 36), (16, 21)])
def test_features_cover_the_image_and_not_its_padding(height, width):
    image = stack(3, (height, width))
    for level, stride in zip(tiny().encoder_features(image), (2, 2, 4, 8, 8), strict=True):
        assert level.shape[2:4] == (-(-height // stride), -(-width // stride))


def test_features_lie_where_they_lie_in_the_padded_image():
    network, image = tiny(), stack(3, (12, 20))
    padded = torch.nn.functional.pad(image, (0, 0, 2, 2, 2, 2), mode="replicate")
    whole = network.encoder_features(padded)[0]
    torch.testing.assert_close(network.encoder_features(image)[0], whole[:, :, 1:-1, 1:-1])


def test_weights_survive_a_plain_file(tmp_path):
    network = perturbed(tiny("uncertainty"))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    other = tiny("uncertainty")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with torch.inference_mode():
        assert torch.equal(other(stack(), scale=3), network(stack(), scale=3))


# --- public FLAVR weights -----------------------------------------------------------------------------------------


def flavr_name(ours: str) -> str | None:
    """FLAVR's name of one of our tensors, written from the layout of its code: the inverse of the conversion."""
    parts = ours.split(".")
    if parts[:2] == ["encoder", "stages"]:
        stage, block, what = parts[2:5]
        tail = {
            "conv1": "conv1.0",
            "conv2": "conv2.0",
            "gate": "fg.attn_layer.0",
            "project": "downsample.0",
        }[what]
        return f"encoder.layer{int(stage) + 1}.{block}.{tail}.{parts[-1]}"
    if parts[0] == "decoder":
        kind = ("conv", "upconv", "upconv", "conv", "upconv")[int(parts[2])]
        tail = "0" if parts[1] == "layers" else "1.attn_layer.0"
        return f"decoder.{parts[2]}.{kind}.{tail}.{parts[-1]}"
    return None


@pytest.fixture(scope="module")
def shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in SliceSRNet(1.0).state_dict().items()}


@pytest.fixture
def flavr(shapes) -> OrderedDict[str, Tensor]:
    """A checkpoint of the right names and shapes; every tensor holds its own number, in four bytes on disk."""
    named = {flavr_name(key): shape for key, shape in shapes.items() if flavr_name(key)}
    state = {name: torch.full((1,), 1.0 + i).expand(shape) for i, (name, shape) in enumerate(named.items())}
    state["encoder.stem.0.weight"] = torch.zeros(1).expand(64, 3, 3, 7, 7)
    state["feature_fuse.conv.0.weight"] = torch.zeros(1).expand(64, 256, 1, 1)
    state["outconv.1.weight"] = torch.zeros(1).expand(9, 64, 7, 7)
    return OrderedDict((f"module.{name}", value) for name, value in state.items())


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def converted(path: Path) -> OrderedDict[str, Tensor]:
    with torch.device("meta"):
        return convert_flavr(path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_flavr_weights_fill_the_trunk(tmp_path, flavr, shapes, wrapped):
    file = saved(tmp_path / "flavr.pth", {"state_dict": flavr, "epoch": 3} if wrapped else flavr)
    found = converted(file)
    trunk = {key for key in shapes if key.startswith(("encoder.stages.", "decoder."))}
    assert set(found) == trunk
    for key, value in found.items():
        assert value.shape == shapes[key]
        assert float(value.flatten()[0]) == float(flavr[f"module.{flavr_name(key)}"].flatten()[0]), key
    with torch.device("meta"):
        result = SliceSRNet(1.0).load_state_dict(found, strict=False, assign=True)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(shapes) - trunk


class Code:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


CONV = "module.encoder.layer2.1.conv1.0.weight"


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda s: without(s, CONV), r"1 tensors are missing.*layer2\.1\.conv1\.0\.weight"),
        (lambda s: {**s, CONV: s[CONV][:5]}, r"layer2\.1\.conv1.*\(5, 128, 3, 3, 3\).*\(128, 128, 3, 3, 3\)"),
        (lambda s: {**s, "module.encoder.layer1.0.conv1.1.bias": torch.zeros(64)}, "conv1.1.bias"),
        (lambda s: {}, "missing"),
        (lambda s: [1, 2], "missing"),
    ],
    ids=["missing", "wrong shape", "unknown", "empty", "no dict"],
)
def test_another_checkpoint_is_refused_in_one_line(tmp_path, flavr, damage, word):
    file = saved(tmp_path / "other.pth", damage(flavr))
    with pytest.raises(WeightsError, match=rf"^other\.pth: .*{word}") as error:
        converted(file)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    file = saved(tmp_path / "evil.pth", {"state_dict": Code(tmp_path / "made")})
    with pytest.raises(WeightsError, match=r"^evil\.pth: damaged or not plain weights") as error:
        converted(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_an_unreadable_file_is_a_weights_error(tmp_path, content):
    file = tmp_path / "broken.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"^broken\.pth: "):
        converted(file)


def test_the_command_line_converts(tmp_path, flavr, capsys):
    file, out = saved(tmp_path / "flavr.pth", flavr), tmp_path / "new" / "trunk.pt"
    assert main(["convert", "flavr", str(file), "-o", str(out)]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["trunk.pt"]
    state = torch.load(out, weights_only=True)
    name = "decoder.layers.1.weight"
    assert float(state[name].flatten()[0]) == float(flavr[f"module.{flavr_name(name)}"].flatten()[0])
    capsys.readouterr()


def test_the_command_line_refuses_in_one_line(tmp_path, capsys):
    file = saved(tmp_path / "evil.pth", {"state_dict": Code(tmp_path / "made")})
    assert main(["convert", "flavr", str(file), "-o", str(tmp_path / "out.pt")]) == WeightsError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "evil.pth: damaged or not plain weights" in lines[0]
    assert not (tmp_path / "out.pt").exists()
    assert not (tmp_path / "made").exists()


def test_the_layout_has_no_normalisation_and_no_stride_along_the_slices():
    convolutions = [m for m in tiny().modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
    assert {m.stride[0] for m in convolutions} == {1}
    assert not [m for m in tiny().modules() if "norm" in type(m).__name__.lower()]
