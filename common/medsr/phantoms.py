"""Synthetic volumes with a known truth: a head for pictures and training, a sphere and a ramp for geometry.

They let every test and demo run offline and without a licence. Nothing here looks like a patient: a number
measured on a phantom shows that a method works, never how well it works on anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medsr.errors import SettingError
from medsr.geometry import validate_affine

__all__ = ["head", "ramp", "sphere"]

FloatArray = npt.NDArray[np.float64]

# Intensities in the order of a contrast-enhanced T1-weighted MRI.
SCALP, SKULL, FLUID, GREY, WHITE, NUCLEUS, LESION = 620.0, 70.0, 170.0, 480.0, 740.0, 580.0, 980.0

OVERSAMPLING = 2
"""Sub-voxels per axis from which a voxel of the head is averaged: partial volume, as a scanner has it."""


def head(
    size: int = 48, *, seed: int = 0, spacing_mm: float = 1.0
) -> tuple[npt.NDArray[np.float32], FloatArray]:
    """Deterministic head in an isotropic cube: scalp, skull, folded cortex, ventricles, bright lesion.

    The head fills the cube at every size, and the same seed gives the same anatomy at every size, only
    sampled more finely. Folds run in all directions, with a period of about ten voxels at the default size,
    and the cerebellar leaves lie almost in the slice plane: detail that thick slices lose. Background is
    exactly zero.

    Args:
        size: voxels per axis, 16 or more.
        seed: of the folds and the place of the lesion.
        spacing_mm: voxel size; world origin at the centre of the cube, axes RAS+.

    Shape:
        - returns: (size, size, size) float32 with values from 0 to about 1000, and the 4 x 4 affine

    Raises:
        SettingError: if ``size`` is below 16 or ``spacing_mm`` is not positive.

    Example:
        >>> volume, affine = head(24)
        >>> volume.shape, float(volume[0, 0, 0]), bool(500 < volume.max() < 1100)
        ((24, 24, 24), 0.0, True)
    """
    if size < 16:
        raise SettingError(f"head: size must be 16 voxels or more, got {size}")
    if not (math.isfinite(spacing_mm) and spacing_mm > 0):
        raise SettingError(f"head: spacing_mm must be positive, got {spacing_mm}")
    from scipy.ndimage import distance_transform_edt

    rng = np.random.default_rng(seed)
    fine = size * OVERSAMPLING
    axis = (np.arange(fine) + 0.5) / fine * 2 - 1  # sub-voxel centres; the cube is [-1, 1]^3
    x, y, z = axis[:, None, None], axis[None, :, None], axis[None, None, :]

    def ellipsoid(centre: Sequence[float], radii: Sequence[float]) -> FloatArray:
        """Distance to the centre in units of the radii: below 1 is inside."""
        terms = (((c - m) / r) ** 2 for c, m, r in zip((x, y, z), centre, radii, strict=True))
        return np.asarray(np.sqrt(sum(terms)))

    outline = ellipsoid((0, 0, 0), (0.78, 0.92, 0.86)) + 0.02 * _waves(axis, rng, period=1.2)
    folds = _waves(axis, rng, period=0.40, count=96)
    depth = np.clip((outline - 0.40) / 0.42, 0, 1)
    sulci = (np.abs(folds) < 0.30 * depth) & (outline > 0.40)
    fissure = (np.abs(x + 0.02 * _waves(axis, rng, period=1.0)) < 0.022) & (z > -0.15) & (outline > 0.35)
    cerebellum = ellipsoid((0, -0.42, -0.46), (0.42, 0.30, 0.24))
    fluid = (outline > 0.82) | sulci | fissure
    fluid = np.where(cerebellum < 1.15, cerebellum > 1, fluid & (cerebellum > 1.15)) | (outline > 0.82)

    # The cortex has one thickness everywhere, as a real one has: grey is whatever lies near to fluid.
    cortex = distance_transform_edt(~fluid, sampling=2 / fine) < 0.065
    image = np.where(fluid, FLUID, np.where(cortex, GREY, WHITE))
    leaves = np.sin(2 * np.pi * (z + 0.25 * y + 0.04 * folds) / 0.20) > 0.1
    image = np.where(cerebellum < 1, np.where(leaves, GREY, WHITE), image)
    image = np.where((cerebellum < 1) & (ellipsoid((0, -0.36, -0.46), (0.14, 0.12, 0.09)) < 1), WHITE, image)
    for side in (-1, 1):
        image = np.where(ellipsoid((0.25 * side, -0.02, -0.06), (0.12, 0.20, 0.12)) < 1, NUCLEUS, image)
        bend = 0.16 * y**2
        ventricle = (
            ((x - side * (0.13 + bend)) / 0.075) ** 2 + (y / 0.36) ** 2 + ((z - 0.10 + bend) / 0.12) ** 2
        )
        image = np.where(ventricle < 1, FLUID, image)
    image = np.where(ellipsoid((0, -0.02, -0.08), (0.03, 0.16, 0.12)) < 1, FLUID, image)

    place = np.array([0.36, 0.30, 0.26]) + rng.uniform(-0.05, 0.05, size=3)
    place[0] *= rng.choice((-1, 1))
    image = np.where(ellipsoid(place, (0.10, 0.09, 0.08)) < 1, LESION, image)
    image = np.where(ellipsoid(place, (0.05, 0.045, 0.04)) < 1, GREY, image)
    image = np.where(
        ellipsoid(place + np.array([0.0, -0.20, 0.05]), (0.045, 0.045, 0.045)) < 1, LESION, image
    )

    image = np.where(outline > 0.86, SKULL, image)
    image = np.where(outline > 0.93, SCALP, image)
    # Texture and receive field, multiplied, so that the background stays exactly zero.
    shading = 1 + 0.02 * _waves(axis, rng, period=0.15) + 0.03 * _waves(axis, rng, period=2.5, count=8)
    image = np.where(outline < 1, image * shading, 0.0)

    blocks = image.reshape(size, OVERSAMPLING, size, OVERSAMPLING, size, OVERSAMPLING)
    volume = np.clip(blocks.mean(axis=(1, 3, 5)), 0, None).astype(np.float32)
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = -(size - 1) / 2 * spacing_mm
    return volume, affine


def sphere(
    shape: Sequence[int],
    *,
    affine: npt.ArrayLike,
    centre_mm: Sequence[float],
    radius_mm: float,
    supersample: Sequence[int] = (1, 1, 1),
) -> npt.NDArray[np.float32]:
    """Ball of value 1 on background 0, placed in the world: its centre of mass tests shifts.

    Args:
        shape: voxels along each array axis.
        affine: voxel-to-world matrix in mm, any orientation.
        centre_mm: world position of the centre.
        radius_mm: radius.
        supersample: points averaged per voxel along each array axis. (1, 1, 1) samples voxel centres; (1, 1,
            8) gives the partial volume of thick slices along the last axis.

    Shape:
        - returns: ``shape``, float32 in [0, 1]

    Raises:
        GeometryError: if the affine cannot be used.
        SettingError: if another argument is out of range.

    Example:
        >>> ball = sphere((9, 9, 9), affine=np.eye(4), centre_mm=(4, 4, 4), radius_mm=2.5)
        >>> float(ball.sum())
        81.0
    """
    dims, matrix = _grid(shape, affine)
    counts = tuple(int(n) for n in supersample)
    if len(counts) != 3 or min(counts) < 1:
        raise SettingError(
            f"sphere: supersample must be three numbers of 1 or more, got {tuple(supersample)}"
        )
    if len(centre_mm) != 3 or not (math.isfinite(radius_mm) and radius_mm > 0):
        raise SettingError(
            f"sphere: needs centre_mm of 3 values and radius_mm > 0, got {centre_mm}, {radius_mm}"
        )
    total = np.zeros(dims)
    for sub in np.ndindex(*counts):
        offset = [(s + 0.5) / n - 0.5 for s, n in zip(sub, counts, strict=True)]
        world = _world(dims, matrix, offset=offset)
        squared = sum((w - c) ** 2 for w, c in zip(world, centre_mm, strict=True))
        total += squared <= radius_mm**2
    return np.asarray(total / math.prod(counts), dtype=np.float32)


def ramp(shape: Sequence[int], *, affine: npt.ArrayLike, direction: Sequence[float]) -> FloatArray:
    """World coordinate along a direction, in mm, at every voxel centre.

    The sharpest test of a geometry: after any resampling that is right, each voxel still holds the coordinate
    of its own new centre, so the deviation *is* the shift in mm. float64, so that rounding stays out of it.

    Args:
        shape: voxels along each array axis.
        affine: voxel-to-world matrix in mm, any orientation.
        direction: world direction (RAS+); only its direction counts.

    Shape:
        - returns: ``shape``, float64

    Raises:
        GeometryError: if the affine cannot be used.
        SettingError: if ``shape`` or ``direction`` is out of range.

    Example:
        >>> ramp((1, 1, 3), affine=np.diag([1, 1, 4, 1]), direction=(0, 0, 2)).ravel().tolist()
        [0.0, 4.0, 8.0]
    """
    dims, matrix = _grid(shape, affine)
    vector = np.asarray(direction, dtype=np.float64)
    length = float(np.linalg.norm(vector)) if vector.shape == (3,) else 0.0
    if not (math.isfinite(length) and length > 0):
        raise SettingError(f"ramp: direction must be three values, not all zero, got {tuple(direction)}")
    unit = vector / length
    parts = (w * u for w, u in zip(_world(dims, matrix), unit, strict=True))
    return np.asarray(np.broadcast_to(sum(parts), dims), dtype=np.float64).copy()


def _grid(shape: Sequence[int], affine: npt.ArrayLike) -> tuple[tuple[int, int, int], FloatArray]:
    if len(shape) != 3 or min(shape) < 1:
        raise SettingError(f"shape must be three numbers of 1 or more, got {tuple(shape)}")
    first, second, third = (int(n) for n in shape)
    return (first, second, third), validate_affine(affine, name="phantom")


def _world(
    dims: tuple[int, int, int], matrix: FloatArray, *, offset: Sequence[float] = (0.0, 0.0, 0.0)
) -> tuple[FloatArray, FloatArray, FloatArray]:
    i, j, k = (np.arange(n) + o for n, o in zip(dims, offset, strict=True))
    index = i[:, None, None], j[None, :, None], k[None, None, :]
    x, y, z = (sum(matrix[row, a] * index[a] for a in range(3)) + matrix[row, 3] for row in range(3))
    return x, y, z


def _waves(axis: FloatArray, rng: np.random.Generator, *, period: float, count: int = 48) -> FloatArray:
    """Smooth random field of unit variance on a cube: plane waves of nearly one period in all directions.

    Its zero level meanders like a sulcus. Defined on the continuum, unlike filtered noise, so that a finer
    grid shows the same field.
    """
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = directions * (2 * np.pi / period) * rng.uniform(0.85, 1.15, size=(count, 1))
    phases = np.exp(1j * rng.uniform(0, 2 * np.pi, size=count))
    first, second, third = (np.exp(1j * np.outer(axis, vectors[:, a])) for a in range(3))
    n = axis.size
    # The exponential of a sum is a product of exponentials: one matrix product instead of n^3 cosines per
    # wave.
    plane = (first[:, None, :] * second[None, :, :] * phases).reshape(n * n, count)
    field = plane.real @ third.real.T - plane.imag @ third.imag.T
    return np.asarray(field.reshape(n, n, n) * math.sqrt(2 / count))
