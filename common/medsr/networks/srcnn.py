"""SRCNN: three convolutions on the bicubic enlargement, the first network for super-resolution, as a baseline.

Papers:
    SRCNN: IEEE TPAMI 38 (2016) 295-307, arXiv 1501.00092, doi:10.1109/TPAMI.2015.2439281.
Code: written from the paper. Weights: none shipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medsr.errors import SettingError
from medsr.networks.interpolation import BicubicUpsample

__all__ = ["SRCNN"]

_WIDTHS = (64, 32)
"""Channels of the patches and of their non-linear mapping."""


class SRCNN(nn.Module):
    """Maps the bicubic enlargement of an image to a sharper one by three convolutions: extract, map, reconstruct.

    The enlargement is part of the network: input is the coarse image. No weight depends on the scale, so the state
    dict tells which one it is for (``trained_scale``). The paper's convolutions lose their border; zero padding keeps
    the size here, and a border of ``sum(k // 2)`` pixels, 6 for 9-1-5, is worse than the rest. MONAI has no such
    network, and its ``UpSample`` another bicubic kernel.

    The weights start with PyTorch's initialisation. With the paper's standard deviation of 0.001 the gradients start
    near nothing: on drawn shapes it was 3 dB behind after 400 iterations of Adam.

    Args:
        scale: enlargement, a whole number of at least 2.
        channels: channels of image and result, 1 (grey) or 3 (red, green, blue).
        kernels: sides of the three kernels; the paper has 9-1-5, 9-3-5 and 9-5-5.

    Shape:
        ``(B, channels, H, W)``, intensities in [0, 1], to ``(B, channels, scale * H, scale * W)``; any size. Nothing
        is clamped.

    Raises:
        SettingError: for a scale that is no whole number of at least 2, or kernels that are not three odd numbers.

    Example:
        >>> import torch
        >>> net = SRCNN(scale=2, channels=1)
        >>> sum(p.numel() for p in net.parameters())
        8129
        >>> net(torch.rand(1, 1, 10, 7)).shape
        torch.Size([1, 1, 20, 14])

    Reference:
        doi:10.1109/TPAMI.2015.2439281
    """

    size_multiple = 1

    told_tensors = ("trained_scale",)
    """What the weights say of themselves, see :func:`medsr.engines.weight_files.check_weights`."""

    half_precision_safe = False
    """No skip carries the image past the convolutions: bfloat16 would round the intensities themselves, by up to
    half a grey level of 256."""

    def __init__(self, scale: int = 4, channels: int = 3, *, kernels: Sequence[int] = (9, 1, 5)) -> None:
        super().__init__()
        if len(kernels) != 3 or any(k < 1 or k % 2 == 0 for k in kernels):
            raise SettingError(f"kernels must be three odd numbers, such as 9, 1, 5, got {list(kernels)}")
        self.upsample = BicubicUpsample(scale)
        self.scale, self.in_channels = self.upsample.scale, int(channels)
        self.register_buffer("trained_scale", torch.tensor(self.scale))
        self.exact_halo = self.upsample.halo(sum(k // 2 for k in kernels))
        widths = (channels, *_WIDTHS, channels)
        self.extract, self.map, self.reconstruct = (
            nn.Conv2d(before, after, k, padding=k // 2)
            for before, after, k in zip(widths[:-1], widths[1:], kernels, strict=True)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge an image."""
        patches = self.extract(self.upsample(image)).relu_()
        return self.reconstruct(self.map(patches).relu_())
