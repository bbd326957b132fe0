"""Stereo super-resolution: from sharp pairs to weights, to enlarged pairs, to the table that compares them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr import catalog
from medsr.handlers.training import save_weights
from medsr.networks.segsrnet import ipassr
from medsr.networks.stereo_fmen import StereoFMEN
from PIL import Image

NAME = "endoscopy_segsrnet_superres"
pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]

TINY = {"features": 8, "mid_features": 6, "down_blocks": 1, "up_blocks": [1, 1]}
DENSE = {"features": 8, "growth": 4, "fusion_growth": 4, "blocks": 1, "attention_blocks": 1, "reduction": 4}
DENSE |= {"rates": [1]}
NETWORK, DENSE_NETWORK = (tuple(f"{key}={value}" for key, value in one.items()) for one in (TINY, DENSE))
QUIET = ("inferer::progress=false",)
TRAINING = (*NETWORK, "crop_size=[8, 16]", "batch_size=2", "iterations=3")


@pytest.fixture
def medsr(medsr_here: Callable[..., Any]) -> Callable[..., tuple[int, list[str]]]:
    return partial(medsr_here, NAME)


def view(column: int = 0, size: tuple[int, int] = (48, 88), row: int = 0) -> np.ndarray:
    """Coloured waves without a period inside the view, seen from some columns further right or rows further down."""
    rows, columns = np.mgrid[row : size[0] + row, column : size[1] + column]
    waves = np.stack(
        [
            np.sin(rows / 2.3 + columns / 7.1),
            np.cos(columns**2 / 900 + rows / 3.7),
            np.sin(rows**2 / 400 + columns / 5.3),
        ],
        -1,
    )
    return np.uint8(120 + 70 * waves)


def save(folder: Path, case: str, *, disparity: int = 5, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    for side, column in (("left", 0), ("right", disparity)):
        Image.fromarray(view(column, **changes)).save(folder / f"{case}_{side}.png")


@pytest.fixture
def sharp(tmp_path: Path) -> Path:
    save(tmp_path / "sharp", "pig-1")
    save(tmp_path / "sharp", "cup-1", disparity=-3)
    return tmp_path / "sharp"


@pytest.fixture
def weights(tmp_path: Path) -> Callable[..., Path]:
    """Write weights of a tiny network that was not trained."""

    def write(make: Callable[..., torch.nn.Module] = StereoFMEN, scale: int = 4, **changes: Any) -> Path:
        torch.manual_seed(0)
        path = tmp_path / "random" / f"{make.__name__}_x{scale}.pt"
        path.parent.mkdir(exist_ok=True)
        size = {**TINY, "fused": True} if make is StereoFMEN else DENSE
        save_weights(make(scale, **{**size, **changes}).state_dict(), path)
        return path

    return write


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [4, 2])
def test_from_sharp_pairs_to_enlarged_ones(medsr, sharp, tmp_path, scale):
    # A single image learns along.
    Image.fromarray(view()).save(sharp / "single.png")
    trained, out = tmp_path / "trained", tmp_path / "out"
    settings = (*TRAINING, f"scale={scale}")
    assert medsr(sharp, out=trained, config=("train.json",), settings=settings) == (0, [])
    record = json.loads((trained / "train_record.json").read_text())
    assert record["iterations"] == 3
    terms = {"l1", "consistency", "photometric", "smoothness", "cycle"}
    assert set(record["history"][0]) >= terms
    assert record["settings"]["loss"]["cycle_weight"] == 0.1

    config = ("inference.json", *([] if scale == 4 else [f"x{scale}.json"]))
    settings = (*NETWORK, *QUIET, f"weights={trained / 'model.pt'}")
    assert medsr(sharp, out=out, config=config, settings=settings) == (0, [])
    cases = report_of(out)["cases"]
    for name, disparity in (("pig-1", 5), ("cup-1", -3), ("single", 0)):
        assert cases[name]["files"] == [
            f"{name}_left_superres.png",
            f"{name}_right_superres.png",
            f"{name}_qc.png",
        ]
        for side in ("left", "right"):
            with Image.open(out / f"{name}_{side}_superres.png") as image:
                assert (image.size, image.mode) == ((88 * scale, 48 * scale), "RGB")
            assert cases[name][f"data_consistency_{side}_db"] > 15
        assert cases[name]["disparity_px"] == disparity
        assert cases[name]["row_residual_px"] < 1
    assert cases["single"]["warnings"] == ["there is no second view: the image was taken for both"]
    assert not cases["pig-1"]["warnings"]


def test_an_ensemble_writes_an_uncertainty_for_each_view(medsr, sharp, weights, tmp_path):
    settings, plain, out = (*NETWORK, *QUIET, f"weights={weights()}"), tmp_path / "plain", tmp_path / "out"
    assert medsr(sharp, out=plain, settings=settings) == (0, [])
    assert medsr(sharp, out=out, settings=(*settings, "ensemble=true")) == (0, [])
    facts = report_of(out)["cases"]["pig-1"]
    assert facts["members"] == 4
    for side in ("left", "right"):
        assert f"pig-1_{side}_uncertainty.png" in facts["files"]
        with Image.open(out / f"pig-1_{side}_uncertainty.png") as image:
            unsure = np.asarray(image) / 65535
        assert unsure.shape == (192, 352)
        assert 0 < unsure.mean() < 0.2
        one, mean = (
            np.asarray(Image.open(folder / f"pig-1_{side}_superres.png"), float) / 255
            for folder in (plain, out)
        )
        # A member is nowhere further from the mean of four than three deviations (plus rounding).
        assert 0 < np.abs(one - mean).mean(-1).max() <= 3 * unsure.max() + 2 / 255
    assert report_of(out)["settings"]["ensemble"] is True


@pytest.mark.slow
@pytest.mark.parametrize("scale", [4, 2])
def test_the_network_as_segsrnet_describes_it_runs_by_overlay(medsr, sharp, tmp_path, scale):
    overlays = [*([] if scale == 4 else ["x2.json"]), "segsrnet.json"]
    settings = (*DENSE_NETWORK, "crop_size=[8, 16]", "iterations=2", f"scale={scale}")
    trained, out = tmp_path / "trained", tmp_path / "out"
    assert medsr(sharp, out=trained, config=("train.json", "segsrnet.json"), settings=settings) == (0, [])
    settings = (*DENSE_NETWORK, *QUIET, f"weights={trained / 'model.pt'}")
    assert medsr(sharp, out=out, config=("inference.json", *overlays), settings=settings) == (0, [])
    with Image.open(out / "pig-1_right_superres.png") as image:
        assert image.size == (88 * scale, 48 * scale)
    shipped = medsr(sharp, out=tmp_path / "shipped", config=("inference.json", *overlays), settings=QUIET)
    assert shipped == (0, [])
    low, high = (
        report_of(one)["cases"]["pig-1"]["data_consistency_left_db"] for one in (out, tmp_path / "shipped")
    )
    assert high > low


@pytest.mark.slow
def test_without_the_maps_only_l1_is_learnt(medsr, sharp, tmp_path):
    settings = (*TRAINING, "sr_only=true", "cross_view=false")
    status, (line,) = medsr(sharp, out=tmp_path / "t", config=("train.json",), settings=settings)
    assert status != 0
    assert "needs sr_only, and balance 0" in line
    settings = (*settings, "balance=0")
    assert medsr(sharp, out=tmp_path / "t", config=("train.json",), settings=settings) == (0, [])
    history = json.loads((tmp_path / "t" / "train_record.json").read_text())["history"]
    assert set(history[0]) == {"iteration", "minutes", "l1"}
    again = (*TRAINING, f"initial_weights={tmp_path / 't' / 'model.pt'}")
    for more, terms in (((), 5), (("sr_only=true",), 1)):
        out = tmp_path / f"again{terms}"
        assert medsr(sharp, out=out, config=("train.json",), settings=(*again, *more)) == (0, [])
        record = json.loads((out / "train_record.json").read_text())
        assert len(set(record["history"][0]) - {"iteration", "minutes"}) == terms
        assert record["settings"]["loss"]["balance"] == 1


@pytest.mark.slow
def test_the_table_has_both_views_one_view_and_the_network_before(medsr, sharp, tmp_path, weights):
    ours, theirs = weights(), weights(ipassr, attention_blocks=0, rates=[])
    settings = (*NETWORK, *QUIET, f"weights={ours}", f'compare={{"again": "{ours}"}}')
    before = ("features=8", "growth=4", "fusion_growth=4", "blocks=1", "reduction=4")
    settings += (f"ipassr_weights={theirs}", *(f"ipassr_def::{one}" for one in before))
    out = tmp_path / "table"
    assert medsr(sharp, out=out, config=("inference.json", "evaluate.json"), settings=settings) == (0, [])
    rows = json.loads((out / "pairs.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"bicubic", "network", "network, one view", "again", "iPASSR"}
    assert {row["protocol"].rpartition(":")[2] for row in rows} == {"both-views", "left-crop64"}
    assert {row["group"] for row in rows} == {"pig", "cup"}
    assert all(row["psnr_db"] > 5 for row in rows)


@pytest.mark.slow
def test_bad_pairs_do_not_stop_the_others(medsr, tmp_path, weights):
    data, out = tmp_path / "data", tmp_path / "out"
    save(data, "good", size=(24, 40))
    for case in ("unequal", "damaged", "alone"):
        save(data, case, size=(24, 40))
    Image.fromarray(view(size=(24, 44))).save(data / "unequal_right.png")
    (data / "damaged_right.png").write_bytes((data / "good_right.png").read_bytes()[:300])
    (data / "alone_left.png").unlink()
    for side in ("left", "right"):
        grey = Image.fromarray(np.uint16(view(size=(24, 40))[..., 0]) * 257)
        grey.save(data / f"grey_{side}.png")
        opaque = np.full((24, 40, 1), 255, np.uint8)
        Image.fromarray(np.dstack([view(size=(24, 40)), opaque])).save(data / f"alpha_{side}.png")
    status, errors = medsr(data, out=out, settings=(*NETWORK, *QUIET, f"weights={weights()}"))
    assert status != 0
    assert not any("Traceback" in line for line in errors)
    cases = report_of(out)["cases"]
    assert {name for name, case in cases.items() if case["status"] == "done"} == {"good", "grey", "alpha"}
    assert cases["alone"]["reason"] == "alone: there is no left view"
    assert "the left view is 3 x 24 x 40, the right one 3 x 24 x 44" in cases["unequal"]["reason"]
    assert cases["damaged"]["reason"].startswith("damaged_right.png")
    for name in ("alone", "unequal", "damaged"):
        assert not list(out.glob(f"{name}*"))
    modes = {}
    for name in ("good", "grey", "alpha"):
        with Image.open(out / f"{name}_right_superres.png") as image:
            modes[name] = image.mode
            assert image.size == (160, 96)
    assert modes == {"good": "RGB", "grey": "I;16", "alpha": "RGB"}


@pytest.mark.slow
def test_rows_that_do_not_match_are_told_and_can_be_shifted(medsr, tmp_path, weights):
    data = tmp_path / "data"
    data.mkdir()
    Image.fromarray(view(row=4)).save(data / "tilted_left.png")
    Image.fromarray(view(3)).save(data / "tilted_right.png")
    settings = (*NETWORK, *QUIET, f"weights={weights()}", "figure=false")
    assert medsr(data, out=tmp_path / "as_it_is", settings=settings) == (0, [])
    case = report_of(tmp_path / "as_it_is")["cases"]["tilted"]
    assert case["row_residual_px"] == pytest.approx(4, abs=0.3)
    assert case["warnings"] == ["rows of the views differ by 4.0 px after a shift of 0; rectify the pair"]
    settings += ("row_shift=estimate",)
    assert medsr(data, out=tmp_path / "shifted", settings=settings) == (0, [])
    case = report_of(tmp_path / "shifted")["cases"]["tilted"]
    assert (case["row_offset_px"], case["output_size"]) == (4, [176, 352])
    assert case["row_residual_px"] < 0.5
    assert not case["warnings"]


@pytest.mark.slow
def test_large_pairs_run_in_bands(medsr, tmp_path, weights):
    data = tmp_path / "data"
    save(data, "tall", size=(150, 24))
    common = (*NETWORK, *QUIET, f"weights={weights()}", "figure=false", "amp=float32")
    images = {}
    for name, limit in (("whole", 10**6), ("bands", 1)):
        assert medsr(data, out=tmp_path / name, settings=(*common, f"max_whole={limit}")) == (0, [])
        with Image.open(tmp_path / name / "tall_left_superres.png") as image:
            images[name] = np.asarray(image).astype(int)
    assert report_of(tmp_path / "bands")["cases"]["tall"]["mode"] == "bands"
    assert abs(images["whole"] - images["bands"]).max() <= 1


@pytest.mark.slow
def test_weights_of_another_scale_are_refused(medsr, sharp, tmp_path, weights):
    settings = (*NETWORK, *QUIET, f"weights={weights(scale=2)}")
    status, (line,) = medsr(sharp, out=tmp_path / "out", settings=settings)
    assert status != 0
    assert "made for another network" in line or "has shape" in line
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_metadata_has_the_numbers_of_the_page_of_results():
    page = (Path(__file__).parents[2] / "docs" / "results-stereo.md").read_text(encoding="utf-8")
    stated = json.loads((catalog.bundle_root(NAME) / "configs" / "metadata.json").read_text())["eval_metrics"]
    for scale in (4, 2):
        part = page.partition(f"## x{scale}\n")[2].partition("\n## ")[0]
        (row,) = (line for line in part.splitlines() if re.match(r"\| all \| \d+ \| network \|", line))
        assert float(row.split("|")[4]) == stated[f"psnr_rgb_both_views_x{scale}_db"]
