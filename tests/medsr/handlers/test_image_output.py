from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr.errors import OutputError
from medsr.handlers.image_output import image_facts, pair_facts, write_result
from medsr.io.images import read_image
from medsr.io.loading import LoadImageFiled
from PIL import Image


def loaded(path: Path, pixels: np.ndarray, **settings: Any) -> dict[str, Any]:
    Image.fromarray(pixels).save(path, **settings)
    item = LoadImageFiled(keys="image")({"image": str(path), "case": path.stem})
    size = tuple(4 * n for n in item["image"].shape[1:])
    item["pred"] = torch.rand(item["image"].shape[0], *size, generator=torch.Generator().manual_seed(0))
    return item


@pytest.mark.parametrize(
    ("pixels", "levels"),
    [
        (np.zeros((5, 6, 3), np.uint8), 255),
        (np.zeros((5, 6), np.uint8), 255),
        (np.zeros((5, 6), np.uint16), 65535),
    ],
    ids=["colour", "grey", "grey16"],
)
def test_a_result_is_encoded_as_its_input(tmp_path, pixels, levels):
    item = loaded(tmp_path / "a.png", pixels)
    write_result(tmp_path / "out.png", item["pred"], item)
    again = read_image(tmp_path / "out.png")
    assert again.values.shape == tuple(item["pred"].shape)
    assert np.abs(again.values - item["pred"].numpy()).max() <= 0.5001 / levels
    assert image_facts(item) == {
        "input_size": [5, 6],
        "output_size": [20, 24],
        "bits": 16 if levels > 255 else 8,
        "channels": item["pred"].shape[0],
    }


def test_dots_per_inch_and_alpha_grow_with_the_image(tmp_path):
    pixels = np.zeros((5, 6, 4), np.uint8)
    pixels[:, :3, 3] = 255
    item = loaded(tmp_path / "a.png", pixels, dpi=(100, 100))
    write_result(tmp_path / "out.png", item["pred"], item)
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "RGBA"
        assert image.info["dpi"] == pytest.approx((400, 400), abs=1)
        alpha = np.asarray(image)[..., 3]
    assert (alpha[:, :8] == 255).all()
    assert (alpha[:, -8:] == 0).all()


@pytest.mark.parametrize("key", ["uncertainty", "uncertainty_left"])
def test_the_uncertainty_keeps_sixteen_bits(tmp_path, key):
    item = loaded(tmp_path / "a.png", np.zeros((5, 6, 3), np.uint8))
    item[key] = torch.full((1, 20, 24), 0.0123)
    write_result(tmp_path / "out.png", item[key], item)
    with Image.open(tmp_path / "out.png") as image:
        assert np.asarray(image).max() == round(0.0123 * 65535)


def test_a_result_that_is_not_finite_is_not_written(tmp_path):
    item = loaded(tmp_path / "a.png", np.zeros((5, 6, 3), np.uint8))
    item["pred"][0, 0, 0] = float("nan")
    with pytest.raises(OutputError):
        write_result(tmp_path / "out.png", item["pred"], item)
    assert not (tmp_path / "out.png").exists()


def test_a_pair_says_how_its_rows_lie(tmp_path):
    item = loaded(tmp_path / "a.png", np.zeros((5, 6, 3), np.uint8))
    item["image"].meta |= {"row_offset_px": 2, "row_residual_px": 0.456, "disparity_px": torch.tensor(7.0)}
    facts = pair_facts(item)
    assert facts == {
        **image_facts(item),
        # With the rows that were cut off.
        "input_size": [7, 6],
        "row_offset_px": 2.0,
        "row_residual_px": 0.46,
        "disparity_px": 7.0,
    }
