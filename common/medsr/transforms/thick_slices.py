"""Thick-slice acquisition of a thin-slice volume: slice-profile blur, sampling, and the new affine.

Considered: ``monai.transforms.RandSimulateLowResolution`` and TorchIO's ``RandomAnisotropy`` interpolate without a
slice profile and return to the input grid; neither states the affine of the thick volume.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, RandomizableTransform, Transform
from monai.utils import ensure_tuple
from torch import Tensor

from medsr.errors import SettingError
from medsr.geometry import rescaled_affine, rescaled_size, spacing_of
from medsr.transforms.slice_profile import PROFILES, acquisition_matrix, as_profile, fwhm_in_voxels

__all__ = [
    "RandSimulateThickSlices",
    "RandSimulateThickSlicesd",
    "SimulateThickSlices",
    "SimulateThickSlicesd",
    "ThickSliceParameters",
    "WholeSlabs",
    "acquire_whole_slabs",
    "thick_slice_affine",
    "whole_span",
]

MIN_RATIO = 1.2
"""Smallest ratio of spacings that counts as thick slices."""


@dataclass(frozen=True)
class ThickSliceParameters:
    """What one acquisition needs to be repeated exactly.

    Args:
        ratio: thick slice spacing divided by thin slice spacing.
        thickness: slice thickness divided by thick slice spacing; below 1 with a gap, above 1 with overlap.
        profile: name of the slice profile, or its taps in thin slices.
        phase: shift of all thick slices, in thin slices.
    """

    ratio: float
    thickness: float = 1.0
    profile: str | tuple[float, ...] = "slr"
    phase: float = 0.0

    def __post_init__(self) -> None:
        if self.ratio < MIN_RATIO:
            raise SettingError(f"the ratio of slice spacings must be >= {MIN_RATIO}, got {self.ratio:g}")
        if self.thickness <= 0:
            raise SettingError(f"the relative slice thickness must be > 0, got {self.thickness:g}")

    def thick_size(self, size: int) -> int:
        """Number of thick slices that fit entirely into ``size`` thin ones."""
        return max(1, int(np.floor(size / self.ratio + 1e-6)))

    def matrix(self, size: int, thick_size: int | None = None) -> npt.NDArray[np.float64]:
        """Acquisition matrix ``(thick slices, thin slices)`` for the image."""
        fwhm = fwhm_in_voxels(self.ratio * self.thickness, 1.0)
        return acquisition_matrix(
            size,
            self.thick_size(size) if thick_size is None else thick_size,
            ratio=self.ratio,
            fwhm=fwhm,
            profile=self.profile,
            phase=self.phase,
        )

    def label_matrix(self, size: int, thick_size: int | None = None) -> npt.NDArray[np.float64]:
        """Area average over the slab of one slice spacing, for labels as one-hot channels."""
        return acquisition_matrix(
            size,
            self.thick_size(size) if thick_size is None else thick_size,
            ratio=self.ratio,
            fwhm=self.ratio,
            profile="box",
            phase=self.phase,
        )


def whole_span(slices: int, ratio: float) -> int:
    """Whole number of thin slices nearest to what thick ones span, rounded up where fewer would not count as thick.

    Args:
        slices: number of thick slices.
        ratio: wanted ratio of spacings; the span divided by ``slices`` is the one that can be had.

    Example:
        >>> whole_span(12, 2.3), whole_span(12, 1.2)
        (28, 15)
    """
    count = round(slices * ratio)
    return math.ceil(slices * ratio) if count / slices < MIN_RATIO else count


class WholeSlabs(NamedTuple):
    """A volume cut to whole slabs, thin and acquired thick: one field of view, each with its affine.

    Attributes:
        thin: what is left of the volume.
        thick: the slices that were acquired from it.
        matrix: what acquires them, ``(thick slices, thin slices)``.
    """

    thin: MetaTensor
    thick: MetaTensor
    matrix: Tensor


def acquire_whole_slabs(
    volume: Tensor, parameters: ThickSliceParameters, *, is_label: bool = False
) -> WholeSlabs:
    """Cut a volume to as many whole slabs as fit, centred, and acquire them: a pair for comparisons.

    As many thin slices are kept as a method makes of the thick ones (:func:`~medsr.geometry.rescaled_size`), so that
    a result lies on the grid of ``thin``. With a ratio that is no whole number they may be half a slice fewer than
    the slabs are long; whoever counts the slabs again from them finds one too few.

    Args:
        volume: thin slices, last.
        parameters: the acquisition.
        is_label: average one-hot labels over the slab instead of applying the profile.

    Shape:
        ``(C, X, Y, Z)`` to ``(C, X, Y, round(n * ratio))`` and ``(C, X, Y, n)``.

    Raises:
        SettingError: if the volume is shorter than one slab.

    Example:
        >>> found = acquire_whole_slabs(torch.ones(1, 4, 4, 117), ThickSliceParameters(2.7))
        >>> found.thin.shape[-1], found.thick.shape[-1]
        (116, 43)
    """
    size, count = volume.shape[-1], parameters.thick_size(volume.shape[-1])
    kept = rescaled_size(count, parameters.ratio)
    if kept > size:
        raise SettingError(
            f"{size} slices are fewer than the {kept} of a slab at ratio {parameters.ratio:g}; lower the ratio"
        )
    start = (size - kept) // 2
    affine = _affine(volume).copy()
    affine[:3, 3] += affine[:3, 2] * start
    values = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
    thin = MetaTensor(values[..., start : start + kept], affine=torch.as_tensor(affine))
    matrix = parameters.label_matrix(kept, count) if is_label else parameters.matrix(kept, count)
    weights = torch.as_tensor(matrix, dtype=torch.float32, device=volume.device)
    return WholeSlabs(thin, _acquired(thin, weights, parameters, axis=2), weights)


def thick_slice_affine(
    affine: npt.ArrayLike,
    parameters: ThickSliceParameters,
    *,
    size: int,
    thick_size: int | None = None,
    axis: int = 2,
) -> npt.NDArray[np.float64]:
    """Affine of the thick volume that ``parameters`` acquire from ``size`` thin slices along ``axis``.

    Args:
        affine: voxel-to-world matrix of the thin volume.
        parameters: the acquisition.
        size: number of thin slices.
        thick_size: number of thick slices; default as many as fit entirely.
        axis: array axis of the slices.

    Example:
        >>> thick_slice_affine(np.eye(4), ThickSliceParameters(4.0), size=8)[2].tolist()
        [0.0, 0.0, 4.0, 1.5]
    """
    new_size = parameters.thick_size(size) if thick_size is None else thick_size
    matrix = rescaled_affine(affine, axis, size=size, new_size=new_size, ratio=1 / parameters.ratio)
    matrix[:3, 3] += np.asarray(affine, dtype=np.float64)[:3, axis] * parameters.phase
    return matrix


class SimulateThickSlices(Transform):
    """Acquire a thin-slice volume as thick slices; the affine of the result is exact.

    Args:
        slice_spacing_mm: distance between the centres of thick slices.
        slice_thickness_mm: width of the excited slab; default the spacing. Smaller leaves a gap.
        profile: ``slr``, ``gaussian``, ``box``, ``slr-legacy`` or taps in thin slices.
        axis: spatial axis of the slices; default the last.
        is_label: average one-hot labels over the slab instead of applying the profile.

    Shape:
        ``(C, X, Y, Z)`` to ``(C, X, Y, Z')`` (slices along ``axis``).

    Raises:
        SettingError: if the spacing is less than 1.2 times the thin spacing.

    Example:
        >>> volume = MetaTensor(torch.ones(1, 4, 4, 8), affine=torch.eye(4))
        >>> SimulateThickSlices(4.0)(volume).shape
        torch.Size([1, 4, 4, 2])
    """

    def __init__(
        self,
        slice_spacing_mm: float,
        slice_thickness_mm: float | None = None,
        profile: str | Sequence[float] = "slr",
        *,
        axis: int = 2,
        is_label: bool = False,
    ) -> None:
        self.slice_spacing_mm = float(slice_spacing_mm)
        self.slice_thickness_mm = float(
            slice_spacing_mm if slice_thickness_mm is None else slice_thickness_mm
        )
        self.profile = as_profile(profile)
        self.axis = axis
        self.is_label = is_label

    def parameters(self, image: Tensor) -> ThickSliceParameters:
        """The acquisition in units of this image's slices."""
        thin = float(spacing_of(_affine(image))[self.axis])
        return ThickSliceParameters(
            ratio=self.slice_spacing_mm / thin,
            thickness=self.slice_thickness_mm / self.slice_spacing_mm,
            profile=self.profile,
        )

    def __call__(self, image: Tensor) -> MetaTensor:
        """Acquire the image."""
        return _acquire(image, self.axis, self.parameters(image), self.is_label)


class RandSimulateThickSlices(RandomizableTransform):
    """Acquire thick slices with ratio, thickness, profile and phase drawn at random.

    A network that saw one profile falls below cubic interpolation on another: draw over what scanners do.

    Args:
        ratio: range of thick spacing divided by thin spacing.
        thickness: range of thickness divided by thick spacing.
        profiles: profiles, by name or as taps, and their probabilities; default mostly ``slr``.
        phase: largest shift of the slices, in thick slices.
        axis: spatial axis of the slices.

    Shape:
        ``(C, X, Y, Z)`` to ``(C, X, Y, Z')``.

    Example:
        >>> rand = RandSimulateThickSlices(ratio=(2, 6)).set_random_state(seed=0)
        >>> 2 <= rand.make_parameters().ratio <= 6
        True
    """

    def __init__(
        self,
        ratio: tuple[float, float] = (2.0, 6.0),
        thickness: tuple[float, float] = (0.6, 1.1),
        profiles: Mapping[str | tuple[float, ...], float] | None = None,
        *,
        phase: float = 0.0,
        axis: int = 2,
    ) -> None:
        super().__init__(prob=1.0)
        self.ratio, self.thickness, self.phase, self.axis = tuple(ratio), tuple(thickness), float(phase), axis
        self.profiles = dict(profiles or {"slr": 0.6, "gaussian": 0.1, "box": 0.15, "slr-legacy": 0.15})
        unknown = [name for name in self.profiles if isinstance(name, str) and name not in PROFILES]
        if unknown:
            raise SettingError(f"slice profile must be one of {', '.join(PROFILES)}, got '{unknown[0]}'")

    def make_parameters(self) -> ThickSliceParameters:
        """Draw one acquisition; applying it is deterministic."""
        weights = np.array(list(self.profiles.values()), dtype=np.float64)
        ratio = float(self.R.uniform(*self.ratio))
        return ThickSliceParameters(
            ratio=ratio,
            thickness=float(self.R.uniform(*self.thickness)),
            profile=list(self.profiles)[self.R.choice(len(weights), p=weights / weights.sum())],
            phase=float(self.R.uniform(-self.phase, self.phase)) * ratio,
        )

    def __call__(self, image: Tensor, parameters: ThickSliceParameters | None = None) -> MetaTensor:
        """Acquire the image, with fresh parameters unless some are given."""
        return _acquire(image, self.axis, parameters or self.make_parameters(), is_label=False)


class SimulateThickSlicesd(MapTransform):
    """Dictionary form of :class:`SimulateThickSlices`; keys in ``label_keys`` are area-averaged.

    Example:
        >>> item = {"image": MetaTensor(torch.ones(1, 4, 4, 8), affine=torch.eye(4))}
        >>> SimulateThickSlicesd("image", 2.0)(item)["image"].shape
        torch.Size([1, 4, 4, 4])
    """

    def __init__(
        self,
        keys: KeysCollection,
        slice_spacing_mm: float,
        slice_thickness_mm: float | None = None,
        profile: str | Sequence[float] = "slr",
        *,
        axis: int = 2,
        label_keys: str | Sequence[str] = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_keys = ensure_tuple(label_keys)
        settings = (slice_spacing_mm, slice_thickness_mm, profile)
        self.image_transform = SimulateThickSlices(*settings, axis=axis)
        self.label_transform = SimulateThickSlices(*settings, axis=axis, is_label=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Acquire every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            transform = self.label_transform if key in self.label_keys else self.image_transform
            result[key] = transform(result[key])
        return result


class RandSimulateThickSlicesd(MapTransform, Randomizable):
    """Dictionary form of :class:`RandSimulateThickSlices`: one draw serves all keys, so that grids cannot drift.

    Example:
        >>> item = {"image": MetaTensor(torch.ones(1, 4, 4, 8), affine=torch.eye(4))}
        >>> RandSimulateThickSlicesd("image", ratio=(2, 2))(item)["image"].shape
        torch.Size([1, 4, 4, 4])
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        label_keys: str | Sequence[str] = (),
        allow_missing_keys: bool = False,
        **settings: Any,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.label_keys = ensure_tuple(label_keys)
        self.draw = RandSimulateThickSlices(**settings)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandSimulateThickSlicesd:
        """Seed the draw."""
        self.draw.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Acquire every key with one draw."""
        result = dict(data)
        parameters = self.draw.make_parameters()
        for key in self.key_iterator(result):
            result[key] = _acquire(result[key], self.draw.axis, parameters, key in self.label_keys)
        return result


def _affine(image: Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(image.affine if isinstance(image, MetaTensor) else np.eye(4), dtype=np.float64)


def _acquire(image: Tensor, axis: int, parameters: ThickSliceParameters, is_label: bool) -> MetaTensor:
    size = image.shape[1 + axis]
    matrix = parameters.label_matrix(size) if is_label else parameters.matrix(size)
    weights = torch.as_tensor(matrix, dtype=torch.float32, device=image.device)
    return _acquired(image, weights, parameters, axis=axis)


def _acquired(image: Tensor, weights: Tensor, parameters: ThickSliceParameters, *, axis: int) -> MetaTensor:
    """The thick volume that the matrix ``weights`` makes of the image, and what a header says of it."""
    thick_size, size = weights.shape
    values = torch.as_tensor(image.as_tensor() if isinstance(image, MetaTensor) else image).float()
    values = torch.moveaxis(torch.moveaxis(values, 1 + axis, -1) @ weights.T, -1, 1 + axis)
    affine = thick_slice_affine(_affine(image), parameters, size=size, thick_size=thick_size, axis=axis)
    meta = dict(image.meta) if isinstance(image, MetaTensor) else {}
    meta["slice_thickness_mm"] = (
        parameters.ratio * parameters.thickness * float(spacing_of(_affine(image))[axis])
    )
    meta["spatial_shape"] = np.asarray(values.shape[1:])
    meta.pop("affine", None)
    return MetaTensor(values.contiguous(), affine=torch.as_tensor(affine), meta=meta)
