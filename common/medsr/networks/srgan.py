"""SRGAN: a residual generator with batch normalisation, SRResNet, and the discriminator that it is trained against.

Papers:
    SRGAN and SRResNet: CVPR 2017, arXiv 1609.04802, doi:10.1109/CVPR.2017.19.
Code: written from the paper. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from medsr.errors import SettingError
from medsr.networks.blocks import convolve_exactly
from medsr.networks.interpolation import linear_subpixel_kernels
from medsr.settings import as_whole, as_wholes

__all__ = ["SRGANDiscriminator", "SRResNet"]

_SLOPE = 0.2
"""Negative slope of the discriminator's leaky ReLUs."""


class SRResNet(nn.Module):
    """Enlarges an image by residual blocks on the coarse grid and sub-pixel convolutions, the generator of SRGAN.

    A 9 x 9 convolution with PReLU; residual blocks of convolution, batch norm, PReLU, convolution, batch norm; one
    more convolution with batch norm, and a skip around all of them; a sub-pixel convolution with PReLU per doubling,
    or a single one for x3; a 9 x 9 convolution to the image. The paper has 16 blocks; a widely used light form, that
    of the study that this package follows up, has 5. Layers start with PyTorch's initialisation: the paper names no
    other, and ICNR, which starts sub-pixel convolutions without a checkerboard, is younger.

    The paper's generator ends in tanh for images in [-1, 1]. Here images are in [0, 1]: ``output="linear"`` leaves
    the last convolution as it is, as SRResNet and most successors do, and ``"tanh01"`` maps it by (tanh + 1) / 2, as
    the light form does.

    For inference batch normalisation must be in evaluation mode; in training mode the result depends on the rest of
    the image and of the batch, and tiles would show.

    MONAI's blocks were considered: ``SubpixelUpsample`` averages over a zero-padded border unless told otherwise;
    ``ResidualUnit`` has the activation after the skip's convolution rather than between the two.

    Args:
        scale: enlargement, 3 or a power of two.
        channels: channels of image and result, 1 (grey) or 3 (red, green, blue).
        blocks: number of residual blocks.
        features: width of the network.
        prelu: ``shared``, one slope per layer, or ``channel``, one per channel.
        output: ``linear`` or ``tanh01``, see above.
        interpolation_start: start as linear interpolation, which the published architecture with a linear output can
            express, instead of at random. A short training then learns detail from its first step.

    Shape:
        ``(B, channels, H, W)``, intensities in [0, 1], to ``(B, channels, scale * H, scale * W)``; any size. Nothing
        is clamped.

    Raises:
        SettingError: for another scale, or an unknown word.

    Example:
        >>> import torch
        >>> net = SRResNet(scale=3, channels=1, blocks=2, features=8).eval()
        >>> net(torch.rand(1, 1, 10, 7)).shape
        torch.Size([1, 1, 30, 21])
        >>> net.exact_halo
        12

    Reference:
        doi:10.1109/CVPR.2017.19
    """

    size_multiple = 1

    grey_from_colour = True
    """Its weights for colour are a start for grey images, see :func:`~medsr.networks.checkpoints.as_grey`."""

    half_precision_safe = True
    """bfloat16 is safe; the last convolution stays in float32. float16 is not tested."""

    def __init__(
        self,
        scale: int = 4,
        channels: int = 3,
        *,
        blocks: int = 16,
        features: int = 64,
        prelu: str = "shared",
        output: str = "linear",
        interpolation_start: bool = False,
    ) -> None:
        super().__init__()
        self.scale = as_whole("scale", scale)
        doublings = self.scale.bit_length() - 1
        if self.scale < 2 or self.scale not in (3, 2**doublings):
            raise SettingError(f"scale must be 3 or a power of two, such as 2, 4 or 8, got {scale}")
        if prelu not in ("shared", "channel"):
            raise SettingError(f"prelu must be 'shared' or 'channel', got '{prelu}'")
        if output not in ("linear", "tanh01"):
            raise SettingError(f"output must be 'linear' or 'tanh01', got '{output}'")
        if interpolation_start and output != "linear":
            raise SettingError(
                "a network with output 'tanh01' cannot start as interpolation; set output to 'linear'"
            )
        channels, features = as_wholes(1, channels=channels, features=features)
        blocks = as_whole("blocks", blocks, 0)
        self.in_channels, self.output = channels, output
        # Head 4, two per block, tail 1. Behind them, at every scale, 3: the last convolution sees four fine pixels
        # further, which lie in two coarse ones at most; each sub-pixel convolution adds one pixel of its own grid,
        # which the doublings halve, so that the first of them sees the third coarse pixel and no more.
        self.exact_halo = 4 + 2 * blocks + 1 + 3
        slopes = features if prelu == "channel" else 1
        self.head = nn.Sequential(nn.Conv2d(channels, features, 9, padding=4), nn.PReLU(slopes))
        self.blocks = nn.Sequential(*(_ResidualBlock(features, slopes) for _ in range(blocks)))
        self.tail = nn.Sequential(nn.Conv2d(features, features, 3, padding=1), nn.BatchNorm2d(features))
        self.upsample = nn.Sequential()
        for factor in [3] if self.scale == 3 else [2] * doublings:
            self.upsample.append(nn.Conv2d(features, factor**2 * features, 3, padding=1))
            self.upsample.append(nn.PixelShuffle(factor))
            self.upsample.append(nn.PReLU(slopes))
        self.out = nn.Conv2d(features, channels, 9, padding=4)
        if interpolation_start:
            self._start_as_interpolation()

    @torch.no_grad()
    def _start_as_interpolation(self) -> None:
        """Carry the image through the first features; what the blocks and the other features know starts unheard.

        The rectifiers let it pass, because intensities are not negative.
        """
        channels = self.in_channels
        nn.init.dirac_(self.head[0].weight[:channels])
        for silent in (self.head[0].bias[:channels], *self.tail[1].parameters(), self.out.bias):
            nn.init.zeros_(silent)
        for conv, shuffle in pairwise(self.upsample):
            if isinstance(shuffle, nn.PixelShuffle):
                factor = shuffle.upscale_factor
                for channel, weight in enumerate(conv.weight.unflatten(0, (-1, factor**2))[:channels]):
                    weight.zero_()
                    weight[:, channel] = linear_subpixel_kernels(factor)
                nn.init.zeros_(conv.bias[: channels * factor**2])
        nn.init.dirac_(self.out.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge an image."""
        head = self.head(image)
        result = convolve_exactly(self.out, self.upsample(self.tail(self.blocks(head)) + head))
        return (result.tanh() + 1) / 2 if self.output == "tanh01" else result


class _ResidualBlock(nn.Sequential):
    """Two normalised 3 x 3 convolutions with a PReLU between, on a skip."""

    def __init__(self, features: int, slopes: int) -> None:
        super().__init__(
            nn.Conv2d(features, features, 3, padding=1),
            nn.BatchNorm2d(features),
            nn.PReLU(slopes),
            nn.Conv2d(features, features, 3, padding=1),
            nn.BatchNorm2d(features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class SRGANDiscriminator(nn.Module):
    """Tells true images from generated ones by eight convolutions, every other one with stride 2.

    All but the first have batch normalisation, all a leaky ReLU. Then a hidden layer and a verdict: over the whole
    last map, for images of one size (``dense``, the paper), or over its mean, for images of any size (``pooled``,
    which goes with the 5-block generator). The result is a logit; the paper's sigmoid belongs to the loss, which is
    not exact on probabilities near 0 and 1. Used with
    :class:`~medsr.engines.adversarial.AdversarialSRTrainer`.

    ``monai.networks.nets.Discriminator`` has a fixed input size, no hidden layer and ends in a sigmoid;
    ``PatchDiscriminator`` judges patches.

    Args:
        channels: channels of the images.
        head: ``pooled`` or ``dense``.
        size: side of the images in pixels, at least 16; for ``dense`` only.
        features: width at full resolution; the deepest maps have eight times as many channels.

    Shape:
        ``(B, channels, H, W)``, intensities in [0, 1], of at least 32 pixels, ``size`` x ``size`` for ``dense``, to
        ``(B, 1)``.

    Raises:
        SettingError: for an unknown head, a size below 16, or images of another size than that of a dense head.

    Example:
        >>> import torch
        >>> SRGANDiscriminator(features=8)(torch.rand(2, 3, 32, 40)).shape
        torch.Size([2, 1])

    Reference:
        doi:10.1109/CVPR.2017.19
    """

    def __init__(
        self, channels: int = 3, *, head: str = "pooled", size: int = 96, features: int = 64
    ) -> None:
        super().__init__()
        if head not in ("pooled", "dense"):
            raise SettingError(f"head must be 'pooled' or 'dense', got '{head}'")
        size = as_whole("size", size, 16)
        channels, features = as_wholes(1, channels=channels, features=features)
        self.size = size if head == "dense" else None
        widths = [features * times for times in (1, 1, 2, 2, 4, 4, 8, 8)]
        self.body = nn.Sequential(nn.Conv2d(channels, features, 3, padding=1), nn.LeakyReLU(_SLOPE, True))
        for index, (before, after) in enumerate(pairwise(widths)):
            self.body.append(nn.Conv2d(before, after, 3, stride=2 - index % 2, padding=1))
            self.body.append(nn.BatchNorm2d(after))
            self.body.append(nn.LeakyReLU(_SLOPE, True))
        # Four strides: what is left of an odd size is rounded up each time.
        seen = widths[-1] * (1 if self.size is None else (-(-self.size // 16)) ** 2)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1) if self.size is None else nn.Identity(),
            nn.Flatten(),
            nn.Linear(seen, 16 * features),
            nn.LeakyReLU(_SLOPE, True),
            nn.Linear(16 * features, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits, one per image; larger is more likely true."""
        if self.size is not None and tuple(image.shape[-2:]) != (self.size, self.size):
            raise SettingError(
                f"the dense head judges images of {self.size} x {self.size} pixels, got {image.shape[-2]} x "
                f"{image.shape[-1]}: set size, or use head='pooled'"
            )
        return self.head(self.body(image))
