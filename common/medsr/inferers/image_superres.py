"""Inference of one 2D image: tiles, self-ensemble, and what a result has to do with its input."""

from __future__ import annotations

import math
import threading
from typing import Any, Protocol

import torch
from monai.inferers import Inferer
from torch import Tensor

from medsr.errors import DataError
from medsr.inferers.self_ensemble import SelfEnsemble
from medsr.inferers.tiles import TileInferer
from medsr.settings import as_flag, as_whole
from medsr.transforms.bicubic import bicubic_bands

__all__ = ["ImageSuperResInferer"]

LARGEST_FLOAT32 = 2**26
"""Pixels of a result that are always kept in float32; more, as of a photograph of several megapixels, in float16.

Its steps are an eighth of the steps of an 8-bit file at most. Finer images are kept in float32, whatever their size.
"""

_INVENTED_FROM = 8
"""Scale from which on most of what is seen has no counterpart in the input."""


class _Network(Protocol):
    """What is asked of a network beside what :class:`~medsr.inferers.tiles.TileInferer` asks."""

    scale: int
    in_channels: int


class ImageSuperResInferer(Inferer):
    """Super-resolves one image and says how well the result agrees with it.

    Made small again with the degradation of the training, a result should be its input: ``facts`` holds how far it
    is from that (``data_consistency_db``, and the largest difference in 255ths). Back-projection adds the enlarged
    difference, which makes them agree; it is off by default, because a network that needs it was not made for the
    image at hand. A grey image runs through a network for colour as three equal channels, whose mean is taken.
    For stereo pairs there is :class:`~medsr.inferers.stereo_superres.StereoSuperResInferer`.

    Args:
        ensemble: average over the eight flips and rotations, at eight times the time; their disagreement is kept as
            ``uncertainty``, that of the last image of the calling thread.
        back_projection: number of back-projection steps.
        **tiles: settings of :class:`~medsr.inferers.tiles.TileInferer`.

    Shape:
        ``(1, C, H, W)`` in [0, 1] to ``(1, C, s * H, s * W)`` in [0, 1], on the CPU, float32; above
        ``LARGEST_FLOAT32`` pixels, where the input has no more than 8 bits, float16.

    Raises:
        SettingError: if a setting is out of range.
        DataError: if the number of channels does not fit the network.

    Example:
        >>> class Twice(torch.nn.Upsample):
        ...     scale, in_channels, size_multiple, exact_halo, half_precision_safe = 2, 3, 1, 0, True
        >>> infer = ImageSuperResInferer(back_projection=1)
        >>> infer(torch.rand(1, 1, 20, 30), Twice(scale_factor=2)).shape
        torch.Size([1, 1, 40, 60])
        >>> infer.facts["back_projection"]
        1

    Reference:
        M. Irani and S. Peleg, Improving resolution by image registration, 1991, doi:10.1016/1049-9652(91)90045-L
    """

    views = 1
    """Views that the channels of an image are of, one after the other."""

    def __init__(self, *, ensemble: bool = False, back_projection: int = 0, **tiles: Any) -> None:
        super().__init__()
        self.back_projection = as_whole("back_projection", back_projection, 0)
        self.ensemble = as_flag("ensemble", ensemble)
        tile_inferer = TileInferer(**tiles)
        self.inferer = SelfEnsemble(tile_inferer, views=self.views) if self.ensemble else tile_inferer
        self._last = threading.local()
        self.facts: dict[str, Any] = {}

    def __call__(self, inputs: Tensor, network: _Network, *args: Any, **kwargs: Any) -> Tensor:
        """Super-resolve the first (only) image of the batch; other arguments are ignored."""
        image = (inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs).float()
        channels = image.shape[1]
        if channels not in (self.views, network.in_channels):
            raise DataError(f"the image has {channels} channels, the network takes {network.in_channels}")
        low, warnings = image.cpu(), []
        result = self._run(image, network)
        if channels < network.in_channels:
            warnings.append("grey image, network for colour: its three equal channels were averaged")
        for _ in range(self.back_projection):
            for first, band in bicubic_bands(low - _small(result, low), _size(result)):
                result[..., first : first + band.shape[-2], :] += band
        result.clamp_(0, 1)
        self._last.uncertainty = getattr(self.inferer, "uncertainty", None)
        difference = _small(result, low) - low
        self.facts = {
            **self.inferer.facts,
            "scale": network.scale,
            **self._consistency(difference),
            "data_consistency_max_255ths": round(255 * float(difference.abs().max()), 2),
            "back_projection": self.back_projection,
            "ensemble": self.ensemble,
            "warnings": [*self.inferer.facts.get("warnings", []), *warnings],
        }
        if network.scale >= _INVENTED_FROM:
            self.facts["notice"] = f"not for diagnosis: at x{network.scale} most detail is estimated"
        return result

    def _consistency(self, difference: Tensor) -> dict[str, Any]:
        """How far the result, made small again, is from the input."""
        return {"data_consistency_db": decibels(difference)}

    def _run(self, image: Tensor, network: _Network) -> Tensor:
        channels, (height, width) = image.shape[1], (network.scale * n for n in _size(image))
        # Grey views run as equal channels, whose mean is taken.
        image = image[:, :, None].expand(-1, -1, network.in_channels // channels, -1, -1).flatten(1, 2)
        if isinstance(self.inferer, SelfEnsemble):
            return _averaged(self.inferer(image, network), channels)
        halved = height * width > LARGEST_FLOAT32 and _has_8_bits(image)
        dtype = torch.float16 if halved else torch.float32
        result = torch.empty(1, channels, height, width, dtype=dtype)

        def place(row: int, column: int, part: Tensor) -> None:
            kept = _averaged(part, channels)
            result[..., row : row + part.shape[-2], column : column + part.shape[-1]] = kept

        self.inferer.stream(image, network, place)
        return result

    @property
    def uncertainty(self) -> Tensor | None:
        """Disagreement of the ensemble for this thread's last image, ``(1, views, s * H, s * W)``; None without one."""
        return getattr(self._last, "uncertainty", None)


def _averaged(image: Tensor, channels: int) -> Tensor:
    """The means of as many groups of channels."""
    return image if image.shape[1] == channels else image.unflatten(1, (channels, -1)).mean(2)


def _has_8_bits(image: Tensor) -> bool:
    """Whether an image in [0, 1] holds whole 255ths alone."""
    levels = 255 * image
    return bool((levels - levels.round()).abs().max() < 1e-3)


def decibels(difference: Tensor) -> float | None:
    """Peak signal-to-noise ratio of a difference of intensities in [0, 1]; None where there is none."""
    error = float(difference.square().mean(dtype=torch.float64))
    return round(-10 * math.log10(error), 2) if error > 0 else None


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _small(result: Tensor, low: Tensor) -> Tensor:
    return torch.cat([band for _, band in bicubic_bands(result, _size(low))], dim=-2)
