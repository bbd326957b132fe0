from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr.engines.mask_comparison import MaskComparison, mask_table
from medsr.errors import SettingError
from medsr.geometry import rescaled_size, slice_positions
from medsr.io.cases import find_labelled_cases
from medsr.io.nifti import read_nifti
from medsr.io.writing import write_nifti
from medsr.resampling import interpolation_matrix
from torch import Tensor, nn


class Threshold(nn.Module):
    """Knows the answer: the mask is where the image is bright."""

    patch_size, spacing_mm = (32, 32, 16), (1.0, 1.0, 4.0)

    def features(self, image: Tensor) -> Tensor:
        return image.clone()

    def read_thick(self, features: Tensor) -> Tensor:
        return 50 * torch.cat([0.5 - features, features - 0.5], dim=1)

    def read_thin(self, features: Tensor, scale: float) -> Tensor:
        depth = features.shape[-1]
        positions = slice_positions(depth, rescaled_size(depth, scale), scale)
        matrix = torch.as_tensor(interpolation_matrix(depth, positions, kind="cubic"), dtype=torch.float32)
        return self.read_thick(features @ matrix.T)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Balls of 13 and 9 voxels radius, bright in a grey box with a little texture; the second mask is empty."""
    place = np.stack(np.meshgrid(*[np.arange(n) for n in (32, 34, 43)], indexing="ij"), -1)
    box = (np.abs(place - (15.5, 16.5, 21)) < 15).all(-1)
    for name, radius in (("a", 13.0), ("b", 9.0)):
        ball = np.linalg.norm(place - (15.3, 16.8, 20.9), axis=-1) < radius
        texture = np.random.default_rng(0).normal(0, 0.01, ball.shape)
        for part, values in (
            ("images", box * (0.3 + 0.6 * ball + texture)),
            ("labels", 2 * ball * (name == "a")),
        ):
            path = tmp_path / "data" / part / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            dtype = np.float32 if part == "images" else np.uint8
            write_nifti(path, values.astype(dtype), affine=np.diag([1.0, 1, 1, 1]), dtype=dtype)
    return tmp_path / "data"


def compare(folder: Path, **settings) -> MaskComparison:
    cases = find_labelled_cases(folder)
    networks = {"bright": Threshold()}
    found = MaskComparison(cases, networks, {"ball": [2]}, inferer={"amp": "float32"}, **settings)
    found.run()
    return found


def test_every_network_is_read_in_every_way_on_the_same_slices(folder, tmp_path):
    found = compare(folder, output=tmp_path / "masks.json")
    rows = {(r["case"], r["network"], r["reading"]): r for r in found.rows}
    assert set(rows) == {
        (case, network, reading)
        for case in "ab"
        for network, reading in (
            ("perfect thick mask", "nearest"),
            ("perfect thick mask", "signed distance"),
            ("bright", "nearest"),
            ("bright", "signed distance"),
            ("bright", "thin head"),
        )
    }
    first = {key[1:]: row for key, row in rows.items() if key[0] == "a"}
    # The network sees what the mask was drawn from, and steps cost what they cost.
    assert first["bright", "nearest"]["thick_dice"] > 0.97
    assert first["perfect thick mask", "nearest"]["thick_dice"] == 1
    assert 0.9 < first["perfect thick mask", "nearest"]["dice"] < 0.97
    for network in ("perfect thick mask", "bright"):
        assert first[network, "signed distance"]["dice"] > first[network, "nearest"]["dice"]
        assert first[network, "signed distance"]["assd_mm"] < first[network, "nearest"]["assd_mm"]
    assert first["bright", "thin head"]["dice"] > first["bright", "nearest"]["dice"]
    saved = json.loads((tmp_path / "masks.json").read_text())
    assert saved["rows"] == found.rows
    assert saved["protocol"].startswith("mask-v2")
    assert saved["min_island_fraction"] == 0


def add_bright_cube(path: Path) -> None:
    """Something small, far from the ball, that every network here takes for one."""
    values = read_nifti(path)[0]
    values[2:5, 2:5, 8:12] = 0.9
    write_nifti(path, values, affine=np.eye(4), dtype=np.float32)


def test_islands_are_removed_from_every_mask_of_every_network(folder, tmp_path):
    clean = compare(folder).rows
    add_bright_cube(folder / "images" / "a.nii.gz")
    kept, removed = compare(folder), compare(folder, min_island_fraction=0.1, output=tmp_path / "masks.json")
    assert json.loads((tmp_path / "masks.json").read_text())["min_island_fraction"] == 0.1

    def of(rows: list[dict], score: str) -> dict[tuple[str, str], float]:
        return {(r["network"], r["reading"]): r[score] for r in rows if r["case"] == "a"}

    for score in ("dice", "assd_mm", "volume_error_ml", "thick_dice"):
        without, found, expected = (of(rows, score) for rows in (kept.rows, removed.rows, clean))
        for key in expected:
            assert found[key] == pytest.approx(expected[key], abs=0.01)
            if key[0] == "bright":
                assert abs(without[key] - expected[key]) > abs(found[key] - expected[key])


def test_a_perfect_mask_loses_its_small_foci_too(folder):
    label = read_nifti(folder / "labels" / "a.nii.gz")[0].astype(np.uint8)
    label[2:5, 2:5, 5:13] = 2
    write_nifti(folder / "labels" / "a.nii.gz", label, affine=np.eye(4), dtype=np.uint8)
    for fraction, whole in ((0.0, True), (0.1, False)):
        rows = [r for r in compare(folder, min_island_fraction=fraction).rows if r["case"] == "a"]
        perfect = [row["thick_dice"] for row in rows if row["network"] == "perfect thick mask"]
        assert [value == 1 for value in perfect] == [whole, whole]


def test_a_wrong_fraction_ends_the_run_before_the_first_case(folder):
    with pytest.raises(SettingError, match="min_island_fraction"):
        MaskComparison(find_labelled_cases(folder), {}, min_island_fraction=10)


def test_an_empty_mask_is_never_a_success(folder):
    rows = {(r["network"], r["reading"]): r for r in compare(folder).rows if r["case"] == "b"}
    assert rows["perfect thick mask", "nearest"]["dice"] is None
    assert rows["bright", "thin head"]["dice"] == 0
    assert rows["bright", "thin head"]["hd95_mm"] is None


def test_a_gap_and_a_ratio_that_is_no_whole_number(folder):
    cases = [case for case in find_labelled_cases(folder) if case["case"] == "a"]
    files = [folder / part / "a.nii.gz" for part in ("images", "labels")]
    whole = [read_nifti(path)[0] for path in files]
    dice = {}
    for depth in range(43, 37, -1):
        for path, values in zip(files, whole, strict=True):
            dtype = np.float32 if path.parent.name == "images" else np.uint8
            write_nifti(path, values[..., :depth].astype(dtype), affine=np.eye(4), dtype=dtype)
        found = MaskComparison(
            cases, {"bright": Threshold()}, {"ball": [2]}, ratio=3.5, gap=1.0, inferer={"amp": "float32"}
        )
        found.run()
        assert found.left_out == {}, depth
        dice[depth] = {(row["network"], row["reading"]): row["dice"] for row in found.rows}
    # What is cut off is background: how many slabs fit, and where they lie, matters little.
    for key in dice[43]:
        values = [one[key] for one in dice.values()]
        assert min(values) > 0.88, key
        assert max(values) - min(values) < 0.04, key


def test_thick_slices_that_are_taken_as_the_truth_are_noted(folder):
    for part, dtype in (("images", np.float32), ("labels", np.uint8)):
        values = read_nifti(folder / part / "a.nii.gz")[0]
        write_nifti(
            folder / part / "a.nii.gz", values.astype(dtype), affine=np.diag([1.0, 1, 3, 1]), dtype=dtype
        )
    found = compare(folder)
    assert list(found.notes) == ["a"]
    assert "3 times as far apart" in found.notes["a"]


def test_a_bad_case_is_left_out_and_ends_the_run_with_a_status(folder, caplog):
    write_nifti(
        folder / "labels" / "a.nii.gz", np.zeros((5, 5, 5), np.uint8), affine=np.eye(4), dtype=np.uint8
    )
    found = compare(folder)
    assert list(found.left_out) == ["a"]
    assert "5 x 5 x 5" in found.left_out["a"]
    assert {row["case"] for row in found.rows} == {"b"}
    with pytest.raises(SystemExit):
        found.finish()


def test_the_mean_leaves_out_what_is_not_defined():
    rows = [
        {"case": case, "class": "c", "network": "n", "reading": "nearest", "dice": 0.5, "hd95_mm": hd95}
        for case, hd95 in (("a", 2.0), ("b", None))
    ]
    assert mask_table(rows).splitlines()[-1] == "| mean | c | n | nearest | 0.500 | 2.000 |"
    with pytest.raises(SettingError, match="no rows"):
        mask_table([])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 0}, "ratio must be a number > 0, got 0"),
        ({"gap": "x"}, "gap must be a number, got 'x'"),
        ({"ratio": 3, "gap": 3}, "ratio 3 with gap 3: the relative slice thickness must be > 0"),
    ],
)
def test_slices_that_cannot_be_simulated_are_refused(settings, said):
    with pytest.raises(SettingError, match=f"^{said}"):
        MaskComparison([], {}, **settings)
