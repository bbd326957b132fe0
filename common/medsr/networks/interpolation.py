"""Interpolation inside networks: as a layer, and as the kernels that a sub-pixel convolution can start from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.resampling import keys_matrix
from medsr.settings import as_whole

__all__ = ["BicubicUpsample", "linear_subpixel_kernels"]

_REACH = 2
"""Pixels on either side that a new pixel may be made of; those on one half of the old pixel see one less."""


class BicubicUpsample(nn.Module):
    """Enlarges an image by a whole number as MATLAB's ``imresize(..., "bicubic")`` does.

    That is the interpolation of the super-resolution benchmarks: Keys' kernel with a = -0.5, half-pixel centres,
    edges mirrored with the edge pixel repeated; the same as :func:`medsr.resampling.antialiased_bicubic_matrix`
    along both axes. With a whole factor every old pixel gives ``scale`` new ones along an axis, each with weights of
    its own that are the same everywhere. So the result is sums of shifted images, interleaved: no matrix per size,
    one graph for all sizes in an export.

    It has no parameters and no buffers, so that the weights of a network with this layer fit every scale. Neither
    autocast nor the TF32 of convolutions on graphics cards touches it: it is float32 at least.

    ``monai.networks.blocks.UpSample(mode="nontrainable", interp_mode="bicubic")`` and
    ``torch.nn.functional.interpolate`` were considered: they use a = -0.75, and repeat the edge pixel further out.
    ``interpolate(antialias=True)`` has the kernel, but cuts it off at the edges, and cannot be exported to ONNX.

    Args:
        scale: enlargement, a whole number of at least 2.

    Shape:
        ``(B, C, H, W)`` to ``(B, C, scale * H, scale * W)``; any size.

    Raises:
        SettingError: for another scale.

    Example:
        >>> upsample = BicubicUpsample(2)
        >>> upsample(torch.tensor([[[[0.0, 1.0]]]])).squeeze()[0]
        tensor([-0.0938,  0.2031,  0.7969,  1.0938])

    Reference:
        R. Keys, IEEE Trans. ASSP 29 (1981) 1153-1160, doi:10.1109/TASSP.1981.1163711
    """

    def __init__(self, scale: int = 4) -> None:
        super().__init__()
        self.scale = as_whole("scale", scale, 2)
        centres = _REACH + (np.arange(self.scale) + 0.5) / self.scale - 0.5
        # Per new pixel of an old one: which shifted images it is made of, and how much of each.
        self._taps = [
            [(shift, float(weight)) for shift, weight in enumerate(row) if weight]
            for row in keys_matrix(2 * _REACH + 1, centres)
        ]

    def halo(self, radius: int) -> int:
        """Pixels around a tile that make exact what sees ``radius`` new pixels around each pixel of the result.

        The centre of the outermost new pixel that is seen lies ``(radius - 0.5) / scale + 0.5`` old pixels before
        that of the tile's first pixel; it is made of the old pixels next to it on either side and one more. Those
        further inside need no more.

        Args:
            radius: in pixels of the enlarged image.
        """
        return 1 - (1 - 2 * radius - self.scale) // (2 * self.scale)

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge an image; the result is float32, or float64 if the image is."""
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        return self._along(self._along(image, 2), 3)

    def _along(self, image: Tensor, axis: int) -> Tensor:
        size, mirrored = image.shape[axis], _mirrored(image, axis)
        parts = []
        for (shift, weight), *others in self._taps:
            part = mirrored.narrow(axis, shift, size) * weight
            for shift, weight in others:
                part = part.add(mirrored.narrow(axis, shift, size), alpha=weight)
            parts.append(part)
        return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


def _mirrored(image: Tensor, axis: int) -> Tensor:
    """The image with two more pixels at both ends of an axis, mirrored with the edge pixel repeated.

    PyTorch's ``reflect`` does not repeat the edge pixel and refuses small images. The first pixel beyond the edge is
    the edge pixel; the second is the third from there, also in an image of one pixel.
    """
    once = F.pad(image, (0, 0, 1, 1) if axis == 2 else (1, 1, 0, 0), mode="replicate")
    return torch.cat([once.narrow(axis, 2, 1), once, once.narrow(axis, -3, 1)], axis)


def linear_subpixel_kernels(scale: int) -> Tensor:
    """Linear interpolation as the 3 x 3 kernels of a sub-pixel convolution, ``(scale ** 2, 3, 3)``.

    They stand in the order of :class:`torch.nn.PixelShuffle`. A 3 x 3 kernel has no room for bicubic interpolation.

    Args:
        scale: enlargement, a whole number.

    Example:
        >>> linear_subpixel_kernels(2)[0]
        tensor([[0.0625, 0.1875, 0.0000],
                [0.1875, 0.5625, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    offset = (torch.arange(scale) + 0.5) / scale - 0.5
    taps = torch.stack([(-offset).clamp(min=0), 1 - offset.abs(), offset.clamp(min=0)], 1)
    return torch.einsum("iy,jx->ijyx", taps, taps).flatten(0, 1)
