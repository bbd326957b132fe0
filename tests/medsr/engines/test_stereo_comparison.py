from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr.engines.stereo_comparison import StereoComparison
from medsr.errors import SettingError
from medsr.io.stereo import find_stereo_cases
from medsr.metrics.image import ImageProtocol
from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize
from PIL import Image
from torch import Tensor, nn

SIZE = (32, 96)


class Bicubic(nn.Module):
    scale, in_channels, size_multiple, exact_halo, half_precision_safe = 2, 6, 1, 2, False

    def forward(self, image: Tensor) -> Tensor:
        return bicubic_resize(image, tuple(2 * n for n in image.shape[-2:]))


class Exchanged(Bicubic):
    """Needs the other view: without it, it knows nothing."""

    def forward(self, image: Tensor) -> Tensor:
        left, right = image.chunk(2, 1)
        same = bool((left == right).all())
        return super().forward(image) * (0.5 if same else 1)


def view(column: int) -> np.ndarray:
    texture = np.random.default_rng(0).random((*SIZE, 3))
    smooth = np.asarray(bicubic_resize(torch.from_numpy(texture).permute(2, 0, 1).float(), SIZE))
    return np.uint8(255 * np.roll(smooth, -column, 2).transpose(1, 2, 0).clip(0, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("pig-1", "pig-2"):
        for side, column in (("left", 0), ("right", 5)):
            Image.fromarray(view(column)).save(tmp_path / f"{name}_{side}.png")
    return tmp_path


def test_every_method_is_scored_under_both_protocols(folder):
    comparison = StereoComparison(
        find_stereo_cases(folder),
        {"same": Bicubic(), "exchange": Exchanged()},
        scale=2,
        one_view=["exchange"],
        inferer={"amp": "float32"},
        output=folder / "pairs.json",
    )
    rows = comparison.run()
    assert json.loads((folder / "pairs.json").read_text())["rows"] == rows
    by = {(row["case"], row["method"], row["protocol"].rpartition(":")[2]): row for row in rows}
    assert len(by) == len(rows) == 2 * 4 * 2
    for which in ("both-views", "left-crop64"):
        bicubic, same, both, alone = (
            by["pig-1", method, which]["psnr_db"]
            for method in ("bicubic", "same", "exchange", "exchange, one view")
        )
        assert same == both == pytest.approx(bicubic, abs=0.01)
        assert alone < bicubic - 2
    assert by["pig-1", "bicubic", "both-views"]["group"] == "pig"
    assert by["pig-1", "bicubic", "both-views"]["disparity_mae_px"] >= 0
    table = comparison._table().splitlines()
    assert table[0].endswith("| disparity error, px |")
    assert len(table) == 2 + 2 * 4


def test_the_scores_are_those_of_the_protocols(folder):
    rows = StereoComparison(find_stereo_cases(folder)[:1], {}, scale=2).run()
    truths = [torch.from_numpy(view(column)).permute(2, 0, 1) / 255 for column in (0, 5)]
    results = [
        bicubic_resize(BicubicDownsample(2, rounding="end")(truth), SIZE).clamp(0, 1) for truth in truths
    ]
    pairs = list(zip(results, truths, strict=True))
    both = np.mean([ImageProtocol().score(*one)["psnr_db"] for one in pairs])
    left = ImageProtocol().score(*(one[:, :, 64:] for one in pairs[0]))["psnr_db"]
    assert [row["psnr_db"] for row in rows] == pytest.approx([both, left], abs=1e-3)


def test_a_pair_without_enough_columns_behind_the_crop_lacks_that_score_only(folder, caplog):
    for side, column in (("left", 0), ("right", 5)):
        narrow = Image.fromarray(view(column)[:, :64])
        narrow.save(folder / f"cow-1_{side}.png")
    comparison = StereoComparison(
        find_stereo_cases(folder), {}, scale=2, output=folder / "out" / "pairs.json"
    )
    rows = comparison.run()
    note = "64 px wide: psnr-v1:rgb:border0:full:u8:left-crop64 needs 75, and is left out"
    assert [row["protocol"].rpartition(":")[2] for row in rows if row["case"] == "cow-1"] == ["both-views"]
    assert len([row for row in rows if row["case"] != "cow-1"]) == 4
    assert (comparison.left_out, comparison.notes) == ({}, {"cow-1": note})
    assert json.loads((folder / "out" / "pairs.json").read_text())["notes"] == comparison.notes
    assert f"cow-1: {note}" in caplog.text
    cells = comparison._table().splitlines()[2].split(" | ")
    assert cells[0] == "| cow"
    assert cells[5:7] == ["-", "-"]


def test_what_is_no_pair_is_left_out(folder, caplog):
    (folder / "pig-2_right.png").unlink()
    Image.fromarray(view(0)).save(folder / "mono.png")
    comparison = StereoComparison(find_stereo_cases(folder), {}, scale=2)
    assert {row["case"] for row in comparison.run()} == {"pig-1"}
    assert comparison.left_out == {
        "mono": "mono: there is no second view to compare with",
        "pig-2": "pig-2: there is no right view",
    }
    with pytest.raises(SystemExit):
        comparison.finish()


def test_networks_of_another_scale_and_unknown_names_are_refused():
    with pytest.raises(SettingError, match="'x2' is a network for x2, not for x4"):
        StereoComparison([], {"x2": Bicubic()}, scale=4)
    with pytest.raises(SettingError, match=r"^one_view: there is no network 'other' .* there are x2$"):
        StereoComparison([], {"x2": Bicubic()}, scale=2, one_view=["other"])
