from __future__ import annotations

import numpy as np
import pytest
from medsr.errors import GeometryError, SettingError
from medsr.geometry import rescaled_affine, spacing_of
from medsr.metrics import head_mask, psnr_3d
from medsr.phantoms import head, ramp, sphere


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return head(48)[0]


def test_head_is_deterministic_and_the_seed_matters(volume):
    np.testing.assert_array_equal(volume, head(48)[0])
    assert not np.array_equal(volume, head(48, seed=1)[0])


def test_head_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    head(16)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_head_has_a_zero_background_and_positive_tissue(volume):
    assert volume.dtype == np.float32
    assert volume.shape == (48, 48, 48)
    for corner in (volume[:4, :4], volume[-4:, -4:], volume[:, :4, :4], volume[:, -4:, -4:]):
        assert (corner == 0).all()
    assert volume.min() == 0
    assert 900 < volume.max() < 1100
    assert 0.25 < (volume > 0).mean() < 0.6


def test_head_holds_fluid_grey_white_and_a_bright_lesion(volume):
    inner = volume[12:36, 12:36, 12:36]
    for low, high in ((100, 260), (430, 560), (680, 800)):
        assert ((inner > low) & (inner < high)).mean() > 0.04
    assert 10 < (volume > 850).sum() < 600


def test_head_is_the_same_anatomy_at_every_size(volume):
    fine = volume.reshape(24, 2, 24, 2, 24, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(fine.ravel(), head(24)[0].ravel())[0, 1] > 0.97


def test_head_loses_detail_in_thick_slices(volume):
    # Otherwise super-resolution had nothing to do: 4-mm slabs must cost as much as on a real head.
    slabs = volume.reshape(48, 48, 12, 4).mean(axis=-1).repeat(4, axis=-1)
    assert 12 < psnr_3d(slabs, volume, data_range=1000, mask=head_mask(volume)) < 24


def test_head_affine_is_centred():
    _, affine = head(20, spacing_mm=1.5)
    np.testing.assert_allclose(spacing_of(affine), 1.5)
    np.testing.assert_allclose(affine @ [9.5, 9.5, 9.5, 1], [0, 0, 0, 1], atol=1e-12)


@pytest.mark.parametrize("arguments", [{"size": 8}, {"spacing_mm": 0}, {"spacing_mm": float("nan")}])
def test_head_faults_are_named(arguments):
    with pytest.raises(SettingError, match=next(iter(arguments))):
        head(**arguments)


def oblique(spacing=(1.0, 1.2, 4.0), origin=(-20.0, 5.0, 7.0)) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [20, -35, 10], degrees=True).as_matrix() * spacing
    affine[:3, 3] = origin
    return affine


@pytest.mark.parametrize("affine", [np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([-1.0, 1, 1, 1]), oblique()])
def test_sphere_has_its_centre_of_mass_and_volume_in_the_world(affine):
    shape = (40, 38, 20)
    centre = (affine @ [19.3, 18.1, 9.6, 1])[:3]
    ball = sphere(shape, affine=affine, centre_mm=centre, radius_mm=9.0, supersample=(3, 3, 5))
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    found = affine[:3, :3] @ (index * ball[..., None]).sum(axis=(0, 1, 2)) / ball.sum() + affine[:3, 3]
    np.testing.assert_allclose(found, centre, atol=0.03)
    volume_mm3 = ball.sum() * abs(np.linalg.det(affine[:3, :3]))
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * 9.0**3, rel=0.02)


def test_sphere_supersampling_is_the_mean_of_thin_slices():
    thick = np.diag([1.0, 1.0, 4.0, 1.0])
    thin = rescaled_affine(thick, axis=2, size=8, new_size=32)
    where = {"centre_mm": (8, 8, 13), "radius_mm": 6.0}
    fine = sphere((16, 16, 32), affine=thin, **where)
    slabs = sphere((16, 16, 8), affine=thick, supersample=(1, 1, 4), **where)
    np.testing.assert_allclose(slabs, fine.reshape(16, 16, 8, 4).mean(axis=-1), atol=1e-6)
    assert set(np.unique(sphere((16, 16, 8), affine=thick, **where))) == {0.0, 1.0}


@pytest.mark.parametrize("affine", [np.diag([1.0, 1.0, 4.0, 1.0]), oblique()])
def test_ramp_is_the_world_coordinate(affine):
    direction = np.array([1.0, -2.0, 0.5])
    volume = ramp((4, 5, 6), affine=affine, direction=direction)
    expected = (affine @ [3, 1, 5, 1])[:3] @ direction / np.linalg.norm(direction)
    assert volume[3, 1, 5] == pytest.approx(expected)
    assert volume.shape == (4, 5, 6)
    assert volume.flags.writeable


def test_ramp_averaged_over_a_slab_keeps_the_coordinate():
    thick = oblique()
    thin = rescaled_affine(thick, axis=2, size=5, new_size=20)
    fine = ramp((4, 4, 20), affine=thin, direction=(0, 1, 1)).reshape(4, 4, 5, 4).mean(axis=-1)
    np.testing.assert_allclose(fine, ramp((4, 4, 5), affine=thick, direction=(0, 1, 1)), atol=1e-10)


def test_geometry_phantom_faults_are_named():
    with pytest.raises(SettingError, match="direction"):
        ramp((2, 2, 2), affine=np.eye(4), direction=(0, 0, 0))
    with pytest.raises(SettingError, match="shape"):
        ramp((2, 2), affine=np.eye(4), direction=(0, 0, 1))
    with pytest.raises(GeometryError, match="phantom"):
        ramp((2, 2, 2), affine=np.zeros((4, 4)), direction=(0, 0, 1))
    with pytest.raises(SettingError, match="radius_mm"):
        sphere((2, 2, 2), affine=np.eye(4), centre_mm=(0, 0, 0), radius_mm=-1)
    with pytest.raises(SettingError, match="supersample"):
        sphere((2, 2, 2), affine=np.eye(4), centre_mm=(0, 0, 0), radius_mm=1, supersample=(0, 1, 1))
