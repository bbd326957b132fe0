"""Trainings of the bundles that were interrupted: they go on to the weights of one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medsr import catalog
from medsr.handlers.training import GradientGuard
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]

IMAGES = ("crop_size=32", "batch_size=2", "iterations=5")
SEGMENTATION = ("width=2", "patch_size=[24,24,4]", "block_size=[24,24,20]", "iterations=5")
TRAININGS = {
    "vdsr": (
        "image_vdsr_superres",
        ("train.json",),
        (*IMAGES, "network_def::layers=3", "features=8", "recycle_at=[2,5]"),
    ),
    "se_gan": (
        "retina_segan_superres",
        ("train.json", "segan.json", "train_gan.json"),
        (*IMAGES, "features=8", "blocks=1", "reduction=4", "discriminator_def::features=8"),
    ),
    "frames": (
        "endoscopy_segsrnet_segmentation",
        ("train.json",),
        ("encoder=resnet18", "width=4", "longest=48", "crop_size=[32,32]", "batch_size=2", "iterations=5"),
    ),
    "planes": (
        "mri_rehrseg_superres",
        ("train.json", "train_planes.json"),
        ("block_size=[24,2,40]", "batch_size=2", "ratio=[2,4]", "iterations=5"),
    ),
    "segmentation": ("mri_rehrseg_segmentation", ("train.json", "train_plain.json"), SEGMENTATION),
}


@pytest.fixture
def data(
    tmp_path: Path, phantom: Callable[..., Path], phantom_mask: Callable[..., Path]
) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        folder = tmp_path / "data"
        if name.startswith("mri"):
            phantom(folder / "images" / "head.nii.gz", 1)
            phantom(folder / "other.nii.gz", 1)
        else:
            labelled = name.endswith("segmentation")
            images = folder / "images" if labelled else folder
            images.mkdir(parents=True)
            for seed in range(3):
                pixels = np.random.default_rng(seed).integers(0, 255, (40, 44, 3), np.uint8)
                Image.fromarray(pixels).save(images / f"{seed}.png")
                if labelled:
                    (folder / "labels").mkdir(exist_ok=True)
                    Image.fromarray(np.uint8(pixels[..., 0] > 150) * 10).save(
                        folder / "labels" / f"{seed}.png"
                    )
        if name == "mri_rehrseg_segmentation":
            phantom_mask(folder / "labels" / "head.nii.gz", 1)
        return folder

    return write


@pytest.fixture
def train(medsr_here: Callable[..., Any], data: Callable[[str], Path]) -> Callable[..., Any]:
    """Run a training into a folder, with its state written after every iteration."""

    def run(training: str, source: Path, out: Path, *more: str) -> tuple[int, list[str]]:
        name, config, settings = TRAININGS[training]
        last = len(catalog.read_settings(catalog.bundle_root(name), "train.json")["train"]["handlers"]) - 1
        settings = (*settings, f"train::handlers::{last}::minutes=0", *more)
        status, lines = medsr_here(name, source, out=out, config=config, settings=settings)
        return int(status), lines

    return run


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Press Ctrl-C in the middle of an iteration, between gradient and step."""
    guard = GradientGuard.__call__

    def guarded(self, engine) -> None:
        if getattr(engine, "state", None) and engine.state.iteration == at:
            raise KeyboardInterrupt
        guard(self, engine)

    monkeypatch.setattr(GradientGuard, "__call__", guarded)


@pytest.mark.parametrize("training", TRAININGS)
def test_a_resumed_training_gives_the_same_weights(training, train, data, tmp_path, monkeypatch):
    source = data(TRAININGS[training][0])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(training, source, whole) == (0, [])
    assert not (whole / "training_state.pt").exists()

    with monkeypatch.context() as patch:
        interrupt(patch, at=4)
        status, _ = train(training, source, parts)
    assert status != 0
    assert (parts / "training_state.pt").exists()
    assert (parts / "SHA256SUMS").read_text() != (whole / "SHA256SUMS").read_text()

    status, lines = train(training, source, parts, "resume=true", "seed=1", "average_momentum=0.5")
    assert (status, len(lines)) == (4, 1)
    assert "training_state.pt: was made with average_momentum 0." in lines[0]
    assert "seed 0, not 1;" in lines[0]

    assert train(training, source, parts, "resume=true", "workers=0", "minutes=600") == (0, [])
    assert (parts / "SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())
