"""Inference of thick and thin masks of one volume: windows are blended before the heads read them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from torch import Tensor, nn

from medsr.errors import DataError, SettingError
from medsr.geometry import refinement_ratio, spacing_of
from medsr.inferers.head_box import head_box
from medsr.inferers.precision import checked_precision, choose_precision, precision_name
from medsr.inferers.volume import MIN_SLICES
from medsr.settings import as_flag, as_number

__all__ = ["ThickSegmentationInferer"]

_MIRRORED = [axes for count in (1, 2, 3) for axes in combinations((-3, -2, -1), count)]
"""The seven sets of axes along which a volume can be flipped."""

_STRETCH = 1.25
"""A window may be so much longer than the training patch, where that saves a second one."""

_TOLERANCE = 0.05
"""Difference of the features that bfloat16 may make: rounding alone makes 0.02, a faulty kernel far more."""


class _Network(Protocol):
    """What is asked of a network: see :class:`~medsr.networks.thick_segmentation.ThickSegmentationNet`."""

    patch_size: Sequence[int]
    spacing_mm: Sequence[float]

    def features(self, image: Tensor) -> Tensor: ...

    def read_thick(self, features: Tensor) -> Tensor: ...

    def read_thin(self, features: Tensor, scale: float) -> Tensor: ...


class ThickSegmentationInferer(Inferer):
    """Class probabilities on thin slices of one volume whose affine says how thick the slices are.

    Windows of the training patch, where the instance norm sees what it saw in training, run over the thick grid.
    ``monai.inferers.SlidingWindowInferer`` was considered: it truncates the places of windows on an output grid that
    is finer by a ratio that is no integer, and would blend every thin voxel of every window. Here its function
    :func:`monai.inferers.sliding_window_inference` blends the *features* of the thick grid, with Gaussian weights,
    and both heads read the blended features once: no seam and no window on the thin grid. Only the box around the
    head, across the slices, is looked at, as in training; the rest is background. ``thick`` holds the
    probabilities on the thick grid of the last volume of the calling thread, since MONAI Label shares one inferer
    between threads, and ``facts`` what the report needs about the last volume.

    Args:
        spacing_mm: slice spacing of the thin grid; default the in-plane spacing.
        patch_size: window on the thick grid, slices last; default the network's training patch. Where the head is
            smaller than that, or longer by a quarter at most, its window is as long as the head.
        overlap: share of a window that the next one covers again.
        mirror: also run the volume flipped along each of its axes and average the eight probabilities, at eight
            times the time.
        amp: ``auto``, ``float32`` or ``bfloat16`` for the features, see
            :func:`medsr.inferers.precision.choose_precision`; the heads run in float32.
        batch: windows that are processed together.
        progress: show a progress bar.

    Shape:
        ``(1, 1, H, W, D)``, slices last, intensities as in training, to ``(1, K, H, W, D')`` with
        ``D' = round(D * ratio)``, float32; ``thick`` is ``(1, K, H, W, D)``.

    Raises:
        SettingError: if a setting is out of range, or the batch holds more than one volume.
        DataError: if the volume has no affine or several channels.

    Example:
        >>> from monai.data import MetaTensor
        >>> from medsr.networks.thick_segmentation import ThickSegmentationNet
        >>> network = ThickSegmentationNet(patch_size=(32, 32, 16), width=4)
        >>> image = MetaTensor(torch.rand(1, 1, 40, 32, 5), affine=torch.diag(torch.tensor([1.0, 1.0, 3.5, 1.0])))
        >>> infer = ThickSegmentationInferer(amp="float32")
        >>> infer(image, network).shape, infer.thick.shape
        (torch.Size([1, 2, 40, 32, 18]), torch.Size([1, 2, 40, 32, 5]))
    """

    def __init__(
        self,
        spacing_mm: float | None = None,
        patch_size: Sequence[int] | None = None,
        overlap: float = 0.25,
        *,
        mirror: bool = False,
        amp: str = "auto",
        batch: int = 1,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if patch_size is not None and (len(patch_size) != 3 or min(patch_size) < 1):
            raise SettingError(f"patch_size must hold three numbers >= 1, got {patch_size}")
        if not 0 <= as_number("overlap", overlap) < 1:
            raise SettingError(f"overlap must lie in [0, 1), got {overlap}")
        self.amp = checked_precision(amp)
        self.spacing_mm = None if spacing_mm is None else as_number("target_spacing_mm", spacing_mm, above=0)
        self.patch_size, self.overlap = patch_size, float(overlap)
        self.mirror, self.batch, self.progress = as_flag("mirror", mirror), max(1, batch), progress
        self._last = threading.local()
        self.facts: dict[str, Any] = {}

    def __call__(self, inputs: Tensor, network: _Network, *args: Any, **kwargs: Any) -> Tensor:
        """Segment the first (only) volume of the batch; other arguments are ignored."""
        if inputs.shape[0] != 1:
            raise SettingError(f"volumes differ in geometry: use batch size 1, got {inputs.shape[0]}")
        if inputs.shape[1] != 1 or not isinstance(inputs, MetaTensor):
            raise DataError(
                f"one channel with an affine is needed, got {inputs.shape[1]} in a {type(inputs).__name__}: load "
                "the volume with its header and segment each channel alone"
            )
        ratio, warnings = self._acquisition(inputs, network)
        if isinstance(network, nn.Module):
            network.eval()
        whole = inputs.as_tensor().float()
        box = (slice(None), slice(None), *head_box(whole))
        stack = whole[box]
        with torch.no_grad():
            window = [
                size if size <= _STRETCH * part else part
                for size, part in zip(stack.shape[2:], self._patch(network), strict=True)
            ]
            # The corners of a volume are often empty: precision is tried in its middle.
            starts = [(size - part) // 2 for size, part in zip(stack.shape[2:], window, strict=True)]
            middle = [slice(start, start + part) for start, part in zip(starts, window, strict=True)]
            trial = stack[:, :, middle[0], middle[1], middle[2]]
            dtype = choose_precision(self.amp, network.features, trial, tolerance=_TOLERANCE)

            def segment(image: Tensor) -> tuple[Tensor, Tensor]:
                features = self._blended(image, network, window, dtype)
                return network.read_thick(features).softmax(1), network.read_thin(features, ratio).softmax(1)

            thick, thin = segment(stack)
            if self.mirror:
                for axes in _MIRRORED:
                    more_thick, more_thin = segment(stack.flip(axes))
                    thick += more_thick.flip(axes)
                    thin += more_thin.flip(axes)
                thick /= 1 + len(_MIRRORED)
                thin /= 1 + len(_MIRRORED)
            thick, thin = (_background_around(part, whole, box) for part in (thick, thin))
        self._last.thick = thick
        self.facts = {"ratio": ratio, "convolutions": precision_name(dtype), "warnings": warnings}
        return thin

    @property
    def thick(self) -> Tensor:
        """Probabilities on the thick grid of this thread's last volume, ``(1, K, H, W, D)``."""
        return getattr(self._last, "thick", torch.empty(0))

    def _patch(self, network: _Network) -> Sequence[int]:
        return network.patch_size if self.patch_size is None else self.patch_size

    def _blended(self, image: Tensor, network: _Network, window: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Features of the whole volume, float32."""

        def features(part: Tensor) -> Tensor:
            with torch.autocast(part.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return network.features(part)

        blended = sliding_window_inference(
            image, window, self.batch, features, self.overlap, mode="gaussian", progress=self.progress
        )
        assert isinstance(blended, Tensor)
        return blended

    def _acquisition(self, inputs: MetaTensor, network: _Network) -> tuple[float, list[str]]:
        """Ratio of the slice spacing to the thin spacing, and what is unusual about the volume."""
        affine = np.asarray(inputs.affine, dtype=np.float64).reshape(-1, 4, 4)[0]
        spacing = spacing_of(affine)
        ratio = refinement_ratio(affine, self.spacing_mm, axis=2)
        warnings = []
        relative = spacing / np.asarray(network.spacing_mm)
        if relative.max() > 2 or relative.min() < 0.5:
            found, planned = (
                " x ".join(f"{one:.3g}" for one in three) for three in (spacing, network.spacing_mm)
            )
            warnings.append(
                f"spacing {found} mm is far from the {planned} mm that the network was planned for"
            )
        if inputs.shape[-1] < MIN_SLICES:
            warnings.append(f"only {inputs.shape[-1]} slices: the network has no context to speak of")
        return ratio, warnings


def _background_around(probabilities: Tensor, whole: Tensor, box: tuple[slice, ...]) -> Tensor:
    """Probabilities of the box at its place in the whole field of view."""
    classes, depth = probabilities.shape[1], probabilities.shape[-1]
    result = probabilities.new_zeros((1, classes, *whole.shape[2:4], depth))
    result[:, 0] = 1
    result[box] = probabilities
    return result
