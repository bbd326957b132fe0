"""The promise of the project: whatever the geometry of a file, its result lies where the file lies.

The chain is that of the inference bundle; only the network is replaced, by one that interpolates, so that what is
left of a shift can come from the geometry alone.
"""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from medsr.geometry import slice_axis, spacing_of
from medsr.inferers.volume import VolumeInferer
from medsr.io.loading import LoadVolumed
from medsr.io.writing import write_nifti
from medsr.phantoms import ramp, sphere
from medsr.resampling import interpolation_matrix
from medsr.transforms.intensity import PercentileToUnitd, RestoreIntensityd
from medsr.transforms.orientation import SliceAxisLastd
from medsr.transforms.results import SplitUncertaintyd
from medsr.transforms.thick_slices import SimulateThickSlices
from medsr.transforms.through_plane import UpdateGeometryd
from monai.bundle import ConfigParser
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

CONFIG = Path(__file__).parents[2] / "bundles" / "mri_rehrseg_superres" / "configs" / "inference.json"

TOLERANCE = 0.05
"""Largest shift, in thin slices."""

RATIOS = (2, 3, 3.5, 4, 5, 6)
SLICES = 13
THIN_MM = 0.8


class Cubic(torch.nn.Module):
    """Stands in for the network: the cubic interpolation that the real one adds its details to."""

    scale = 1.0

    def __init__(self, uncertainty: float | None = None) -> None:
        super().__init__()
        self.uncertainty = uncertainty

    def forward(
        self, image: torch.Tensor, scale: float, thickness: float, positions: np.ndarray
    ) -> torch.Tensor:
        matrix = torch.as_tensor(interpolation_matrix(image.shape[-1], positions).T, dtype=image.dtype)
        found = image @ matrix
        if self.uncertainty is None:
            return found
        return torch.cat([found, torch.full_like(found, self.uncertainty)], dim=1)


class Stack(NamedTuple):
    """How a stack lies: world axis and sign of every array axis, the array axis of the slices, a rotation."""

    name: str
    order: tuple[int, ...]
    signs: tuple[int, int, int]
    slice_axis: int
    angles: tuple[float, float, float] = (0, 0, 0)

    def affine(self) -> np.ndarray:
        """Of the thin volume, isotropic."""
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, self.order] * np.array(self.signs) * THIN_MM
        affine[:3, :3] = Rotation.from_euler("xyz", self.angles, degrees=True).as_matrix() @ affine[:3, :3]
        affine[:3, 3] = (-37.5, 12.25, 101.0)
        return affine

    def shape(self, slices: int, plane: tuple[int, int] = (6, 7)) -> tuple[int, ...]:
        shape = list(plane)
        shape.insert(self.slice_axis, slices)
        return tuple(shape)


_SIGNS = ((1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, 1), (1, 1, -1), (-1, -1, -1))
STACKS = [
    # All six orders of the axes, every one flipped differently, the slices along each array axis in turn.
    *(
        Stack(
            "".join("RAS"[w] if s > 0 else "LPI"[w] for w, s in zip(order, signs, strict=True)),
            order,
            signs,
            i % 3,
        )
        for i, (order, signs) in enumerate(zip(permutations(range(3)), _SIGNS, strict=True))
    ),
    Stack("oblique axial", (0, 1, 2), (-1, -1, 1), 2, (15, -10, 5)),
    Stack("oblique sagittal", (1, 2, 0), (-1, 1, 1), 2, (-25, 40, 10)),
    Stack("oblique coronal", (0, 2, 1), (1, -1, 1), 0, (50, 35, -60)),
]
BY_NAME = pytest.mark.parametrize("stack", STACKS, ids=[stack.name for stack in STACKS])
BY_RATIO = pytest.mark.parametrize("ratio", RATIOS)
BY_GAP = pytest.mark.parametrize("thickness", [1.0, 0.7], ids=["no gap", "gap"])


def acquire(thin: np.ndarray, stack: Stack, ratio: float, thickness: float) -> MetaTensor:
    """Thick slices as a reader would hand them over."""
    spacing = ratio * THIN_MM
    image = MetaTensor(
        torch.as_tensor(thin, dtype=torch.float32)[None], affine=torch.as_tensor(stack.affine())
    )
    thick = SimulateThickSlices(spacing, thickness * spacing, axis=stack.slice_axis)(image)
    assert thick.shape[1 + stack.slice_axis] == SLICES
    thick.meta["original_affine"] = thick.affine.clone()
    return thick


def superres(thick: MetaTensor, **settings: Any) -> tuple[MetaTensor, VolumeInferer]:
    """Preprocessing, inferer and postprocessing of the inference bundle."""
    preprocessing = Compose([SliceAxisLastd("image"), PercentileToUnitd("image")])
    keys = ["pred", "uncertainty"]
    postprocessing = Compose(
        [
            SplitUncertaintyd("pred"),
            RestoreIntensityd(keys, magnitude_keys="uncertainty", allow_missing_keys=True),
            Invertd(keys, preprocessing, "image", nearest_interp=False, allow_missing_keys=True),
            UpdateGeometryd(keys, allow_missing_keys=True),
        ]
    )
    batch = list_data_collate([preprocessing({"image": thick})])
    sizes = {key: json.loads(CONFIG.read_text(encoding="utf-8"))[key] for key in ("group", "tile")}
    inferer = VolumeInferer(**{"slice_profile": "slr", "amp": "float32", **sizes, **settings})
    batch["pred"] = inferer(batch["image"], Cubic())
    (item,) = decollate_batch(batch)
    return postprocessing(item)["pred"], inferer


def check_grid(shape: tuple[int, ...], affine: np.ndarray, stack: Stack, ratio: float) -> None:
    assert shape[stack.slice_axis] == round(SLICES * ratio)
    np.testing.assert_allclose(spacing_of(affine), THIN_MM, rtol=1e-4)
    # Directions, and their sense, are those of the input.
    np.testing.assert_allclose(affine[:3, :3], stack.affine()[:3, :3], atol=1e-4)


def ramp_of(stack: Stack, ratio: float, direction: np.ndarray) -> np.ndarray:
    return ramp(stack.shape(int(np.ceil(SLICES * ratio))), affine=stack.affine(), direction=direction)


def check_ramp(values: np.ndarray, affine: np.ndarray, stack: Stack, direction: np.ndarray) -> None:
    """Voxels hold the world coordinate of their own centre; fitted along the slices, away from the ends."""
    expected = ramp(values.shape, affine=affine, direction=direction)
    found, expected = (np.moveaxis(v, stack.slice_axis, -1) for v in (values, expected))
    margin = 3 * found.shape[-1] // SLICES
    found, expected = found[..., margin:-margin], expected[..., margin:-margin]
    slope, _ = np.polyfit(expected.ravel() - expected.mean(), found.ravel(), 1)
    assert slope == pytest.approx(1, abs=0.005)
    assert abs((found - expected).mean()) / THIN_MM < TOLERANCE / 5
    assert np.abs(found - expected).max() / THIN_MM < TOLERANCE


def sphere_of(stack: Stack, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased ball off the centre of any voxel, and its centre in the world.

    Along the slices it is as smooth as thick slices can sample: what lies in a gap is lost, and with a sharp rim
    the acquisition itself would move the centre of mass.
    """
    radius = 2.2 * ratio
    plane = (int(2 * radius) + 5, int(2 * radius) + 7)
    shape, affine = stack.shape(int(np.ceil(SLICES * ratio)), plane), stack.affine()
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2 + (0.31, -0.23, 0.17)) + affine[:3, 3]
    ball = sphere(shape, affine=affine, centre_mm=centre, radius_mm=radius * THIN_MM, supersample=(3, 3, 3))
    return gaussian_filter1d(ball, 0.4 * ratio, axis=stack.slice_axis), centre


def centre_of_mass(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    grid = np.indices(values.shape).reshape(3, -1)
    weights = values.ravel().astype(np.float64)
    return affine[:3, :3] @ (grid @ weights / weights.sum()) + affine[:3, 3]


def check_sphere(values: np.ndarray, affine: np.ndarray, centre: np.ndarray) -> None:
    shift = (centre_of_mass(values, affine) - centre) / THIN_MM
    assert np.linalg.norm(shift) < TOLERANCE, f"moved by {shift.round(3)} voxels"


@BY_GAP
@BY_RATIO
@BY_NAME
def test_a_ramp_is_not_shifted(stack, ratio, thickness):
    normal = stack.affine()[:3, stack.slice_axis]
    for direction in (normal, (0.4, -0.5, 0.6)):
        pred, inferer = superres(acquire(ramp_of(stack, ratio, direction), stack, ratio, thickness))
        check_grid(pred.shape[1:], pred.affine.numpy(), stack, ratio)
        check_ramp(pred.numpy()[0], pred.affine.numpy(), stack, direction)
        assert inferer.facts["ratio"] == ratio
        assert inferer.facts["slice_thickness_per_spacing"] == pytest.approx(thickness, abs=1e-3)


@BY_GAP
@BY_RATIO
@BY_NAME
def test_a_sphere_is_not_shifted(stack, ratio, thickness):
    ball, centre = sphere_of(stack, ratio)
    pred, _ = superres(acquire(ball, stack, ratio, thickness))
    check_grid(pred.shape[1:], pred.affine.numpy(), stack, ratio)
    check_sphere(pred.numpy()[0], pred.affine.numpy(), centre)
    # And it is still that sphere, not a blob somewhere symmetric.
    assert pred.sum().item() == pytest.approx(float(ball.sum()), rel=0.05)


@pytest.mark.parametrize("settings", [{"consistency": 0.0}, {"group": 4}, {"both_directions": True}], ids=str)
@BY_RATIO
def test_the_settings_of_the_inferer_do_not_shift_either(ratio, settings):
    stack = STACKS[-2]
    direction = stack.affine()[:3, stack.slice_axis]
    pred, _ = superres(acquire(ramp_of(stack, ratio, direction), stack, ratio, 1.0), **settings)
    check_ramp(pred.numpy()[0], pred.affine.numpy(), stack, direction)
    ball, centre = sphere_of(stack, ratio)
    pred, _ = superres(acquire(ball, stack, ratio, 1.0), **settings)
    check_sphere(pred.numpy()[0], pred.affine.numpy(), centre)


def test_the_checks_see_a_forgotten_half_voxel():
    """Every check above must be able to fail: keep the origin of the thick slices, as naive tools do."""
    stack = STACKS[0]
    direction = stack.affine()[:3, stack.slice_axis]
    thick = acquire(ramp_of(stack, 4, direction), stack, 4, 1.0)
    pred, _ = superres(thick)
    wrong = pred.affine.numpy().copy()
    wrong[:3, 3] = thick.affine.numpy()[:3, 3]
    check_grid(pred.shape[1:], wrong, stack, 4)
    with pytest.raises(AssertionError):
        check_ramp(pred.numpy()[0], wrong, stack, direction)
    slightly = pred.affine.numpy().copy()
    slightly[:3, 3] += 1.5 * TOLERANCE * slightly[:3, stack.slice_axis]
    ball, centre = sphere_of(stack, 4)
    pred, _ = superres(acquire(ball, stack, 4, 1.0))
    with pytest.raises(AssertionError, match="moved by"):
        check_sphere(pred.numpy()[0], slightly, centre)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_exchanged_axes_give_exchanged_results(order):
    rng = np.random.default_rng(0)
    thick = acquire(rng.random(STACKS[0].shape(3 * SLICES)), STACKS[0], 3, 1.0)
    expected, _ = superres(thick)
    affine = thick.affine[:, [*order, 3]]
    meta = {
        "original_affine": affine,
        "spatial_shape": np.array(thick.shape[1:])[list(order)],
        "slice_thickness_mm": thick.meta["slice_thickness_mm"],
    }
    turned = MetaTensor(thick.as_tensor().permute(0, *(1 + i for i in order)), affine=affine, meta=meta)
    found, _ = superres(turned)
    back = found.as_tensor().permute(0, *(1 + int(i) for i in np.argsort(order)))
    in_plane_kept = [i for i in order if i != STACKS[0].slice_axis] == sorted(
        i for i in order if i != STACKS[0].slice_axis
    )
    if in_plane_kept:
        # The network sees the very same array.
        assert torch.equal(back, expected.as_tensor())
    np.testing.assert_allclose(back, expected.as_tensor(), atol=1e-4)
    np.testing.assert_allclose(found.affine, expected.affine[:, [*order, 3]], atol=1e-9)


# --- through files, with the chain read from the bundle itself ---


def run_bundle(source: Path, target: Path, *, network: torch.nn.Module) -> dict[str, str]:
    """Run the bundle's own inference config; returns the cases that failed."""
    target.mkdir()
    parser = ConfigParser()
    parser.read_config(str(CONFIG))
    parser["dataset_dir"], parser["output_dir"] = str(source), str(target)
    parser["network"], parser["device"] = network, "$torch.device('cpu')"
    # What stands in for the network has no part that may be less exact.
    parser["amp"] = "float32"
    # Without the handlers that need a trained network; the settings stay those of the bundle.
    parser["handlers"], parser["figure"] = ["@output"], False
    parser["inferer"]["progress"] = False
    evaluator = parser.get_parsed_content("evaluator")
    evaluator.run()
    return dict(evaluator.failures)


def save(path: Path, thick: MetaTensor, *, sidecar: bool = True) -> None:
    array = np.moveaxis(thick.numpy(), 0, -1) if len(thick) > 1 else thick.numpy()[0]
    write_nifti(path, array, affine=thick.affine.numpy(), sform_code=2, qform_code=1)
    if sidecar:
        content = {"SliceThickness": float(thick.meta["slice_thickness_mm"])}
        path.with_name(path.name.split(".")[0] + ".json").write_text(json.dumps(content), encoding="utf-8")


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a file that says the same in sform and qform."""
    image = nib.load(path)
    assert image.header["sform_code"] == 2
    assert image.header["qform_code"] == 1
    np.testing.assert_allclose(image.get_sform(), image.get_qform(), atol=1e-4)
    np.testing.assert_allclose(image.affine, image.get_sform(), atol=1e-6)
    np.testing.assert_allclose(image.header.get_zooms()[:3], spacing_of(image.affine), rtol=1e-5)
    assert image.get_data_dtype() == np.float32
    return np.asarray(image.dataobj), np.asarray(image.affine)


@BY_GAP
def test_files_keep_their_place_through_the_bundle(tmp_path, thickness):
    source = tmp_path / "in"
    source.mkdir()
    truth = {}
    for number, stack in enumerate(STACKS):
        ratio = RATIOS[number % len(RATIOS)]
        direction = stack.affine()[:3, stack.slice_axis]
        save(
            source / f"ramp{number}.nii.gz",
            acquire(ramp_of(stack, ratio, direction), stack, ratio, thickness),
        )
        ball, centre = sphere_of(stack, ratio)
        save(source / f"ball{number}.nii.gz", acquire(ball, stack, ratio, thickness))
        truth[number] = (stack, ratio, direction, centre)
    assert run_bundle(source, tmp_path / "out", network=Cubic()) == {}
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2 * len(STACKS)
    for number, (stack, ratio, direction, centre) in truth.items():
        for name in ("ramp", "ball"):
            values, affine = load(tmp_path / "out" / f"{name}{number}_superres.nii.gz")
            check_grid(values.shape, affine, stack, ratio)
            if name == "ramp":
                check_ramp(values, affine, stack, direction)
            else:
                check_sphere(values, affine, centre)


def test_uncertainty_lies_on_the_same_grid_and_has_no_offset(tmp_path):
    stack, ratio = STACKS[2], 4
    direction = stack.affine()[:3, stack.slice_axis]
    source = tmp_path / "in"
    source.mkdir()
    # Far from zero: an offset added by mistake could not be missed.
    thick = acquire(ramp_of(stack, ratio, direction) + 5000, stack, ratio, 1.0)
    save(source / "a.nii.gz", thick)
    assert run_bundle(source, tmp_path / "out", network=Cubic(uncertainty=0.01)) == {}
    values, affine = load(tmp_path / "out" / "a_superres.nii.gz")
    uncertainty, same = load(tmp_path / "out" / "a_uncertainty.nii.gz")
    np.testing.assert_array_equal(affine, same)
    assert uncertainty.shape == values.shape
    check_ramp(values - 5000, affine, stack, direction)
    # One hundredth of what is between the 0.1 and 99.9 percentiles.
    span = float(np.ptp(thick.numpy()))
    assert uncertainty.min() == pytest.approx(uncertainty.max())
    assert 0.008 * span < uncertainty.max() <= 0.01 * span


def test_time_points_each_keep_their_place(tmp_path):
    stack, ratio = STACKS[4], 3
    ball, centre = sphere_of(stack, ratio)
    thick = acquire(ball, stack, ratio, 1.0)
    series = MetaTensor(torch.cat([thick.as_tensor(), 3 * thick.as_tensor()]), affine=thick.affine)
    series.meta["slice_thickness_mm"] = thick.meta["slice_thickness_mm"]
    source = tmp_path / "in"
    source.mkdir()
    save(source / "a.nii.gz", series)
    assert run_bundle(source, tmp_path / "out", network=Cubic(uncertainty=0.01)) == {}
    for name in ("superres", "uncertainty"):
        values, affine = load(tmp_path / "out" / f"a_{name}.nii.gz")
        assert values.shape[3:] == (2,)
        check_grid(values.shape[:3], affine, stack, ratio)
        if name == "superres":
            check_sphere(values[..., 0], affine, centre)
            np.testing.assert_allclose(values[..., 1], 3 * values[..., 0], atol=0.01)


def test_the_chain_by_hand_is_the_chain_of_the_bundle(tmp_path):
    """The many cases above are only worth something if the bundle does the same."""
    stack, ratio = STACKS[-1], 3.5
    ball, _ = sphere_of(stack, ratio)
    source = tmp_path / "in"
    source.mkdir()
    save(source / "a.nii.gz", acquire(ball, stack, ratio, 0.7))
    assert run_bundle(source, tmp_path / "out", network=Cubic()) == {}
    values, affine = load(tmp_path / "out" / "a_superres.nii.gz")
    loaded = LoadVolumed("image")({"image": str(source / "a.nii.gz")})["image"]
    assert slice_axis(loaded.affine) == stack.slice_axis
    by_hand, _ = superres(loaded)
    np.testing.assert_allclose(values, by_hand.numpy()[0], atol=1e-5)
    np.testing.assert_allclose(affine, by_hand.affine, atol=1e-4)
