from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from medsr.geometry import rescaled_size
from nibabel.orientations import axcodes2ornt, ornt_transform

from benchmarks.quality import thick_folder
from benchmarks.quality.thick_folder import STUDIES, Source, write_study, written_classes

CODES = {"a": [7], "b": [3, 4]}


@pytest.fixture
def anatomy() -> tuple[np.ndarray, np.ndarray]:
    """Image and mask in RAS order, unlike along every axis."""
    x, y, z = np.meshgrid(*(np.arange(float(n)) for n in (12, 10, 16)), indexing="ij")
    mask = np.zeros((12, 10, 16), np.uint8)
    mask[1:4, 2:9, :8], mask[6:9, 1:4, 4:12], mask[9:11, 5:8, 8:] = 7, 3, 4
    mask[11, 9] = 99
    return (x + 20 * y + 400 * z).astype(np.float32), mask


def stored(folder: Path, values: tuple[np.ndarray, np.ndarray], codes: str, *, silent: bool = False) -> Path:
    """Save image and mask with their axes in another order; ``silent`` with a header that does not tell."""
    folder.mkdir()
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    for name, one in zip(("image", "mask"), values, strict=True):
        file = nib.Nifti1Image(one, np.eye(4)).as_reoriented(turn)
        affine = np.eye(4) if silent else file.affine
        nib.save(nib.Nifti1Image(np.asarray(file.dataobj), affine), folder / f"{name}.nii.gz")
    return folder


def written(folder: Path, kind: str) -> np.ndarray:
    return np.asarray(nib.load(folder / kind / "case.nii.gz").dataobj)


@pytest.mark.parametrize("silent", [False, True])
def test_slices_are_axial_however_the_file_is_stored(tmp_path, monkeypatch, anatomy, silent):
    found = []
    for codes in ("RAS", "LIA"):
        source = Source("image.nii.gz", "mask.nii.gz", CODES, axes=codes if silent else None)
        monkeypatch.setitem(STUDIES, "tested", {"case": source})
        data = stored(tmp_path / codes, anatomy, codes, silent=silent)
        write_study("tested", tmp_path / f"{codes}_out", data, ratio=4)
        found.append(tmp_path / f"{codes}_out")
    for kind in ("images", "labels", "true/images", "true/labels"):
        first, second = (written(folder, kind) for folder in found)
        assert np.array_equal(first, second), kind
    assert np.array_equal(written(found[1], "true/images"), anatomy[0])
    assert written(found[1], "images").shape == (12, 10, 4)


def test_classes_are_numbered_and_other_values_are_background(tmp_path, monkeypatch, anatomy):
    monkeypatch.setitem(STUDIES, "tested", {"case": Source("image.nii.gz", "mask.nii.gz", CODES)})
    write_study("tested", tmp_path / "out", stored(tmp_path / "data", anatomy, "RAS"), ratio=4)
    mask = anatomy[1]
    expected = np.select([mask == 7, np.isin(mask, (3, 4))], [1, 2], 0)
    assert np.array_equal(written(tmp_path / "out", "true/labels"), expected)
    assert written_classes("tested") == {"a": [1], "b": [2]}
    # Every boundary along the slices lies between two slabs of four.
    assert np.array_equal(written(tmp_path / "out", "labels"), expected[..., ::4])


@pytest.mark.parametrize("size", range(38, 44))
def test_thick_and_true_slices_share_one_centre_at_any_ratio(tmp_path, monkeypatch, size):
    monkeypatch.setitem(STUDIES, "tested", {"case": Source("image.nii.gz", "mask.nii.gz")})
    z = np.arange(float(size))
    values = np.broadcast_to(z, (4, 5, size)).astype(np.float32)
    data = stored(tmp_path / "data", (values, (values > 20).astype(np.uint8)), "RAS")
    write_study("tested", tmp_path / "out", data, ratio=3.5)
    files = {kind: nib.load(tmp_path / "out" / kind / "case.nii.gz") for kind in ("images", "true/images")}
    for file in files.values():
        # A ramp of world coordinates: every slice tells where it is.
        place = file.affine[2, 2] * np.arange(file.shape[-1]) + file.affine[2, 3]
        np.testing.assert_allclose(np.asarray(file.dataobj)[2, 2, 1:-1], place[1:-1], atol=0.05)
    assert files["true/images"].shape[-1] == rescaled_size(files["images"].shape[-1], 3.5)
    for kind in ("labels", "true/labels"):
        file = nib.load(tmp_path / "out" / kind / "case.nii.gz")
        np.testing.assert_allclose(file.affine, files[kind.replace("labels", "images")].affine)


@pytest.mark.parametrize("study", STUDIES)
def test_all_cases_of_a_study_have_the_same_classes(study):
    assert len({tuple(source.classes or ()) for source in thick_folder.STUDIES[study].values()}) == 1
