from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.networks.se_gan import SEGenerator
from medsr.networks.vdsr import VDSR
from PIL import Image
from torch import nn

from benchmarks.measure import ROOT, added_peak
from benchmarks.quality import sisr

NETWORKS = {
    "image_vdsr_superres": (VDSR, {"layers": 3, "features": 4}),
    "retina_segan_superres": (SEGenerator, {"features": 4, "blocks": 1, "image_skip": True}),
}


def make_bundle(folder: Path, name: str, *, weights: bool = True) -> None:
    kind, sizes = NETWORKS[name]
    root = folder / name
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    settings = {
        "bundle_root": "",
        "weights": "$@bundle_root + '/models/model.pt'",
        "network_def": {"_target_": f"{kind.__module__}.{kind.__name__}", **sizes},
    }
    (root / "configs" / "metadata.json").write_text("{}")
    (root / "configs" / "inference.json").write_text(json.dumps(settings))
    (root / "configs" / "segan.json").write_text("{}")
    if weights:
        network = kind(**sizes)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.02)
        torch.save(network.state_dict(), root / "models" / "model.pt")
        digest = hashlib.sha256((root / "models" / "model.pt").read_bytes()).hexdigest()
        (root / "models" / "SHA256SUMS").write_text(f"{digest}  model.pt\n")


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bundles"
    folder.mkdir()
    make_bundle(folder, "image_vdsr_superres", weights=False)
    make_bundle(folder, "retina_segan_superres")
    monkeypatch.setenv("MEDSR_BUNDLES", str(folder))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two of the names that have a detail, one of them grey and of an odd size."""
    folder = tmp_path / "set"
    folder.mkdir()
    y, x = np.mgrid[:70, :58]
    waves = np.uint8(127 + 100 * np.sin(x / 4) * np.cos(y / 5))
    Image.fromarray(np.stack([waves, waves // 2, 255 - waves], -1)).save(folder / "baby.png")
    Image.fromarray(waves[:49]).save(folder / "head.png")
    return folder


def test_one_run_writes_page_rows_and_picture(
    bundles: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # In this process: a new one imports for seconds, and has a test of its own.
    monkeypatch.setattr(sisr, "peak_of", lambda call, *arguments: added_peak(sisr.measured(*arguments)))
    out, report = tmp_path / "out", tmp_path / "page.md"
    rows = sisr.compare(images, report=report, out=out, rounds=1)
    by_method = {row["method"]: row for row in rows}
    assert list(by_method) == ["bicubic", "VDSR", "SRResNet", "SRGAN", "FMEN", "SE-GAN"]
    ours, bicubic = by_method["SE-GAN"], by_method["bicubic"]
    assert (ours["input"], ours["output"]) == ([14, 17], [56, 68])
    network = SEGenerator(**NETWORKS["retina_segan_superres"][1])
    assert ours["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert ours["gmac"] > 0
    # The interpolation, disturbed a little.
    assert 15 < ours["psnr_db"] < bicubic["psnr_db"]
    assert ours["protocol"] == "psnr-v1:y:border4:full:u8"
    assert ours["seconds_per_megapixel"] == pytest.approx(ours["seconds"] / (56 * 68 / 1e6), rel=0.1)

    # Eight bits of mantissa of a disturbance of some grey levels.
    assert 0 < ours["bfloat16_mean_grey_levels"] < ours["bfloat16_largest_grey_levels"] < 2
    assert abs(ours["bfloat16_psnr_db"]) < 0.1

    assert "no weights at models/model.pt" in by_method["VDSR"]["missing"]
    assert "there is no bundle" in by_method["FMEN"]["missing"]
    text = report.read_text()
    assert text in capsys.readouterr().out
    assert text.count("not measured: ") == 4
    assert f"| SE-GAN | {ours['bfloat16_mean_grey_levels']:.2f} |" in text
    assert "without the paper's feature loss" in text
    assert str(tmp_path) not in text
    assert json.loads((out / "sisr.json").read_text())["rows"] == rows
    with Image.open(out / "sisr.png") as picture:
        # Truth, bicubic and one network; the image and its detail.
        assert picture.width > 700
        assert picture.height > 500


def test_the_images_of_others_stay_out_of_the_repository(images: Path) -> None:
    with pytest.raises(SettingError, match="outside of the repository"):
        sisr.compare(images, report=None, out=ROOT / "docs" / "figures")
    with pytest.raises(DataError):
        sisr.compare(images / "none", report=None, out=None)


def test_scores_are_means_under_the_protocol_of_the_literature() -> None:
    sharp = {name: torch.full((3, 24, 24), 0.5) for name in ("a", "b")}
    # A grey level of luma has 219 steps of 255.
    results = {"a": sharp["a"] + 10 / 255, "b": sharp["b"] + 20 / 255}
    found = sisr.scores(results, sharp)
    expected = [-20 * np.log10(219 / 255 * step / 255) for step in (10, 20)]
    assert found["psnr_db"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_a_number_that_was_not_measured_is_a_dash() -> None:
    row = {
        "method": "bicubic",
        "input": [4, 2],
        "output": [16, 8],
        "seconds": 0.5,
        "seconds_per_megapixel": 1.0,
        "peak_mib": None,
        "psnr_db": 28.0,
        "ssim": 0.5,
    }
    lines = sisr.table([row, {"method": "VDSR", "missing": "no weights"}]).splitlines()
    assert lines[2] == "| bicubic | 4 x 2 | 16 x 8 | - | - | - | 0.500 | 1.00 | - | 28.00 | 0.5000 |"
    assert lines[3].startswith("| VDSR | not measured: no weights |")
    assert {line.count("|") for line in lines} == {12}


@pytest.mark.parametrize("name", sisr.INSETS)
def test_a_picture_has_every_method_and_its_detail(name: str) -> None:
    sharp = {name: torch.rand(3, 64, 48)}
    results = {"bicubic": sharp, "FMEN": {name: sharp[name].flip(-1)}}
    figure = sisr.picture([name], sharp, results)
    wholes, details = figure.axes[:3], figure.axes[3:]
    assert wholes[0].get_title() == "truth"
    assert wholes[2].get_title().startswith("FMEN: ")
    frame = wholes[0].patches[0]
    left, top = (int(n) for n in frame.get_xy())
    side = int(frame.get_width())
    shown = np.asarray(details[2].images[0].get_array())
    expected = results["FMEN"][name][:, top : top + side, left : left + side].permute(1, 2, 0).numpy()
    assert np.allclose(shown, expected, atol=1 / 255)
