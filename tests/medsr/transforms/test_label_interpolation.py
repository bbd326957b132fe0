from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from medsr.errors import DataError, GeometryError, SettingError
from medsr.geometry import rescaled_affine, rescaled_size, slice_positions, spacing_of
from medsr.metrics import average_surface_distance, dice
from medsr.phantoms import sphere
from medsr.resampling import interpolation_matrix
from medsr.transforms.label_interpolation import LabelThroughPlaned, signed_distance_interpolation
from medsr.transforms.through_plane import ResampleThroughPlaned
from monai.data import MetaTensor
from scipy.ndimage import distance_transform_edt, gaussian_filter

RATIOS = (2, 3.5, 4)
SPACING = (1.0, 1.0, 4.0)


def disc(radius, centre=(0.0, 0.0), size=33) -> np.ndarray:
    axis = np.arange(size) - (size - 1) / 2
    return (axis[:, None] - centre[0]) ** 2 + (axis - centre[1]) ** 2 <= radius**2


def stack(*slices) -> np.ndarray:
    return np.stack(slices, axis=-1).astype(np.uint8)


def blobs(shape=(20, 24, 6), classes=(0, 3, 17, 40), seed=0) -> np.ndarray:
    """Random smooth class map in which every class touches every other one."""
    rng = np.random.default_rng(seed)
    fields = [gaussian_filter(rng.normal(size=shape), (2.5, 2.5, 0.7)) for _ in classes]
    return np.array(classes)[np.argmax(fields, axis=0)]


def thick_and_thin_ball(ratio, radius_mm, centre_mm) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same ball on 14 thick slices and on thin ones over the same field of view; the affine of the thick."""
    affine = np.diag([1.0, 1.0, ratio, 1.0])
    affine[:3, 3] = (-20, -20, -13 / 2 * ratio)
    thin_size = rescaled_size(14, ratio)
    thin_affine = rescaled_affine(affine, 2, size=14, new_size=thin_size, ratio=ratio)
    balls = (
        sphere(shape, affine=a, centre_mm=centre_mm, radius_mm=radius_mm).astype(np.uint8)
        for shape, a in (((41, 41, 14), affine), ((41, 41, thin_size), thin_affine))
    )
    return *balls, affine


# -- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    ("radius_mm", "centre_mm"), [(9, (0, 0, 0)), (9.5, (0.4, -1.3, 0.8)), (12, (-2, 1, 1.7))]
)
@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_a_ball_comes_closer_to_the_truth_than_by_nearest_neighbour(ratio, radius_mm, centre_mm, kind):
    thick, truth, _ = thick_and_thin_ball(ratio, radius_mm, centre_mm)
    found, nearest = (
        signed_distance_interpolation(thick, ratio, spacing_mm=(1, 1, ratio), kind=k)
        for k in (kind, "nearest")
    )
    assert found.shape == truth.shape
    assert 1 - dice(found, truth) < 0.75 * (1 - dice(nearest, truth))
    distances = [average_surface_distance(mask, truth, (1, 1, 1)) for mask in (found, nearest)]
    assert distances[0] < 0.85 * distances[1]


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ball_stays_where_it_is(ratio):
    centre = np.array((1.25, -2.5, 0.0))
    thick, truth, affine = thick_and_thin_ball(ratio, 11, centre)
    item = {"label": MetaTensor(torch.from_numpy(thick)[None], affine=torch.as_tensor(affine))}
    found = LabelThroughPlaned("label", 1.0)(item)["label"]
    assert found.shape[1:] == truth.shape
    index = np.argwhere(found.numpy()[0]).mean(axis=0)
    world = found.affine.numpy() @ np.append(index, 1)
    np.testing.assert_allclose(world[:3], centre, atol=0.1)


@pytest.mark.parametrize("kind", ["nearest", "linear", "cubic"])
def test_the_middle_of_every_thick_slice_is_exact(kind):
    thick = blobs()
    depth = thick.shape[-1]
    same = signed_distance_interpolation(thick, positions=range(depth), spacing_mm=SPACING, kind=kind)
    np.testing.assert_array_equal(same, thick)
    tripled = signed_distance_interpolation(thick, 3.0, spacing_mm=SPACING, kind=kind)
    np.testing.assert_array_equal(tripled[..., 1::3], thick)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", ["nearest", "linear", "cubic"])
def test_a_cylinder_along_the_slice_axis_is_unchanged(ratio, kind):
    base = disc(9.3, (2, -3)).astype(np.uint8)
    thin = signed_distance_interpolation(stack(*[base] * 6), ratio, spacing_mm=SPACING, kind=kind)
    assert thin.shape[-1] == rescaled_size(6, ratio)
    np.testing.assert_array_equal(thin, np.repeat(base[..., None], thin.shape[-1], axis=-1))


def test_an_outline_that_moves_is_half_way_in_between():
    thick = np.zeros((20, 5, 2), dtype=np.uint8)
    thick[:8, :, 0] = thick[:12, :, 1] = 1
    thin = signed_distance_interpolation(thick, positions=[0, 0.3, 0.55, 0.8, 1], spacing_mm=(0.5, 2, 5))
    assert thin[:, 2].sum(axis=0).tolist() == [8, 9, 10, 11, 12]
    assert (thin == thin[:, :1]).all()


def test_distances_are_measured_in_mm():
    # The voxel at (10, 10) is one pixel inside along x in one slice, one pixel outside along y in the next.
    thick = np.zeros((21, 21, 2), dtype=np.uint8)
    thick[:11, :, 0] = 1
    thick[:, :10, 1] = 1

    def found(spacing):
        positions = np.linspace(0, 1, 41)
        thin = signed_distance_interpolation(thick, positions=positions, spacing_mm=spacing)
        return positions[thin[10, 10] == 1].max()

    # Inside by 0.5 mm, outside by 0.5 or by 3 - 0.5 mm, and the other way round.
    assert found((1, 1, 20)) == pytest.approx(0.5, abs=0.03)
    assert found((1, 3, 20)) == pytest.approx(0.5 / 3, abs=0.03)
    assert found((3, 1, 20)) == pytest.approx(2.5 / 3, abs=0.03)


@pytest.mark.parametrize("ratio", [2, 3, 4, 5])
def test_two_classes_are_the_interpolated_distance_above_zero(ratio):
    thick = blobs(classes=(0, 1), seed=2)
    signed = np.stack(
        [
            distance_transform_edt(m, sampling=(0.8, 0.8)) - distance_transform_edt(~m, sampling=(0.8, 0.8))
            for m in np.moveaxis(thick == 1, -1, 0)
        ],
        axis=-1,
    )
    signed = np.clip(np.sign(signed) * (np.abs(signed) - 0.4), -2.4, 2.4)
    positions = slice_positions(thick.shape[-1], thick.shape[-1] * ratio)
    expected = signed @ interpolation_matrix(thick.shape[-1], positions, kind="linear").T
    found = signed_distance_interpolation(thick, float(ratio), spacing_mm=(0.8, 0.8, 3.2))
    clear = np.abs(expected) > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], (expected > 0)[clear])


# -- ends and empty slices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_an_end_is_tapered_and_never_passes_the_face_of_its_slab(ratio):
    empty = np.zeros((33, 33))
    thick = stack(empty, empty, disc(8), disc(8), empty, empty)
    thin, nearest = (
        signed_distance_interpolation(thick, ratio, spacing_mm=SPACING, kind=kind)
        for kind in ("linear", "nearest")
    )
    assert (thin <= nearest).all()
    # What lies deeper than half a slice spacing and a pixel, 3 mm, reaches the face.
    np.testing.assert_array_equal(thin[disc(4.5)], nearest[disc(4.5)])
    areas = thin.sum(axis=(0, 1))
    first = np.flatnonzero(areas)[0]
    assert 0 < areas[first] < areas[len(areas) // 2] == disc(8).sum()
    np.testing.assert_array_equal(areas, areas[::-1])


def test_a_lesion_does_not_depend_on_another_one_far_away():
    near, far = disc(3, (-8, -8)), disc(3, (9, 9))
    alone = signed_distance_interpolation(stack(near, np.zeros_like(near)), 4.0, spacing_mm=SPACING)
    both = signed_distance_interpolation(stack(near, far), 4.0, spacing_mm=SPACING)
    np.testing.assert_array_equal(alone[:16, :16], both[:16, :16])
    assert (alone.sum(axis=(0, 1)) > 0).tolist() == [True] * 4 + [False] * 4
    # Without a limit the other lesion, 20 mm away, wins at once.
    unlimited = signed_distance_interpolation(stack(near, far), 4.0, spacing_mm=SPACING, limit_mm=1000)
    assert unlimited[:16, :16].sum() < 0.7 * both[:16, :16].sum()


@pytest.mark.parametrize("inverted", [False, True])
def test_an_empty_or_full_slice_is_equally_far_everywhere(inverted):
    corner = np.zeros((12, 12), dtype=bool)
    corner[:4, :4] = True

    def areas(first):
        thick = stack(first ^ inverted, np.full_like(first, inverted))
        thin = signed_distance_interpolation(thick, 4.0, spacing_mm=SPACING)
        return (thin ^ inverted).sum(axis=(0, 1)).tolist()

    # Inside by 0.5, 1.5, 2.5 and 3 mm, outside by 3 mm: these end after 1/7, 1/3, 5/11 and 1/2 of the way.
    assert areas(corner) == [16, 16, 16, 4, 0, 0, 0, 0]
    for flip in (corner, corner[::-1], corner[:, ::-1], corner[::-1, ::-1]):
        assert areas(flip) == areas(corner)


@pytest.mark.parametrize("kind", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("value", [0, 1, 7])
def test_a_mask_of_one_class_stays_of_one_class(kind, value):
    thick = np.full((6, 5, 3), value, dtype=np.int16)
    thin = signed_distance_interpolation(thick, 3.5, spacing_mm=SPACING, kind=kind)
    np.testing.assert_array_equal(thin, np.full((6, 5, 11), value))


def test_full_and_empty_slices_meet_at_the_face_between_them():
    thick = stack(np.ones((9, 9)), np.ones((9, 9)), np.zeros((9, 9)))
    thin = signed_distance_interpolation(thick, 4.0, spacing_mm=SPACING)
    assert thin.all(axis=(0, 1)).tolist() == [True] * 8 + [False] * 4
    assert thin.any(axis=(0, 1)).tolist() == [True] * 8 + [False] * 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_single_slice_is_repeated(seed):
    thick = blobs((12, 12, 1), seed=seed)
    thin = signed_distance_interpolation(thick, 4.0, spacing_mm=SPACING)
    np.testing.assert_array_equal(thin, np.repeat(thick, 4, axis=-1))


# -- several classes and forms ------------------------------------------------------------------------------


def test_nearest_repeats_the_thick_slices():
    thick = blobs()
    repeated = signed_distance_interpolation(thick, 4.0, spacing_mm=SPACING, kind="nearest")
    np.testing.assert_array_equal(repeated, np.repeat(thick, 4, axis=-1))
    broken = signed_distance_interpolation(thick, 3.5, spacing_mm=SPACING, kind="nearest")
    index = np.floor(slice_positions(6, 21, 3.5) + 0.5).astype(int)
    np.testing.assert_array_equal(broken, thick[..., index])


def test_thin_slices_hold_only_the_classes_of_their_neighbours():
    thick = blobs()
    thin = signed_distance_interpolation(thick, 4.0, spacing_mm=SPACING)
    assert set(np.unique(thin)) == {0, 3, 17, 40}
    # Between two equal thick voxels with the same neighbourhood nothing changes.
    positions = slice_positions(6, 24)
    below = np.clip(np.floor(positions).astype(int), 0, 5)
    above = np.clip(below + 1, 0, 5)
    changed = (thin != thick[..., below]) & (thin != thick[..., above])
    assert changed.mean() < 0.01


def test_equal_distances_go_to_the_lower_class():
    thick = np.zeros((9, 9, 2), dtype=np.uint8)
    thick[..., 0], thick[..., 1] = 5, 2
    middle = signed_distance_interpolation(thick, positions=[0.49, 0.5, 0.51], spacing_mm=SPACING)
    assert middle[4, 4].tolist() == [5, 2, 2]


@pytest.mark.parametrize("kind", ["linear", "nearest"])
def test_one_hot_channels_and_class_maps_agree(kind):
    classes = blobs(classes=(0, 1, 2))
    channels = (classes == np.arange(3)[:, None, None, None]).astype(np.float32)
    settings = {"spacing_mm": SPACING, "kind": kind}
    expected = signed_distance_interpolation(classes, 3.5, **settings)
    found = signed_distance_interpolation(channels, 3.5, **settings)
    assert found.shape == (3, 20, 24, 21)
    assert (found.sum(axis=0) == 1).all()
    np.testing.assert_array_equal(found.argmax(axis=0), expected)
    np.testing.assert_array_equal(
        signed_distance_interpolation(classes[None], 3.5, **settings), expected[None]
    )


def test_type_and_device_are_kept():
    classes = blobs(classes=(0, 1))
    expected = signed_distance_interpolation(classes, 2.0, spacing_mm=SPACING)
    for kind in (np.uint8, np.int64, np.float32, np.bool_):
        found = signed_distance_interpolation(classes.astype(kind), 2.0, spacing_mm=SPACING)
        assert isinstance(found, np.ndarray)
        assert found.dtype == kind
        np.testing.assert_array_equal(found, expected)
    for kind in (torch.uint8, torch.float32, torch.bool):
        for label in (torch.from_numpy(classes).to(kind), MetaTensor(torch.from_numpy(classes).to(kind))):
            found = signed_distance_interpolation(label, 2.0, spacing_mm=SPACING)
            assert type(found) is torch.Tensor
            assert found.dtype == kind
            np.testing.assert_array_equal(found.numpy(), expected)


def test_reversed_and_transposed_masks_give_reversed_and_transposed_results():
    thick, spacing = blobs(classes=(0, 1), seed=5), (0.7, 1.2, 4.0)
    expected = signed_distance_interpolation(thick, 4.0, spacing_mm=spacing)
    reverse = signed_distance_interpolation(thick[..., ::-1], 4.0, spacing_mm=spacing)
    np.testing.assert_array_equal(reverse[..., ::-1], expected)
    swapped = signed_distance_interpolation(thick.swapaxes(0, 1), 4.0, spacing_mm=(1.2, 0.7, 4.0))
    np.testing.assert_array_equal(swapped.swapaxes(0, 1), expected)


# -- wrong inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros((4, 4)), r"must be \(H, W, D\) or \(K, H, W, D\), got shape \(4, 4\)"),
        (np.zeros((1, 1, 4, 4, 4)), "got shape"),
        (np.zeros((4, 4, 0)), "got shape"),
        (np.zeros((0, 4, 4, 4)), "got shape"),
        (np.full((4, 4, 4), 0.5), "only whole numbers"),
        (np.full((4, 4, 4), np.nan), "only whole numbers"),
        (np.full((2, 4, 4, 4), 0.5), "must be one-hot"),
        (np.zeros((2, 4, 4, 4)), "must be one-hot"),
        (np.ones((2, 4, 4, 4)), "must be one-hot"),
    ],
)
def test_what_is_no_mask_is_refused(label, message):
    with pytest.raises(DataError, match=message):
        signed_distance_interpolation(label, 2.0, spacing_mm=SPACING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either the ratio"),
        ({"ratio": 2.0, "positions": [0.0]}, "either the ratio"),
        ({"ratio": 2.0, "spacing_mm": (1, 1)}, "spacing_mm must be 3 positive numbers"),
        ({"ratio": 2.0, "spacing_mm": (1, 0, 1)}, "spacing_mm must be 3 positive numbers"),
        ({"ratio": 2.0, "limit_mm": -1}, "limit_mm must be 1 positive number of mm"),
        ({"ratio": 2.0, "limit_mm": math.inf}, "limit_mm must be 1 positive number of mm"),
        ({"ratio": 2.0, "kind": "quintic"}, "interpolation must be one of"),
    ],
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(SettingError, match=message):
        signed_distance_interpolation(np.zeros((4, 4, 4)), **{"spacing_mm": SPACING, **settings})


def test_a_ratio_that_is_none_is_refused():
    with pytest.raises(GeometryError, match="ratio > 0"):
        signed_distance_interpolation(np.zeros((4, 4, 4)), -1.0, spacing_mm=SPACING)


# -- the dictionary transform -------------------------------------------------------------------------------


def labelled(spacing, **meta) -> MetaTensor:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, (1, 2, 0)] * np.array([-1, 1, -1]) * np.asarray(spacing)
    affine[:3, 3] = (-30.5, 12.25, 60)
    return MetaTensor(torch.from_numpy(blobs())[None], affine=torch.as_tensor(affine), meta=meta)


@pytest.mark.parametrize("ratio", [2, 3.5, 4])
@pytest.mark.parametrize("spacing_mm", [None, 0.8])
def test_masks_and_images_share_their_thin_grid(ratio, spacing_mm):
    label = labelled((0.8, 0.8, 0.8 * ratio))
    item = {"label": label, "image": label.clone().float()}
    found = LabelThroughPlaned("label", spacing_mm)(item)["label"]
    image = ResampleThroughPlaned("image", spacing_mm, kind="nearest")(item)["image"]
    assert found.shape == image.shape
    np.testing.assert_array_equal(found.affine.numpy(), image.affine.numpy())
    np.testing.assert_allclose(spacing_of(found.affine), 0.8, rtol=1e-3)
    nearest = LabelThroughPlaned("label", spacing_mm, kind="nearest")(item)["label"]
    np.testing.assert_array_equal(nearest.numpy(), image.numpy())
    assert (nearest.numpy() != found.numpy()).any()


def test_the_spacing_of_the_mask_decides_its_distances():
    label = labelled((0.7, 1.2, 4.8))
    found = LabelThroughPlaned("label")({"label": label})["label"]
    expected = signed_distance_interpolation(label.numpy()[0], 4.0, spacing_mm=(0.7, 1.2, 4.8))
    np.testing.assert_array_equal(found.numpy()[0], expected)
    wrong = signed_distance_interpolation(label.numpy()[0], 4.0, spacing_mm=(4.8, 1.2, 0.7))
    assert (found.numpy()[0] != wrong).any()


def test_type_and_metadata_are_kept_and_the_input_is_left_alone():
    label = labelled((1, 1, 4), filename_or_obj="a.nii")
    before, affine = label.clone(), label.affine.clone()
    found = LabelThroughPlaned("label")({"label": label, "name": "a"})
    assert found["name"] == "a"
    assert found["label"].dtype == label.dtype
    assert found["label"].meta["filename_or_obj"] == "a.nii"
    assert torch.equal(label.as_tensor(), before.as_tensor())
    assert torch.equal(label.affine, affine)


def test_a_near_isotropic_mask_passes_unchanged():
    label = labelled((1, 1, 1.1))
    found = LabelThroughPlaned("label")({"label": label})["label"]
    assert torch.equal(found.as_tensor(), label.as_tensor())
    assert torch.equal(found.affine, label.affine)


def test_missing_keys_are_an_error_unless_allowed():
    item = {"label": labelled((1, 1, 4))}
    with pytest.raises(KeyError):
        LabelThroughPlaned(("label", "other"))(item)
    assert set(LabelThroughPlaned(("label", "other"), allow_missing_keys=True)(item)) == {"label"}
