from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr.engines.frame_comparison import FrameComparison, frame_table, with_facts
from medsr.errors import SettingError
from medsr.io.masks import find_labelled_frames
from medsr.metrics.frames import frame_scores
from medsr.transforms.bicubic import bicubic_resize
from PIL import Image
from torch import Tensor, nn

CLASSES = {"background": [0], "instrument": [10, 20]}
SIZE = (43, 61)
INFERER = {"amp": "float32"}


class Bright(nn.Module):
    """What is brighter than a threshold is an instrument."""

    scale, in_channels, out_channels, size_multiple = 1, 3, 1, 32
    exact_halo, half_precision_safe = 0, False

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, image: Tensor) -> Tensor:
        return 100 * (image.mean(1, keepdim=True) - self.threshold)


class Enlarge(nn.Module):
    """Bicubic enlargement of single images or of pairs; of pairs the left one only if both are equal."""

    scale, size_multiple, exact_halo, half_precision_safe = 2, 1, 2, False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_channels = channels

    def forward(self, image: Tensor) -> Tensor:
        if self.in_channels == 6:
            assert torch.equal(*image.chunk(2, 1))
        return bicubic_resize(image, tuple(2 * n for n in image.shape[-2:]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two groups; the instrument is bright, and a strip of unlabelled pixels is bright too."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for name, column in (("a-1", 20), ("a-2", 35), ("b-1", 30)):
        disc = (rows - 22) ** 2 + (columns - column) ** 2 < 11**2
        image = np.where(disc, 230, 30)
        mask = np.where(disc, np.where(rows < 22, 10, 20), 0)
        image[:3], mask[:3] = 230, 255
        Image.fromarray(np.uint8(np.stack([image] * 3, -1))).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(np.uint8(mask)).save(tmp_path / "labels" / f"{name}.png")
    return tmp_path


def test_networks_are_scored_on_the_pixels_of_the_file_without_those_to_ignore(folder):
    networks = {"right": Bright(), "none": Bright(2), "all": Bright(-1)}
    comparison = FrameComparison(
        find_labelled_frames(folder),
        networks,
        classes=CLASSES,
        ignore=[255],
        inferer=INFERER,
        output=folder / "frames.json",
    )
    rows = comparison.run()
    written = json.loads((folder / "frames.json").read_text())
    assert written["rows"] == rows
    assert written["protocol"].startswith(rows[0]["protocol"])
    by = {(row["case"], row["network"]): row for row in rows}
    assert len(by) == len(rows) == 9
    assert by["a-1", "right"]["iou_present"] == by["a-1", "right"]["isi_iou"] == 1
    assert by["b-1", "none"]["iou_present"] == 0
    counts = by["b-1", "all"]["classes"]["instrument"]
    assert counts["pred"] == (SIZE[0] - 3) * SIZE[1]
    assert by["b-1", "all"]["iou_present"] == counts["target"] / counts["pred"]
    assert {row["group"] for row in rows} == {"a", "b"}
    table = comparison._table().splitlines()
    assert len(table) == 2 + 3 * 3
    assert table[2].startswith("| a | 2 | sharp | right | 1.000 ± 0.000 |")


@pytest.mark.parametrize("channels", [3, 6])
def test_the_study_scores_sharp_interpolated_and_super_resolved_frames_alike(folder, channels):
    rows = FrameComparison(
        find_labelled_frames(folder, groups=["b"]),
        {"network": Bright(0.7)},
        classes=CLASSES,
        ignore=[255],
        scale=2,
        superres={"enlarged": Enlarge(channels)},
        inferer=INFERER,
    ).run()
    by = {row["input"]: row for row in rows}
    assert list(by) == ["sharp", "bicubic", "enlarged"]
    assert by["sharp"]["iou_present"] == 1
    assert 0.8 < by["bicubic"]["iou_present"] < 1
    # The network is the same interpolation, on the same frame made small.
    assert by["enlarged"]["classes"] == by["bicubic"]["classes"]
    assert len({row["classes"]["instrument"]["target"] for row in rows}) == 1
    assert all(row["scale"] == 2 for row in rows)


def test_what_cannot_be_scored_is_left_out(folder, caplog):
    Image.new("L", (5, 5)).save(folder / "labels" / "a-1.png")
    Image.new("L", SIZE[::-1], 77).save(folder / "labels" / "a-2.png")
    comparison = FrameComparison(
        find_labelled_frames(folder), {"n": Bright()}, classes=CLASSES, ignore=[255], inferer=INFERER
    )
    assert {row["case"] for row in comparison.run()} == {"b-1"}
    assert "5 x 5" in comparison.left_out["a-1"]
    assert "grey value 77" in comparison.left_out["a-2"]
    with pytest.raises(SystemExit):
        comparison.finish()


def test_masks_without_anything_to_find_are_pointed_out_and_never_perfect(folder, caplog):
    for path in (folder / "labels").iterdir():
        Image.new("L", SIZE[::-1], 255 if path.stem == "b-1" else 0).save(path)
    comparison = FrameComparison(
        find_labelled_frames(folder), {"none": Bright(2)}, classes=CLASSES, ignore=[255], inferer=INFERER
    )
    comparison.run()
    assert "every pixel of the truth is to be ignored" in comparison.left_out["b-1"]
    assert "1.000" not in comparison._table()
    assert "check classes and ignore" in caplog.text


def test_settings_that_do_not_fit_are_refused():
    parts = {"background": [0], "shaft": [10], "wrist": [20]}
    with pytest.raises(SettingError, match="'n' gives 1 logits per pixel, 3 classes need 3"):
        FrameComparison([], {"n": Bright()}, classes=parts)
    with pytest.raises(SettingError, match="scale must be a whole number >= 1, got 0"):
        FrameComparison([], {}, classes=CLASSES, scale=0)
    with pytest.raises(SettingError, match="need a scale"):
        FrameComparison([], {}, classes=CLASSES, superres={"s": Enlarge(6)})
    with pytest.raises(SettingError, match="'s' is a network for x2, not for x4"):
        FrameComparison([], {}, classes=CLASSES, scale=4, superres={"s": Enlarge(6)})


def test_the_table_has_the_classes_where_there_are_several():
    truth = torch.tensor([[0, 1, 2, 2]])
    scores = frame_scores(torch.tensor([[0, 1, 2, 0]]), truth, ["background", "shaft", "wrist"])
    row = {"case": "a-1", "group": "a", "network": "n", "input": "sharp", **scores}
    head, _, first, everything = frame_table([row]).splitlines()
    assert head.endswith("| shaft | wrist |")
    assert first.endswith("| 1.000 | 0.500 |")
    assert everything == first.replace("| a |", "| all |")
    with pytest.raises(SettingError, match="no rows"):
        frame_table([])


def test_facts_stay_with_a_network_of_another_library():
    network = with_facts(nn.Conv2d(3, 4, 1), classes=4)
    assert (network.in_channels, network.out_channels, network.scale) == (3, 4, 1)
    assert network(torch.rand(1, 3, 2, 2)).shape == (1, 4, 2, 2)


def test_the_statistics_of_a_network_of_another_library_follow_within_a_short_training():
    slow = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1, momentum=0.01))
    network, frames = with_facts(slow, classes=1), 1e-3 * torch.rand(4, 3, 8, 8)
    for _ in range(100):
        network(frames)
    assert float(network[1].running_var) < 1e-3
