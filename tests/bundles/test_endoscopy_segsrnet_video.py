"""Stereo video through the command line: a film and a folder of frames become larger ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr.errors import DataError, WeightsError
from medsr.handlers.training import save_weights
from medsr.io.video import read_video_header, write_video
from medsr.networks.stereo_fmen import StereoFMEN
from PIL import Image

TINY = {"features": 8, "mid_features": 6, "down_blocks": 1, "up_blocks": [1, 1]}
VIDEO = ("inference.json", "video.json")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]


@pytest.fixture
def medsr(medsr_here: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """``medsr run`` with a tiny network that was not trained."""

    def run(
        source: Path, *settings: str, scale: int = 4, config: tuple[str, ...] = VIDEO
    ) -> tuple[int, list[str]]:
        torch.manual_seed(0)
        weights = tmp_path / f"x{scale}.pt"
        save_weights(StereoFMEN(scale, **TINY, fused=True).state_dict(), weights)
        network = [f"{key}={value}" for key, value in TINY.items()]
        settings = (*network, f"weights={weights}", "video::progress=false", *settings)
        return partial(medsr_here, "endoscopy_segsrnet_superres")(
            source, out=tmp_path / "out", config=config, settings=settings
        )

    return run


def film(path: Path, *, axis: int = 1) -> Path:
    view = np.random.default_rng(0).random((3, 16, 40)).astype(np.float32)
    with write_video(path, rate=Fraction(25), tick=Fraction(1, 25)) as video:
        for number in range(2):
            video.add(np.roll(np.concatenate([view, np.roll(view, -3, 2)], axis + 1), number, 1), number)
    return path


def case_of(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert {"video.json", "inference.json"} < set(report["sha256"])
    (case,) = report["cases"].values()
    return case


@pytest.mark.parametrize("scale", [4, 2])
def test_a_film_becomes_a_larger_film(medsr, tmp_path, scale):
    config = VIDEO if scale == 4 else ("inference.json", "x2.json", "video.json")
    assert medsr(film(tmp_path / "clip.mkv"), scale=scale, config=config) == (0, [])
    header = read_video_header(tmp_path / "out" / "clip_superres.mkv")
    assert (header.size, header.rate, header.frames) == ((16 * scale, 80 * scale), 25, 2)
    case = case_of(tmp_path / "out")
    assert (case["status"], case["scale"]) == ("done", scale)
    assert case["frames_per_second"] > 0


def test_a_folder_of_frames_becomes_pairs_of_images(medsr, tmp_path):
    frame = np.random.default_rng(0).integers(0, 255, (32, 40, 3), np.uint8)
    (tmp_path / "in").mkdir()
    for name in ("a1", "a2"):
        Image.fromarray(frame).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "a2.png").write_bytes(b"no image")
    status, errors = medsr(tmp_path / "in", "frame_layout=top_bottom")
    assert status == 1
    assert not any("Traceback" in line for line in errors)
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert found == {"left/a1.png", "right/a1.png"}
    with Image.open(tmp_path / "out" / "left" / "a1.png") as image:
        assert image.size == (160, 64)
    case = case_of(tmp_path / "out")
    assert case["status"] == "incomplete"
    assert case["frames_failed"]["a2"].startswith("a2.png: not a PNG")


def test_what_is_wrong_is_one_line(medsr, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    status, lines = medsr(tmp_path / "text.mp4")
    assert (status, len(lines)) == (DataError.exit_code, 1)
    assert "text.mp4: damaged, or no video" in lines[0]
    status, lines = medsr(film(tmp_path / "clip.mkv"), "weights=none.pt")
    assert (status, len(lines)) == (WeightsError.exit_code, 1)
    status, lines = medsr(tmp_path / "clip.mkv", "result=gif")
    assert status != 0
    assert "result must be one of auto, png, mkv, mp4" in lines[-1]
