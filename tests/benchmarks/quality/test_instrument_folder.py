from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr.io.masks import find_labelled_frames, read_mask
from medsr.transforms.frame_labels import GreysToClassesd
from PIL import Image

from benchmarks.quality import instrument_folder
from benchmarks.quality.fundus_folder import TRAIN as FUNDUS


def write(root: Path, labels: str, name: str, mask: np.ndarray) -> None:
    """A frame that is white where there is an instrument, and black elsewhere."""
    image = np.isin(mask, [10, 31])[..., None].repeat(3, 2).astype(np.uint8) * 255
    for folder, values in (("images", image), (labels, mask)):
        (root / folder).mkdir(parents=True)
        Image.fromarray(values).save(root / folder / name, compress_level=1)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    mask = np.zeros((1080, 1920), dtype=np.uint8)
    mask[400:700, 800:1300] = 10
    write(tmp_path / "instrument_seg" / "endovis17", "labels_parts", "frame000.png", mask)
    mask = np.full((480, 854), 50, dtype=np.uint8)
    mask[200:300, 400:500] = 31
    mask[[0, -1]] = mask[:, [0, -1]] = 255
    write(tmp_path / "instrument_seg" / "cholecseg8k", "labels_watershed", "frame_1_endo.png", mask)
    outlines = {
        "cholec80-1": {
            "image": "own/a.png",
            "outlines": [[[3, 1], [6, 1], [6, 5], [3, 5]], [[0, 7], [1, 7], [1, 7]]],
        },
        "davinci-1": {"image": "own/b.png", "outlines": []},
    }
    (tmp_path / "outlines.json").write_text(json.dumps(outlines))
    monkeypatch.setattr(instrument_folder, "OUTLINES", tmp_path / "outlines.json")
    (tmp_path / "own").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / "own" / name)
    name = next(iter(FUNDUS))
    monkeypatch.setattr(instrument_folder, "FUNDUS", [name])
    fundus = tmp_path / "retina" / name
    fundus.parent.mkdir(parents=True)
    Image.new("RGB", (1280, 960), (150, 60, 20)).save(fundus)
    return tmp_path


def test_frames_are_reduced_with_their_masks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["instrument_folder", str(output), "--data", str(data)])
    instrument_folder.main()
    items = find_labelled_frames(output / "all")
    names = [item["case"] for item in items]
    assert names == ["cholec-frame_1", "cholec80-1", "davinci-1", "endovis17-frame000"]
    items, outlined = [items[0], items[3]], items[1:3]
    parts = find_labelled_frames(output / "parts")
    assert [item["case"] for item in parts] == ["endovis17-frame000", "fundus-IDRiD_01"]
    no_instrument = read_mask(parts[1]["label"])
    assert no_instrument.shape == (480, 640)
    assert not no_instrument.any()
    greys = [{0, 31, 255}, {0, 10}]
    for item, size, values in zip(items, [(360, 640), (504, 632)], greys, strict=True):
        mask = read_mask(item["label"])
        with Image.open(item["image"]) as picture:
            image = np.asarray(picture)[..., 0]
        assert mask.shape == image.shape == size
        assert set(np.unique(mask)) == values
        np.testing.assert_array_equal((image > 127)[2:-2, 2:-2], np.isin(mask, [10, 31])[2:-2, 2:-2])
        GreysToClassesd("label", instrument_folder.LABEL_MAP)({"label": torch.from_numpy(mask)[None]})
    border = read_mask(items[0]["label"]) == 255
    assert border[[0, -1]].all()
    assert border[:, [0, -1]].all()
    assert not border[1:-1, 1:-1].any()
    drawn, empty = (read_mask(item["label"]) for item in outlined)
    assert drawn.shape == empty.shape == (10, 20)
    assert not empty.any()
    # Columns before rows, the corners included.
    assert (drawn[1:6, 3:7] == 10).all()
    assert (drawn[7, :2] == 10).all()
    assert np.count_nonzero(drawn) == 5 * 4 + 2


def test_the_outlines_lie_inside_their_frames() -> None:
    frames = json.loads(instrument_folder.OUTLINES.read_text(encoding="utf-8"))
    assert len(frames) == 7
    for name, frame in frames.items():
        width, height = (640, 360) if name.startswith("cholec80-") else (512, 512)
        for outline in frame["outlines"]:
            assert len(outline) >= 3
            assert all(0 <= column <= width and 0 <= row <= height for column, row in outline)
