"""VDSR: a deep residual on the bicubic enlargement, the classic single-image super-resolution network.

Papers:
    VDSR: CVPR 2016, arXiv 1511.04587, doi:10.1109/CVPR.2016.182.
    Initialisation: He et al., arXiv 1502.01852.
Code: written from the papers. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsr.networks.interpolation import BicubicUpsample
from medsr.settings import as_whole, as_wholes

__all__ = ["VDSR"]

_SPREAD_ABOUT_IDENTITY = 0.3
"""Of weights that start near the identity, relative to He's: activations keep their spread through twenty layers."""


class VDSR(nn.Module):
    """Adds to the bicubic enlargement of an image what twenty convolutions on the fine grid find missing.

    All convolutions are 3 x 3 with zero padding and, but for the last, a ReLU. The enlargement is part of the
    network: input is the coarse image. No weight depends on the scale, so the state dict tells which one it is for
    (``trained_scale``): at another one the result is worse than interpolation. Weights start as in the paper, from a
    normal distribution that keeps the variance before a ReLU.

    Everything runs on the fine grid, which makes it costly: 667,000 multiplications per pixel of the result, and 512
    bytes of features. MONAI has no such network, and its ``UpSample`` another bicubic kernel.

    Args:
        scale: enlargement, a whole number of at least 2.
        channels: channels of image and result, 1 (grey) or 3 (red, green, blue).
        bias: whether the convolutions have a bias; the published size is that without.
        layers: number of convolutions.
        features: width of the network.
        interpolation_start: start as bicubic enlargement, with a last convolution of zeros, instead of as in the paper.
            Convolutions start blind to constants, as a residual is, and those between first and last near the
            identity. On the paper's start half of the rectifiers of the middle layers die in the first minutes.

    Shape:
        ``(B, channels, H, W)``, intensities in [0, 1], to ``(B, channels, scale * H, scale * W)``; any size. Nothing
        is clamped.

    Raises:
        SettingError: for a scale that is no whole number of at least 2, fewer than two layers, or no features.

    Example:
        >>> import torch
        >>> net = VDSR(scale=3, channels=1, layers=4, features=8)
        >>> net(torch.rand(1, 1, 10, 7)).shape
        torch.Size([1, 1, 30, 21])
        >>> net.exact_halo
        3

    Reference:
        doi:10.1109/CVPR.2016.182
    """

    size_multiple = 1

    grey_from_colour = True
    """Its weights for colour are a start for grey images, see :func:`~medsr.networks.checkpoints.as_grey`."""

    told_tensors = ("trained_scale",)
    """What the weights say of themselves, see :func:`medsr.engines.weight_files.check_weights`."""

    half_precision_safe = True
    """bfloat16 touches the residual only; the enlargement and the sum stay in float32. float16 is not tested."""

    def __init__(
        self,
        scale: int = 4,
        channels: int = 3,
        *,
        bias: bool = False,
        layers: int = 20,
        features: int = 64,
        interpolation_start: bool = False,
    ) -> None:
        super().__init__()
        layers = as_whole("layers", layers, 2)
        channels, features = as_wholes(1, channels=channels, features=features)
        self.upsample = BicubicUpsample(scale)
        self.scale, self.in_channels = self.upsample.scale, channels
        self.register_buffer("trained_scale", torch.tensor(self.scale))
        # One pixel of the fine grid per convolution.
        self.exact_halo = self.upsample.halo(layers)
        self.body = nn.Sequential()
        for layer in range(layers - 1):
            self.body.append(nn.Conv2d(features if layer else channels, features, 3, padding=1, bias=bias))
            self.body.append(nn.ReLU(inplace=True))
        self.body.append(nn.Conv2d(features, channels, 3, padding=1, bias=bias))
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=(2 / (9 * features)) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if interpolation_start:
            self._start_as_interpolation()

    def _start_as_interpolation(self) -> None:
        first, *between, last = (module for module in self.body if isinstance(module, nn.Conv2d))
        with torch.no_grad():
            for conv in (first, *between):
                conv.weight -= conv.weight.mean(dim=(1, 2, 3), keepdim=True)
            for conv in between:
                identity = nn.init.dirac_(torch.empty_like(conv.weight))
                conv.weight.mul_(_SPREAD_ABOUT_IDENTITY).add_(identity)
        nn.init.zeros_(last.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge an image."""
        enlarged = self.upsample(image)
        return enlarged + self.body(enlarged.to(image.dtype))
