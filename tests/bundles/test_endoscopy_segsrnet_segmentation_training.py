"""Training of frame segmentation: from labelled frames to weights, to the table, over folds, and end to end."""

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
from medsr.engines.frame_comparison import with_facts
from medsr.networks.spp_linknet import SPPLinkNet
from medsr.networks.stereo_fmen import StereoFMEN
from medsr.transforms.drawn_instruments import RandDrawnInstrumentsd
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.networks.nets import FlexibleUNet
from PIL import Image

NAME = "endoscopy_segsrnet_segmentation"
pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]

NETWORK = ("encoder=resnet18", "width=8", "longest=96")
TRAINING = (*NETWORK, "crop_size=[32, 64]", "batch_size=2", "iterations=3")
SUPERRES = {"features": 8, "mid_features": 6, "down_blocks": 1, "up_blocks": [1, 1]}
SUPERRES_SETTINGS = tuple(f"superres_def::{key}={value}" for key, value in SUPERRES.items())
SCALE = 2


@pytest.fixture
def medsr(medsr_here: Callable[..., Any]) -> Callable[..., tuple[int, list[str]]]:
    return partial(medsr_here, NAME)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A bright disc, the instrument, before a dark background; three groups of two frames, with unlabelled pixels."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:72, :90]
    folder = tmp_path / "frames"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for name in ("a-1", "a-2", "b-1", "b-2", "c-1", "c-2"):
        row, column = generator.integers(20, 52), generator.integers(20, 70)
        disc = (rows - row) ** 2 + (columns - column) ** 2 < 15**2
        image = np.where(disc, 220, 60 + 20 * np.sin(columns / 4))
        Image.fromarray(np.uint8(np.stack([image] * 3, -1))).save(folder / "images" / f"{name}.png")
        mask = np.where(disc, np.where(rows < row, 10, 20), 0)
        mask[0] = 255
        Image.fromarray(np.uint8(mask)).save(folder / "labels" / f"{name}.png")
    return folder


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "train_record.json").read_text())


def rows_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "frames.json").read_text())["rows"]


@pytest.mark.slow
def test_from_labelled_frames_to_the_table(medsr, frames, tmp_path):
    trained, out = tmp_path / "trained", tmp_path / "out"
    settings = (*TRAINING, 'leave_out=["c"]')
    assert medsr(frames, out=trained, config=("train.json",), settings=settings) == (0, [])
    record = record_of(trained)
    assert record["iterations"] == 3
    assert set(record["history"][0]) == {"iteration", "minutes", "cross_entropy", "jaccard"}
    assert record["settings"]["leave_out"] == ["c"]
    assert record["settings"]["encoder_weights"] == "random"

    ours, theirs = trained / "model.pt", trained / "model.pt"
    settings = (*NETWORK, f"weights={ours}", f'compare={{"again": "{theirs}"}}', 'groups=["c"]')
    config = ("inference.json", "evaluate.json")
    assert medsr(frames, out=out, config=config, settings=settings) == (0, [])
    rows = rows_of(out)
    assert [(row["case"], row["network"]) for row in rows] == [
        (case, network) for case in ("c-1", "c-2") for network in ("network", "again")
    ]
    assert all(row["input"] == "sharp" for row in rows)
    assert all(0 <= row["iou_present"] <= 1 for row in rows)


@pytest.mark.slow
def test_training_learns_to_find_the_disc(medsr, frames, tmp_path):
    trained, out = tmp_path / "trained", tmp_path / "out"
    settings = (*TRAINING, 'leave_out=["c"]', "iterations=60", "learning_rate=0.01", "average_momentum=0.2")
    assert medsr(frames, out=trained, config=("train.json",), settings=settings) == (0, [])
    settings = (*NETWORK, f"weights={trained / 'model.pt'}", 'groups=["c"]')
    assert medsr(frames, out=out, config=("inference.json", "evaluate.json"), settings=settings) == (0, [])
    assert min(row["iou_present"] for row in rows_of(out)) > 0.5


@pytest.mark.slow
def test_overlays_of_a_task_and_of_the_baseline_fit_training_and_evaluation(medsr, frames, tmp_path):
    overlays = ("parts.json", "flexible_unet.json")
    trained, out = tmp_path / "trained", tmp_path / "out"
    settings, unet = tuple(one for one in TRAINING if one not in NETWORK[1:]), ("backbone=resnet18",)
    # The second folder has the same groups.
    assert medsr(
        frames,
        frames,
        out=trained,
        config=("train.json", *overlays),
        settings=(*settings, *unet, "longest=96"),
    ) == (0, [])
    assert record_of(trained)["settings"]["classes"]["clasper"] == [30]
    state = torch.load(trained / "model.pt", weights_only=True)
    network = FlexibleUNet(3, 4, "resnet18", pretrained=False)
    with_facts(network, 4).load_state_dict(state)
    config = ("inference.json", *overlays, "evaluate.json")
    settings = (*unet, f"weights={trained / 'model.pt'}", 'groups=["a"]')
    assert medsr(frames, out=out, config=config, settings=settings) == (0, [])
    assert set(rows_of(out)[0]["classes"]) == {"shaft", "wrist", "clasper"}


def test_instruments_are_drawn_with_the_classes_of_the_masks(medsr, frames, tmp_path):
    settings = (*TRAINING, "iterations=1", "draw_share=1")
    assert medsr(frames, out=tmp_path / "out", config=("train.json", "parts.json"), settings=settings) == (
        0,
        [],
    )
    assert record_of(tmp_path / "out")["settings"]["draw_share"] == 1
    root = catalog.bundle_root(NAME) / "configs"
    for config, classes in ((["train.json"], (1, 1, 1)), (["train.json", "parts.json"], (1, 2, 3))):
        parser = ConfigParser()
        parser.read_config([root / name for name in config])
        parser["draw_share"] = 0.25
        transforms = parser.get_parsed_content("train#random_transforms")
        (drawing,) = (one for one in transforms if isinstance(one, RandDrawnInstrumentsd))
        assert (drawing.classes, drawing.prob) == (classes, 0.25)
    classes = 'classes={"background": [0], "left": [10], "right": [20]}'
    status, (line,) = medsr(frames, out=tmp_path / "a", config=("train.json",), settings=(*settings, classes))
    assert status != 0
    assert "there are background, left, right: set draw_share to 0" in line
    assert not (tmp_path / "a" / "model.pt").exists()


@pytest.mark.slow
def test_the_study_segments_sharp_bicubic_and_super_resolved_frames(medsr, frames, tmp_path, weights):
    ours = weights(SPPLinkNet(encoder="resnet18", width=8))
    superres = weights(StereoFMEN(SCALE, **SUPERRES, fused=True))
    settings = (
        *NETWORK,
        *SUPERRES_SETTINGS,
        f"weights={ours}",
        f"study_scale={SCALE}",
        f'superres_weights={{"ours": "{superres}"}}',
        'groups=["b"]',
    )
    out = tmp_path / "out"
    assert medsr(frames, out=out, config=("inference.json", "evaluate.json"), settings=settings) == (0, [])
    assert [(row["case"], row["input"]) for row in rows_of(out)] == [
        (case, source) for case in ("b-1", "b-2") for source in ("sharp", "bicubic", "ours")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_both_networks_learn_end_to_end_or_super_resolution_alone(medsr, frames, tmp_path, weights, freeze):
    ours = weights(SPPLinkNet(encoder="resnet18", width=8))
    superres = weights(StereoFMEN(SCALE, **SUPERRES, fused=True))
    settings = (
        *TRAINING,
        *SUPERRES_SETTINGS,
        f"scale={SCALE}",
        f"initial_weights={ours}",
        f"superres_weights={superres}",
        f"freeze_segmenter={str(freeze).lower()}",
    )
    out = tmp_path / "joint"
    assert medsr(frames, out=out, config=("train.json", "train_joint.json"), settings=settings) == (0, [])
    record = record_of(out)
    assert set(record["history"][0]) == {"iteration", "minutes", "segmentation", "l1"}
    assert record["settings"]["freeze_segmenter"] is freeze
    changed = {}
    for name, before in (("model", ours), ("superres", superres)):
        old, new = (torch.load(path, weights_only=True) for path in (before, out / f"{name}.pt"))
        assert list(old) == list(new)
        # The average of equal numbers is equal but for rounding.
        changed[name] = not all(torch.allclose(old[key].float(), new[key].float(), 1e-5, 1e-7) for key in old)
    assert changed == {"model": not freeze, "superres": True}


@pytest.mark.slow
def test_folds_go_on_where_they_stopped(medsr, frames, tmp_path):
    out = tmp_path / "folds"
    config = ("train.json", "cross_validate.json")
    settings = (*TRAINING, 'folds=[["a"], ["b"]]', 'leave_out=["c"]', "iterations=2")
    assert medsr(frames, out=out, config=config, settings=settings) == (0, [])
    result = json.loads((out / "cross_validation.json").read_text())
    assert [fold["groups"] for fold in result["folds"]] == [["a"], ["b"]]
    assert result["over_frames"]["frames"] == 4
    assert result["over_folds"]["folds"] == 2
    assert record_of(out / "fold0" / "training")["settings"]["leave_out"] == ["c", "a"]
    assert {row["group"] for row in rows_of(out / "fold1" / "scores")} == {"b"}

    first = (out / "fold0" / "training" / "model.pt").stat().st_mtime_ns
    (out / "fold1" / "scores").rename(out / "fold1" / "scores.part")
    (out / "cross_validation.json").unlink()
    assert medsr(frames, out=out, config=config, settings=settings) == (0, [])
    assert json.loads((out / "cross_validation.json").read_text()) == result
    assert (out / "fold0" / "training" / "model.pt").stat().st_mtime_ns == first

    status, (line,) = medsr(frames, out=out, config=config, settings=(*settings, "seed=1"))
    assert status != 0
    assert "holds a cross-validation with training::seed 0, not 1" in line
    status, (line,) = medsr(frames, out=out, config=config, settings=(*settings, "optimizer::weight_decay=1"))
    assert status != 0
    assert "optimizer::weight_decay would not reach the folds" in line


@pytest.mark.parametrize(
    ("overlays", "given", "sizes"),
    [([], {}, [0.6, 1.0]), (["parts.json"], {}, [0.5, 1.0]), (["parts.json"], {"sizes": [1.0]}, [1.0])],
)
def test_folds_are_scored_at_the_sizes_of_inference(frames, tmp_path, overlays, given, sizes):
    root = catalog.bundle_root(NAME) / "configs"
    files = [str(root / name) for name in ("train.json", *overlays, "cross_validate.json")]
    settings = {"dataset_dir": str(frames), "overlays": overlays, "folds": 3, **given}
    workflow = ConfigWorkflow(
        files, logging_file=False, workflow_type=None, output_dir=str(tmp_path), **settings
    )
    workflow.initialize()
    folds = workflow.parser.get_parsed_content("cross_validation")
    assert folds.evaluate_settings["mirror"] is False
    scoring = ConfigParser(ConfigParser.load_config_files([str(root / name) for name in folds.evaluate]))
    scoring.update(folds.evaluate_settings)
    assert scoring["sizes"] == sizes


@pytest.mark.slow
def test_two_processes_train_together(frames, tmp_path, call):
    root = catalog.bundle_root(NAME) / "configs"
    files = [str(root / name) for name in ("train.json", "multi_gpu_train.json")]
    words: list[object] = [
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "monai.bundle",
    ]
    words += ["run", "--config_file", files, "--dataset_dir", frames, "--output_dir", tmp_path / "together"]
    for setting in TRAINING:
        key, _, value = setting.partition("=")
        words += [f"--{key}", value]
    process = call(words)
    assert process.returncode == 0, process.stderr
    state = torch.load(tmp_path / "together" / "model.pt", weights_only=True)
    SPPLinkNet(encoder="resnet18", width=8).load_state_dict(state)
    assert record_of(tmp_path / "together")["iterations"] == 3


@pytest.mark.slow
def test_a_group_that_does_not_exist_is_one_line(medsr, frames, tmp_path):
    settings = (*TRAINING, 'leave_out=["d"]')
    status, (line,) = medsr(frames, out=tmp_path / "t", config=("train.json",), settings=settings)
    assert status != 0
    assert "there is no group 'd' in the folders; there are a, b, c" in line
