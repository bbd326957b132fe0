from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr.engines.image_comparison import (
    ImageComparison,
    finite,
    image_table,
    lanczos_resize,
    refuse_other_scales,
)
from medsr.errors import SettingError
from medsr.metrics.image import ImageProtocol
from medsr.transforms.bicubic import bicubic_resize
from PIL import Image
from torch import Tensor, nn


class Bicubic(nn.Module):
    scale, in_channels, size_multiple, exact_halo, half_precision_safe = 4, 3, 1, 2, False

    def forward(self, image: Tensor) -> Tensor:
        return bicubic_resize(image, tuple(4 * n for n in image.shape[-2:]))


@pytest.fixture
def cases(tmp_path: Path) -> list[dict[str, str]]:
    """Two cameras; disks with a texture on black, so that there is a field of view."""
    found = []
    y, x = np.mgrid[:70, :82]
    for number, name in enumerate(("one-1", "one-2", "two-1")):
        texture = 0.6 + 0.3 * np.sin((x + number) / 3) * np.cos(y / 4)
        inside = (y - 35) ** 2 + (x - 41) ** 2 < 30**2
        pixels = np.uint8(255 * np.where(inside, texture, 0))
        Image.fromarray(np.stack([pixels, pixels // 2, pixels // 3], -1)).save(tmp_path / f"{name}.png")
        found.append({"image": str(tmp_path / f"{name}.png"), "case": name})
    return found


def test_every_method_is_scored_under_every_protocol(cases, tmp_path):
    comparison = ImageComparison(
        cases, {"same": Bicubic()}, scale=4, output=tmp_path / "rows.json", inferer={"amp": "float32"}
    )
    rows = comparison.run()
    assert len(rows) == 3 * 3 * 3
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    by = {(row["case"], row["method"], row["protocol"]): row for row in rows}
    for case in ("one-1", "two-1"):
        for protocol in {row["protocol"] for row in rows}:
            ours, bicubic = by[case, "same", protocol], by[case, "bicubic", protocol]
            assert ours["psnr_db"] == pytest.approx(bicubic["psnr_db"], abs=0.02)
            assert by[case, "lanczos", protocol]["psnr_db"] != bicubic["psnr_db"]
    # What lies outside the field of view does not count inside it.
    inside, full = (by["one-1", "bicubic", f"psnr-v1:rgb:border0:{mask}:u8"] for mask in ("fov", "full"))
    assert inside["psnr_db"] != full["psnr_db"]


def test_the_enlarged_protocol_is_named_and_easier(cases):
    scores = {}
    for size in (None, 160):
        rows = ImageComparison(cases[:1], {}, scale=4, protocols=[ImageProtocol()], enlarge_to=size).run()
        assert {row["enlarged_to"] for row in rows} == {size}
        scores[size] = rows[0]["psnr_db"]
    assert scores[160] > scores[None] + 2


def test_a_bad_image_is_left_out_and_the_run_ends_with_an_error(cases, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    comparison = ImageComparison([{"image": str(tmp_path / "bad.png"), "case": "bad"}, *cases], {}, scale=4)
    assert {row["case"] for row in comparison.run()} == {"one-1", "one-2", "two-1"}
    assert "bad" in comparison.left_out
    with pytest.raises(SystemExit):
        comparison.finish()


def test_a_dark_image_needs_no_field_of_view_for_the_whole_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 6, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "dark.png")
    cases = [{"image": str(tmp_path / "dark.png"), "case": "dark"}]
    full = ImageComparison(cases, {}, scale=4, protocols=[ImageProtocol(), ImageProtocol(channel="y")])
    assert len(full.run()) == 4
    assert full.left_out == {}
    inside = ImageComparison(cases, {}, scale=4, protocols=[ImageProtocol(mask="fov")])
    assert inside.run() == []
    assert "dark" in inside.left_out


def test_a_network_of_another_scale_is_refused(cases):
    with pytest.raises(SettingError, match="'x4' is a network for x4, not for x8"):
        ImageComparison(cases, {"x4": Bicubic()}, scale=8)


def test_means_are_per_group_and_equal_images_do_not_count():
    rows = [
        {"case": f"{g}-{n}", "group": g, "method": "m", "protocol": "p", "psnr_db": value, "ssim": 0.5}
        for g, n, value in (("a", 1, 30.0), ("a", 2, None), ("b", 1, 40.0))
    ]
    lines = image_table(rows).splitlines()[2:]
    assert lines == [
        "| a | 2 | m | 30.00 | 0.5000 |",
        "| b | 1 | m | 40.00 | 0.5000 |",
        "| all | 3 | m | 35.00 | 0.5000 |",
        "",
        "In no PSNR above, because a method restores them exactly: 1 images.",
    ]
    assert image_table(rows[1:2]).splitlines()[2] == "| a | 1 | m | - | 0.5000 |"
    with pytest.raises(SettingError, match="no rows"):
        image_table([])


def test_what_one_method_restores_exactly_counts_for_none_of_them():
    row = {"group": "a", "protocol": "p", "ssim": 0.5}
    rows = [
        {**row, "case": f"a-{n}", "method": method, "psnr_db": value}
        for n, values in enumerate([(30.0, 31.0), (None, 80.0)])
        for method, value in zip(("cubic", "network"), values, strict=True)
    ]
    assert [line.split(" | ")[3] for line in image_table(rows).splitlines()[2:4]] == ["30.00", "31.00"]
    # Of the same image under another protocol, all have a score.
    other = [{**one, "protocol": "q", "psnr_db": 20.0} for one in rows]
    assert image_table([*rows, *other]).splitlines()[3].split(" | ")[3:] == [
        "31.00",
        "0.5000",
        "20.00",
        "0.5000 |",
    ]


def test_a_group_called_all_is_not_the_total():
    row = {"method": "m", "protocol": "p", "ssim": 0.5}
    rows = [{**row, "case": f"{g}-1", "group": g, "psnr_db": v} for g, v in (("all", 30.0), ("b", 40.0))]
    lines = image_table(rows).splitlines()[2:]
    assert [line[:16] for line in lines] == ["| all | 1 | m | ", "| b | 1 | m | 40", "| all groups | 2"]
    assert [line.split(" | ")[3] for line in lines] == ["30.00", "40.00", "35.00"]


def test_further_columns_are_means_of_what_is_known():
    row = {"group": "a", "method": "m", "protocol": "p", "psnr_db": 30.0, "ssim": 0.5}
    rows = [{**row, "case": f"a-{n}", "more": more} for n, more in enumerate((1.0, None, 2.0))]
    assert image_table(rows, {"more": "title"}).splitlines()[0].endswith("SSIM | title |")
    assert image_table(rows, {"more": "title"}).splitlines()[2].endswith("| 1.500 |")
    assert image_table(rows[1:2], {"more": "title"}).splitlines()[2].endswith("| - |")


def test_scores_are_as_json_can_hold_them():
    assert finite(30.12345) == 30.1234
    assert finite(math.inf) is None


def test_the_first_network_of_another_scale_is_named():
    refuse_other_scales({"a": Bicubic()}, 4)
    with pytest.raises(SettingError, match="'a' is a network for x4, not for x2"):
        refuse_other_scales({"a": Bicubic()}, 2)


def test_lanczos_keeps_the_channels_apart():
    image = torch.stack([torch.full((5, 6), value) for value in (0.1, 0.5, 0.9)])
    found = lanczos_resize(image, (20, 24))
    assert found.shape == (3, 20, 24)
    assert torch.allclose(found, image[:, :1, :1].expand(3, 20, 24), atol=1e-6)


@pytest.mark.parametrize("size", [0, 3, 4.5, "large"])
def test_a_size_that_cannot_be_made_small_is_refused(size):
    with pytest.raises(SettingError, match=r"^enlarge_to must be a whole number >= 4, got"):
        ImageComparison([], {}, scale=4, enlarge_to=size)
