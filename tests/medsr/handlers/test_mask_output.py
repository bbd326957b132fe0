from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr.errors import OutputError
from medsr.handlers.image_output import image_facts
from medsr.handlers.mask_output import frame_facts, segmented_pair_facts, write_frame_result
from medsr.handlers.qc_frame import class_overlay
from medsr.io.loading import LoadImageFiled
from monai.data import MetaTensor
from PIL import Image


def loaded(path: Path, pixels: np.ndarray, **settings: Any) -> dict[str, Any]:
    Image.fromarray(pixels).save(path, **settings)
    item = LoadImageFiled(keys="image")({"image": str(path), "case": path.stem})
    mask = torch.zeros(1, *pixels.shape[:2], dtype=torch.uint8)
    mask[:, 1:4, 2:6] = 2
    # As CopyItemsd leaves them: equal, but not one object.
    return {**item, "pred": MetaTensor(mask), "overlay": MetaTensor(mask.clone())}


@pytest.mark.parametrize(
    "pixels",
    [np.full((9, 8, 3), 100, np.uint8), np.full((9, 8), 100, np.uint8), np.full((9, 8), 30000, np.uint16)],
    ids=["colour", "grey", "grey16"],
)
def test_an_index_for_programs_and_an_overlay_for_people(tmp_path, pixels):
    item = loaded(tmp_path / "a.png", pixels)
    for key in ("pred", "overlay"):
        write_frame_result(tmp_path / f"{key}.png", item[key], item)
    with Image.open(tmp_path / "pred.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), item["pred"][0].numpy())
    with Image.open(tmp_path / "overlay.png") as image:
        assert image.mode == "RGB"
        found = np.moveaxis(np.asarray(image), -1, 0)
    expected = class_overlay(item["image"], item["pred"]).numpy()
    assert np.abs(found / 255 - expected).max() <= 0.5001 / 255
    assert len(np.unique(found.reshape(3, -1), axis=1).T) == 3  # background, inside, outline


def test_every_index_survives(tmp_path):
    item = loaded(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    item["pred"] = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    write_frame_result(tmp_path / "all.png", item["pred"], item)
    with Image.open(tmp_path / "all.png") as image:
        assert np.asarray(image).ravel().tolist() == list(range(256))


def test_an_enlarged_view_is_encoded_as_its_input(tmp_path):
    item = loaded(tmp_path / "a.png", np.zeros((9, 8), np.uint16), dpi=(100, 100))
    item["superres_left"] = torch.rand(1, 18, 16)
    write_frame_result(tmp_path / "out.png", item["superres_left"], item)
    with Image.open(tmp_path / "out.png") as image:
        assert (image.size, image.mode) == ((16, 18), "I;16")
        assert image.info["dpi"] == pytest.approx((200, 200), abs=1)
    item["superres_left"][0, 0, 0] = float("nan")
    with pytest.raises(OutputError):
        write_frame_result(tmp_path / "bad.png", item["superres_left"], item)
    assert not (tmp_path / "bad.png").exists()


def test_facts_tell_sizes_and_shares(tmp_path):
    item = loaded(tmp_path / "a.png", np.zeros((9, 8, 3), np.uint8))
    names = ["background", "shaft", "wrist"]
    shares = {"background": 0.833333, "shaft": 0.0, "wrist": 0.166667}
    facts = frame_facts(item, classes=names)
    assert facts == {**image_facts(item), "area_share": shares}
    assert facts["output_size"] == [9, 8]
    item["image"].meta["disparity_px"] = 7.0
    item |= {"superres": torch.rand(3, 18, 16), "seg_left": item["pred"], "seg_right": torch.zeros(1, 9, 8)}
    facts = segmented_pair_facts(item, classes=dict.fromkeys(names))
    assert facts["output_size"] == [18, 16]
    assert facts["disparity_px"] == 7.0
    assert facts["area_share_left"] == shares
    assert facts["area_share_right"] == {"background": 1.0, "shaft": 0.0, "wrist": 0.0}
