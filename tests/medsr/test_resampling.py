from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from medsr.errors import SettingError
from medsr.geometry import rescaled_size, slice_positions
from medsr.resampling import (
    INTERPOLATORS,
    antialiased_bicubic_matrix,
    interpolation_matrix,
    keys_matrix,
    resample_last_axis,
)
from PIL import Image
from scipy.ndimage import map_coordinates

SIZES = st.integers(1, 24)
# Beyond the last centre, as the outer thin slices of a stack lie, and further.
SHARES = st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=8)


def places_of(size: int, shares: list[float]) -> np.ndarray:
    return np.asarray(shares) * (size - 1) + np.linspace(-0.5, 0.5, len(shares))


@given(SIZES, SHARES, st.integers(0, 99))
def test_cubic_equals_scipy(size, shares, seed):
    line = np.random.default_rng(seed).normal(size=size)
    places = places_of(size, shares)
    expected = map_coordinates(line, [places], order=3, mode="nearest")
    np.testing.assert_allclose(interpolation_matrix(size, places) @ line, expected, atol=1e-5)


@pytest.mark.parametrize("ratio", [1.3, 2, 3.5, 6])
def test_cubic_equals_scipy_on_the_grid_of_super_resolution(ratio):
    size = 13
    positions = slice_positions(size, rescaled_size(size, ratio), ratio)
    volume = np.random.default_rng(1).normal(size=(3, 2, size))
    grid = np.meshgrid(np.arange(3), np.arange(2), positions, indexing="ij")
    expected = map_coordinates(volume, grid, order=1)  # both other axes fall on voxels
    linear = resample_last_axis(volume, interpolation_matrix(size, positions, kind="linear"))
    inside = (positions >= 0) & (positions <= size - 1)
    np.testing.assert_allclose(linear[..., inside], expected[..., inside], atol=1e-5)
    for row, line in zip(
        resample_last_axis(volume, interpolation_matrix(size, positions)).reshape(6, -1),
        volume.reshape(6, -1),
        strict=True,
    ):
        np.testing.assert_allclose(
            row, map_coordinates(line, [positions], order=3, mode="nearest"), atol=1e-5
        )


@given(SIZES, SHARES, st.sampled_from(INTERPOLATORS))
def test_rows_sum_to_one_and_constants_stay(size, shares, kind):
    places = places_of(size, shares)
    matrix = interpolation_matrix(size, places, kind=kind)
    assert matrix.shape == (len(places), size)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(keys_matrix(size, places).sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("kind", INTERPOLATORS)
def test_slices_themselves_are_kept(kind):
    np.testing.assert_allclose(interpolation_matrix(9, np.arange(9), kind=kind), np.eye(9), atol=1e-6)
    np.testing.assert_allclose(keys_matrix(9, np.arange(9)), np.eye(9), atol=1e-12)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_cubic_reproduces_cubic_polynomials_far_from_the_ends(power):
    places = np.linspace(18, 26, 33)
    found = interpolation_matrix(45, places) @ ((np.arange(45) - 22) / 5.0) ** power
    np.testing.assert_allclose(found, ((places - 22) / 5) ** power, atol=1e-5)


def test_keys_reproduces_parabolas_and_only_with_its_own_parameter():
    places = np.linspace(3, 8, 21)
    parabola = (np.arange(12) - 5.0) ** 2
    np.testing.assert_allclose(keys_matrix(12, places) @ parabola, (places - 5) ** 2, atol=1e-12)
    assert np.abs(keys_matrix(12, places, a=-0.75) @ parabola - (places - 5) ** 2).max() > 0.01


def test_keys_is_the_bicubic_of_pytorch():
    line = torch.rand(11, dtype=torch.float64)
    size = 28
    found = keys_matrix(11, slice_positions(11, size), a=-0.75) @ line.numpy()
    image = line[None, None, :, None].expand(1, 1, 11, 4)
    expected = torch.nn.functional.interpolate(image, size=(size, 4), mode="bicubic")[0, 0, :, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@given(st.integers(2, 24), SHARES)
def test_linear_is_a_ramp_between_the_ends_and_flat_beyond(size, shares):
    places = places_of(size, shares)
    found = interpolation_matrix(size, places, kind="linear") @ np.arange(size)
    np.testing.assert_allclose(found, np.clip(places, 0, size - 1), atol=1e-9)


@given(SIZES, SHARES)
def test_nearest_picks_one_slice_not_further_than_half_a_slice(size, shares):
    places = places_of(size, shares)
    matrix = interpolation_matrix(size, places, kind="nearest")
    assert ((matrix == 0) | (matrix == 1)).all()
    picked = matrix @ np.arange(size)
    assert (np.abs(picked - np.clip(places, 0, size - 1)) <= 0.5 + 1e-12).all()


def test_nearest_gives_every_slab_its_share():
    # Also for a ratio whose thin slices straddle no border: 4 thin slices for each thick one.
    matrix = interpolation_matrix(5, slice_positions(5, 20, 4), kind="nearest")
    np.testing.assert_array_equal(matrix, np.kron(np.eye(5), np.ones((4, 1))))
    assert interpolation_matrix(3, [0.5], kind="nearest")[0].argmax() == 1


@pytest.mark.parametrize("kind", INTERPOLATORS)
@pytest.mark.parametrize("ratio", [2, 3, 5.5])
def test_a_reversed_stack_gives_the_reversed_result(kind, ratio):
    size = 8
    new_size = rescaled_size(size, ratio)
    positions = slice_positions(size, new_size, ratio)
    if kind == "nearest":
        # A tie goes to the later slice in both directions.
        positions = positions[np.abs(positions % 1 - 0.5) > 1e-9]
    matrix = interpolation_matrix(size, positions, kind=kind)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-9)


def test_the_result_belongs_to_the_caller():
    first = interpolation_matrix(6, [1.5])
    first[:] = 7
    assert interpolation_matrix(6, [1.5]).max() < 1


@given(SIZES, SIZES)
def test_antialiased_rows_sum_to_one_and_commute_with_a_flip(size, new_size):
    matrix = antialiased_bicubic_matrix(size, new_size)
    assert matrix.shape == (new_size, size)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)


def test_antialiased_halving_has_the_weights_of_the_kernel_at_quarter_steps():
    # Keys' kernel at 1/4, 3/4, 5/4 and 7/4, halved because it is twice as wide.
    half = np.array([111, 29, -9, -3]) / 256
    matrix = antialiased_bicubic_matrix(24, 12)
    np.testing.assert_array_equal(matrix[5, 7:15], [*half[::-1], *half])
    assert np.count_nonzero(matrix[5]) == 8
    # The first row reaches three pixels over the edge, where it sees pixels 0, 1 and 2 mirrored.
    reach = np.array([*half[::-1], *half])
    np.testing.assert_allclose(matrix[0, :5], [*(reach[3:6] + reach[2::-1]), *reach[6:]], atol=1e-15)


@given(SIZES, st.integers(1, 5))
def test_antialiased_enlarging_is_plain_keys_away_from_the_edges(size, ratio):
    positions = slice_positions(size, size * ratio)
    inside = (positions >= 1) & (positions <= size - 2)
    found = antialiased_bicubic_matrix(size, size * ratio)
    np.testing.assert_allclose(found[inside], keys_matrix(size, positions)[inside], atol=1e-12)


@pytest.mark.parametrize(("size", "new_size"), [(96, 24), (90, 30), (64, 27), (160, 10), (20, 80)])
def test_antialiased_is_that_of_pillow_and_of_pytorch_in_the_interior(size, new_size):
    line = np.random.default_rng(0).random(size)
    found = antialiased_bicubic_matrix(size, new_size) @ line
    rim = max(2, int(np.ceil(2 * new_size / size))) + 1
    picture = Image.fromarray(np.tile(line.astype(np.float32), (4, 1)))
    pillow = np.asarray(picture.resize((new_size, 4), Image.Resampling.BICUBIC))[0]
    np.testing.assert_allclose(found[rim:-rim], pillow[rim:-rim], atol=1e-6)
    pytorch = torch.nn.functional.interpolate(
        torch.as_tensor(line)[None, None, None].expand(1, 1, 4, size),
        size=(4, new_size),
        mode="bicubic",
        antialias=True,
    )[0, 0, 0]
    np.testing.assert_allclose(found[rim:-rim], pytorch[rim:-rim].numpy(), atol=1e-6)


def test_antialiasing_removes_what_the_coarse_grid_cannot_hold():
    fine = np.cos(np.pi * np.arange(96))
    assert np.abs(antialiased_bicubic_matrix(96, 24) @ fine)[3:-3].max() < 0.02
    assert np.abs(keys_matrix(96, slice_positions(96, 32)) @ fine).max() > 0.9


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_mirror_serves_axes_shorter_than_the_kernel(size):
    # Sixteen mirrored copies of the axis, the middle of which is free of their edge.
    line = np.random.default_rng(0).random(size)
    mirrored = np.concatenate([line, line[::-1]] * 16)
    for new_size in (1, 3):
        middle = (antialiased_bicubic_matrix(32 * size, 32 * new_size) @ mirrored)[16 * new_size :][:new_size]
        np.testing.assert_allclose(antialiased_bicubic_matrix(size, new_size) @ line, middle, atol=1e-12)


def test_the_antialiased_matrix_belongs_to_the_caller_and_needs_pixels():
    antialiased_bicubic_matrix(8, 2)[:] = 7
    assert antialiased_bicubic_matrix(8, 2).max() < 1
    with pytest.raises(SettingError, match="from 8 to 0 pixels"):
        antialiased_bicubic_matrix(8, 0)


def test_resample_last_axis_applies_the_matrix_in_float32():
    volume = np.random.default_rng(0).integers(0, 4000, (2, 3, 5)).astype(np.int16)
    matrix = interpolation_matrix(5, [0.3, 2.2])
    found = resample_last_axis(volume, matrix)
    assert found.dtype == np.float32
    assert found.shape == (2, 3, 2)
    np.testing.assert_allclose(found, volume.astype(float) @ matrix.T, rtol=1e-5, atol=1e-3)


def test_an_unknown_interpolation_is_named():
    with pytest.raises(SettingError, match="nearest, linear, cubic, got 'lanczos'"):
        interpolation_matrix(4, [1.0], kind="lanczos")


@pytest.mark.parametrize(("size", "new_size"), [(16, 5), (5, 16), (7, 7)])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, None), slice(1, 5, 2), slice(3, 100)])
def test_rows_of_the_bicubic_matrix_are_those_of_the_whole(size, new_size, rows):
    whole = antialiased_bicubic_matrix(size, new_size)
    np.testing.assert_array_equal(antialiased_bicubic_matrix(size, new_size, rows), whole[rows])


def test_large_bicubic_matrices_are_not_kept():
    rows = slice(0, 4)
    first, again = (antialiased_bicubic_matrix(2**19, 2**17, rows) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (4, 2**19)
