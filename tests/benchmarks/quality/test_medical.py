from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from medsr import catalog
from medsr.io.images import read_image
from medsr.io.writing import write_nifti
from medsr.networks.vdsr import VDSR
from medsr.phantoms import head
from PIL import Image

from benchmarks.quality import medical, medical_folder, stereo_folder
from benchmarks.quality.medical_folder import endoscopy, fundus, slices, volumes, write_photographs

SHARP = np.array([1.0, 1.0, 1.0])


def block(shape: tuple[int, int, int], margin: int) -> torch.Tensor:
    """A head of ones in air."""
    volume = torch.zeros(shape)
    volume[tuple(slice(margin, size - margin) for size in shape)] = 1
    return volume


def test_slices_are_cut_across_sharp_axes_only() -> None:
    volume = block((20, 24, 16), 4)
    sizes = {name[0]: tuple(plane.shape) for name, plane in slices(volume, SHARP)}
    # To the head, and not to the field of view.
    assert sizes == {"x": (1, 16, 8), "y": (1, 12, 8), "z": (1, 12, 16)}
    thick = dict(slices(volume, np.array([1.0, 1.0, 4.0])))
    assert {name[0] for name in thick} == {"z"}
    assert len(thick) == medical_folder.SLICES


def test_what_tests_was_not_trained_on(tmp_path: Path) -> None:
    assert not set(fundus("train")) & set(fundus("test"))
    assert not set(volumes("train")) & set(volumes("test"))
    for folder, _ in stereo_folder.SINGLE.values():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "frame.png").touch()
    train, test = (endoscopy(part, tmp_path) for part in ("train", "test"))
    assert len(train) > len(stereo_folder.SINGLE)
    assert not {Path(name).parts[1] for name in train} & {Path(name).parts[1] for name in test}


def test_photographs_become_grey_and_smaller(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (255, 128, 0)).save(tmp_path / "a photo.png")
    assert write_photographs({"a photo.png": 2.0}, tmp_path, tmp_path / "fundus") == 1
    values = read_image(tmp_path / "fundus-00-a_photo.png").values
    assert values.shape == (1, 10, 20)
    assert 0.3 < values.min() <= values.max() < 0.7


def test_one_field_of_an_interlaced_frame_is_taken_without_its_border(tmp_path: Path) -> None:
    frame = np.zeros((1080, 1920), np.uint8)
    frame[28:1052:2, 320:1600] = 255
    path = Path(stereo_folder.SINGLE["endovis17"][0]) / "frame.png"
    (tmp_path / path).parent.mkdir(parents=True)
    Image.fromarray(frame).save(tmp_path / path)
    write_photographs({path.as_posix(): 2.0}, tmp_path, tmp_path / "endoscopy")
    values = read_image(tmp_path / "endoscopy-00-frame.png").values
    assert values.shape[1] < 520
    assert values.min() > 0.99


@pytest.mark.parametrize(("bundle", "overlays"), medical.METHODS.values(), ids=medical.METHODS)
def test_every_method_is_a_bundle_with_its_overlays(bundle: str, overlays: list[str]) -> None:
    root = catalog.bundle_root(bundle)
    assert all((root / "configs" / name).is_file() for name in ("inference.json", *overlays))


def test_the_page_compares_all_methods_for_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, affine = head(40)
    (tmp_path / "data").mkdir()
    write_nifti(tmp_path / "data" / "head.nii.gz", volume, affine=affine)
    Image.fromarray((np.random.default_rng(0).random((24, 32, 3)) * 255).astype(np.uint8)).save(
        tmp_path / "data" / "eye.png"
    )
    monkeypatch.setattr(medical_folder, "fundus", lambda part: {"eye.png": 1.0})
    monkeypatch.setattr(medical_folder, "endoscopy", lambda part, data: {})
    monkeypatch.setattr(medical_folder, "volumes", lambda part: ["head.nii.gz"])
    monkeypatch.setattr(medical, "METHODS", {"again": ("a bundle", [])})
    # Before its first step it is bicubic interpolation, of three equal channels here.
    monkeypatch.setattr(
        medical, "shipped_by", lambda *_: VDSR(layers=3, features=4, interpolation_start=True)
    )
    report = tmp_path / "page.md"
    rows = medical.compare(data=tmp_path / "data", report=report)
    assert {(row["method"], row["group"]) for row in rows} == {
        (method, kind) for method in ("bicubic", "lanczos", "again") for kind in ("fundus", "mri")
    }
    assert {row["protocol"] for row in rows} == {medical.PROTOCOL.identifier}
    lines = report.read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    found = {(kind, method): rest for kind, _, method, *rest in cells}
    counts = {kind: count for kind, count, *_ in cells}
    assert (counts["fundus"], counts["mri"]) == ("1", str(3 * medical_folder.SLICES))
    for kind in ("fundus", "mri", "all"):
        assert found[kind, "again"] == found[kind, "bicubic"]
        assert found[kind, "again"] != found[kind, "lanczos"]
