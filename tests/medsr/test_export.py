from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr import cli, export
from medsr.errors import MissingExtraError, OutputError, SettingError, WeightsError
from medsr.export import OpenVINONetwork, bundle_network, export_onnx
from medsr.inferers.image_superres import ImageSuperResInferer
from medsr.networks.fmen import FMEN
from medsr.networks.layout import channels_last
from medsr.networks.se_gan import SEGenerator
from medsr.networks.segsrnet import SEGSRNet
from medsr.networks.srcnn import SRCNN
from medsr.networks.srgan import SRResNet
from medsr.networks.stereo_fmen import StereoFMEN
from medsr.networks.vdsr import VDSR
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def small_fmen() -> nn.Module:
    return FMEN(features=8, mid_features=6, down_blocks=1, up_blocks=(1, 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "fmen": lambda: used(small_fmen()).fuse(),
    "vdsr": lambda: VDSR(layers=4, features=8),
    "vdsr x3 grey": lambda: VDSR(3, 1, layers=3, features=8),
    "srresnet": lambda: SRResNet(blocks=2, features=8, output="tanh01"),
    "srcnn": SRCNN,
    "segan": lambda: SEGenerator(features=8, blocks=2, image_skip=True),
}


def used(network: nn.Module) -> nn.Module:
    """As after a training: no weight and no statistic is where it starts."""
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                value.add_(
                    0.05 * torch.rand(value.shape) if "var" in name else 0.05 * torch.randn(value.shape)
                )
    return network.eval()


def run(file: Path, image: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["pred"], {"image": image.numpy()})[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_and_openvino_agree_with_torch_at_other_sizes(name: str, tmp_path: Path) -> None:
    network = used(NETWORKS[name]())
    file = export_onnx(channels_last(network), tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    openvino = OpenVINONetwork(file) if _has_openvino() else None
    for batch, height, width in ((1, 21, 34), (2, 7, 5), (1, 1, 2)):
        image = torch.rand(batch, network.in_channels, height, width)
        with torch.no_grad():
            expected = network(image)
        assert expected.std() > 0.01
        torch.testing.assert_close(run(file, image), expected, rtol=0, atol=1e-4)
        if openvino is not None:
            torch.testing.assert_close(openvino(image), expected, rtol=0, atol=1e-3)


def test_the_file_states_what_the_network_states_and_the_network_stays(tmp_path: Path) -> None:
    network = used(small_fmen()).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    file = export_onnx(network, tmp_path / "net.onnx", origin={"bundle": "image_fmen_superres"})
    stated = {item.key: item.value for item in onnx.load(file).metadata_props}
    assert json.loads(stated["scale"]) == 4
    assert json.loads(stated["exact_halo"]) == network.exact_halo
    assert json.loads(stated["half_precision_safe"]) is True
    assert stated["bundle"] == "image_fmen_superres"
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Frozen(nn.Module):
    """Knows the size that was traced, as networks do that compute with sizes in Python."""

    scale, in_channels, size_multiple, exact_halo, half_precision_safe = 1, 3, 1, 0, True

    def forward(self, image: Tensor) -> Tensor:
        return image + torch.linspace(0, 1, int(image.shape[-1]))[: image.shape[-1]].clone()


class Shifting(Frozen):
    """Right at the size that was traced, wrong at others, without an error."""

    def forward(self, image: Tensor) -> Tensor:
        return image / float(image.shape[-1])


class Inexpressible(Frozen):
    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.svdvals(image)


@pytest.mark.parametrize("kind", [Frozen, Shifting, Inexpressible])
def test_networks_that_do_not_export_are_refused_and_leave_nothing(kind: type, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("older")
    with pytest.raises(SettingError, match=f"^{kind.__name__} cannot be exported"):
        export_onnx(kind(), tmp_path / "net.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize(
    "network",
    [
        SEGSRNet(2, features=8, growth=4, blocks=2),
        StereoFMEN(2, features=8, mid_features=6, down_blocks=1, up_blocks=(1, 1)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_a_network_for_pairs_is_refused_with_the_reason(tmp_path: Path, network: nn.Module) -> None:
    name = type(network).__name__
    with pytest.raises(
        SettingError, match=rf"^{name} takes pairs and is not exported: .*; run its bundle instead$"
    ):
        export_onnx(network, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = SRCNN()
    nn.init.constant_(network.reconstruct.bias, float("nan"))
    with pytest.raises(SettingError, match="differs from PyTorch by nan"):
        export_onnx(network, tmp_path / "net.onnx")


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"as \.onnx"):
        export_onnx(SRCNN(), tmp_path / "net.pt")
    with pytest.raises(OutputError, match="no such folder"):
        export_onnx(SRCNN(), tmp_path / "none" / "net.onnx")


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(export, "import_module", absent)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'medsr[export]'")):
        export_onnx(SRCNN(), tmp_path / "net.onnx")
    with pytest.raises(MissingExtraError, match="openvino"):
        OpenVINONetwork(tmp_path / "net.onnx")


# --- OpenVINO --------------------------------------------------------------------------------------------------


def _has_openvino() -> bool:
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


needs_openvino = pytest.mark.skipif(not _has_openvino(), reason="openvino is not installed")


@needs_openvino
def test_the_inferer_takes_it_in_place_of_the_network(tmp_path: Path) -> None:
    network = used(VDSR(layers=3, features=8))
    fast = OpenVINONetwork(export_onnx(network, tmp_path / "net.onnx"))
    infer = ImageSuperResInferer(tile=16, max_whole=32 * 32, amp="float32")
    image = torch.rand(1, 3, 37, 22)
    expected = infer(image, network)
    assert infer.facts["mode"] == "tiles"
    torch.testing.assert_close(infer(image, fast), expected, rtol=0, atol=1e-3)


@needs_openvino
def test_the_precision_is_the_one_asked_for(tmp_path: Path) -> None:
    network = used(VDSR(layers=3, features=8))
    file = export_onnx(network, tmp_path / "net.onnx")
    assert "32" in str(OpenVINONetwork(file)._compiled.get_property("INFERENCE_PRECISION_HINT"))
    if not _openvino_bfloat16():
        with pytest.raises(SettingError, match="no bfloat16"):
            OpenVINONetwork(file, precision="bf16")
    unsafe = export_onnx(SRCNN(), tmp_path / "unsafe.onnx")
    with pytest.raises(SettingError, match="not safe in bfloat16"):
        OpenVINONetwork(unsafe, precision="bf16")


def _openvino_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@needs_openvino
def test_bfloat16_is_near(tmp_path: Path) -> None:
    if not _openvino_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    network = used(SEGenerator(features=8, blocks=2, image_skip=True))
    fast = OpenVINONetwork(export_onnx(network, tmp_path / "net.onnx"), precision="bf16")
    image = torch.rand(1, 3, 24, 20)
    with torch.no_grad():
        expected = network(image)
    assert (fast(image) - expected).abs().mean() < 0.02 * expected.std()


@needs_openvino
@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"text", "cannot be read as ONNX"), ("other", "not written by")],
)
def test_files_of_others_are_refused(tmp_path: Path, content: Any, reason: str) -> None:
    file = tmp_path / "net.onnx"
    if content == "other":
        export_onnx(SRCNN(), file)
        model = onnx.load(file)
        del model.metadata_props[:]
        onnx.save(model, file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(WeightsError, match=reason):
        OpenVINONetwork(file)


# --- Bundles and the command -----------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle in the manner of the real ones, and a copy that must not be mistaken for it."""
    root = tmp_path / "bundles" / "image_small_superres"
    (root / "configs").mkdir(parents=True)
    (root / "models" / "x3").mkdir(parents=True)
    settings = {
        "imports": ["$import medsr.catalog as catalog"],
        "bundle_root": "$str(catalog.bundle_root('image_small_superres'))",
        "weights": "$@bundle_root + '/models/model.pt'",
        "scale": 2,
        "network_def": {
            "_target_": "medsr.networks.vdsr.VDSR",
            "scale": "@scale",
            "layers": 3,
            "features": 8,
        },
    }
    overlay = {"scale": 3, "weights": "$@bundle_root + '/models/x3/model.pt'"}
    for name, content in (("metadata", {}), ("inference", settings), ("x3", overlay)):
        (root / "configs" / f"{name}.json").write_text(json.dumps(content))
    lines = []
    for file, scale in (("model.pt", 2), ("x3/model.pt", 3)):
        torch.save(used(VDSR(scale, layers=3, features=8)).state_dict(), root / "models" / file)
        lines.append(f"{hashlib.sha256((root / 'models' / file).read_bytes()).hexdigest()}  {file}")
    (root / "models" / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("MEDSR_BUNDLES", str(root.parent))
    monkeypatch.chdir(tmp_path)
    return root


def test_a_bundle_gives_its_network_and_the_digest_of_its_weights(bundle: Path) -> None:
    network, digest = bundle_network(bundle)
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert (network.scale, network.training) == (2, False)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert digest == hashlib.sha256((bundle / "models" / "model.pt").read_bytes()).hexdigest()
    other, other_digest = bundle_network(bundle, [bundle / "configs" / "x3.json"])
    assert other.scale == 3
    assert other_digest != digest


def test_a_copy_of_a_bundle_uses_its_own_weights(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "elsewhere" / bundle.name)
    (copy / "models" / "model.pt").unlink()
    with pytest.raises(WeightsError, match="no weights at"):
        bundle_network(copy)


def test_the_command_exports_a_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", bundle.name, "-o", "made/net.onnx", "--config", "x3.json"]) == 0
    assert capsys.readouterr().out == "medsr: wrote made/net.onnx\n"
    network, digest = bundle_network(bundle, [bundle / "configs" / "x3.json"])
    stated = {item.key: item.value for item in onnx.load("made/net.onnx").metadata_props}
    assert (stated["scale"], stated["bundle"], stated["weights_sha256"]) == ("3", bundle.name, digest)
    image = torch.rand(1, 3, 19, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(Path("made/net.onnx"), image), network(image), rtol=0, atol=1e-4)


def test_the_command_takes_other_weights(bundle: Path, tmp_path: Path) -> None:
    torch.save(used(VDSR(2, layers=3, features=8)).state_dict(), tmp_path / "mine.pt")
    assert cli.main(["export", bundle.name, "-o", "net.onnx", "--weights", "mine.pt"]) == 0
    network, _ = bundle_network(bundle, weights="mine.pt")
    image = np.float32(np.random.default_rng(0).random((1, 3, 6, 9)))
    with torch.no_grad():
        expected = network(torch.from_numpy(image))
    torch.testing.assert_close(run(Path("net.onnx"), torch.from_numpy(image)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--weights", "none.pt"], WeightsError.exit_code, "no weights at"),
        (["--weights", "other.pt"], WeightsError.exit_code, "made for another network"),
        (["--config", "x5.json"], SettingError.exit_code, "has no config x5.json"),
        (["--config", "broken.json"], SettingError.exit_code, "cannot be read as JSON"),
        (["-o", "net.pt"], OutputError.exit_code, "as .onnx"),
        (["-o", "other.pt/net.onnx"], OutputError.exit_code, "cannot write"),
    ],
)
def test_faults_are_one_line_and_leave_no_file(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    reason: str,
) -> None:
    torch.save(SRCNN().state_dict(), tmp_path / "other.pt")
    (bundle / "configs" / "broken.json").write_text("{")
    assert cli.main(["export", bundle.name, "-o", "net.onnx", *words]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert reason in lines[0]
    assert not list(tmp_path.glob("*.onnx"))


def test_a_bundle_for_volumes_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((bundle / "configs" / "inference.json").read_text())
    settings["network_def"] = {
        "_target_": "torch.nn.Conv3d",
        "in_channels": 1,
        "out_channels": 1,
        "kernel_size": 1,
    }
    (bundle / "configs" / "inference.json").write_text(json.dumps(settings))
    torch.save(nn.Conv3d(1, 1, 1).state_dict(), "volumes.pt")
    assert (
        cli.main(["export", bundle.name, "-o", "net.onnx", "--weights", "volumes.pt"])
        == SettingError.exit_code
    )
    assert "Conv3d states no scale: only networks for single images" in capsys.readouterr().err


def test_a_bundle_without_a_network_is_refused(bundle: Path) -> None:
    (bundle / "configs" / "inference.json").write_text(json.dumps({"weights": "model.pt"}))
    with pytest.raises(SettingError, match=r"inference\.json has no 'network_def'"):
        bundle_network(bundle)
