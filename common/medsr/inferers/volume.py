"""Inference of one volume as a scanner delivers it: ratio and thickness from its geometry, every channel alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsr.errors import SettingError
from medsr.geometry import refinement_ratio, rescaled_size, slice_positions, spacing_of
from medsr.inferers.head_box import head_box
from medsr.inferers.precision import precision_name
from medsr.inferers.slice_group import SliceGroupInferer
from medsr.metrics.volume import psnr
from medsr.resampling import interpolation_matrix
from medsr.settings import as_number
from medsr.transforms.slice_profile import acquisition_matrix, as_profile, fwhm_in_voxels

__all__ = ["MIN_SLICES", "VolumeInferer", "make_consistent", "projection_matrix"]

MIN_SLICES = 4
"""With fewer slices the network has no context to speak of: the result is the cubic interpolation."""

_ROWS = 16
"""Rows of a volume that are compared with its measured slices at a time: copies of whole results cost memory."""


_THICKEST = 1.5
"""Slice thickness over spacing that is believed at most: training saw 1.1, and to undo what a slip in a unit claims
would make detail that is not there, without bound."""

_HEAD_MARGIN = 16
"""Voxels around the head that the network sees and makes, too: air next to the head tells where it ends."""


class VolumeInferer(SliceGroupInferer):
    """Super-resolves volumes whose affine says how thick the slices are.

    The ratio is the slice spacing divided by ``spacing_mm``, the thickness comes from the setting, else from
    ``meta["slice_thickness_mm"]``, else it is the spacing (no gap). Each channel, for example each time point, is
    processed alone: by the network in the box around the head, by cubic interpolation in the air beside it.
    Afterwards the result is made consistent with the measured slices: the part of the difference between them and
    the re-acquired result that the slice profile can explain is added back.
    ``facts`` holds what the report needs about the last volume.

    Args:
        spacing_mm: slice spacing of the result; default the in-plane spacing.
        slice_thickness_mm: overrides what the file says.
        slice_profile: ``slr``, ``gaussian``, ``box``, ``slr-legacy``, a file of taps, or the taps.
        consistency: share of the explainable difference that is added back; 0 leaves the network's result.
        label_channels: how many of the last input channels are labels, super-resolved together with the one image.
        **settings: of :class:`~medsr.inferers.slice_group.SliceGroupInferer`.

    Shape:
        ``(1, C, H, W, D)``, slices last, intensities about [0, 1], to ``(1, C * K, H, W, D')`` with the ``K``
        output channels of the network: all images first, then all uncertainties. With labels: image, label
        probabilities, uncertainty.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> VolumeInferer(slice_profile="box", tile=None).slice_profile
        'box'
    """

    def __init__(
        self,
        spacing_mm: float | None = None,
        slice_thickness_mm: float | None = None,
        slice_profile: str | Sequence[float] = "slr",
        *,
        consistency: float = 1.0,
        label_channels: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.spacing_mm, self.slice_thickness_mm = (
            None if value is None else as_number(name, value, above=0)
            for name, value in (("target_spacing_mm", spacing_mm), ("slice_thickness_mm", slice_thickness_mm))
        )
        if not 0 <= as_number("consistency", consistency) <= 1:
            raise SettingError(f"consistency must lie in [0, 1], got {consistency}")
        self.label_channels = int(label_channels)
        self.slice_profile, self.consistency = as_profile(slice_profile), float(consistency)
        self.profile_name = Path(slice_profile).name if isinstance(slice_profile, str) else "taps"
        self.facts: dict[str, Any] = {}

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Super-resolve the first (only) volume of the batch."""
        if inputs.shape[0] != 1:
            raise SettingError(f"volumes differ in geometry: use batch size 1, got {inputs.shape[0]}")
        self.used_dtype, self.int8_planes = torch.float32, False
        ratio, thickness, warnings = self._acquisition(inputs)
        stack = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        size = stack.shape[-1]
        new_size = rescaled_size(size, ratio)
        facts: dict[str, Any] = {
            "ratio": ratio,
            "slice_thickness_per_spacing": round(thickness, 4),
            "slice_profile": self.profile_name,
            "method": "network",
        }
        result: Tensor | None = None
        acquire = self.acquisition(new_size, size, ratio, thickness)
        labels = self.label_channels
        if labels and stack.shape[1] != 1 + labels:
            raise SettingError(
                f"one image and {labels} label channels are needed, got {stack.shape[1]} channels"
            )
        channels = [stack] if labels else stack.split(1, dim=1)
        for k, one in enumerate(channels):
            if size < MIN_SLICES:
                found = self._interpolated(one, ratio, new_size, network)
            else:
                found = self._in_head_box(one, network, ratio=ratio, thickness=thickness)
            if self.consistency:
                make_consistent(found[0, 0], one[0, 0], acquire, share=self.consistency)
            found[:, 1 : 1 + labels].sigmoid_()
            if len(channels) == 1:
                result = found
                break
            if result is None:
                result = found.new_empty(1, found.shape[1], len(channels), *found.shape[2:])
            result[:, :, k] = found
        assert result is not None
        result = result.view(1, -1, *result.shape[-3:])
        if size < MIN_SLICES:
            facts["method"] = "cubic interpolation"
            warnings.append(f"only {size} slices: interpolated, the network needs {MIN_SLICES}")
        facts["data_consistency_db"] = _rounded(self._consistency_db(result[0, 0], stack[0, 0], acquire))
        facts["convolutions"] = precision_name(self.used_dtype)
        if self.int8_planes:
            facts["convolutions"] += ", those of the planes int8"
        facts["warnings"] = warnings
        self.facts = facts
        return result

    def acquisition(self, size: int, thick_size: int, ratio: float, thickness: float) -> Tensor:
        """Matrix ``(thick slices, thin slices)`` by which the result, re-acquired, should give the input."""
        fwhm = fwhm_in_voxels(ratio * thickness, 1.0)
        matrix = acquisition_matrix(size, thick_size, ratio=ratio, fwhm=fwhm, profile=self.slice_profile)
        return torch.as_tensor(matrix, dtype=torch.float32)

    def _acquisition(self, inputs: Tensor) -> tuple[float, float, list[str]]:
        meta = getattr(inputs, "meta", {})
        affine = np.asarray(getattr(inputs, "affine", np.eye(4)), dtype=np.float64).reshape(-1, 4, 4)[0]
        spacing = float(spacing_of(affine)[2])
        ratio = refinement_ratio(affine, self.spacing_mm, axis=2)
        found = meta.get("slice_thickness_mm")
        found = None if found is None else float(np.asarray(found).ravel()[0])
        thickness = self.slice_thickness_mm or found or spacing
        warnings = []
        if not 0.2 <= thickness / spacing <= _THICKEST:
            warnings.append(f"slice thickness {thickness:g} mm is unusual for a spacing of {spacing:.3g} mm")
        if thickness / spacing > _THICKEST:
            thickness = _THICKEST * spacing
            warnings[-1] += f"; {thickness:.3g} mm was assumed"
        if ratio > 8:
            warnings.append(f"ratio {ratio:g} is beyond the 8 that the network was trained for")
        return ratio, thickness / spacing, warnings

    def _in_head_box(
        self, stack: Tensor, network: Callable[..., Tensor], *, ratio: float, thickness: float
    ) -> Tensor:
        """Run the network where the head is; the air around it is interpolated."""
        box = (slice(None), slice(None), *head_box(stack[:, :1], margin=_HEAD_MARGIN))
        part = stack[box]
        found = super().__call__(part, network, scale=ratio, thickness=thickness)
        if part.shape == stack.shape:
            return found
        whole = self._interpolated(stack, ratio, found.shape[-1], network)
        if whole.shape[1] > stack.shape[1]:
            # Even where nothing is, the network expects some error: without it the box would be seen.
            whole[:, -1].clamp_(min=float(found[:, -1].min()))
        whole[box] = found
        return whole

    @staticmethod
    def _interpolated(stack: Tensor, ratio: float, new_size: int, network: Callable[..., Tensor]) -> Tensor:
        size, channels = stack.shape[-1], stack.shape[1]
        positions = slice_positions(size, new_size, ratio)
        matrices = [interpolation_matrix(size, positions, kind=kind) for kind in ("cubic", "nearest")]
        cubic, nearest = (torch.as_tensor(m.T).to(stack.device, torch.float32) for m in matrices)
        has_error = bool(getattr(network, "branches", 0))
        result = torch.empty(1, channels + has_error, *stack.shape[2:4], new_size, device=stack.device)
        for thick, thin in zip(stack.split(_ROWS, dim=2), result.split(_ROWS, dim=2), strict=True):
            thin[:, :channels] = thick.float() @ cubic
            if has_error:
                # Without a network the local contrast between the slices is the best guess of the error.
                thin[:, channels:] = (thin[:, :1] - thick[:, :1].float() @ nearest).abs()
            thin[:, 1:channels] = thin[:, 1:channels].clamp(0.01, 0.99).logit()
        return result

    @staticmethod
    def _consistency_db(image: Tensor, stack: Tensor, acquire: Tensor) -> float:
        again = acquire.to(image).T
        # Mean squared errors of parts add up, decibels do not.
        error = sum(
            10 ** (-psnr(thin @ again, thick, data_range=1.0) / 10) * len(thin) / len(image)
            for thin, thick in zip(image.split(_ROWS), stack.split(_ROWS), strict=True)
        )
        return -10 * math.log10(error) if error else math.inf


def projection_matrix(acquire: Tensor, *, damping: float = 1e-2) -> Tensor:
    """Damped right inverse of an acquisition: the smallest change of the thin slices that explains thick ones.

    Shape:
        ``(thick, thin)`` to ``(thin, thick)``.

    Example:
        >>> acquire = torch.tensor([[0.5, 0.5]])
        >>> projection_matrix(acquire, damping=0.0).ravel().tolist()
        [1.0, 1.0]
    """
    exact = acquire.double()
    gram = exact @ exact.T
    scale = float(gram.diagonal().mean())
    return (exact.T @ torch.linalg.inv(gram + damping * scale * torch.eye(len(gram)).double())).float()


def make_consistent(image: Tensor, measured: Tensor, acquire: Tensor, *, share: float = 1.0) -> None:
    """Add back, in place, what the acquisition can explain of the difference of measured and re-acquired slices.

    Args:
        image: thin slices; changed.
        measured: thick slices.
        acquire: what makes thick slices of thin ones, ``(thick, thin)``.
        share: how much of it is added.

    Shape:
        ``(H, ..., thin)`` and ``(H, ..., thick)``.

    Example:
        >>> image = torch.zeros(1, 4)
        >>> make_consistent(image, torch.ones(1, 1), torch.full((1, 4), 0.25))
        >>> image.round(decimals=1).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """
    again, back = acquire.to(image).T, projection_matrix(acquire.cpu()).to(image).T
    for thin, thick in zip(image.split(_ROWS), measured.split(_ROWS), strict=True):
        thin.add_((thick.float() - thin @ again) @ back, alpha=share)


def _rounded(value: float) -> float | None:
    return round(value, 2) if np.isfinite(value) else None
