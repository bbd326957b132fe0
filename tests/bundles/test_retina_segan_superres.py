"""Fundus super-resolution: from sharp images to weights, to enlarged images, to the table that compares them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr import catalog
from PIL import Image

NAME = "retina_segan_superres"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]

NETWORK = ("features=8", "mid_features=6", "down_blocks=1", "up_blocks=[1,1]")
# Bars look at the environment when they are first imported, which another test may have done.
QUIET = ("inferer::progress=false",)
TRAINING = (*NETWORK, "crop_size=32", "batch_size=2", "iterations=4")


@pytest.fixture
def medsr(medsr_here: Callable[..., Any]) -> Callable[..., tuple[int, list[str]]]:
    return partial(medsr_here, NAME)


def fundus(size: tuple[int, int] = (48, 56)) -> np.ndarray:
    """Orange disk with dark curves on black."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    inside = (rows - size[0] / 2) ** 2 + (columns - size[1] / 2) ** 2 < (0.45 * min(size)) ** 2
    vessels = 1 - 0.5 * np.exp(-((np.sin(columns / 5) * 6 + size[0] / 2 - rows) ** 2) / 4)
    tissue = (vessels * inside)[..., None] * np.array([200, 110, 50])
    return np.uint8(tissue)


@pytest.fixture
def sharp(tmp_path: Path) -> Path:
    folder = tmp_path / "sharp"
    folder.mkdir()
    for name in ("one-1", "two-1"):
        Image.fromarray(fundus()).save(folder / f"{name}.png")
    return folder


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("scale", [4, 8])
def test_from_sharp_images_to_enlarged_ones(medsr, sharp, tmp_path, scale):
    trained = tmp_path / "trained"
    settings = (*TRAINING, f"scale={scale}")
    assert medsr(sharp, out=trained, config=("train.json",), settings=settings) == (0, [])
    record = json.loads((trained / "train_record.json").read_text())
    assert record["iterations"] == 4
    assert set(record["history"][0]) >= {"l1", "mse"}
    assert record["settings"]["loss"]["perceptual"] == "none"

    adversary = tmp_path / "gan"
    start = f"initial_weights={trained / 'model.pt'}"
    gan = (*settings, start, "warm_up=2")
    assert medsr(sharp, out=adversary, config=("train.json", "train_gan.json"), settings=gan) == (0, [])
    history = json.loads((adversary / "train_record.json").read_text())["history"]
    assert set(history[0]) >= {"l1", "mse", "adversarial", "discriminator"}
    assert (adversary / "model.pt").read_bytes() != (trained / "model.pt").read_bytes()

    out = tmp_path / "out"
    config = ("inference.json", *([] if scale == 4 else [f"x{scale}.json"]))
    weights = (*NETWORK, *QUIET, f"weights={adversary / 'model.pt'}")
    assert medsr(sharp, out=out, config=config, settings=(*weights, "ensemble=true")) == (0, [])
    for name in ("one-1", "two-1"):
        with Image.open(out / f"{name}_superres.png") as image:
            assert (image.size, image.mode) == ((56 * scale, 48 * scale), "RGB")
        with Image.open(out / f"{name}_uncertainty.png") as image:
            assert image.size == (56 * scale, 48 * scale)
        facts = report_of(out)["cases"][name]
        assert facts["output_size"] == [48 * scale, 56 * scale]
        assert facts["members"] == 8
        assert ("notice" in facts) == (scale >= 8)


def test_a_file_of_vgg19_weights_adds_the_feature_term_and_is_checked(medsr, sharp, tmp_path, vgg19_file):
    file, digest = vgg19_file
    settings = (*TRAINING, "iterations=1", f"vgg19_weights={file}")

    status, lines = medsr(sharp, out=tmp_path / "none", config=("train.json",), settings=settings)
    assert status == 4
    assert "needs the sha256 of its file" in lines[-1]
    wrong = (*settings, f"vgg19_sha256={'0' * 64}")
    status, lines = medsr(sharp, out=tmp_path / "none", config=("train.json",), settings=wrong)
    assert status == 3
    assert f"vgg19.pth: its SHA-256 is {digest}, not 000" in lines[-1]

    out = tmp_path / "trained"
    right = (*settings, f"vgg19_sha256={digest}")
    assert medsr(sharp, out=out, config=("train.json",), settings=right) == (0, [])
    record = json.loads((out / "train_record.json").read_text())
    assert record["settings"]["loss"]["feature_weight"] == 1.0
    assert record["settings"]["loss"]["sha256"] == digest
    assert "feature" in record["history"][0]


def test_the_table_has_interpolation_and_networks(medsr, sharp, tmp_path):
    assert medsr(sharp, out=tmp_path / "t", config=("train.json",), settings=TRAINING)[0] == 0
    weights = tmp_path / "t" / "model.pt"
    settings = (*NETWORK, *QUIET, f"weights={weights}", f'compare={{"again": "{weights}"}}')
    out = tmp_path / "table"
    assert medsr(sharp, out=out, config=("inference.json", "evaluate.json"), settings=settings) == (0, [])
    rows = json.loads((out / "images.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"bicubic", "lanczos", "network", "again"}
    assert {row["group"] for row in rows} == {"one", "two"}
    assert all(row["psnr_db"] > 5 for row in rows)


def test_every_encoding_comes_back_and_bad_files_do_not_stop_the_others(medsr, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    pixels = fundus((24, 20))
    Image.fromarray(pixels).save(data / "colour.jpg", quality=95)
    Image.fromarray(np.uint16(pixels[..., 0]) * 257).save(data / "grey16.png")
    Image.fromarray(np.dstack([pixels, np.full((24, 20), 128, np.uint8)])).save(data / "alpha.png")
    Image.fromarray(pixels).convert("P").save(data / "palette.png")
    Image.fromarray(pixels).convert("CMYK").save(data / "cmyk.jpg")
    (data / "cut.png").write_bytes((data / "palette.png").read_bytes()[:200])
    (data / "text.png").write_text("no image")
    status, errors = medsr(data, out=out, settings=QUIET)
    assert status != 0
    cases = report_of(out)["cases"]
    done = {name for name, case in cases.items() if case["status"] == "done"}
    assert done == {"colour", "grey16", "alpha", "palette"}
    for name in ("cmyk", "cut", "text"):
        assert cases[name]["reason"].startswith(name)
        assert not list(out.glob(f"{name}*"))
    assert not any("Traceback" in line for line in errors)
    modes = {}
    for name in done:
        with Image.open(out / f"{name}_superres.png") as image:
            modes[name] = image.mode
            assert image.size == (80, 96)
    assert modes == {"colour": "RGB", "grey16": "I;16", "alpha": "RGBA", "palette": "RGB"}


@pytest.mark.parametrize("scale", [4, 8])
def test_the_published_generator_by_overlay_enlarges_and_goes_on_from_its_weights(
    medsr, sharp, tmp_path, scale
):
    out, trained = tmp_path / "out", tmp_path / "trained"
    scaled = [] if scale == 4 else [f"x{scale}.json"]
    config = ("inference.json", *scaled, "segan.json")
    assert medsr(sharp, out=out, config=config, settings=QUIET) == (0, [])
    with Image.open(out / "one-1_superres.png") as image:
        assert image.size == (scale * 56, scale * 48)
    weights = (
        catalog.bundle_root(NAME) / "models" / "segan" / ("" if scale == 4 else f"x{scale}") / "model.pt"
    )
    settings = (
        "crop_size=32",
        "batch_size=2",
        "iterations=2",
        f"initial_weights={weights}",
        f"scale={scale}",
    )
    assert medsr(sharp, out=trained, config=("train.json", "segan.json"), settings=settings) == (0, [])
    again = (*QUIET, f"weights={trained / 'model.pt'}")
    assert medsr(sharp, out=tmp_path / "again", config=config, settings=again) == (0, [])


def test_weights_of_one_scale_are_a_start_for_another(medsr, sharp, tmp_path):
    first, second = tmp_path / "x4", tmp_path / "x8"
    assert medsr(sharp, out=first, config=("train.json",), settings=TRAINING)[0] == 0
    start = (*NETWORK, "crop_size=32", "batch_size=2", "iterations=1", "learning_rate=1e-9", "scale=8")
    settings = (*start, f"initial_weights={first / 'model.pt'}")
    assert medsr(sharp, out=second, config=("train.json",), settings=settings) == (0, [])
    four, eight = (torch.load(path / "model.pt", weights_only=True) for path in (first, second))
    assert four["tail.weight"].shape[0] * 4 == eight["tail.weight"].shape[0]
    kept = [key for key in four if not key.startswith("tail.")]
    assert len(kept) == len(four) - 2
    assert all(torch.allclose(four[key], eight[key], atol=1e-6) for key in kept)


def test_weights_of_another_scale_are_refused(medsr, sharp, tmp_path):
    weights = catalog.bundle_root(NAME) / "models" / "model.pt"
    out = tmp_path / "out"
    status, (line,) = medsr(
        sharp, out=out, config=("inference.json", "x8.json"), settings=(f"weights={weights}",)
    )
    assert status != 0
    assert "'tail.weight' has shape (48, 50, 3, 3), this network needs (192, 50, 3, 3)" in line
    assert not list(out.glob("*.png"))
