"""From thick scans with masks to masks on thin slices: the pipeline of four commands, and what stops it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr.catalog import bundle_root
from medsr.phantoms import head
from monai.bundle import ConfigParser
from monai.data import MetaTensor

SUPERRES = bundle_root("mri_rehrseg_superres") / "configs"
CONFIGS = bundle_root("mri_rehrseg_segmentation") / "configs"
LABELS = [SUPERRES / name for name in ("train.json", "train_planes.json", "train_labels.json")]
TINY = {"width": 2, "patch_size": [32, 32, 8], "spacing_mm": [1.0, 1.0, 4.0]}
SMALL = {"iterations": 2, "batch_size": 1, "block_size": [32, 32, 44], "nodes": [2, 2], **TINY}

pytestmark = pytest.mark.slow


def write_study(folder: Path, nifti: Callable[..., Path], names: str = "ab") -> Path:
    """Heads of 4 mm slices with a bright ball, which is the mask; its value in the file is 3."""
    sharp, affine = head(48)
    place = np.stack(np.meshgrid(*[np.arange(n) for n in sharp.shape], indexing="ij"), -1)
    for shift, name in enumerate(names):
        ball = np.linalg.norm(place - (22 + shift, 24, 26), axis=-1) < 8
        thick_affine = affine.copy()
        thick_affine[:3, 2] *= 4
        thick_affine[:3, 3] += affine[:3, 2] * 1.5
        image = (sharp + 500 * ball).reshape(48, 48, 12, 4).mean(-1)
        mask = ball.reshape(48, 48, 12, 4).mean(-1) >= 0.5
        nifti(folder / "images" / f"{name}.nii.gz", image.astype(np.float32), thick_affine)
        nifti(folder / "labels" / f"{name}.nii.gz", (3 * mask).astype(np.uint8), thick_affine)
        nifti(folder / "true" / "images" / f"{name}.nii.gz", (sharp + 500 * ball).astype(np.float32), affine)
        nifti(folder / "true" / "labels" / f"{name}.nii.gz", (3 * ball).astype(np.uint8), affine)
    return folder


@dataclass
class Pipeline:
    """Every command once, each on what the one before left."""

    folder: Path
    processes: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def pipeline(
    tmp_path_factory: pytest.TempPathFactory, nifti: Callable[..., Path], monai_run: Callable[..., Any]
) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    study = write_study(folder / "study", nifti)
    done = Pipeline(folder)

    def step(name: str, configs: Any, **settings: Any) -> None:
        done.processes[name] = monai_run(configs, cwd=folder, output_dir=folder / name, **settings)
        assert done.processes[name].returncode == 0, done.processes[name].stderr

    classes = "{'ball': [3]}"
    step("labels", LABELS, dataset_dir=study, classes=classes, iterations=3, batch_size=1)
    teacher = folder / "labels" / "model.pt"
    pseudo = CONFIGS / "make_pseudo.json"
    # Stopped after one case, and started again.
    step("pseudo", pseudo, dataset_dir=study, classes=classes, weights=teacher, leave_out="['b']")
    step("pseudo", pseudo, dataset_dir=study, classes=classes, weights=teacher)
    step("train", CONFIGS / "train.json", dataset_dir=folder / "pseudo", teacher_weights=teacher, **SMALL)
    plain = [CONFIGS / "train.json", CONFIGS / "train_plain.json"]
    step("plain", plain, dataset_dir=folder / "pseudo", **{**SMALL, "block_size": None})
    off = {f"{term}_weight": 0 for term in ("uncertainty", "cosine", "pairwise")}
    step("upper", CONFIGS / "train.json", dataset_dir=study / "true", classes=classes, **off, **SMALL)
    weights = folder / "train" / "model.pt"
    for name, fraction in (("masks", None), ("islands", 0), ("one", 1)):
        found = {"dataset_dir": study / "images", "weights": weights, "min_island_fraction": fraction}
        step(name, CONFIGS / "inference.json", **found, **TINY)
    step(
        "compared",
        [CONFIGS / "inference.json", CONFIGS / "evaluate.json"],
        dataset_dir=study / "true",
        classes=classes,
        weights=weights,
        compare=str({"plain": str(folder / "plain" / "model.pt")}),
        **TINY,
    )
    return done


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel as nib

    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def test_the_teacher_is_the_complete_network_and_says_what_it_learnt(pipeline):
    record = json.loads((pipeline.folder / "labels" / "train_record.json").read_text())
    assert {"l1", "cross_entropy", "dice"} <= set(json.dumps(record).replace('"', " ").split())


def test_pseudo_data_are_a_labelled_folder_on_exact_geometry(pipeline):
    folder = pipeline.folder / "pseudo"
    truth = pipeline.folder / "study" / "true"
    for name in "ab":
        image, affine = load(folder / "images" / f"{name}.nii.gz")
        true_image, true_affine = load(truth / "images" / f"{name}.nii.gz")
        np.testing.assert_allclose(affine, true_affine, atol=1e-4)
        assert image.shape == true_image.shape
        assert np.corrcoef(image.ravel(), true_image.ravel())[0, 1] > 0.95
        label, _ = load(folder / "labels" / f"{name}.nii.gz")
        true_label = load(truth / "labels" / f"{name}.nii.gz")[0] > 0
        assert label.dtype == np.float32
        assert 0 <= label.min() <= label.max() <= 1
        assert 2 * ((label > 0.5) & true_label).sum() / ((label > 0.5).sum() + true_label.sum()) > 0.8
        uncertainty, _ = load(folder / "uncertainty" / f"{name}.nii.gz")
        assert uncertainty.dtype == np.float32
        assert 0 < uncertainty.min() <= uncertainty.max() <= 1


def test_a_stopped_run_goes_on_where_it_was(pipeline):
    report = json.loads((pipeline.folder / "pseudo" / "report.json").read_text())
    assert ["earlier_run" in report["cases"][case] for case in "ab"] == [True, False]


def test_every_term_is_logged_under_its_name(pipeline):
    terms = {name: (pipeline.folder / name / "train_record.json").read_text() for name in ("train", "plain")}
    for term in ("thick_cross_entropy", "thin_cross_entropy", "thin_dice", "cosine", "pairwise"):
        assert term in terms["train"]
    assert "thick_dice" in terms["plain"]
    assert '"cosine":' not in terms["plain"]


@pytest.mark.parametrize(("overlay", "as_acquired"), [(["train_plain.json"], True), ([], False)])
def test_the_plain_network_sees_the_slices_of_the_scan(overlay, as_acquired):
    parser = ConfigParser()
    parser.read_config([CONFIGS / name for name in ("train.json", *overlay)])
    settings = {"slice_profile": "box", "train#prepare_batch#gamma": [1, 1], "train#prepare_batch#noise": 0}
    parser.update({**settings, "train#prepare_batch#brightness": 0, "patch_size": [16, 16, 4]})
    if not as_acquired:
        parser.update({"block_size": [16, 16, 20]})
    cut, prepare = (
        parser.get_parsed_content(f"train#{name}") for name in ("random_transforms#0", "prepare_batch")
    )
    cut.set_random_state(seed=0)
    # Every voxel tells its slice of the scan: a slice that mixes two of them is no whole number.
    slices = torch.arange(12.0).repeat_interleave(4).expand(1, 20, 20, 48)
    item = {"image": MetaTensor(slices.clone()), "label": torch.zeros(1, 20, 20, 48)}
    mixed = 0
    for _ in range(20):
        block = {key: values[None] for key, values in cut(item).items() if key in ("image", "label")}
        thick = prepare(block)[0]
        mixed += not torch.allclose(thick, thick.round(), atol=1e-3)
    assert mixed == 0 if as_acquired else mixed > 5


def test_masks_lie_on_both_grids(pipeline):
    source, affine = load(pipeline.folder / "study" / "images" / "a.nii.gz")
    true_affine = load(pipeline.folder / "study" / "true" / "images" / "a.nii.gz")[1]
    out = pipeline.folder / "masks"
    names = {path.name for path in out.iterdir()}
    expected = ("seg.nii.gz", "seg_lr.nii.gz", "prob.nii.gz", "uncertainty.nii.gz", "qc.png")
    assert names == {"report.json", *(f"{case}_{name}" for case in "ab" for name in expected)}
    thick, thick_affine = load(out / "a_seg_lr.nii.gz")
    assert thick.shape == source.shape
    np.testing.assert_allclose(thick_affine, affine, atol=1e-4)
    assert thick.dtype == np.uint8
    for suffix in ("seg", "prob", "uncertainty"):
        thin, thin_affine = load(out / f"a_{suffix}.nii.gz")
        assert thin.shape == (48, 48, 48)
        np.testing.assert_allclose(thin_affine, true_affine, atol=1e-4)
    uncertainty = load(out / "a_uncertainty.nii.gz")[0]
    assert 0 <= uncertainty.min() <= uncertainty.max() <= 1


@pytest.mark.parametrize(("name", "fraction"), [("islands", 0), ("masks", 0.1), ("one", 1)])
def test_islands_leave_the_masks_and_nothing_else(pipeline, name, fraction):
    from scipy.ndimage import label

    every, out = pipeline.folder / "islands", pipeline.folder / name
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["min_island_fraction"] == fraction
    removed = report["cases"]["a"]["islands_removed"]
    for grid, suffix, voxel_ml in (("thin_grid", "seg", 0.001), ("input_grid", "seg_lr", 0.004)):
        full = load(every / f"a_{suffix}.nii.gz")[0]
        components, count = label(full, np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel(), minlength=1 + count)
        large = [index for index in range(1, 1 + count) if sizes[index] >= fraction * sizes[1:].max()]
        assert np.array_equal(load(out / f"a_{suffix}.nii.gz")[0], full * np.isin(components, large))
        lost = full.sum(dtype=int) - sizes[large].sum()
        assert removed[grid]["1"] == {"islands": count - len(large), "ml": pytest.approx(lost * voxel_ml)}
    # What was removed can be found again: the probability is the network's.
    probability = load(out / "a_prob.nii.gz")[0]
    assert np.array_equal(probability, load(every / "a_prob.nii.gz")[0])
    assert np.array_equal(probability > 0.5, load(every / "a_seg.nii.gz")[0] > 0)


@pytest.mark.parametrize("fraction", ["10", "-1", "nan", "$None", "small"])
def test_a_fraction_that_is_none_is_refused(phantom, tmp_path, medsr_here, fraction):
    scan, settings = phantom(tmp_path / "a.nii.gz"), [f"min_island_fraction={fraction}"]
    status, lines = medsr_here("mri_rehrseg_segmentation", scan, out=tmp_path / "out", settings=settings)
    assert status != 0
    assert len(lines) == 1
    assert "min_island_fraction must be a number" in lines[0]
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_both_networks_are_compared_on_the_same_slices(pipeline):
    found = json.loads((pipeline.folder / "compared" / "masks.json").read_text())
    assert found["min_island_fraction"] == 0.1
    rows = found["rows"]
    assert {row["network"] for row in rows} == {"perfect thick mask", "network", "plain"}
    assert {row["class"] for row in rows} == {"ball"}
    assert sum(row["reading"] == "thin head" for row in rows) == 4


# The thin head of the network for thick slices alone gets no gradient, and no process may wait for one.
@pytest.mark.parametrize("more", [(), ("train_plain.json",)])
def test_two_processes_train_network_and_adapter_together(pipeline, call, more):
    import torch

    out = pipeline.folder / f"together{len(more)}"
    files = [str(CONFIGS / name) for name in ("train.json", *more, "multi_gpu_train.json")]
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    settings = {
        "config_file": files,
        "dataset_dir": pipeline.folder / "pseudo",
        "teacher_weights": pipeline.folder / "labels" / "model.pt",
        "output_dir": out,
        **SMALL,
    }
    process = call([*words, *(word for key, value in settings.items() for word in (f"--{key}", value))])
    assert process.returncode == 0, process.stderr
    state, alone = (
        torch.load(folder / "model.pt", weights_only=True) for folder in (out, pipeline.folder / "train")
    )
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in alone.items()}
    assert json.loads((out / "train_record.json").read_text())["iterations"] == 2


@pytest.mark.parametrize(
    ("config", "spoil", "settings", "fragment"),
    [
        (
            "make_pseudo.json",
            lambda s: (s / "labels" / "a.nii.gz").unlink(),
            {},
            "a has no partner in labels/",
        ),
        ("make_pseudo.json", None, {"leave_out": "['a','b']"}, "no case is left after 2 were left out"),
        ("make_pseudo.json", None, {"weights": "absent.pt"}, "absent.pt: no such weight file"),
        (
            "make_pseudo.json",
            None,
            {"classes": "{'one': [1], 'three': [3]}"},
            "made for another network|has shape",
        ),
        ("train.json", None, {"leave_out": "['c']"}, "c is to be left out, but there is no such case"),
        (
            "train.json",
            None,
            {"teacher_weights": "absent.pt", "classes": "{'ball': [3]}"},
            "absent.pt: no such weight file",
        ),
    ],
)
def test_what_cannot_work_ends_in_one_line(
    pipeline, tmp_path, nifti, monai_run, one_error, config, spoil, settings, fragment
):
    import re

    study = write_study(tmp_path / "study", nifti)
    if spoil:
        spoil(study)
    given = {"weights": pipeline.folder / "labels" / "model.pt"} if config == "make_pseudo.json" else {}
    process = monai_run(
        CONFIGS / config, dataset_dir=study, output_dir=tmp_path / "out", **{**given, **settings}
    )
    assert re.search(fragment, one_error(process))
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_a_bad_mask_is_left_out_and_the_others_go_on(pipeline, tmp_path, nifti, monai_run, one_error):
    study = write_study(tmp_path / "study", nifti)
    mask, affine = load(study / "labels" / "a.nii.gz")
    shifted = affine.copy()
    shifted[2, 3] += 2
    nifti(study / "labels" / "a.nii.gz", mask, shifted)
    process = monai_run(
        CONFIGS / "make_pseudo.json",
        dataset_dir=study,
        output_dir=tmp_path / "out",
        classes="{'ball': [3]}",
        weights=pipeline.folder / "labels" / "model.pt",
    )
    assert process.returncode != 0
    assert "Traceback" not in process.stderr
    assert "label a.nii.gz: lies 2 mm away from image a.nii.gz" in process.stderr
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["b.nii.gz"]


def test_pseudo_data_of_a_label_that_changed_are_replaced_only_if_asked_for(
    pipeline, tmp_path, nifti, monai_run
):
    study = write_study(tmp_path / "study", nifti)
    mask, affine = load(study / "labels" / "a.nii.gz")
    nifti(study / "labels" / "a.nii.gz", mask * (np.arange(48) < 22)[:, None, None], affine)
    out = shutil.copytree(pipeline.folder / "pseudo", tmp_path / "out")
    before = {name: (out / "labels" / f"{name}.nii.gz").read_bytes() for name in "ab"}
    settings = {
        **{"dataset_dir": study, "output_dir": out, "classes": "{'ball': [3]}"},
        "weights": pipeline.folder / "labels" / "model.pt",
    }
    process = monai_run(CONFIGS / "make_pseudo.json", **settings)
    assert process.returncode != 0
    assert "a: " in process.stderr
    assert "made of another input of this name" in process.stderr
    assert {name: (out / "labels" / f"{name}.nii.gz").read_bytes() for name in "ab"} == before
    process = monai_run(CONFIGS / "make_pseudo.json", **settings, overwrite=True)
    assert process.returncode == 0, process.stderr
    assert load(out / "labels" / "a.nii.gz")[0].sum() < 0.8 * load(out / "labels" / "b.nii.gz")[0].sum()


def test_a_value_of_no_class_is_named(pipeline, tmp_path, nifti, monai_run):
    study = write_study(tmp_path / "study", nifti, "a")
    process = monai_run(
        CONFIGS / "make_pseudo.json",
        dataset_dir=study,
        output_dir=tmp_path / "out",
        weights=pipeline.folder / "labels" / "model.pt",
    )
    assert process.returncode != 0
    assert "a.nii.gz: value 3 belongs to no class of foreground [1]" in process.stderr
    shutil.rmtree(study)
