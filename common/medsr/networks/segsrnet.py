"""Super-resolution of stereo-endoscopic pairs: dense residual blocks, attention, and exchange between the views.

Papers:
    SEGSRNet: arXiv 2404.13330. It names its blocks and leaves most numbers open; those are chosen here and said so.
    iPASSR (extractor, exchange and reconstruction): CVPR Workshops (NTIRE) 2021, arXiv 2011.03802.
    CBAM (channel, then spatial attention): ECCV 2018, arXiv 1807.06521. ASPP: arXiv 1606.00915.
Code: written from the papers. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.networks.blocks import border_sides, channel_means, convolve_exactly
from medsr.networks.interpolation import BicubicUpsample
from medsr.networks.parallax import (
    BiPAM,
    ParallaxResult,
    StereoPrediction,
    by_view,
    checked_pair,
    side_by_side,
    wanted_of,
)
from medsr.settings import as_whole, as_whole_list, as_wholes

__all__ = ["SEGSRNet", "ipassr"]

_SLOPE = 0.1
"""Negative slope of all leaky ReLUs."""

_LAYERS = 4
"""Convolutions of a dense block before its 1 x 1 fusion."""

_SKIPS = ("matlab", "pytorch")

_Means = Callable[[Tensor], Tensor]


class SEGSRNet(nn.Module):
    """Enlarges both views of a rectified stereo pair, each with the help of the other.

    One extractor serves both views: a convolution; combined channel and spatial attention (CCSB); parallel dilated
    convolutions (ASPP); dense residual blocks, whose outputs are all fused. :class:`~medsr.networks.parallax.BiPAM`
    brings features of the other view. Both are fused by a dense block and a channel gate, refined by more dense
    blocks, and spread over the fine grid by one pixel shuffle. The result is added to the bicubic enlargement. Nothing
    is clamped.

    The publication leaves open what is inside CCSB (two convolutions, a channel gate and a spatial gate, on a skip),
    the rates of ASPP, and the width and number of the dense blocks; these are iPASSR's. Convolutions start with
    Xavier's weights, as published, and the last one with zeros, so that training starts from the bicubic image. Both
    views are compared by the same weights at first, see :meth:`~medsr.networks.parallax.BiPAM.match_from_the_start`.

    A pair is one tensor with six channels, left before right, as the MONAI tools need it. Where there is one camera,
    its image twice gives a pair without disparity. Pixels are matched along rows: pairs must be rectified.

    What tiling is exact: none across columns, as each pixel sees its whole row. Across rows, bands of full width are
    exact with ``gated_row_halo`` more rows on either side, if they are given the gate statistics of the whole image:
    see :meth:`squeeze`, as for :class:`~medsr.networks.se_gan.SEGenerator`.

    MONAI's blocks were considered: ``ChannelSELayer`` cannot be given means from elsewhere; ``SimpleASPP`` has no
    activation in its branches and no skip. MONAI has no stereo network.

    Args:
        scale: enlargement, a whole number of at least 2.
        channels: channels of one view, 1 (grey) or 3 (red, green, blue).
        features: width of the network.
        growth: channels that each layer of a dense block adds.
        fusion_growth: the same, in the block that fuses the views, which is twice as wide.
        blocks: dense blocks of the extractor, each a level of the exchange, and of the reconstruction.
        attention_blocks: number of CCSB.
        rates: dilations of the ASPP, in pixels; empty leaves it out.
        reduction: channels of a channel gate divided by its width.
        cross_view: exchange features; without, each view is enlarged on its own, for comparison.
        path: see :func:`~medsr.networks.parallax.parallax_attention`.
        tied: see :class:`~medsr.networks.parallax.BiPAM`.
        band: the same; in pixels of the coarse pair.
        skip: kernel of the enlargement that the result is added to: ``matlab``, that of the benchmarks, or
            ``pytorch``, that of iPASSR.

    Shape:
        ``(B, 2 * channels, H, W)``, intensities in [0, 1], to ``(B, 2 * channels, scale * H, scale * W)``; any size.

    Raises:
        SettingError: for an unknown word, or statistics that do not fit.
        DataError: for another number of channels.

    Example:
        >>> net = SEGSRNet(4, features=8, growth=4, blocks=2).eval()
        >>> net(torch.rand(1, 6, 10, 7)).shape
        torch.Size([1, 6, 40, 28])

    Reference:
        arXiv 2404.13330; arXiv 2011.03802
    """

    size_multiple = 1

    exact_halo = None
    """No finite halo makes tiling exact: pixels see their whole row, and the gates the whole image."""

    task_tensors = ("spread.weight", "spread.bias")
    """Their shape depends on the scale."""

    half_precision_safe = True
    """bfloat16 is safe; scores, masks and the last convolution stay in float32. float16 is not tested."""

    def __init__(
        self,
        scale: int = 4,
        channels: int = 3,
        *,
        features: int = 64,
        growth: int = 24,
        fusion_growth: int = 32,
        blocks: int = 4,
        attention_blocks: int = 1,
        rates: Sequence[int] = (1, 4, 8),
        reduction: int = 16,
        cross_view: bool = True,
        path: str = "chunked",
        tied: bool = False,
        band: tuple[int, int] | None = None,
        skip: str = "matlab",
    ) -> None:
        super().__init__()
        if skip not in _SKIPS:
            raise SettingError(f"skip must be one of {', '.join(_SKIPS)}, got '{skip}'")
        self.upsample = BicubicUpsample(scale)
        channels, features, growth, fusion_growth, blocks = as_wholes(
            1,
            channels=channels,
            features=features,
            growth=growth,
            fusion_growth=fusion_growth,
            blocks=blocks,
        )
        attention_blocks = as_whole("attention_blocks", attention_blocks, 0)
        rates = as_whole_list("rates", rates, 1)
        if cross_view and features % blocks:
            raise SettingError(f"features must be a multiple of blocks, got {features} and {blocks}")
        self.scale, self.in_channels, self.skip = self.upsample.scale, 2 * channels, skip
        # Head; two convolutions and the 7 x 7 gate of each CCSB; ASPP; dense blocks; what is compared; dense blocks
        # of fusion and reconstruction; and the last convolution, whose fine pixel lies within one coarse one.
        self.gated_row_halo = (
            1
            + 5 * attention_blocks
            + max(rates, default=0)
            + _LAYERS * blocks
            + BiPAM.row_reach * bool(cross_view)
        ) + (_LAYERS + _LAYERS * blocks + 1)
        self.head = nn.Conv2d(channels, features, 3, padding=1)
        self.attention = nn.ModuleList(_CCSB(features, reduction) for _ in range(attention_blocks))
        self.context = _ASPP(features, rates) if rates else nn.Identity()
        self.extract = _DenseGroup(features, growth, blocks)
        self.exchange = BiPAM(features, blocks, path=path, tied=tied, band=band) if cross_view else None
        self.mix = _DenseBlock(2 * features, fusion_growth)
        self.gate = _ChannelGate(2 * features, reduction)
        self.fuse = nn.Conv2d(2 * features, features, 1)
        self.reconstruct = _DenseGroup(features, growth, blocks)
        self.spread = nn.Conv2d(features, features * self.scale**2, 1)
        self.out = nn.Conv2d(features, channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out.weight)
        if self.exchange is not None:
            self.exchange.match_from_the_start()

    def forward(
        self, image: Tensor, statistics: Sequence[Tensor] | None = None, *, parallax: str = "none"
    ) -> Tensor | StereoPrediction:
        """Enlarge a pair.

        Args:
            image: the pair, left before right.
            statistics: what :meth:`squeeze` returns, ``(B or 1, 2 * width)`` per gate; default the pair's own.
            parallax: ``none`` returns the enlarged pair alone; ``disparity`` returns a :class:`StereoPrediction` with
                masks and disparity; ``maps`` one with masks and attention maps, which training losses need.
        """
        wanted = wanted_of(parallax, self.exchange)
        if statistics is None:
            fused, found = self._fused(image, channel_means, wanted=wanted)
        else:
            given = iter(self._checked(statistics, len(image)))
            fused, found = self._fused(image, lambda _: by_view(next(given)), wanted=wanted)
        # One shuffle by the whole scale, in the order of torch.nn.PixelShuffle.
        fine = F.pixel_shuffle(self.spread(self.reconstruct(fused)[0]), self.scale)
        result = side_by_side(convolve_exactly(self.out, fine)) + self._enlarged(image)
        return result if found is None else StereoPrediction(result, image, found)

    def squeeze(
        self,
        image: Tensor,
        statistics: Sequence[Tensor] | None = None,
        *,
        border: int | Sequence[int] = 0,
    ) -> list[Tensor]:
        """Channel means that the gates see, ``(B, 2 * width)`` each, left before right, at least float32.

        Args:
            image: the pair, or a band of its rows with their halo.
            statistics: what the gates use meanwhile; default the means that are returned.
            border: pixels that the means leave out at each side: one number, or top, bottom, left and right.

        Raises:
            SettingError: if no pixel is left, or the statistics do not fit.
        """
        height, width = image.shape[-2:]
        top, bottom, left, right = border_sides(border, (height, width))
        given = None if statistics is None else iter(self._checked(statistics, len(image)))
        found: list[Tensor] = []

        def means(features: Tensor) -> Tensor:
            own = channel_means(features[..., top : height - bottom, left : width - right])
            found.append(side_by_side(own))
            return own if given is None else by_view(next(given))

        self._fused(image, means, wanted={})
        return found

    def _fused(
        self, image: Tensor, means: _Means, *, wanted: Mapping[str, bool]
    ) -> tuple[Tensor, ParallaxResult | None]:
        """Features of both views after the exchange, and what the exchange found if it is asked for."""
        features = self.head(by_view(checked_pair(image, self.in_channels)))
        for block in self.attention:
            features = block(features, means)
        features, levels = self.extract(self.context(features))
        found = None
        # A view on its own is what the exchange gives where nothing matches.
        brought = features
        if self.exchange is not None:
            result = self.exchange(levels, features, **wanted)
            brought, found = result.features, result if wanted else None
        # The levels are the largest tensors.
        del levels
        fused = self.mix(torch.cat([features, brought], 1))
        return self.fuse(self.gate(fused, means)), found

    def _enlarged(self, image: Tensor) -> Tensor:
        if self.skip == "matlab":
            return self.upsample(image)
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        return F.interpolate(image, scale_factor=float(self.scale), mode="bicubic", align_corners=False)

    def _checked(self, statistics: Sequence[Tensor], batch: int) -> Sequence[Tensor]:
        gates = [*(block.gate for block in self.attention), self.gate]
        expected = [2 * gate.expand.out_features for gate in gates]
        found = [tuple(one.shape) for one in statistics]
        if [shape[-1] for shape in found] != expected or {shape[0] for shape in found} - {1, batch}:
            raise SettingError(
                f"statistics must be (1 or {batch}, n) for n in {expected}, got tensors of shape {found}"
            )
        return [one.expand(batch, -1) for one in statistics]


def ipassr(scale: int = 4, **settings: Any) -> SEGSRNet:
    """The network that SEGSRNet builds on: without CCSB and ASPP, and with PyTorch's bicubic kernel.

    Args:
        scale: enlargement.
        settings: other arguments of :class:`SEGSRNet`.

    Example:
        >>> sum(p.numel() for p in ipassr(4).parameters())
        1427851

    Reference:
        arXiv 2011.03802
    """
    return SEGSRNet(scale, **{"attention_blocks": 0, "rates": (), "skip": "pytorch", **settings})


class _DenseBlock(nn.Module):
    """Convolutions that each read all before them, a 1 x 1 fusion, and a skip (RDB)."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(features + layer * growth, growth, 3, padding=1) for layer in range(_LAYERS)
        )
        self.fuse = nn.Conv2d(features + _LAYERS * growth, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        dense = x
        for layer in self.layers:
            dense = torch.cat([dense, F.leaky_relu(layer(dense), _SLOPE, inplace=True)], 1)
        return x + self.fuse(dense)


class _DenseGroup(nn.Module):
    """Dense blocks in series; returns the fusion of all their outputs, and these outputs side by side."""

    def __init__(self, features: int, growth: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_DenseBlock(features, growth) for _ in range(blocks))
        self.fuse = nn.Conv2d(blocks * features, features, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        levels = torch.cat(outputs, 1)
        return self.fuse(levels), levels


class _ChannelGate(nn.Module):
    """Scales each channel by a gate that sees the means of all channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // as_whole("reduction", reduction, 1))
        self.reduce, self.expand = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor, means: _Means) -> Tensor:
        hidden = F.leaky_relu(self.reduce(means(x).to(self.reduce.weight.dtype)), _SLOPE)
        return x * self.expand(hidden).sigmoid().to(x.dtype)[..., None, None]


class _SpatialGate(nn.Module):
    """Scales each pixel by a gate that sees mean and maximum over the channels around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.conv(seen).sigmoid()


class _CCSB(nn.Module):
    """Two convolutions, a channel gate and a spatial gate, on a skip."""

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.gate, self.spatial = _ChannelGate(features, reduction), _SpatialGate()

    def forward(self, x: Tensor, means: _Means) -> Tensor:
        y = self.conv2(F.leaky_relu(self.conv1(x), _SLOPE, inplace=True))
        return x + self.spatial(self.gate(y, means))


class _ASPP(nn.Module):
    """Dilated convolutions side by side, a 1 x 1 fusion, and a skip."""

    def __init__(self, features: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(features, features, 3, padding=rate, dilation=rate) for rate in rates
        )
        self.fuse = nn.Conv2d(len(rates) * features, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [F.leaky_relu(branch(x), _SLOPE, inplace=True) for branch in self.branches]
        return x + self.fuse(torch.cat(seen, 1))
