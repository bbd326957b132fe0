"""Inference of the classes of a frame of any size: scaled as in training, padded for the network, scaled back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Protocol

import torch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import DataError, MedsrError, SettingError
from medsr.inferers.precision import checked_precision, choose_precision, precision_name
from medsr.settings import as_flag, as_number, as_whole
from medsr.transforms.bicubic import bicubic_resize
from medsr.transforms.frame_labels import reduced_size

__all__ = ["FrameSegmentationInferer"]

_MIRRORED = [axes for count in (1, 2) for axes in combinations((-2, -1), count)]
"""The three sets of axes along which a frame can be flipped."""

_TRIAL = 128
"""Side of the middle of a frame on which the precision is tried, at least."""

_TOLERANCE = 0.1
"""Difference of the logits that bfloat16 may make: rounding alone makes 0.03, a faulty kernel far more."""


class _Network(Protocol):
    """What is asked of a network: see :class:`~medsr.networks.spp_linknet.SPPLinkNet`."""

    in_channels: int
    size_multiple: int
    half_precision_safe: bool

    def __call__(self, image: Tensor) -> Tensor: ...


class FrameSegmentationInferer(Inferer):
    """Class probabilities of every pixel of frames of any size, whatever sizes the network takes.

    A network knows instruments at the size that they had in training: ``longest`` brings every frame to that scale,
    by antialiased bicubic resizing, and the probabilities back to the pixels of the frame, linearly, so that they
    still add up to one. What is missing to the network's ``size_multiple`` is filled with the last row and column.
    How large an instrument is in the frame depends on how near it is: with several ``sizes`` the frame is seen at each,
    and the probabilities are averaged.

    ``monai.inferers.SimpleInferer`` was considered: it does neither. ``monai.inferers.SlidingWindowInferer`` shows a
    network with pyramid pooling windows where it expects the whole frame.

    One logit (background or not) becomes two probabilities, so that the class of largest probability is the mask in
    every task. ``facts`` holds what the report needs about the last batch: ``network_size`` (rows, columns) that the
    network saw, at the largest of the ``sizes``, ``padding`` (below, on the right) beside these, ``sizes``, ``mirror``,
    ``precision`` and ``warnings``.

    Args:
        mirror: also run the frame flipped along each axis and along both, and average the four probabilities, at
            four times the time.
        amp: ``auto``, ``float32`` or ``bfloat16``, see :func:`medsr.inferers.precision.choose_precision`; networks
            that are not ``half_precision_safe`` run in float32.
        longest: longer side at which the network sees a frame, in pixels; None leaves frames as they are.
        sizes: shares of that size at which it sees the frame, in turn.

    Shape:
        ``(B, C, H, W)``, C = 1 or 3, intensities in [0, 1], to ``(B, K, H, W)``, float32, with K >= 2, the background
        first.

    Raises:
        SettingError: if a setting is out of range.
        DataError: if the frame has no pixels, or its channels do not fit the network.
        MedsrError: if the network gives values that are not finite.

    Example:
        >>> class Bright(nn.Module):
        ...     in_channels, size_multiple, half_precision_safe = 3, 32, True
        ...     def forward(self, image):
        ...         return 20 * image.mean(1, keepdim=True) - 10
        >>> infer = FrameSegmentationInferer(longest=64)
        >>> infer(torch.full((1, 3, 90, 120), 0.9), Bright()).argmax(1).unique().tolist()
        [1]
        >>> infer.facts["network_size"], infer.facts["padding"]
        ([48, 64], [16, 0])
    """

    def __init__(
        self,
        *,
        mirror: bool = False,
        amp: str = "auto",
        longest: int | None = None,
        sizes: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
            raise SettingError(f"sizes must be a list of numbers > 0, got {sizes!r}")
        # The largest first: it is the one that the facts are about.
        self.sizes = sorted((as_number("sizes", share, above=0) for share in sizes), reverse=True)
        self.amp = checked_precision(amp)
        self.mirror = as_flag("mirror", mirror)
        self.longest = None if longest is None else as_whole("longest", longest, 1)
        self.facts: dict[str, Any] = {}

    def __call__(self, inputs: Tensor, network: _Network, *args: Any, **kwargs: Any) -> Tensor:
        """Segment frames of one size; other arguments are ignored."""
        if inputs.ndim != 4 or 0 in inputs.shape:
            raise DataError(f"frames are (B, C, H, W) with pixels, got {tuple(inputs.shape)}")
        if inputs.shape[1] not in (1, network.in_channels):
            raise DataError(
                f"the frame has {inputs.shape[1]} channels, the network takes {network.in_channels}"
            )
        if isinstance(network, nn.Module):
            network.eval()
        image = (inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs).float()
        warnings = []
        if image.shape[1] < network.in_channels:
            image = image.expand(-1, network.in_channels, -1, -1)
            warnings.append("grey frame, network for colour: it was given as equal channels")
        sizes = [self._size(image, share) for share in self.sizes]
        padding = [[-length % network.size_multiple for length in size] for size in sizes]
        with torch.no_grad():
            views = [_resized(image, size, pads) for size, pads in zip(sizes, padding, strict=True)]
            dtype = self._precision(views[0], network, warnings)
            found = image.new_zeros(())
            for size, view in zip(sizes, views, strict=True):
                one = self._averaged(view, network, dtype)[..., : size[0], : size[1]]
                if size != tuple(image.shape[-2:]):
                    one = F.interpolate(
                        one, image.shape[-2:], mode="bilinear", align_corners=False, antialias=True
                    )
                found = found + one / len(sizes)
        self.facts = {
            "network_size": list(sizes[0]),
            "padding": padding[0],
            "sizes": list(self.sizes),
            "mirror": self.mirror,
            "precision": precision_name(dtype),
            "warnings": warnings,
        }
        return found

    def _size(self, image: Tensor, share: float) -> tuple[int, int]:
        """Rows and columns that the network sees."""
        height, width = image.shape[-2:]
        longest = max(height, width)
        # The scale that ResizeFramed gives a frame in training.
        return reduced_size(height, width, longest / ((self.longest or longest) * share))

    def _precision(self, image: Tensor, network: _Network, warnings: list[str]) -> torch.dtype:
        if self.amp != "float32" and not network.half_precision_safe:
            if self.amp == "bfloat16":
                warnings.append(f"{type(network).__name__} is not safe in bfloat16: float32 was used")
            return torch.float32
        # The corners of an endoscopic frame are often black: precision is tried in its middle.
        side = -(-_TRIAL // network.size_multiple) * network.size_multiple
        starts = [max(0, (length - side) // 2) for length in image.shape[-2:]]
        middle = image[..., starts[0] : starts[0] + side, starts[1] : starts[1] + side]
        return choose_precision(self.amp, network, middle, tolerance=_TOLERANCE)

    def _averaged(self, image: Tensor, network: _Network, dtype: torch.dtype) -> Tensor:
        found = _probabilities(image, network, dtype)
        if self.mirror:
            for axes in _MIRRORED:
                found += _probabilities(image.flip(axes), network, dtype).flip(axes)
            found /= 1 + len(_MIRRORED)
        return found


def _resized(image: Tensor, size: tuple[int, int], padding: Sequence[int]) -> Tensor:
    """The frame as the network sees it: rows below and columns on the right are repeated."""
    if size != tuple(image.shape[-2:]):
        image = bicubic_resize(image, size).clamp(0, 1)
    return F.pad(image, (0, padding[1], 0, padding[0]), mode="replicate")


def _probabilities(image: Tensor, network: _Network, dtype: torch.dtype) -> Tensor:
    with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = network(image)
    logits = logits.float()
    if not torch.isfinite(logits).all():
        raise MedsrError(
            "the network gave values that are not finite: check the image and the weights, or use amp=float32"
        )
    if logits.shape[1] > 1:
        return logits.softmax(1)
    return torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], 1)
