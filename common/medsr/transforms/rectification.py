"""Rectification: views of a calibrated stereo camera as if both cameras looked the same way, side by side."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F

from medsr.errors import DataError
from medsr.io.stereo import StereoCalibration, read_calibration

__all__ = ["Rectifyd", "rectifying_maps"]

FloatArray = npt.NDArray[np.float64]

_ROUNDING = 1e-6
"""Pixels by which a place may miss the image and still count as on its edge."""


def rectifying_maps(
    calibration: StereoCalibration, size: tuple[int, int], *, origin: tuple[int, int] = (0, 0)
) -> FloatArray:
    """Where in the views to look for each pixel of the rectified ones.

    Both cameras turn by half of the rotation between them, and then together so that the line through them becomes
    their rows. They get one focal length, the smaller of their vertical ones, and one principal point, so that points
    at infinity have no disparity, and the mean of the two views stays in the middle. Then the lens distortion is
    applied. OpenCV's ``stereoRectify`` and ``initUndistortRectifyMap`` do the same, but need OpenCV.

    Args:
        calibration: the cameras.
        size: rows and columns of the views.
        origin: row and column of the calibrated image at which the views start, if they were cut out of it.

    Returns:
        row and column in the left and in the right view, in pixels, the centre of the first pixel at 0.

    Shape:
        - output: ``(2, H, W, 2)``.

    Example:
        >>> camera, still = np.array([[50.0, 0, 5], [0, 50, 4], [0, 0, 1]]), np.zeros(5)
        >>> parallel = StereoCalibration(camera, camera, still, still, np.eye(3), np.array([-4.0, 0, 0]))
        >>> rectifying_maps(parallel, (9, 11))[0, 3, 7]
        array([3., 7.])

    Reference:
        J.-Y. Bouguet, Camera Calibration Toolbox for Matlab, doi:10.22002/D1.20164
    """
    half = Rotation.from_matrix(calibration.rotation).as_rotvec() / 2
    turns = [Rotation.from_rotvec(half).as_matrix(), Rotation.from_rotvec(-half).as_matrix()]
    # From the left camera to the right one; where the views are swapped it points to the left.
    baseline = -turns[1] @ calibration.translation
    along = np.array([np.sign(baseline[0]) or 1.0, 0, 0])
    axis = np.cross(baseline, along)
    angle = np.arctan2(np.linalg.norm(axis), baseline @ along)
    length = np.linalg.norm(axis)
    level = Rotation.from_rotvec(axis / length * angle if length else np.zeros(3)).as_matrix()
    turns = [level @ turn for turn in turns]
    cameras = []
    for camera in (calibration.left, calibration.right):
        moved = camera.copy()
        moved[:2, 2] -= origin[1], origin[0]
        cameras.append(moved)
    lenses = (calibration.left_distortion, calibration.right_distortion)
    focal = min(camera[1, 1] for camera in cameras)
    middle = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
    centres = []
    for camera, lens, turn in zip(cameras, lenses, turns, strict=True):
        ray = turn @ _ray(middle, camera, lens)
        centres.append(middle - focal * ray[:2] / ray[2])
    centre = np.mean(centres, axis=0)
    rows, columns = np.indices(size, dtype=float)
    seen = np.stack([(columns - centre[0]) / focal, (rows - centre[1]) / focal, np.ones(size)], -1)
    return np.stack(
        [
            _pixels(seen @ turn, camera, lens)
            for camera, lens, turn in zip(cameras, lenses, turns, strict=True)
        ]
    )


class Rectifyd(MapTransform):
    """Rectify pairs with the calibration of their camera, so that what belongs together lies in one row.

    Interpolation is bicubic; what the camera does not see is cut off, in both views alike, so disparities stay.
    ``monai.transforms.Warpd`` was considered: it needs a field per image and has no camera in it. A calibration may
    be off, that of some EndoVis 2017 recordings by 20 rows: :class:`~medsr.transforms.stereo.AlignRowsd` after this
    one measures what is left.

    Args:
        keys: pairs.
        calibration: a file for :func:`medsr.io.stereo.read_calibration`, or what it returns.
        origin: see :func:`rectifying_maps`.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(2C, H, W)`` to ``(2C, H', W')`` with ``H' <= H`` and ``W' <= W``, float32.

    Raises:
        DataError: if the calibration cannot be read, is for images of another size, or the views see nothing in
            common.

    Example:
        >>> Rectifyd("image", "none.txt")
        Traceback (most recent call last):
        medsr.errors.DataError: none.txt: cannot be read (No such file or directory)
    """

    def __init__(
        self,
        keys: KeysCollection,
        calibration: Any,
        *,
        origin: tuple[int, int] = (0, 0),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        given = isinstance(calibration, StereoCalibration)
        self.calibration = calibration if given else read_calibration(calibration)
        self.origin = (int(origin[0]), int(origin[1]))
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Rectify every pair."""
        result = dict(data)
        for key in self.key_iterator(result):
            pair = result[key]
            values = pair.as_tensor() if isinstance(pair, MetaTensor) else pair
            found = self._moved(values.float())
            result[key] = MetaTensor(found).copy_meta_from(pair) if isinstance(pair, MetaTensor) else found
        return result

    def _grid(self, height: int, width: int) -> Tensor:
        """The sampling grid for images of a size, without what one of the views does not see."""
        whole, (top, left) = self.calibration.size, self.origin
        # A part says where it starts; the whole needs no origin.
        fits = whole is None or (
            (height, width) == whole
            if self.origin == (0, 0)
            else height + top <= whole[0] and width + left <= whole[1]
        )
        if not fits:
            raise DataError(
                f"the calibration is for images of {whole[0]} x {whole[1]}, got {height} x {width}; for a part of "
                "them, give its origin"
            )
        places = rectifying_maps(self.calibration, (height, width), origin=self.origin)
        limits = np.array([height - 1, width - 1])
        inside = ((places >= -_ROUNDING) & (places <= limits + _ROUNDING)).all(axis=(0, 3))
        rows, columns = _inner(inside)
        # grid_sample counts from -1 at the outer edge of the first pixel to 1 at that of the last; columns first.
        grid = (2 * places[:, rows, columns] + 1) / (limits + 1) - 1
        return torch.from_numpy(grid[..., ::-1].copy()).float()

    def _moved(self, pair: Tensor) -> Tensor:
        size = (pair.shape[1], pair.shape[2])
        # The frames of a video have one size.
        if self._last is None or self._last[0] != size:
            self._last = (size, self._grid(*size))
        views, grid = pair.unflatten(0, (2, -1)), self._last[1]
        found = F.grid_sample(
            views, grid.to(views.device), mode="bicubic", padding_mode="border", align_corners=False
        )
        return found.flatten(0, 1)


def _inner(inside: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """A rectangle that lies inside: from the whole, the side is taken away that misses the most, until none does."""
    top, bottom, left, right = 0, inside.shape[0], 0, inside.shape[1]
    while top < bottom and left < right:
        part = inside[top:bottom, left:right]
        missing = [1 - side.mean() for side in (part[0], part[-1], part[:, 0], part[:, -1])]
        worst = int(np.argmax(missing))
        if missing[worst] == 0:
            return slice(top, bottom), slice(left, right)
        top, bottom = top + (worst == 0), bottom - (worst == 1)
        left, right = left + (worst == 2), right - (worst == 3)
    raise DataError("after rectification the views have no pixel in common; check the calibration")


def _distorted(points: FloatArray, lens: FloatArray) -> FloatArray:
    """Points ``(..., 2)`` on the plane at distance 1, as the lens shows them (Brown and Conrady)."""
    k1, k2, p1, p2, k3 = lens
    x, y = points[..., 0], points[..., 1]
    r2 = x**2 + y**2
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
            y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y,
        ],
        -1,
    )


def _pixels(rays: FloatArray, camera: FloatArray, lens: FloatArray) -> FloatArray:
    """Row and column of rays ``(..., 3)``; none for those that come from behind."""
    shown = _distorted(rays[..., :2] / np.where(rays[..., 2:] > 0, rays[..., 2:], np.nan), lens)
    column = camera[0, 0] * shown[..., 0] + camera[0, 1] * shown[..., 1] + camera[0, 2]
    return np.stack([camera[1, 1] * shown[..., 1] + camera[1, 2], column], -1)


def _ray(pixel: FloatArray, camera: FloatArray, lens: FloatArray) -> FloatArray:
    """The ray of a pixel (column, row), by iteration: lens distortion has no inverse in closed form."""
    y = (pixel[1] - camera[1, 2]) / camera[1, 1]
    shown = np.array([(pixel[0] - camera[0, 2] - camera[0, 1] * y) / camera[0, 0], y])
    found = shown
    for _ in range(20):
        found = found + shown - _distorted(found, lens)
    return np.array([*found, 1.0])
