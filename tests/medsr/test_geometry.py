from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from medsr import geometry
from medsr.errors import DataError, GeometryError, SettingError
from medsr.geometry import (
    FloatArray,
    refinement_ratio,
    rescaled_affine,
    rescaled_size,
    slice_axis,
    slice_positions,
    spacing_of,
    through_plane_ratio,
    to_slice_last,
    validate_affine,
)

# Six ways to lie in the scanner: which world axis each array axis follows.
PERMUTATIONS = list(itertools.permutations(range(3)))
FLIPS = list(itertools.product((1.0, -1.0), repeat=3))

AXES = st.integers(0, 2)
SIZES = st.integers(1, 60)
RATIOS = st.floats(0.3, 8.0)
ANGLES = st.tuples(*[st.floats(-180.0, 180.0)] * 3)
SPACINGS = st.tuples(*[st.floats(0.2, 10.0)] * 3)
ORIGINS = st.tuples(*[st.floats(-300.0, 300.0)] * 3)


def rotation(degrees: tuple[float, float, float]) -> FloatArray:
    turned = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        first, second = (i for i in range(3) if i != axis)
        step = np.eye(3)
        step[[first, first, second, second], [first, second, first, second]] = [
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        ]
        turned = turned @ step
    return turned


def make_affine(
    spacing: tuple[float, ...],
    origin: tuple[float, ...] = (0.0, 0.0, 0.0),
    *,
    directions: FloatArray | None = None,
) -> FloatArray:
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if directions is None else directions) * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


def signed_permutation(order: tuple[int, ...], signs: tuple[float, ...]) -> FloatArray:
    directions = np.zeros((3, 3))
    for column, (row, sign) in enumerate(zip(order, signs, strict=True)):
        directions[row, column] = sign
    return directions


def faces(affine: FloatArray, axis: int, size: int) -> FloatArray:
    """World positions of the two end faces of the volume: half a voxel beyond the end centres."""
    ends = np.zeros((2, 4))
    ends[:, axis] = -0.5, size - 0.5
    ends[:, 3] = 1.0
    return (ends @ affine.T)[:, :3]


def centres(affine: FloatArray, axis: int, size: int) -> FloatArray:
    voxels = np.zeros((size, 4))
    voxels[:, axis] = np.arange(size)
    voxels[:, 3] = 1.0
    return (voxels @ affine.T)[:, :3]


AFFINES = st.builds(
    lambda spacing, origin, angles: make_affine(spacing, origin, directions=rotation(angles)),
    SPACINGS,
    ORIGINS,
    ANGLES,
)


@given(AFFINES, AXES, SIZES, SIZES)
def test_the_field_of_view_is_preserved(affine: FloatArray, axis: int, size: int, new_size: int) -> None:
    new = rescaled_affine(affine, axis, size=size, new_size=new_size)
    np.testing.assert_allclose(faces(new, axis, new_size), faces(affine, axis, size), atol=1e-8)


@given(AFFINES, AXES, SIZES, RATIOS)
def test_with_any_ratio_the_centre_stays_and_the_spacing_is_exact(
    affine: FloatArray, axis: int, size: int, ratio: float
) -> None:
    new_size = rescaled_size(size, ratio)
    new = rescaled_affine(affine, axis, size=size, new_size=new_size, ratio=ratio)
    middle = faces(affine, axis, size).mean(axis=0)
    np.testing.assert_allclose(faces(new, axis, new_size).mean(axis=0), middle, atol=1e-8)
    assert spacing_of(new)[axis] == pytest.approx(spacing_of(affine)[axis] / ratio)
    # Rounding to whole slices moves either face by at most a quarter of a new slice, up to the rounded ratio.
    new_spacing, slack = spacing_of(new)[axis], 5e-4 * size / 2
    shift = np.linalg.norm(faces(new, axis, new_size) - faces(affine, axis, size), axis=1)
    if size * ratio >= 0.5:
        assert (shift <= (0.25 + slack) * new_spacing + 1e-8).all()


@given(AFFINES, AXES, st.integers(1, 30), st.integers(1, 8))
def test_the_new_slices_of_a_slab_average_to_its_centre(
    affine: FloatArray, axis: int, size: int, ratio: int
) -> None:
    new = rescaled_affine(affine, axis, size=size, new_size=size * ratio)
    fine = centres(new, axis, size * ratio).reshape(size, ratio, 3).mean(axis=1)
    np.testing.assert_allclose(fine, centres(affine, axis, size), atol=1e-8)


@given(AFFINES, AXES, st.integers(1, 30), st.integers(1, 8))
def test_the_origin_moves_by_half_a_new_spacing_per_extra_slice(
    affine: FloatArray, axis: int, size: int, ratio: int
) -> None:
    new = rescaled_affine(affine, axis, size=size, new_size=size * ratio)
    direction = affine[:3, axis] / spacing_of(affine)[axis]
    shift = -spacing_of(new)[axis] * (ratio - 1) / 2 * direction
    np.testing.assert_allclose(new[:3, 3] - affine[:3, 3], shift, atol=1e-9)


@given(AFFINES, AXES, SIZES, RATIOS)
def test_the_other_axes_and_the_input_are_untouched(
    affine: FloatArray, axis: int, size: int, ratio: float
) -> None:
    before = affine.copy()
    new = rescaled_affine(affine, axis, size=size, new_size=rescaled_size(size, ratio), ratio=ratio)
    others = [i for i in range(3) if i != axis]
    np.testing.assert_array_equal(new[:, others], affine[:, others])
    np.testing.assert_array_equal(affine, before)
    np.testing.assert_array_equal(new[3], [0, 0, 0, 1])


@given(AFFINES, AXES, SIZES, st.integers(1, 8))
def test_finer_and_back_is_the_identity(affine: FloatArray, axis: int, size: int, ratio: int) -> None:
    fine = rescaled_affine(affine, axis, size=size, new_size=size * ratio)
    np.testing.assert_allclose(
        rescaled_affine(fine, axis, size=size * ratio, new_size=size), affine, atol=1e-9
    )


@given(AFFINES, AXES, SIZES)
def test_ratio_one_changes_nothing(affine: FloatArray, axis: int, size: int) -> None:
    np.testing.assert_allclose(rescaled_affine(affine, axis, size=size, new_size=size), affine, atol=1e-12)


@given(SIZES, SIZES)
def test_positions_agree_with_the_affine(size: int, new_size: int) -> None:
    affine = make_affine((1.0, 1.0, 3.0), (5.0, -7.0, 11.0))
    fine = centres(rescaled_affine(affine, 2, size=size, new_size=new_size), 2, new_size)[:, 2]
    np.testing.assert_allclose(fine, 11.0 + 3.0 * slice_positions(size, new_size), atol=1e-9)


@given(SIZES, SIZES)
def test_positions_are_even_and_symmetric(size: int, new_size: int) -> None:
    positions = slice_positions(size, new_size)
    assert positions.shape == (new_size,)
    np.testing.assert_allclose(np.diff(positions), size / new_size)
    np.testing.assert_allclose(positions + positions[::-1], size - 1, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "old_mm", "new_mm", "expected"),
    [
        (40, 4.0, 1.0, 160),
        (25, 6.5, 1.0, 163),  # 162.5: halves round up
        (25, 6.5, 0.78125, 208),
        (30, 5.0, 1.3, 115),  # 115.38
        (31, 5.0, 1.3, 119),  # 119.23
        (24, 5.0, 1.0, 120),
        (24, 5.0, 0.9, 133),  # 133.33
        (11, 7.5, 0.5, 165),
        (35, 4.8, 1.016, 165),  # 165.35
        (36, 3.3, 0.573, 207),  # 207.32
        (60, 3.0, 1.0, 180),
        (60, 3.000016, 0.9, 200),  # header noise does not add a slice
        (60, 2.999984, 1.0, 180),
        (61, 3.0, 2.0, 92),  # 91.5
        (1, 8.0, 1.0, 8),
        (1, 1.0, 4.0, 1),  # never fewer than one slice
        (160, 1.0, 4.0, 40),
        (155, 1.0, 2.5, 62),
        (33, 3.6, 1.2, 99),
        (48, 2.2, 1.1, 96),
    ],
)
def test_the_number_of_slices_is_exact(size: int, old_mm: float, new_mm: float, expected: int) -> None:
    assert rescaled_size(size, old_mm / new_mm) == expected


@pytest.mark.parametrize(
    ("size", "ratio"), [(0, 4.0), (-3, 4.0), (10, 0.0), (10, -1.0), (10, float("nan")), (10, float("inf"))]
)
def test_sizes_and_ratios_that_mean_nothing_are_refused(size: int, ratio: float) -> None:
    with pytest.raises(GeometryError, match="size must be >= 1 and ratio > 0"):
        rescaled_size(size, ratio)


@pytest.mark.parametrize(("size", "ratio"), [(10, 4000.0), (30, 1e30)])
def test_more_slices_than_a_file_can_hold_are_refused(size: int, ratio: float) -> None:
    assert rescaled_size(10, 3276.7) == 32767
    with pytest.raises(GeometryError, match="above the 32767 that NIfTI can hold"):
        rescaled_size(size, ratio)


@pytest.mark.parametrize("order", PERMUTATIONS)
@pytest.mark.parametrize("signs", FLIPS)
def test_all_orientations_and_flips(order: tuple[int, ...], signs: tuple[float, ...]) -> None:
    for axis in range(3):
        spacing = [0.9, 0.9, 0.9]
        spacing[axis] = 4.5
        affine = make_affine(
            tuple(spacing), (-90.0, 120.0, -70.0), directions=signed_permutation(order, signs)
        )
        assert slice_axis(affine) == axis
        new = rescaled_affine(affine, axis, size=20, new_size=100)
        np.testing.assert_allclose(spacing_of(new), 0.9)
        np.testing.assert_allclose(faces(new, axis, 100), faces(affine, axis, 20), atol=1e-10)
        # The axes keep their directions: a flip stays a flip.
        np.testing.assert_array_equal(np.sign(new[:3, :3]), np.sign(affine[:3, :3]))


@given(ANGLES, AXES, st.floats(0.3, 2.0), st.floats(1.25, 12.0), ORIGINS)
def test_oblique_volumes(
    angles: tuple[float, float, float], axis: int, in_plane: float, ratio: float, origin: tuple[float, ...]
) -> None:
    spacing = [in_plane] * 3
    spacing[axis] = in_plane * ratio
    affine = make_affine(tuple(spacing), origin, directions=rotation(angles))
    np.testing.assert_allclose(spacing_of(affine), spacing)
    np.testing.assert_array_equal(validate_affine(affine), affine)
    assert slice_axis(affine) == axis


@given(st.floats(0.3, 3.0), st.floats(1.0, 1.19), AXES)
def test_near_isotropic_volumes_need_force(in_plane: float, ratio: float, axis: int) -> None:
    spacing = [in_plane] * 3
    spacing[axis] *= ratio
    affine = make_affine(tuple(spacing))
    with pytest.raises(GeometryError, match="scan: already near-isotropic"):
        slice_axis(affine, name="scan")
    assume(ratio > 1.0)
    assert slice_axis(affine, force=True) == axis


def test_an_isotropic_volume_that_is_forced_counts_as_axial() -> None:
    assert slice_axis(np.eye(4), force=True) == 2


def test_the_limit_of_the_ratio_belongs_to_the_thick_side() -> None:
    limit = make_affine((1.0, 1.0, geometry.RATIO_LIMIT))
    assert slice_axis(limit) == 2


@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 1, 2)])
@pytest.mark.parametrize("axis", range(3))
def test_the_permutation_ends_with_the_slice_axis_and_can_be_undone(
    shape: tuple[int, int, int], axis: int
) -> None:
    volume = np.arange(np.prod(shape)).reshape(shape)
    order = to_slice_last(axis)
    moved = volume.transpose(order)
    assert moved.shape[-1] == shape[axis]
    assert order[0] < order[1]
    np.testing.assert_array_equal(moved.transpose(np.argsort(order)), volume)


@pytest.mark.parametrize("axis", [-1, 3])
def test_there_is_no_fourth_axis(axis: int) -> None:
    with pytest.raises(GeometryError, match="axis must be 0, 1 or 2"):
        to_slice_last(axis)


def _with(place: tuple[int, int], value: float) -> FloatArray:
    affine = np.eye(4)
    affine[place] = value
    return affine


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.eye(3), "4 x 4 matrix, got shape"),
        (np.ones(16), "4 x 4 matrix, got shape"),
        (_with((0, 0), np.nan), "NaN or infinite"),
        (_with((1, 3), np.inf), "NaN or infinite"),
        (_with((1, 1), 0.0), "singular"),
        (np.diag([0.0, 0.0, 0.0, 1.0]), "singular"),
        (make_affine((1.0, 1.0, 1.0), directions=np.ones((3, 3))), "singular"),
        (_with((0, 2), 0.2), "not perpendicular"),
        (_with((1, 0), -0.01), "not perpendicular"),
    ],
)
def test_bad_affines_are_named_in_one_line(affine: FloatArray, reason: str) -> None:
    with pytest.raises(GeometryError, match=reason) as caught:
        validate_affine(affine, name="scan.nii.gz")
    assert str(caught.value).startswith("scan.nii.gz: ")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DataError)


def test_rounding_in_a_header_is_not_shear() -> None:
    affine = make_affine((0.5, 0.5, 7.5), directions=rotation((3.0, -11.0, 7.0)))
    assert validate_affine(affine.astype(np.float32)).dtype == np.float64
    validate_affine(np.round(affine, 4))


def test_the_ratio_ignores_noise_in_the_spacing():
    assert through_plane_ratio(np.diag([0.9, 0.9, 3.6000192, 1])) == 4.0
    assert through_plane_ratio(np.diag([4.0, 1, 0.8, 1])) == 4.0
    assert through_plane_ratio(np.diag([0.9, 0.9, 3.6, 1]), 1.2) == 3.0


@pytest.mark.parametrize(("wanted", "text"), [(5, "5"), (1e9, r"1e\+09")])
def test_a_target_coarser_than_the_slices_is_refused(wanted, text):
    affine = np.diag([0.9, 0.9, 3.6, 1])
    assert refinement_ratio(affine, 3.6) == 1.0
    assert refinement_ratio(affine) == 4.0
    with pytest.raises(SettingError, match=f"target_spacing_mm {text} is coarser than the slices of 3.6 mm"):
        refinement_ratio(affine, wanted)


def test_slices_finer_than_the_plane_are_refused_without_a_target():
    with pytest.raises(SettingError, match="target_spacing_mm 2 is coarser than the slices of 1 mm"):
        refinement_ratio(np.diag([2.0, 2, 1, 1]), axis=2)


def test_rounding_does_not_choose_among_equal_spacings():
    for spacing in ([1.00000004, 1.00000003, 0.99999999], [0.99999998, 0.99999997, 0.99999999]):
        assert slice_axis(np.diag([*spacing, 1.0]), force=True) == 2
    assert slice_axis(np.diag([1.01, 1.0, 1.0, 1.0]), force=True) == 0
