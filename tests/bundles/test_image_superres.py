"""The three single-image bundles: one shared text, from sharp images to weights, to enlarged images, to the table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr import catalog
from medsr.handlers.training import save_weights
from medsr.networks.fmen import FMEN
from medsr.networks.srgan import SRResNet
from medsr.networks.vdsr import VDSR
from PIL import Image

pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]

FMEN_NAME, VDSR_NAME, SRGAN_NAME = NAMES = (
    "image_fmen_superres",
    "image_vdsr_superres",
    "image_srgan_superres",
)
TINY: Mapping[str, Mapping[str, Any]] = {
    FMEN_NAME: {"features": 8, "mid_features": 7, "down_blocks": 1, "up_blocks": [1, 1]},
    VDSR_NAME: {"layers": 3, "features": 8},
    SRGAN_NAME: {"blocks": 1, "features": 8},
}
NETWORK = {FMEN_NAME: FMEN, VDSR_NAME: VDSR, SRGAN_NAME: SRResNet}
TRAINING = ("crop_size=32", "batch_size=2", "iterations=2")


def words(settings: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{prefix}{key}={json.dumps(value)}" for key, value in settings.items())


def tiny(name: str, config: str) -> tuple[str, ...]:
    """Settings that make the network of a bundle tiny; where they are none of a config, its arguments."""
    known = catalog.read_settings(catalog.bundle_root(name), config)
    settings = words(TINY[name], "" if set(TINY[name]) <= set(known) else "network_def::")
    # tqdm, once imported, shows its bars in a quiet run as well.
    return (*settings, "inferer::progress=false") if config == "inference.json" else settings


def picture(size: tuple[int, int] = (40, 44)) -> np.ndarray:
    """Coloured stripes and a bright square."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    stripes = np.stack([np.sin(rows / 3), np.sin(columns / 4), np.sin((rows + columns) / 5)], -1)
    pixels = 120 + 60 * stripes
    pixels[8:14, 8:14] = 240
    return np.uint8(pixels)


@pytest.fixture
def sharp(tmp_path: Path) -> Path:
    folder = tmp_path / "sharp"
    folder.mkdir()
    Image.fromarray(picture()).save(folder / "one.png")
    # Narrower than a crop: it is reflected at its border.
    Image.fromarray(picture((20, 50))).save(folder / "two.png")
    return folder


@pytest.fixture
def random_weights(tmp_path: Path) -> Callable[..., Path]:
    """Write weights of a tiny network that was not trained."""

    def write(name: str, **changes: Any) -> Path:
        torch.manual_seed(0)
        form = {"fused": True} if name == FMEN_NAME else {}
        path = tmp_path / "random" / "model.pt"
        path.parent.mkdir(exist_ok=True)
        save_weights(NETWORK[name](**{**TINY[name], **form, **changes}).state_dict(), path)
        return path

    return write


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# --- One text -----------------------------------------------------------------------------------------------

OWN_OF_TRAINING = {
    "_desc_",
    "imports",
    "bundle_root",
    "network_def",
    "saved_form",
    "crop_size",
    "learning_rate",
}
"""What distinguishes the trainings: a comparison of the networks must not compare anything else.

The crop is smaller for VDSR, which computes on the fine grid: else it takes few steps in the minutes of the others.
"""

OWN = {
    "train.json": OWN_OF_TRAINING,
    "inference.json": {"_desc_", "bundle_root", "network_def"},
    "evaluate.json": set(),
    "multi_gpu_train.json": set(),
}


@pytest.mark.parametrize("config", OWN)
def test_the_bundles_share_one_text(config):
    found = {name: catalog.read_settings(catalog.bundle_root(name), config) for name in NAMES}
    shared = [
        {key: value for key, value in found[name].items() if key not in OWN[config] | set(TINY[name])}
        for name in NAMES
    ]
    assert shared[0] == shared[1] == shared[2]
    # The order in which they are read, too.
    assert [*shared[0]] == [*shared[1]] == [*shared[2]]


def test_what_differs_is_the_network():
    found = {name: catalog.read_settings(catalog.bundle_root(name), "train.json") for name in NAMES}
    imports = {name: set(found[name]["imports"]) for name in NAMES}
    assert imports[VDSR_NAME] == imports[SRGAN_NAME]
    assert imports[FMEN_NAME] - imports[VDSR_NAME] == {"$import medsr.networks.fmen as fmen"}
    assert imports[VDSR_NAME] < imports[FMEN_NAME]
    for settings in found.values():
        definition = settings["network_def"]
        assert (definition["scale"], definition["channels"]) == ("@scale", "@channels")
        # All of them start from interpolation, so that none spends its minutes on learning it.
        assert definition["interpolation_start"] is True


# --- From images to images ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scale", [4, 2])
@pytest.mark.parametrize("name", NAMES)
def test_from_sharp_images_to_enlarged_ones(medsr_here, sharp, tmp_path, name, scale):
    trained, out = tmp_path / "trained", tmp_path / "out"
    settings = (*tiny(name, "train.json"), *TRAINING, f"scale={scale}")
    assert medsr_here(name, sharp, out=trained, config=("train.json",), settings=settings) == (0, [])
    record = json.loads((trained / "train_record.json").read_text())
    assert record["iterations"] == 2
    assert set(record["history"][0]) >= {"l1"}

    weights = trained / "model.pt"
    settings = (*tiny(name, "inference.json"), f"scale={scale}", f"weights={weights}")
    assert medsr_here(name, sharp, out=out, settings=(*settings, "ensemble=true")) == (0, [])
    for case, (width, height) in {"one": (44, 40), "two": (50, 20)}.items():
        for what in ("superres", "uncertainty"):
            with Image.open(out / f"{case}_{what}.png") as image:
                assert image.size == (scale * width, scale * height)
        facts = report_of(out)["cases"][case]
        assert facts["output_size"] == [scale * height, scale * width]
        assert facts["members"] == 8
        # Training starts from interpolation, which is not far from the image.
        assert facts["data_consistency_db"] > 15

    again = (*tiny(name, "train.json"), *TRAINING, f"scale={scale}")
    again += (f"initial_weights={trained / 'training' / 'model.pt'}",)
    assert medsr_here(name, sharp, out=tmp_path / "again", config=("train.json",), settings=again) == (0, [])


@pytest.mark.slow
def test_trained_and_merged_form_give_one_image(medsr_here, sharp, tmp_path):
    trained = tmp_path / "trained"
    settings = (*tiny(FMEN_NAME, "train.json"), *TRAINING)
    assert medsr_here(FMEN_NAME, sharp, out=trained, config=("train.json",), settings=settings) == (0, [])
    images = {}
    for form, fused in (("model.pt", "true"), ("training/model.pt", "false")):
        out = tmp_path / fused
        settings = (*tiny(FMEN_NAME, "inference.json"), f"weights={trained / form}")
        settings += (f"network_def::fused={fused}",)
        assert medsr_here(FMEN_NAME, sharp, out=out, settings=settings) == (0, [])
        images[fused] = pixels_of(out / "one_superres.png")
    difference = np.abs(images["true"] - images["false"])
    # A value on the edge between two grey levels may fall to either side.
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.01


@pytest.mark.slow
def test_srgan_plays_on_from_trained_weights(medsr_here, sharp, tmp_path, random_weights):
    start = random_weights(SRGAN_NAME)
    before = start.read_bytes()
    out = tmp_path / "gan"
    settings = (*tiny(SRGAN_NAME, "train.json"), *TRAINING, f"initial_weights={start}")
    config = ("train.json", "train_gan.json")
    assert medsr_here(SRGAN_NAME, sharp, out=out, config=config, settings=settings) == (0, [])
    history = json.loads((out / "train_record.json").read_text())["history"]
    assert set(history[0]) >= {"l1", "adversarial", "discriminator"}
    assert (out / "model.pt").read_bytes() != before
    settings = (*tiny(SRGAN_NAME, "inference.json"), f"weights={out / 'model.pt'}")
    assert medsr_here(SRGAN_NAME, sharp, out=tmp_path / "out", settings=settings) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_interpolation_and_networks(medsr_here, sharp, tmp_path, random_weights, name):
    weights = random_weights(name)
    settings = (*tiny(name, "inference.json"), f"weights={weights}")
    settings += (f'compare={{"again": "{weights}"}}',)
    out = tmp_path / "table"
    assert medsr_here(
        name, sharp, out=out, config=("inference.json", "evaluate.json"), settings=settings
    ) == (0, [])
    found = json.loads((out / "images.json").read_text())
    rows, made_by = found["rows"], found["run"]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {made_by["sha256"]["network"], made_by["sha256"]["again"]} == {digest}
    assert made_by["settings"]["scale"] == 4
    assert {row["method"] for row in rows} == {"bicubic", "lanczos", "network", "again"}
    assert {row["protocol"] for row in rows} == {"psnr-v1:y:border4:full:u8", "psnr-v1:rgb:border0:full:u8"}
    assert {row["case"] for row in rows} == {"one", "two"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_grey_images_can_have_a_network_of_their_own(medsr_here, tmp_path, name):
    sharp, trained, out = tmp_path / "sharp", tmp_path / "trained", tmp_path / "out"
    sharp.mkdir()
    Image.fromarray(np.uint16(picture()[..., 0]) * 257).save(sharp / "slice.png")
    settings = (*tiny(name, "train.json"), *TRAINING, "channels=1")
    assert medsr_here(name, sharp, out=trained, config=("train.json",), settings=settings) == (0, [])
    settings = (*tiny(name, "inference.json"), f"weights={trained / 'model.pt'}", "channels=1")
    assert medsr_here(name, sharp, out=out, settings=settings) == (0, [])
    with Image.open(out / "slice_superres.png") as image:
        assert (image.mode, image.size) == ("I;16", (176, 160))
    assert not report_of(out)["cases"]["slice"].get("warnings")


@pytest.mark.slow
def test_srgan_takes_the_feature_loss_of_its_paper_where_there_is_a_file(
    medsr_here, sharp, tmp_path, vgg19_file
):
    file, digest = vgg19_file
    settings = (
        *tiny(SRGAN_NAME, "train.json"),
        *TRAINING,
        "crop_size=64",
        "iterations=1",
        f"vgg19_weights={file}",
    )
    both, out = ("train.json", "train_gan.json"), tmp_path / "trained"
    status, lines = medsr_here(SRGAN_NAME, sharp, out=out, config=both, settings=settings)
    assert status != 0
    assert "needs the sha256 of its file" in lines[-1]
    right = (*settings, f"vgg19_sha256={digest}")
    assert medsr_here(SRGAN_NAME, sharp, out=out, config=both, settings=right) == (0, [])
    record = json.loads((out / "train_record.json").read_text())
    assert record["settings"]["loss"]["feature_weight"] == 1.0
    assert "feature" in record["history"][-1]


# --- Bad input; the other bundles run the same code ---------------------------------------------------------


@pytest.mark.slow
def test_bad_files_do_not_stop_the_others(medsr_here, tmp_path, random_weights):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    Image.fromarray(picture((12, 16))).save(data / "good.png")
    Image.fromarray(picture((12, 16))[..., 0]).save(data / "grey.png")
    Image.fromarray(picture((12, 16))).convert("CMYK").save(data / "cmyk.jpg")
    (data / "cut.png").write_bytes((data / "good.png").read_bytes()[:150])
    settings = (*tiny(VDSR_NAME, "inference.json"), f"weights={random_weights(VDSR_NAME)}")
    status, errors = medsr_here(VDSR_NAME, data, out=out, settings=settings)
    assert status != 0
    cases = report_of(out)["cases"]
    assert {name for name, case in cases.items() if case["status"] == "done"} == {"good", "grey"}
    for name in ("cmyk", "cut"):
        assert cases[name]["reason"].startswith(name)
        assert not list(out.glob(f"{name}*"))
    assert not any("Traceback" in line for line in errors)
    with Image.open(out / "grey_superres.png") as image:
        assert (image.mode, image.size) == ("L", (64, 48))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_scale_are_refused(medsr_here, sharp, tmp_path, random_weights, name):
    out = tmp_path / "out"
    settings = (*tiny(name, "inference.json"), f"weights={random_weights(name, scale=2)}")
    status, (line,) = medsr_here(name, sharp, out=out, settings=settings)
    assert status != 0
    assert line.startswith("medsr: error: model.pt")
    assert not list(out.glob("*.png"))
