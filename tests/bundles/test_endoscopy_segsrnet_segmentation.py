"""Segmentation of frames, and of stereo pairs that are enlarged before: from files to masks, figure and report."""

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
from medsr.inferers.frame_segmentation import FrameSegmentationInferer
from medsr.io.images import read_image
from medsr.networks.spp_linknet import SPPLinkNet
from medsr.networks.stereo_fmen import StereoFMEN
from PIL import Image

NAME = "endoscopy_segsrnet_segmentation"
pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]

TINY = {"encoder": "resnet18", "width": 8}
SUPERRES = {"features": 8, "mid_features": 6, "down_blocks": 1, "up_blocks": [1, 1]}
NETWORK = (*(f"{key}={value}" for key, value in TINY.items()), "longest=64", "amp=float32")
PAIRS = (
    *NETWORK,
    *(f"{key}={value}" for key, value in SUPERRES.items()),
    "inferer::superres::progress=false",
)
TASKS = {"binary": 2, "parts": 4, "type": 8}
SIZE = (45, 70)


@pytest.fixture
def medsr(medsr_here: Callable[..., Any]) -> Callable[..., tuple[int, list[str]]]:
    return partial(medsr_here, NAME)


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Large blobs of colour, so that neighbouring pixels agree."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.fromarray(picture()).save(folder / "pig-1.png")
    return folder


def segmenter(classes: int) -> SPPLinkNet:
    """Not trained, but with a say in every class."""
    torch.manual_seed(classes)
    return SPPLinkNet(1 if classes == 2 else classes, **TINY).eval()


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "classes"), TASKS.items())
def test_a_frame_becomes_a_mask_an_overlay_a_figure_and_a_report(
    medsr, frames, tmp_path, weights, task, classes
):
    out, network = tmp_path / "out", segmenter(classes)
    config = ("inference.json", *([] if task == "binary" else [f"{task}.json"]))
    settings = (*NETWORK, f"weights={weights(network)}")
    assert medsr(frames, out=out, config=config, settings=settings) == (0, [])
    files = ["pig-1_overlay.png", "pig-1_qc.png", "pig-1_seg.png"]
    assert sorted(path.name for path in out.iterdir()) == [*files, "report.json"]

    mask = pixels(out / "pig-1_seg.png")
    image = torch.as_tensor(read_image(frames / "pig-1.png").values)[None]
    sizes = [0.5, 1.0] if task == "parts" else [0.6, 1.0]
    expected = FrameSegmentationInferer(amp="float32", longest=64, sizes=sizes)(image, network)
    assert expected.shape[1] == classes
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, expected[0].argmax(0).numpy())
    assert len(np.unique(mask)) > 1
    drawn = pixels(out / "pig-1_overlay.png")
    assert drawn.shape == (*SIZE, 3)
    assert np.array_equal(drawn[mask == 0], picture()[mask == 0])
    assert not np.array_equal(drawn[mask > 0], picture()[mask > 0])

    report = report_of(out)
    case = report["cases"]["pig-1"]
    assert sorted(case["files"]) == files
    assert next(iter(case["area_share"])) == "background"
    found = np.bincount(mask.ravel(), minlength=classes) / mask.size
    np.testing.assert_allclose(list(case["area_share"].values()), found, atol=1e-6)
    assert (case["network_size"], case["padding"]) == ([41, 64], [23, 0])
    assert report["settings"]["classes"] == list(case["area_share"])
    assert set(report["sha256"]) == {*config, "SPPLinkNet.pt"}


@pytest.mark.slow
def test_bad_frames_do_not_stop_the_others(medsr, frames, tmp_path, weights):
    opaque = np.full((*SIZE, 1), 255, np.uint8)
    Image.fromarray(np.dstack([picture(), opaque])).save(frames / "alpha.png")
    Image.fromarray(np.uint16(picture()[..., 0]) * 257).save(frames / "grey.png")
    (frames / "damaged.png").write_bytes((frames / "pig-1.png").read_bytes()[:300])
    out = tmp_path / "out"
    settings = (*NETWORK, f"weights={weights(segmenter(2))}", "mirror=true")
    status, errors = medsr(frames, out=out, settings=settings)
    assert status != 0
    assert not any("Traceback" in line for line in errors)
    cases = report_of(out)["cases"]
    assert {name for name, case in cases.items() if case["status"] == "done"} == {"pig-1", "alpha", "grey"}
    assert cases["damaged"]["reason"].startswith("damaged.png")
    assert not list(out.glob("damaged*"))
    assert "grey" in cases["grey"]["warnings"][-1]
    assert not cases["alpha"]["warnings"]
    for name in ("alpha", "grey"):
        assert pixels(out / f"{name}_seg.png").shape == SIZE
        assert pixels(out / f"{name}_overlay.png").shape == (*SIZE, 3)
    assert np.array_equal(pixels(out / "alpha_seg.png"), pixels(out / "pig-1_seg.png"))


@pytest.mark.slow
def test_results_and_weights_are_protected(medsr, frames, tmp_path, weights):
    out, path = tmp_path / "out", weights(segmenter(2))
    settings = (*NETWORK, f"weights={path}", "figure=false")
    assert medsr(frames, out=out, settings=settings) == (0, [])
    assert not list(out.glob("*_qc.png"))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    # As after an interruption, what is there stays.
    Image.fromarray(picture()).save(frames / "pig-2.png")
    assert medsr(frames, out=out, settings=settings) == (0, [])
    changed = {path.name for path in out.iterdir() if path.stat().st_mtime_ns != before.get(path.name)}
    assert changed == {"pig-2_seg.png", "pig-2_overlay.png", "report.json"}
    assert set(report_of(out)["cases"]) == {"pig-1", "pig-2"}
    assert medsr(frames, out=out, settings=settings) == (0, [])
    status, (line,) = medsr(frames, out=out, settings=(*settings, "mirror=true"))
    assert status != 0
    assert "is there already, made with mirror false, not true" in line
    assert medsr(frames, out=out, settings=(*settings, "overwrite=true")) == (0, [])
    status, (line,) = medsr(
        frames, out=tmp_path / "parts", config=("inference.json", "parts.json"), settings=settings
    )
    assert status != 0
    assert "has shape" in line
    assert not list((tmp_path / "parts").glob("*.png"))


@pytest.mark.slow
def test_pairs_are_enlarged_and_segmented_in_one_call(medsr, tmp_path, weights):
    data, out, size = tmp_path / "pairs", tmp_path / "out", (20, 36)
    data.mkdir()
    for side, seed in (("left", 0), ("right", 1)):
        Image.fromarray(picture(seed, size)).save(data / f"pig-1_{side}.png")
    Image.fromarray(np.uint16(picture(2, size)[..., 0]) * 257).save(data / "single.png")
    torch.manual_seed(0)
    first = weights(StereoFMEN(2, **SUPERRES, fused=True, interpolation_start=True))
    second = weights(segmenter(4))
    settings = (*PAIRS, f"superres_weights={first}", f"weights={second}", "scale=2")
    config = ("superres_inference.json", "parts.json")
    # What the command line says of the weights goes before the overlay.
    assert medsr(data, out=out, config=config, settings=settings) == (0, [])
    cases = report_of(out)["cases"]
    for name, mode in (("pig-1", "RGB"), ("single", "I;16")):
        results = [f"{name}_{side}_{kind}.png" for kind in ("superres", "seg") for side in ("left", "right")]
        assert cases[name]["files"] == [*results, f"{name}_qc.png"]
        for result in results:
            with Image.open(out / result) as image:
                assert image.size == (72, 40)
                assert image.mode == ("L" if "seg" in result else mode)
        for side in ("left", "right"):
            shares = cases[name][f"area_share_{side}"]
            mask = pixels(out / f"{name}_{side}_seg.png")
            found = np.bincount(mask.ravel(), minlength=4) / mask.size
            np.testing.assert_allclose(list(shares.values()), found, atol=1e-6)
            assert cases[name][f"data_consistency_{side}_db"] > 15
        assert cases[name]["output_size"] == [40, 72]
        assert cases[name]["segmentation"]["network_size"] == [36, 64]
    assert "there is no second view: the image was taken for both" in cases["single"]["warnings"]
    configs = {"parts.json", "superres_inference.json"}
    assert set(report_of(out)["sha256"]) == {*configs, "weights", "superres_weights"}

    # The masks are those of inference.json on the files of the enlarged views, but for their rounding to 8 bits.
    again = tmp_path / "again"
    settings = (*NETWORK, f"weights={second}", "figure=false")
    config = ("inference.json", "parts.json")
    assert medsr(out / "pig-1_left_superres.png", out=again, config=config, settings=settings) == (0, [])
    same = pixels(again / "pig-1_left_superres_seg.png") == pixels(out / "pig-1_left_seg.png")
    assert same.mean() > 0.99

    status, (line,) = medsr(
        data,
        out=tmp_path / "other",
        config=("superres_inference.json", "parts.json"),
        settings=(*PAIRS, f"superres_weights={second}", f"weights={second}", "scale=2"),
    )
    assert status != 0
    assert "made for another network" in line


def test_the_tasks_are_those_of_the_challenge():
    root = catalog.bundle_root(NAME)
    names = {
        task: list(catalog.read_settings(root, config)["classes"])
        for task, config in zip(TASKS, ("inference.json", "parts.json", "type.json"), strict=True)
    }
    assert {task: len(found) for task, found in names.items()} == TASKS
    assert names["binary"] == ["background", "instrument"]
    assert names["parts"] == ["background", "shaft", "wrist", "clasper"]
    superres = catalog.read_settings(root, "superres_inference.json")
    own = catalog.read_settings(root)
    assert superres["classes"] == own["classes"]
    assert superres["segmenter_def"] == own["network_def"]
    # What the other bundle's weights were made with.
    other = catalog.read_settings(catalog.bundle_root("endoscopy_segsrnet_superres"))
    assert superres["superres_def"] == other["network_def"]
    for key in SUPERRES:
        assert superres[key] == other[key]


def test_monai_label_gets_columns_before_rows():
    from monai.bundle import ConfigParser
    from monai.data import MetaTensor

    parser = ConfigParser()
    parser.read_config(str(catalog.bundle_root(NAME) / "configs" / "inference.json"))
    transforms = parser.get_parsed_content("post_transforms")
    probability = torch.rand(2, 6, 8)
    item = transforms({"image": MetaTensor(torch.rand(3, 6, 8)), "pred": probability})
    assert item["pred"].dtype == torch.uint8
    assert torch.equal(item["pred"].as_tensor().T, probability.argmax(0).byte())
