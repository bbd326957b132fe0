from __future__ import annotations

import pytest
import torch
from medsr.errors import MissingExtraError
from medsr.networks.fmen import FMEN
from medsr.networks.se_gan import SEGenerator

from benchmarks.speed import image_sr

IMAGE = (1, 3, 12, 16)


def small_fmen() -> FMEN:
    return FMEN(features=8, mid_features=6, down_blocks=1, up_blocks=(1, 1)).eval()


def test_the_plain_form_is_the_same_network() -> None:
    network = small_fmen()
    image = torch.rand(*IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(
            image_sr.plain_form(network.fuse(), image), network(image), rtol=0, atol=1e-5
        )


def test_all_forms_of_fmen_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    times = image_sr.fused(small_fmen(), torch.rand(*IMAGE), 2)
    assert set(times) == {"fused", "plain", "plain NCHW", "training form"}
    shown = capsys.readouterr().out
    assert "FMEN, 12 x 16 x4: training form / fused" in shown
    assert "nan" not in shown


def test_the_gated_network_is_compared_in_all_its_forms(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    times = image_sr.gated(SEGenerator(features=8, blocks=1, image_skip=True), torch.rand(*IMAGE), 2)
    assert {"eager", "inferer", "OpenVINO f32", "probe"} <= set(times)
    shown = capsys.readouterr().out
    assert ("OpenVINO bf16" in times) != ("OpenVINO bf16 left out" in shown)
    assert "rate of the inferer / rate of the probe" in shown


def test_without_openvino_the_rest_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*arguments: object, **settings: object) -> None:
        raise MissingExtraError("openvino is not installed")

    monkeypatch.setattr(image_sr, "export_onnx", absent)
    times = image_sr.gated(SEGenerator(features=8, blocks=1, image_skip=True), torch.rand(*IMAGE), 1)
    assert set(times) == {"eager", "inferer", "probe"}
    assert "OpenVINO f32 left out: openvino is not installed" in capsys.readouterr().out
