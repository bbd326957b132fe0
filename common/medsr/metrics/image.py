"""Fidelity of a 2D image: PSNR and SSIM in RGB or on luma, and the protocol that belongs to every number.

The same result gains or loses several dB with the colour channel, the border, the rounding and the region that
count. :class:`ImageProtocol` holds these four choices and writes them beside the numbers. Images are
``(C, H, W)`` arrays or tensors with intensities in [0, 1]; score one at a time and average the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, SettingError
from medsr.metrics.volume import SSIM_TAPS, as_array, masked_values, ssim_map
from medsr.metrics.volume import psnr as _psnr

__all__ = [
    "CHANNELS",
    "MASKS",
    "SET5_X4",
    "ImageProtocol",
    "MeanScore",
    "luma",
    "mean_score",
    "psnr",
    "round_to_8_bits",
    "ssim",
]

Image: TypeAlias = Any
"""A NumPy array or a torch tensor."""

ImageT = TypeVar("ImageT")
FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

CHANNELS = ("rgb", "y")
MASKS = ("full", "fov")

_SIGMA = 1.5
_RIM = SSIM_TAPS // 2
_TIE = 1e-4
"""Grey levels by which a value may miss a half and still count as one: 5 times what float32 costs."""


def luma(image: ImageT) -> ImageT:
    """Luma of ITU-R BT.601 in studio range, from 16/255 (black) to 235/255 (white).

    The Y of the super-resolution literature (MATLAB's ``rgb2ycbcr``). Full-range luma, as OpenCV and Pillow
    compute it, reads 20 log10(255/219) = 1.32 dB less. Gradients flow.

    Args:
        image: RGB image in [0, 1], array or tensor.

    Shape:
        ``(..., 3, H, W)`` to ``(..., 1, H, W)``.

    Raises:
        DataError: if there are not three channels.

    Example:
        >>> round(float(luma(np.ones((3, 1, 1)))[0, 0, 0] * 255), 6)
        235.0

    Reference:
        Recommendation ITU-R BT.601-7, https://www.itu.int/rec/R-REC-BT.601
    """
    values: Any = image
    if values.ndim < 3 or values.shape[-3] != 3:
        raise DataError(f"luma: the image must be (..., 3, H, W), got shape {tuple(values.shape)}")
    red, green, blue = (values[..., index : index + 1, :, :] for index in range(3))
    result: ImageT = (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255
    return result


def round_to_8_bits(image: ImageT) -> ImageT:
    """Clip to [0, 1] and round to whole 255ths, halves up: what an 8-bit file would have kept.

    ``torch.round`` and ``numpy.round`` take halves to the even neighbour. The type of the image stays; half
    precision cannot tell all levels apart, so convert it first.

    Args:
        image: array or tensor of any shape, floating point.

    Example:
        >>> (round_to_8_bits(np.array([-0.1, 0.5, 1.5])) * 255).tolist()
        [0.0, 128.0, 255.0]
    """
    values: Any = image
    result: ImageT = ((values.clip(0, 1) * 255 + (0.5 + _TIE)) // 1) / 255
    return result


def psnr(
    pred: Image,
    target: Image,
    *,
    border: int = 0,
    mask: Image | None = None,
    channel: str = "rgb",
    rounded: bool = False,
) -> float:
    """Peak signal-to-noise ratio in dB with peak 1; ``math.inf`` for identical images.

    ``monai.metrics.PSNRMetric`` was considered: it has no mask, no border and no luma, and its mean over images
    is infinite as soon as one of them is; see :func:`mean_score`.

    Args:
        pred: image to judge.
        target: reference.
        border: pixels left out on each side.
        mask: pixels that count (non-zero is inside); default all.
        channel: ``rgb`` takes all channels as they are, ``y`` the luma; a single channel is taken for luma.
        rounded: round both images to 8 bits first; the luma of the rounded images is not rounded again.

    Shape:
        - pred, target: ``(C, H, W)``;
        - mask: ``(H, W)`` or ``(1, H, W)``.

    Raises:
        DataError: if shapes differ, values are not finite, the target leaves [0, 1] or nothing is left to measure.
        SettingError: if ``channel`` or ``border`` does not exist.

    Example:
        >>> round(psnr(np.full((3, 8, 8), 0.6), np.full((3, 8, 8), 0.5)), 6)
        20.0
    """
    first, second, inside = _prepare(pred, target, mask, ImageProtocol(channel, border, rounded))
    return _masked_psnr(first, second, inside)


def ssim(
    pred: Image,
    target: Image,
    *,
    border: int = 0,
    mask: Image | None = None,
    channel: str = "rgb",
    rounded: bool = False,
) -> float:
    """Mean structural similarity: Gaussian window of 11 x 11, sigma 1.5, valid region, mean over the channels.

    ``monai.metrics.SSIMMetric`` was considered and agrees within 1e-5; it works in float32 with a dense window
    and has no mask. Inside a mask the map of the whole image is averaged: a window at the rim still sees 5 pixels
    of the outside. Identical images give 1.

    Args:
        pred: image to judge.
        target: reference.
        border: pixels left out on each side, before the windows are laid.
        mask: pixels over which the map is averaged; default all whose window fits.
        channel: as in :func:`psnr`.
        rounded: as in :func:`psnr`.

    Shape:
        - pred, target: ``(C, H, W)``;
        - mask: ``(H, W)`` or ``(1, H, W)``.

    Raises:
        DataError: as :func:`psnr`, and if less than 11 pixels are left along an axis.
        SettingError: as :func:`psnr`.

    Example:
        >>> image = np.random.default_rng(0).random((3, 16, 16))
        >>> round(ssim(image, image), 9)
        1.0

    Reference:
        Wang et al., Image quality assessment: from error visibility to structural similarity, 2004,
        doi:10.1109/TIP.2003.819861
    """
    return _masked_ssim(*_prepare(pred, target, mask, ImageProtocol(channel, border, rounded)))


@dataclass(frozen=True)
class ImageProtocol:
    """How two images are compared, and the name under which the numbers may be compared with others.

    Args:
        channel: ``rgb`` or ``y``, see :func:`psnr`.
        border: pixels left out on each side.
        rounded: round both images to 8 bits first.
        mask: ``full`` for the whole frame, ``fov`` for the field of view that the caller hands to :meth:`score`.

    Raises:
        SettingError: if a choice does not exist.

    Example:
        >>> ImageProtocol(mask="fov").identifier
        'psnr-v1:rgb:border0:fov:u8'
    """

    channel: str = "rgb"
    border: int = 0
    rounded: bool = True
    mask: str = "full"

    def __post_init__(self) -> None:
        if self.channel not in CHANNELS:
            raise SettingError(f"channel must be one of {', '.join(CHANNELS)}, got '{self.channel}'")
        if self.mask not in MASKS:
            raise SettingError(f"mask must be one of {', '.join(MASKS)}, got '{self.mask}'")
        if int(self.border) != self.border or self.border < 0:
            raise SettingError(f"border must be a whole number of pixels >= 0, got {self.border}")

    @property
    def identifier(self) -> str:
        """Name of the protocol; equal names mean comparable numbers."""
        depth = "u8" if self.rounded else "float"
        return f"psnr-v1:{self.channel}:border{self.border}:{self.mask}:{depth}"

    def score(self, pred: Image, target: Image, mask: Image | None = None) -> dict[str, float | str]:
        """PSNR, SSIM and the identifier of one image.

        Args:
            pred: image to judge.
            target: reference.
            mask: field of view; not looked at by a protocol over the full frame, so that one call serves all.

        Returns:
            ``psnr_db`` (``math.inf`` for identical images, which JSON cannot hold), ``ssim`` and ``protocol``.

        Raises:
            DataError: as :func:`psnr`, and if the field of view is to count and is not given.
        """
        if self.mask == "full":
            mask = None
        elif mask is None:
            raise DataError(f"{self.identifier} counts the field of view; give its mask")
        first, second, inside = _prepare(pred, target, mask, self)
        return {
            "psnr_db": _masked_psnr(first, second, inside),
            "ssim": _masked_ssim(first, second, inside),
            "protocol": self.identifier,
        }


SET5_X4 = ImageProtocol(channel="y", border=4)
"""The x4 tables of the literature from SRCNN on, in which bicubic reads 28.42 dB / 0.8104 on Set5.

To the last digit so only if the method works on the luma: the 8-bit luma of the truth is degraded without
rounding, enlarged, and both are handed in as one-channel images. RGB images under this protocol read 28.43 dB /
0.8113, which is what newer repositories print.
"""


@dataclass(frozen=True)
class MeanScore:
    """Mean over several images, with the infinite ones apart.

    Args:
        mean: mean of the finite scores; ``math.inf`` if there is none.
        finite: number of scores in the mean.
        infinite: number of scores left out: images equal to their reference.
    """

    mean: float
    finite: int
    infinite: int


def mean_score(scores: Iterable[float]) -> MeanScore:
    """Mean of per-image scores; identical images (infinite PSNR) are counted and not averaged.

    One perfect image, for example a black one, would otherwise make every mean infinite; a large stand-in value
    would make the mean depend on the stand-in.

    Args:
        scores: one number for each image, in dB or without unit.

    Raises:
        DataError: if there is no score, or one is NaN or minus infinity.

    Example:
        >>> mean_score([30.0, 32.0, math.inf])
        MeanScore(mean=31.0, finite=2, infinite=1)
    """
    values = [float(score) for score in scores]
    if not values or any(math.isnan(value) or value == -math.inf for value in values):
        raise DataError(f"mean_score: needs one number or more and no NaN, got {values}")
    finite = [value for value in values if value < math.inf]
    mean = math.fsum(finite) / len(finite) if finite else math.inf
    return MeanScore(mean, len(finite), len(values) - len(finite))


def _prepare(
    pred: Image, target: Image, mask: Image | None, protocol: ImageProtocol
) -> tuple[FloatArray, FloatArray, BoolArray | None]:
    """What is compared: float64 images and mask after rounding, luma and crop."""
    first, second = (as_array(image).astype(np.float64, copy=False) for image in (pred, target))
    if first.ndim != 3 or first.shape != second.shape or first.size == 0:
        raise DataError(f"images must be two equal (C, H, W), got shapes {first.shape} and {second.shape}")
    if not np.isfinite(first).all():
        raise DataError("pred holds NaN or infinite values; repair it first")
    if not (second.min() >= -1e-6 and second.max() <= 1 + 1e-6):
        raise DataError(
            f"target must lie in [0, 1], got {second.min():g} to {second.max():g}; scale or clip it first"
        )
    if protocol.rounded:
        first, second = round_to_8_bits(first), round_to_8_bits(second)
    if protocol.channel == "y" and first.shape[0] != 1:
        first, second = luma(first), luma(second)
    inside = None
    if mask is not None:
        inside = as_array(mask) != 0
        inside = inside[0] if inside.ndim == 3 and inside.shape[0] == 1 else inside
        if inside.shape != first.shape[1:]:
            raise DataError(f"mask must be (H, W) = {first.shape[1:]}, got shape {inside.shape}")
    kept = tuple(slice(protocol.border, size - protocol.border) for size in first.shape[1:])
    if any(one.start >= one.stop for one in kept):
        raise DataError(f"a border of {protocol.border} leaves nothing of an image of shape {first.shape}")
    return first[:, kept[0], kept[1]], second[:, kept[0], kept[1]], None if inside is None else inside[kept]


def _masked_psnr(first: FloatArray, second: FloatArray, inside: BoolArray | None) -> float:
    mask = None if inside is None else np.broadcast_to(inside, first.shape)
    return _psnr(first, second, data_range=1.0, mask=mask)


def _masked_ssim(first: FloatArray, second: FloatArray, inside: BoolArray | None) -> float:
    if min(first.shape[1:]) < SSIM_TAPS:
        raise DataError(f"ssim: needs {SSIM_TAPS} pixels or more along each axis, got shape {first.shape}")
    kept = (slice(_RIM, -_RIM),) * 2
    mask = None if inside is None else inside[kept]
    # Plane by plane: a photograph of 12 megapixels has five float64 maps of 100 MB in flight for each.
    maps = (ssim_map(*planes, sigma=_SIGMA)[kept] for planes in zip(first, second, strict=True))
    return float(np.mean([masked_values({"the SSIM map": one}, mask=mask)[0].mean() for one in maps]))
