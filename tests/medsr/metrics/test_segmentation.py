from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.metrics import (
    average_surface_distance,
    boundary_dice,
    dice,
    hausdorff_95,
    segmentation_scores,
    volume_error_ml,
)

THICK = (1.0, 1.0, 4.0)
ISOTROPIC = (1.0, 1.0, 1.0)
DISTANCES = (boundary_dice, hausdorff_95, average_surface_distance)


def ellipsoid(spacing, radii_mm, *, offset_mm=(0.0, 0.0, 0.0), extent_mm=72) -> np.ndarray:
    """Ellipsoid in the middle of a cube of ``extent_mm``, moved by ``offset_mm``."""
    axes = [(np.arange(round(extent_mm / s)) + 0.5) * s - extent_mm / 2 for s in spacing]
    grid = np.meshgrid(*axes, indexing="ij")
    return sum(((x - o) / r) ** 2 for x, o, r in zip(grid, offset_mm, radii_mm, strict=True)) <= 1


def box(shape, low, high) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*pair) for pair in zip(low, high, strict=True))] = True
    return mask


def brute_force(first, second, spacing) -> dict[str, float]:
    """All distances from their definitions, voxel by voxel."""

    def boundary(mask):
        points, areas = [], []
        for index in map(tuple, np.argwhere(mask)):
            exposed = [0, 0, 0]
            for axis, step in product(range(3), (-1, 1)):
                other = list(index)
                other[axis] += step
                outside = not 0 <= other[axis] < mask.shape[axis]
                exposed[axis] += outside or not mask[tuple(other)]
            if any(exposed):
                faces = [math.prod(spacing) / s for s in spacing]
                areas.append(math.hypot(*(n * f for n, f in zip(exposed, faces, strict=True))))
                points.append([i * s for i, s in zip(index, spacing, strict=True)])
        return points, areas

    def directed(points, others):
        return [min(math.dist(p, q) for q in others) for p in points]

    def within(distances, areas, share):
        return next(
            d
            for d in sorted(distances)
            if sum(a for e, a in zip(distances, areas, strict=True) if e <= d) >= share * sum(areas)
        )

    (points, areas), (other_points, other_areas) = boundary(first), boundary(second)
    there, back = directed(points, other_points), directed(other_points, points)
    distances, weights = there + back, areas + other_areas
    total = sum(weights)
    return {
        "hd95_mm": max(within(there, areas, 0.95), within(back, other_areas, 0.95)),
        "assd_mm": sum(d * w for d, w in zip(distances, weights, strict=True)) / total,
        "boundary_dice_1mm": sum(w for d, w in zip(distances, weights, strict=True) if d <= 1) / total,
    }


# -- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [ISOTROPIC, THICK])
def test_identical_masks_are_perfect(spacing):
    mask = ellipsoid(spacing, (16, 20, 24))
    assert segmentation_scores(mask, mask, spacing) == {
        "dice": 1,
        "hd95_mm": 0,
        "assd_mm": 0,
        "boundary_dice_1mm": 1,
        "volume_error_ml": 0,
    }


def test_dice_and_volume_error_by_hand():
    first, second = box((8, 8, 8), (0, 0, 0), (4, 4, 4)), box((8, 8, 8), (2, 0, 0), (8, 4, 4))
    assert dice(first, second) == pytest.approx(2 * 32 / (64 + 96))
    assert volume_error_ml(first, second, (0.5, 1, 4)) == pytest.approx(-32 * 2 / 1000)
    assert volume_error_ml(second, first, (0.5, 1, 4)) == pytest.approx(32 * 2 / 1000)


@pytest.mark.parametrize(("axis", "voxels"), [(0, 4), (1, 4), (2, 1), (0, 8), (1, 8), (2, 2)])
def test_the_shift_of_a_ball_is_measured_in_mm_along_its_axis(axis, voxels):
    offset = [0.0, 0.0, 0.0]
    offset[axis] = shift = voxels * THICK[axis]
    first, second = (ellipsoid(THICK, (20, 20, 20), offset_mm=o) for o in ((0, 0, 0), offset))
    # A twentieth of a ball's area faces the shift within 18 degrees: 95 % lie within cos(18) = 0.95 of it.
    assert hausdorff_95(first, second, THICK) == pytest.approx(0.95 * shift, rel=0.12)
    # Spacings in another order put the same masks elsewhere.
    wrong = (1, 4, 1) if axis == 1 else THICK[::-1]
    assert hausdorff_95(first, second, wrong) != pytest.approx(0.95 * shift, rel=0.2)
    assert volume_error_ml(first, second, THICK) == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_ellipsoid_sees_its_own_axis(axis):
    # An ellipsoid with three different radii: only the spacing of the shifted axis may count.
    first = ellipsoid(THICK, (12, 16, 24))
    second = np.roll(first, 1, axis)
    assert hausdorff_95(first, second, THICK) == pytest.approx(THICK[axis])
    agreement = boundary_dice(first, second, THICK)
    assert agreement == pytest.approx(1) if axis < 2 else agreement < 0.8


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores_follow_the_axes_when_these_are_permuted(axis):
    spacing = (0.7, 1.1, 3.0)
    first = ellipsoid(spacing, (14, 17, 24))
    second = ellipsoid(spacing, (15, 15, 21), offset_mm=(2, -1, 3))
    order = np.roll((0, 1, 2), axis)
    expected = segmentation_scores(first, second, spacing)
    found = segmentation_scores(first.transpose(order), second.transpose(order), np.array(spacing)[order])
    assert found == pytest.approx(expected)


def test_a_box_that_grows_by_one_face():
    first, second = box((12, 12, 12), (0, 0, 0), (8, 8, 4)), box((12, 12, 12), (0, 0, 0), (8, 8, 5))
    assert hausdorff_95(first, second, THICK) == 4
    assert hausdorff_95(first, second, THICK[::-1]) == 1
    assert boundary_dice(first, second, THICK[::-1]) == 1
    assert boundary_dice(first, second, THICK, tolerance_mm=4) == 1
    assert boundary_dice(first, second, THICK, tolerance_mm=3.9) < 0.9


@pytest.mark.parametrize("spacing", [ISOTROPIC, (0.5, 0.5, 0.5), (0.8, 1, 1.25)])
def test_concentric_balls_are_their_difference_apart(spacing):
    first, second = ellipsoid(spacing, (18,) * 3), ellipsoid(spacing, (20,) * 3)
    assert average_surface_distance(first, second, spacing) == pytest.approx(2, abs=0.12)
    assert hausdorff_95(first, second, spacing) == pytest.approx(2, abs=0.45)
    assert boundary_dice(first, second, spacing) == 0
    assert boundary_dice(first, second, spacing, tolerance_mm=3) == 1
    error = volume_error_ml(first, second, spacing)
    assert error == pytest.approx(-4 / 3 * math.pi * (20**3 - 18**3) / 1000, rel=0.02)


@pytest.mark.parametrize("spacing", [ISOTROPIC, THICK, (2.0, 0.7, 1.3)])
def test_agreement_with_brute_force(spacing):
    rng = np.random.default_rng(3)
    first, second = (ellipsoid((1, 1, 1), (3.4, 2.6, 3.0), extent_mm=9) for _ in range(2))
    first, second = first ^ (rng.random(first.shape) < 0.04), second ^ (rng.random(first.shape) < 0.04)
    found = segmentation_scores(first, second, spacing)
    for name, expected in brute_force(first, second, spacing).items():
        assert found[name] == pytest.approx(expected, rel=1e-5), name


def test_isotropic_distances_agree_with_monai():
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    first, second = (
        ellipsoid(ISOTROPIC, (14, 17, 20)),
        ellipsoid(ISOTROPIC, (16, 17, 18), offset_mm=(2, 3, 0)),
    )
    tensors = [torch.from_numpy(mask)[None, None] for mask in (first, second)]
    settings = {"include_background": True, "spacing": ISOTROPIC}
    monai_hd = compute_hausdorff_distance(*tensors, percentile=95, **settings).item()
    monai_asd = compute_average_surface_distance(*tensors, symmetric=True, **settings).item()
    assert hausdorff_95(first, second, ISOTROPIC) == pytest.approx(monai_hd, rel=0.05)
    assert average_surface_distance(first, second, ISOTROPIC) == pytest.approx(monai_asd, rel=0.05)


def test_thick_slices_tell_nearly_the_same_as_thin_ones():
    def scores(spacing):
        masks = (ellipsoid(spacing, (12,) * 3, offset_mm=o) for o in ((0, 0, 0), (3, 0, 0)))
        return segmentation_scores(*masks, spacing)

    thin, thick = scores(ISOTROPIC), scores(THICK)
    # Counting boundary voxels without their area, the distance would fall by 38 %.
    assert thick["assd_mm"] == pytest.approx(thin["assd_mm"], rel=0.25)
    assert thick["hd95_mm"] == pytest.approx(thin["hd95_mm"], rel=0.1)


def test_the_faces_of_a_voxel_count_with_their_area():
    # A plate of one slice: its voxels show two faces of 1 mm2, those at its rim sides of 4 mm2 as well.
    first, second = box((30, 30, 3), (0, 0, 1), (20, 20, 2)), box((30, 30, 3), (0, 0, 1), (25, 20, 2))
    inner, rim, corner = 2, math.hypot(2, 4), math.hypot(2, 4, 4)

    def area(length):
        return (length - 2) * 18 * inner + 2 * (length - 2 + 18) * rim + 4 * corner

    # The longer plate's columns 21 to 24 are 2 to 5 mm from the shorter one; all else agrees within 1 mm.
    far = 4 * 18 * inner + 2 * 4 * rim + (18 * (rim - inner) + 2 * (corner - rim))
    expected = 1 - far / (area(20) + area(25))
    assert boundary_dice(first, second, THICK) == pytest.approx(expected)


def test_a_mask_at_the_border_of_the_volume_ends_there():
    inner, outer = box((6, 6, 6), (0, 0, 0), (6, 6, 3)), box((8, 8, 8), (1, 1, 1), (7, 7, 4))
    other, other_outer = box((6, 6, 6), (0, 0, 0), (6, 6, 5)), box((8, 8, 8), (1, 1, 1), (7, 7, 6))
    assert segmentation_scores(inner, other, THICK) == segmentation_scores(outer, other_outer, THICK)


def test_scores_are_those_of_the_single_functions():
    first = ellipsoid(THICK, (14, 17, 24))
    second = ellipsoid(THICK, (15, 15, 21), offset_mm=(2, -1, 3))
    assert segmentation_scores(first, second, THICK) == {
        "dice": dice(first, second),
        "hd95_mm": hausdorff_95(first, second, THICK),
        "assd_mm": average_surface_distance(first, second, THICK),
        "boundary_dice_1mm": boundary_dice(first, second, THICK, tolerance_mm=1.0),
        "volume_error_ml": volume_error_ml(first, second, THICK),
    }


@pytest.mark.parametrize("score", [dice, *DISTANCES])
def test_scores_are_symmetric(score):
    masks = ellipsoid(THICK, (14, 17, 24)), ellipsoid(THICK, (15, 15, 21), offset_mm=(2, -1, 3))
    rest = () if score is dice else (THICK,)
    assert score(*masks, *rest) == pytest.approx(score(*masks[::-1], *rest))


def test_a_tolerance_of_one_voxel_survives_a_header_in_float32():
    first, second = box((12, 8, 8), (2, 2, 2), (8, 6, 6)), box((12, 8, 8), (3, 2, 2), (9, 6, 6))
    for size in (1.0, np.nextafter(np.float32(1), np.float32(2)), np.nextafter(np.float32(1), np.float32(0))):
        assert boundary_dice(first, second, (size, size, size)) == 1


# -- empty masks --------------------------------------------------------------------------------------------


def test_a_class_that_is_in_neither_mask_has_no_score():
    empty = np.zeros((4, 4, 4), dtype=bool)
    assert set(segmentation_scores(empty, empty, ISOTROPIC).values()) == {None}
    assert dice(empty, empty) is None
    assert volume_error_ml(empty, empty, ISOTROPIC) is None
    assert [score(empty, empty, ISOTROPIC) for score in DISTANCES] == [None] * 3


@pytest.mark.parametrize("missed", [True, False])
def test_one_empty_mask_is_a_failure_and_no_distance(missed):
    empty, mask = np.zeros((4, 4, 4), dtype=bool), box((4, 4, 4), (0, 0, 0), (2, 2, 2))
    pair = (empty, mask) if missed else (mask, empty)
    assert segmentation_scores(*pair, THICK) == {
        "dice": 0,
        "hd95_mm": None,
        "assd_mm": None,
        "boundary_dice_1mm": 0,
        "volume_error_ml": pytest.approx(-0.032 if missed else 0.032),
    }
    assert dice(*pair) == 0
    assert [score(*pair, THICK) for score in DISTANCES] == [0, None, None]


def test_masks_without_a_common_voxel_have_distances_all_the_same():
    first, second = box((9, 4, 4), (0, 0, 0), (1, 1, 1)), box((9, 4, 4), (8, 0, 0), (9, 1, 1))
    assert segmentation_scores(first, second, (0.5, 1, 1)) == {
        "dice": 0,
        "hd95_mm": 4,
        "assd_mm": 4,
        "boundary_dice_1mm": 0,
        "volume_error_ml": 0,
    }


# -- inputs -------------------------------------------------------------------------------------------------


def test_tensors_and_integer_masks_are_welcome():
    first = ellipsoid(THICK, (14, 17, 24))
    second = ellipsoid(THICK, (15, 15, 21), offset_mm=(2, -1, 3))
    expected = segmentation_scores(first, second, THICK)
    for kind in (torch.bool, torch.uint8, torch.float32, torch.bfloat16):
        tensors = (torch.from_numpy(mask).to(kind) for mask in (first, second))
        assert segmentation_scores(*tensors, THICK) == expected
    assert segmentation_scores(first.astype(np.int16), second.astype(float), list(THICK)) == expected
    assert all(type(value) is float for value in expected.values())


def test_shapes_that_differ_are_refused():
    first, second = np.zeros((4, 4, 4), dtype=bool), np.zeros((4, 4, 5), dtype=bool)
    for score in (volume_error_ml, segmentation_scores, *DISTANCES):
        with pytest.raises(DataError, match="shapes differ: pred"):
            score(first, second, ISOTROPIC)
    with pytest.raises(DataError, match="shapes differ: pred"):
        dice(first, second)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((1, 4, 4, 4)), r"pred: a mask must be \(X, Y, Z\), got shape \(1, 4, 4, 4\)"),
        (np.full((4, 4, 4), 2), "pred: a mask holds only 0 and 1; pass one class"),
        (np.full((4, 4, 4), 0.5), "pred: a mask holds only 0 and 1"),
        (np.full((4, 4, 4), np.nan), "pred: a mask holds only 0 and 1"),
    ],
)
def test_what_is_no_mask_of_one_class_is_refused(mask, message):
    with pytest.raises(DataError, match=message):
        segmentation_scores(mask, np.zeros((4, 4, 4)), ISOTROPIC)


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, -1, 1), (1, 1, math.nan), 1.0])
def test_a_spacing_that_is_none_is_refused(spacing):
    mask = np.ones((4, 4, 4), dtype=bool)
    for score in (volume_error_ml, segmentation_scores, *DISTANCES):
        with pytest.raises(SettingError, match="three positive numbers in array order"):
            score(mask, mask, spacing)


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    mask = np.ones((4, 4, 4), dtype=bool)
    with pytest.raises(SettingError, match="tolerance_mm must be"):
        boundary_dice(mask, mask, ISOTROPIC, tolerance_mm=tolerance)
