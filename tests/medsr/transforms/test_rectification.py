from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from medsr.errors import DataError
from medsr.io.stereo import StereoCalibration
from medsr.transforms.rectification import Rectifyd, rectifying_maps
from medsr.transforms.stereo import match_rows
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

CAMERA = np.array([[60.0, 0.3, 31], [0, 61, 22], [0, 0, 1]])
OTHER = np.array([[58.0, 0, 33], [0, 59, 25], [0, 0, 1]])


def calibration(**changes: Any) -> StereoCalibration:
    given = {
        "left": CAMERA,
        "right": OTHER,
        "left_distortion": np.array([0.05, -0.02, 0.003, -0.002, 0.01]),
        "right_distortion": np.array([-0.04, 0.01, 0.001, 0.002, 0.0]),
        "rotation": Rotation.from_rotvec([0.02, -0.05, 0.06]).as_matrix(),
        "translation": np.array([-4.0, 0.3, 0.2]),
        "size": (48, 64),
    }
    return StereoCalibration(**{**given, **changes})


def seen(points: np.ndarray, camera: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """Row and column at which a camera sees points, by the textbook."""
    x, y = points[:, 0] / points[:, 2], points[:, 1] / points[:, 2]
    r2 = x**2 + y**2
    k1, k2, p1, p2, k3 = lens
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
    v = y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
    return (camera @ np.stack([u, v, np.ones_like(u)]))[1::-1].T


def rectified(place: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """The pixel of the rectified view that looks at a place of the view, by inverting the map near its minimum."""
    row, column = np.unravel_index(np.argmin(((maps - place) ** 2).sum(-1)), maps.shape[:2])
    assert 0 < row < maps.shape[0] - 1
    assert 0 < column < maps.shape[1] - 1
    slopes = np.stack(
        [
            (maps[row + 1, column] - maps[row - 1, column]) / 2,
            (maps[row, column + 1] - maps[row, column - 1]) / 2,
        ],
        1,
    )
    return np.array([row, column]) + np.linalg.solve(slopes, place - maps[row, column])


@pytest.mark.parametrize("translation", [[-4.0, 0.3, 0.2], [-4.0, 0, 0], [3.0, 0.5, -0.4]])
def test_a_point_lies_in_one_row_of_both_views_and_its_disparity_tells_its_depth(translation):
    one = calibration(translation=np.array(translation))
    maps = rectifying_maps(one, (48, 64))
    points = np.array([[0.0, 0, 40], [5, 3, 50], [-6, 4, 45], [4, -5, 60], [1, 2, 3000]])
    left = seen(points, one.left, one.left_distortion)
    right = seen(points @ one.rotation.T + one.translation, one.right, one.right_distortion)
    places = [
        [rectified(place, view) for place in views] for views, view in zip((left, right), maps, strict=True)
    ]
    rows, columns = np.moveaxis(np.array(places), -1, 0)
    np.testing.assert_allclose(rows[0], rows[1], atol=0.01)
    disparity = columns[0] - columns[1]
    assert np.sign(disparity[0]) == -np.sign(translation[0])
    # The product of disparity and depth is focal length times baseline.
    depth = np.abs(59 * np.linalg.norm(translation) / disparity[:4])
    np.testing.assert_allclose(depth, points[:4, 2], rtol=0.12)
    assert abs(disparity[4]) < 0.15


def test_parallel_cameras_of_one_kind_need_nothing():
    camera, still = np.array([[60.0, 0, 31], [0, 60, 22], [0, 0, 1]]), np.zeros(5)
    one = calibration(
        left=camera,
        right=camera,
        left_distortion=still,
        right_distortion=still,
        rotation=np.eye(3),
        translation=np.array([-4.0, 0, 0]),
    )
    pair = torch.rand(6, 48, 64)
    torch.testing.assert_close(Rectifyd("image", one)({"image": pair})["image"], pair, atol=1e-4, rtol=0)


def test_what_both_cameras_see_of_a_picture_is_brought_to_one_height():
    # A plane with a texture, seen by both cameras; the right one stands higher and is rolled.
    camera = np.array([[90.0, 0, 60], [0, 90, 45], [0, 0, 1]])
    one = calibration(
        left=camera,
        right=camera,
        left_distortion=np.zeros(5),
        right_distortion=np.zeros(5),
        rotation=Rotation.from_rotvec([-0.02, 0, 0.03]).as_matrix(),
        translation=np.array([-2.0, 0.8, 0.1]),
        size=None,
    )
    rng = np.random.default_rng(0)
    waves, phases = rng.normal(0, 1.5, (60, 2)), rng.uniform(0, 6.28, 60)

    def view(turn: np.ndarray, move: np.ndarray) -> torch.Tensor:
        rows, columns = np.indices((90, 120), dtype=float)
        rays = np.stack([(columns - 60) / 90, (rows - 45) / 90, np.ones((90, 120))], -1)
        # The plane z = 30 of the left camera.
        start, rays = -turn.T @ move, rays @ turn
        points = start + rays * ((30 - start[2]) / rays[..., 2])[..., None]
        values = np.cos(points[..., :2] @ waves.T + phases).sum(-1)
        return torch.from_numpy(values / 40 + 0.5).float()[None]

    pair = torch.cat([view(np.eye(3), np.zeros(3)), view(one.rotation, one.translation)])
    before = match_rows(pair, max_rows=12)
    after = match_rows(Rectifyd("image", one)({"image": pair})["image"], max_rows=12)
    assert abs(before.offset_px) + before.spread_px > 1.5
    assert abs(after.offset_px) < 0.1
    assert after.spread_px < 0.1
    assert after.disparity_px == pytest.approx(90 * 2 / 30, abs=1.1)


def test_what_a_camera_does_not_see_is_cut_off():
    found = Rectifyd("image", calibration())({"image": torch.ones(2, 48, 64)})["image"]
    assert 24 < found.shape[1] < 48
    assert 32 < found.shape[2] < 64
    # Black corners would be below.
    torch.testing.assert_close(found, torch.ones_like(found))


def test_a_part_of_the_calibrated_image_is_the_part_of_its_rectification():
    one = calibration()
    whole, part = rectifying_maps(one, (48, 64)), rectifying_maps(one, (44, 60), origin=(2, 2))
    # The same middle: the same centre, counted from the part's first pixel.
    np.testing.assert_allclose(part, whole[:, 2:46, 2:62] - 2, atol=1e-9)
    assert Rectifyd("image", one, origin=(2, 2))({"image": torch.rand(6, 44, 60)})["image"].shape[0] == 6


def test_metadata_and_other_items_stay():
    pair = MetaTensor(torch.rand(6, 48, 64), meta={"filename_or_obj": "a.png"})
    transform = Rectifyd("image", calibration())
    found = transform({"image": pair, "case": "a"})
    assert found["case"] == "a"
    assert found["image"].meta["filename_or_obj"] == "a.png"
    # Workers of a loader get a copy.
    again = pickle.loads(pickle.dumps(transform))({"image": pair})["image"]
    assert torch.equal(again, found["image"])


@pytest.mark.parametrize(("size", "origin"), [((48, 60), (0, 0)), ((47, 64), (2, 0))])
def test_a_calibration_for_another_size_is_refused(size, origin):
    with pytest.raises(DataError, match="the calibration is for images of 48 x 64, got"):
        Rectifyd("image", calibration(), origin=origin)({"image": torch.rand(6, *size)})


def test_cameras_that_see_different_things_are_refused():
    apart = calibration(rotation=Rotation.from_rotvec([0, 2.5, 0]).as_matrix())
    with pytest.raises(DataError, match="no pixel in common"):
        Rectifyd("image", apart)({"image": torch.rand(6, 48, 64)})
