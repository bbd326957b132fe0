from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from medsr.geometry import spacing_of
from medsr.phantoms import ramp
from medsr.transforms.orientation import SliceAxisLastd
from medsr.transforms.through_plane import ResampleThroughPlaned, UpdateGeometryd
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from scipy.spatial.transform import Rotation

RATIOS = (2, 3, 3.5, 4, 5, 6)
SLICES = 13


def affine_of(spacing, order=(0, 1, 2), angles=(0, 0, 0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * np.array([-1, 1, -1]) * np.asarray(spacing)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = (-30.5, 12.25, 60)
    return affine


def ramp_image(shape, affine, direction) -> MetaTensor:
    values = torch.as_tensor(ramp(shape, affine=affine, direction=direction), dtype=torch.float32)
    return MetaTensor(values[None], affine=torch.as_tensor(affine))


@pytest.mark.parametrize("kind", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("angles", [(0, 0, 0), (20, -35, 50)])
def test_a_resampled_ramp_holds_the_coordinates_of_its_new_grid(kind, ratio, angles):
    affine = affine_of((0.8, 0.8, 0.8 * ratio), (1, 2, 0), angles)
    direction = affine[:3, 2] + 0.3 * affine[:3, 0]
    item = {"image": ramp_image((5, 4, SLICES), affine, direction)}
    found = ResampleThroughPlaned("image", kind=kind)(item)["image"]
    assert found.shape == (1, 5, 4, math.floor(SLICES * ratio + 0.5))
    np.testing.assert_allclose(spacing_of(found.affine), 0.8)
    error = found.numpy()[0] - ramp(found.shape[1:], affine=found.affine.numpy(), direction=direction)
    inner = error[..., 5 * int(ratio) : -5 * int(ratio)] / 0.8
    if kind == "nearest":
        # A staircase: off by half a thick slice at most, and by nothing on average over a thick slice.
        assert np.abs(inner).max() <= ratio / 2 + 1e-3
        assert abs(inner.mean()) < 0.05
    else:
        assert np.abs(inner).max() < 0.01


def test_the_spacing_may_be_chosen_and_defaults_to_the_coarser_in_plane_axis():
    image = MetaTensor(torch.rand(1, 6, 6, 10), affine=torch.diag(torch.tensor([0.5, 0.8, 4.0, 1])))
    assert ResampleThroughPlaned("image")({"image": image})["image"].shape[-1] == 50
    chosen = ResampleThroughPlaned("image", 2.0)({"image": image})["image"]
    assert chosen.shape[-1] == 20
    np.testing.assert_allclose(spacing_of(chosen.affine), [0.5, 0.8, 2.0], rtol=1e-6)


def test_metadata_say_which_axes_are_sharp():
    thick = MetaTensor(torch.rand(1, 6, 6, 5), affine=torch.diag(torch.tensor([1.0, 1, 4, 1])), meta={"a": 1})
    fine = MetaTensor(
        torch.rand(1, 6, 6, 5), affine=torch.diag(torch.tensor([1.0, 1, 1.1, 1])), meta={"a": 2}
    )
    found = ResampleThroughPlaned(("thick", "fine"))({"thick": thick, "fine": fine})
    assert found["thick"].meta["sharp_axes"] == (0, 1)
    assert found["fine"].meta["sharp_axes"] == (0, 1, 2)
    assert torch.equal(found["fine"].as_tensor(), fine.as_tensor())
    assert torch.equal(found["fine"].affine, fine.affine)
    assert (found["thick"].meta["a"], found["fine"].meta["a"]) == (1, 2)
    assert "sharp_axes" not in thick.meta
    assert "sharp_axes" not in fine.meta


def test_missing_keys_are_an_error_unless_allowed():
    item = {"image": MetaTensor(torch.rand(1, 4, 4, 5), affine=torch.diag(torch.tensor([1.0, 1, 4, 1])))}
    for transform in (ResampleThroughPlaned, UpdateGeometryd):
        with pytest.raises(KeyError):
            transform("pred")({"image": MetaTensor(item["image"], meta=source_meta(np.eye(4), (4, 4, 5)))})
    assert set(ResampleThroughPlaned(("image", "x"), allow_missing_keys=True)(item)) == {"image"}


def source_meta(affine, shape, **more):
    return {"original_affine": torch.as_tensor(affine), "spatial_shape": np.asarray(shape), **more}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("angles", [(0, 0, 0), (20, -35, 50)])
def test_a_result_gets_the_affine_of_its_own_grid_after_the_inverse(ratio, axis, order, angles):
    spacing, shape = np.full(3, 0.7), [4, 4, 4]
    spacing[axis], shape[axis] = 0.7 * ratio, SLICES
    affine = affine_of(spacing, order, angles)
    image = MetaTensor(torch.rand(1, *shape), affine=torch.as_tensor(affine), meta=source_meta(affine, shape))
    preprocessing = Compose([SliceAxisLastd("image")])
    item = preprocessing({"image": image})
    count = math.floor(SLICES * ratio + 0.5)
    item["pred"] = MetaTensor(torch.zeros(1, 4, 4, count))
    postprocessing = Compose(
        [Invertd("pred", preprocessing, "image", nearest_interp=False), UpdateGeometryd("pred")]
    )
    pred = postprocessing(item)["pred"]

    fine_shape = list(shape)
    fine_shape[axis] = count
    assert list(pred.shape) == [1, *fine_shape]
    found = pred.affine.numpy()
    np.testing.assert_allclose(spacing_of(found), 0.7, rtol=1e-6)
    centre_of = [np.append((np.array(n) - 1) / 2, 1) for n in (shape, fine_shape)]
    np.testing.assert_allclose(found @ centre_of[1], affine @ centre_of[0], atol=1e-6)
    cosines = (found[:3, :3] / 0.7 * (affine[:3, :3] / spacing)).sum(axis=0)
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    if count == SLICES * ratio:
        # The outer faces of the stack, half a voxel beyond its centres, do not move.
        corner = np.append([-0.5, -0.5, -0.5], 1)
        np.testing.assert_allclose(found @ corner, affine @ corner, atol=1e-6)
        assert np.linalg.norm(found[:3, 3] - affine[:3, 3]) == pytest.approx(0.7 * (ratio - 1) / 2)


def test_results_keep_what_a_file_needs_and_nothing_of_the_processing():
    affine = affine_of((1, 1, 4))
    meta = source_meta(
        affine, (4, 4, 5), sform_code=2, qform_code=1, filename_or_obj="a.nii", intensity_scale=7.0,
        step=2.5, step_unit="sec",
    )  # fmt: skip
    source = MetaTensor(torch.rand(1, 4, 4, 5), affine=torch.eye(4), meta=meta)
    pred = MetaTensor(torch.rand(2, 4, 4, 20), affine=torch.as_tensor(affine), meta={"stale": 1})
    item = {"image": source, "pred": pred, "uncertainty": torch.rand(2, 4, 4, 20)}
    found = UpdateGeometryd(("pred", "uncertainty"))(item)
    for key in ("pred", "uncertainty"):
        assert found[key].meta["sform_code"] == 2
        assert found[key].meta["qform_code"] == 1
        assert found[key].meta["filename_or_obj"] == "a.nii"
        assert (found[key].meta["step"], found[key].meta["step_unit"]) == (2.5, "sec")
        assert not {"stale", "intensity_scale"} & set(found[key].meta)
        assert torch.equal(torch.as_tensor(found[key].as_tensor()), torch.as_tensor(item[key]))
        np.testing.assert_allclose(spacing_of(found[key].affine), 1)
    np.testing.assert_allclose(found["pred"].affine, found["uncertainty"].affine)


def test_a_chosen_spacing_decides_the_affine():
    affine = affine_of((1, 1, 4))
    source = MetaTensor(torch.rand(1, 4, 4, 5), meta=source_meta(affine, (4, 4, 5)))
    found = UpdateGeometryd("pred", spacing_mm=2.0)({"image": source, "pred": torch.rand(1, 4, 4, 10)})[
        "pred"
    ]
    np.testing.assert_allclose(spacing_of(found.affine), [1, 1, 2])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_result_may_be_turned_so_that_its_slices_come_last(axis):
    affine = np.diag([*np.where(np.arange(3) == axis, 3.0, 1.0), 1.0])
    shape = [4, 5, 6]
    fine = [n * (3 if k == axis else 1) for k, n in enumerate(shape)]
    image = MetaTensor(torch.zeros(1, *shape), meta=source_meta(affine, shape))
    pred = torch.rand(1, *fine)
    as_it_was, turned = (
        UpdateGeometryd("pred", slices_last=last)({"image": image, "pred": pred})["pred"]
        for last in (False, True)
    )
    assert turned.shape[-1] == fine[axis]
    # Every voxel stays where it was.
    index = np.array([1, 2, 3])
    order = [k for k in range(3) if k != axis] + [axis]
    place = np.asarray(as_it_was.affine) @ [*index, 1]
    assert np.allclose(np.asarray(turned.affine) @ [*index[order], 1], place)
    assert as_it_was[(0, *index)] == turned[(0, *index[order])]
