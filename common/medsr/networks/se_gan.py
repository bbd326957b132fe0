"""Super-resolution of photographs by a gated residual network, and the discriminator that is trained against it.

Papers:
    Medical image super resolution with improved squeeze-and-excitation blocks in a GAN: IEEE Access 7 (2019),
    doi:10.1109/ACCESS.2019.2944862. The layout follows it; what it leaves open is chosen here and said so.
    Squeeze-and-excitation: arXiv 1709.01507. EDSR (residual blocks without normalisation): arXiv 1707.02921.
    ICNR (sub-pixel convolutions that start without a checkerboard): arXiv 1707.02937.
Code: written from the papers. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from medsr.errors import SettingError
from medsr.networks.blocks import border_sides, channel_means, convolve_exactly
from medsr.networks.interpolation import BicubicUpsample
from medsr.settings import as_whole, as_wholes

__all__ = ["FusionDiscriminator", "ImprovedSE", "SEGenerator"]

_GAIN, _EXCITED, _SQUEEZED = 2.0, 0.8, 0.2
"""Gain of the gate, and the shares of the excitation and of the squeezed means themselves in it."""

_SLOPE = 0.2
"""Negative slope of the discriminator's leaky ReLUs."""

_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)


class ImprovedSE(nn.Module):
    """Scales each channel by ``2 (0.8 sigmoid(W2 relu(W1 y)) + 0.2 sigmoid(y))``, with the channel means ``y``.

    To the classic excitation a second path is added that needs no parameters: the mean of a channel reaches its own
    gate directly. The gain of 2 lets a gate amplify as well as damp, and makes it 1 where both paths are neutral.
    MONAI's ``ChannelSELayer`` has the first path alone, and cannot be given means from elsewhere.

    Args:
        channels: number of channels.
        reduction: ``channels`` divided by the width between the two layers, which is 1 at least.

    Shape:
        ``(B, channels, H, W)`` to the same.

    Example:
        >>> gate = ImprovedSE(64)
        >>> sum(p.numel() for p in gate.parameters())
        580
        >>> gate(torch.zeros(1, 64, 5, 7)).shape
        torch.Size([1, 64, 5, 7])

    Reference:
        doi:10.1109/ACCESS.2019.2944862; arXiv 1709.01507
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // as_whole("reduction", reduction, 1))
        self.reduce, self.expand = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor, mean: Tensor | None = None) -> Tensor:
        """Scale ``x`` by the gates of its own channel means, or of ``mean`` ``(B or 1, channels)``."""
        return x * self.gate(x, mean)

    def gate(self, x: Tensor, mean: Tensor | None = None) -> Tensor:
        """Scales ``(B or 1, channels, 1, 1)`` in the data type of ``x``; arguments as for ``forward``."""
        mean = channel_means(x) if mean is None else mean
        excited = self.expand(F.relu(self.reduce(mean.to(self.reduce.weight.dtype))))
        scale = _GAIN * (_EXCITED * excited.sigmoid() + _SQUEEZED * mean.sigmoid())
        return scale.to(x.dtype)[..., None, None]


class SEGenerator(nn.Module):
    """Enlarges an image 2, 4, 8 or 16 times by a gated residual network.

    A head, residual blocks without normalisation (3 x 3 convolution, ReLU, 3 x 3 convolution, gate), a skip around
    them, and one sub-pixel convolution with a gate per doubling. Nothing is clamped, and by default no interpolation
    is added: this is the published form. The convolution after the residual blocks is EDSR's; the publication does
    not show it.

    The gates look at the whole image, so no halo makes tiles equal to it. :meth:`squeeze` measures what the gates
    of a tile would see and ``forward`` takes it as ``statistics``: with those of the whole image, tiles with a halo
    of ``gated_halo`` pixels are exact. Gates depend on earlier gates, so the statistics of an image that is only
    seen in tiles are found by repeating :meth:`squeeze` with the last statistics until they no longer change.

    MONAI's blocks were considered: ``SubpixelUpsample`` averages over a zero-padded border unless told otherwise and
    has no gate; ``SEBlock`` is a bottleneck with the classic excitation.

    Args:
        scale: enlargement, a power of two.
        channels: channels of image and result, 1 (grey) or 3 (red, green, blue).
        features: width of the network.
        blocks: number of residual blocks.
        reduction: see :class:`ImprovedSE`.
        body_tail: whether a convolution follows the residual blocks.
        image_skip: add the bicubic enlargement of the image, and start as that. Without, as published, thousands of
            iterations go into learning to interpolate before anything is gained.

    Shape:
        ``(B, channels, H, W)``, intensities in [0, 1], to ``(B, channels, scale * H, scale * W)``; any size.

    Raises:
        SettingError: for a scale that is no power of two, or statistics that do not fit.

    Example:
        >>> net = SEGenerator(scale=4, features=8, blocks=2)
        >>> image = torch.rand(1, 3, 10, 7)
        >>> net(image).shape
        torch.Size([1, 3, 40, 28])
        >>> torch.equal(net(image, net.squeeze(image)), net(image))
        True

    Reference:
        doi:10.1109/ACCESS.2019.2944862; arXiv 1707.02921
    """

    size_multiple = 1

    grey_from_colour = True
    """Its weights for colour are a start for grey images, see :func:`~medsr.networks.checkpoints.as_grey`."""

    exact_halo = None
    """No finite halo makes tiling exact: the gates look at the whole image. See ``gated_halo``."""

    half_precision_safe = True
    """bfloat16 is safe; the last convolution stays in float32. float16 is not tested."""

    def __init__(
        self,
        scale: int = 4,
        channels: int = 3,
        *,
        features: int = 64,
        blocks: int = 16,
        reduction: int = 16,
        body_tail: bool = True,
        image_skip: bool = False,
    ) -> None:
        super().__init__()
        self.scale = as_whole("scale", scale)
        doublings = self.scale.bit_length() - 1
        if self.scale < 2 or self.scale != 2**doublings:
            raise SettingError(f"scale must be a power of two, such as 2, 4, 8 or 16, got {scale}")
        channels, features, blocks = as_wholes(1, channels=channels, features=features, blocks=blocks)
        self.in_channels, self.features = channels, features
        # One pixel per 3 x 3 convolution; those behind the first doubling reach less than one pixel together, and
        # the last pixel that they touch has to be there in full.
        self.gated_halo = 1 + 2 * blocks + int(body_tail) + 2
        self.head = nn.Conv2d(channels, features, 3, padding=1)
        self.head_se = ImprovedSE(features, reduction)
        self.blocks = nn.ModuleList(_ResidualBlock(features, reduction) for _ in range(blocks))
        self.body_tail = nn.Conv2d(features, features, 3, padding=1) if body_tail else nn.Identity()
        self.doublings = nn.ModuleList(_Doubling(features, reduction) for _ in range(doublings))
        # PyTorch's initialisation starts near zero as it is; a weaker start here made training no faster.
        self.out = nn.Conv2d(features, channels, 3, padding=1)
        self.image_skip = BicubicUpsample(self.scale) if image_skip else None
        if image_skip:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, image: Tensor, statistics: Sequence[Tensor] | None = None) -> Tensor:
        """Enlarge an image.

        Args:
            image: the image.
            statistics: what :meth:`squeeze` returns, ``(B, features)`` or ``(1, features)`` per gate; default the
                image's own.
        """
        if statistics is None:
            features = self._features(image, channel_means)
        else:
            given = iter(self._checked(statistics, len(image)))
            features = self._features(image, lambda _: next(given))
        result = convolve_exactly(self.out, features)
        return result if self.image_skip is None else result + self.image_skip(image)

    def squeeze(
        self,
        image: Tensor,
        statistics: Sequence[Tensor] | None = None,
        *,
        border: int | Sequence[int] = 0,
    ) -> list[Tensor]:
        """Channel means that the gates see, ``(B, features)`` each, in forward order and at least float32.

        Args:
            image: the image, or a tile of it with its halo.
            statistics: what the gates use meanwhile; default the means that are returned.
            border: pixels of ``image`` that the means leave out at each side: one number, or top, bottom, left and
                right. A tile at the edge of an image has no halo there.

        Raises:
            SettingError: if no pixel is left, or the statistics do not fit.
        """
        height, width = image.shape[-2:]
        top, bottom, left, right = border_sides(border, (height, width))
        given = None if statistics is None else iter(self._checked(statistics, len(image)))
        found: list[Tensor] = []

        def means(features: Tensor) -> Tensor:
            factor = features.shape[-2] // height
            rows = slice(top * factor, (height - bottom) * factor)
            columns = slice(left * factor, (width - right) * factor)
            found.append(channel_means(features[..., rows, columns]))
            return found[-1] if given is None else next(given)

        self._features(image, means)
        return found

    def _features(self, image: Tensor, means: Callable[[Tensor], Tensor]) -> Tensor:
        """What the last convolution reads; ``means`` gives each gate its channel means."""
        head = self.head(image)
        head = self.head_se(head, means(head))
        features = head
        for block in self.blocks:
            features = block(features, means)
        features = self.body_tail(features) + head
        for doubling in self.doublings:
            features = doubling(features, means)
        return features

    def _checked(self, statistics: Sequence[Tensor], batch: int) -> Sequence[Tensor]:
        expected = 1 + len(self.blocks) + len(self.doublings)
        shapes = sorted({tuple(one.shape) for one in statistics})
        if len(statistics) != expected or not set(shapes) <= {(1, self.features), (batch, self.features)}:
            raise SettingError(
                f"statistics must hold {expected} tensors ({batch}, {self.features}), got {len(statistics)} of {shapes}"
            )
        return statistics


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a ReLU between, gated, on a skip."""

    rectified_convolutions = ("conv1", "conv2")

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.se = ImprovedSE(features, reduction)

    def forward(self, x: Tensor, means: Callable[[Tensor], Tensor]) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x), inplace=True))
        # Gate and skip in one pass over the memory.
        return torch.addcmul(x, y, self.se.gate(y, means(y)))


class _Doubling(nn.Module):
    """Sub-pixel convolution by 2, then a gate.

    It starts as nearest-neighbour enlargement (ICNR): the four pixels of a square have equal weights, so the result
    has no checkerboard that would have to be unlearned. MONAI's ``icnr_init`` expects another order of the channels
    and leaves the bias random, which brings the checkerboard back.
    """

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features, 4 * features, 3, padding=1)
        self.se = ImprovedSE(features, reduction)
        with torch.no_grad():
            self.conv.weight.copy_(self.conv.weight[:features].repeat(4, 1, 1, 1))
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, means: Callable[[Tensor], Tensor]) -> Tensor:
        x = _shuffled(self.conv(x))
        return self.se(x, means(x))


class FusionDiscriminator(nn.Module):
    """Tells true images from generated ones, by the maps of its last three blocks together.

    Eight gated convolutions, every other one with stride 2, go from fine to coarse. The sixth to eighth map are
    brought to one size and fused, so that the verdict rests on textures of more than one size. The result is a
    logit: relativistic losses compare logits, a sigmoid is for reports only.

    Normalisation is off unless asked for: batch normalisation makes images of a batch depend on each other, which
    relativistic losses with small batches do not bear well. Without it the weights must keep the variance from layer
    to layer (He's initialisation): PyTorch's default would start with logits that do not depend on the image.
    MONAI's ``Discriminator`` has a fixed input size and ends in a sigmoid; ``PatchDiscriminator`` judges patches.

    Args:
        channels: channels of the images.
        features: width at full resolution; the deepest maps have eight times as many channels.
        reduction: see :class:`ImprovedSE`.
        norm: ``none``, ``batch`` or ``spectral``, in the eight blocks.

    Shape:
        ``(B, channels, H, W)``, intensities in [0, 1], of at least 32 pixels, to ``(B, 1)``.

    Raises:
        SettingError: for an unknown norm.

    Example:
        >>> FusionDiscriminator(features=8)(torch.rand(2, 3, 32, 40)).shape
        torch.Size([2, 1])

    Reference:
        doi:10.1109/ACCESS.2019.2944862; spectral normalisation: arXiv 1802.05957
    """

    def __init__(
        self, channels: int = 3, *, features: int = 64, reduction: int = 16, norm: str = "none"
    ) -> None:
        super().__init__()
        if norm not in ("none", "batch", "spectral"):
            raise SettingError(f"norm must be 'none', 'batch' or 'spectral', got '{norm}'")
        widths = [features * times for times in (1, 1, 2, 2, 4, 4, 8, 8, 8)]
        self.head = _he(nn.Conv2d(channels, features, 3, padding=1))
        self.blocks = nn.ModuleList(
            _ConvSE(before, after, stride=2 - index % 2, reduction=reduction, norm=norm)
            for index, (before, after) in enumerate(pairwise(widths))
        )
        self.fuse = _he(nn.Conv2d(sum(widths[-3:]), widths[-1], 1))
        self.hidden, self.verdict = (
            _he(nn.Linear(widths[-1], 2 * widths[-1])),
            _he(nn.Linear(2 * widths[-1], 1)),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits, one per image; larger is more likely true."""
        x = F.leaky_relu(self.head(image), _SLOPE)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        # The windows of this pooling lie where the strided convolution looks, for odd sizes too.
        finer = F.avg_pool2d(maps[-3], 2, ceil_mode=True)
        fused = F.leaky_relu(self.fuse(torch.cat([finer, *maps[-2:]], dim=1)), _SLOPE)
        return self.verdict(F.leaky_relu(self.hidden(fused.mean(dim=(2, 3))), _SLOPE))


class _ConvSE(nn.Module):
    """3 x 3 convolution, norm, leaky ReLU and gate."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, reduction: int, norm: str) -> None:
        super().__init__()
        conv = _he(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1))
        self.conv = spectral_norm(conv) if norm == "spectral" else conv
        self.norm = nn.BatchNorm2d(outputs) if norm == "batch" else nn.Identity()
        self.se = ImprovedSE(outputs, reduction)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(F.leaky_relu(self.norm(self.conv(x)), _SLOPE))


def _he(layer: _Layer) -> _Layer:
    """The layer, with weights that keep the variance before a leaky ReLU, and no bias."""
    nn.init.kaiming_normal_(layer.weight, a=_SLOPE)
    nn.init.zeros_(layer.bias)
    return layer


def _shuffled(x: Tensor) -> Tensor:
    """Spread four groups of channels over the pixels of 2 x 2 squares, ``(B, 4C, H, W)`` to ``(B, C, 2H, 2W)``.

    ``nn.PixelShuffle`` has the four values of a channel side by side. Here the four groups are: in channels-last
    memory that moves whole runs of ``2C`` numbers, twice as fast in bfloat16. The result is channels-last always.
    """
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch, height, width, 2, channels // 2).transpose(2, 3)
    return rows.reshape(batch, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)
