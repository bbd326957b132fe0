"""Convolutions in 8 bit integers, for inference on processors that multiply these several times faster than float32.

Papers:
    Integer arithmetic for inference (a scale for the activations, one per channel for the weights): CVPR 2018,
    doi:10.1109/CVPR.2018.00286.
Code: written from the paper, on the oneDNN operators that PyTorch's own compiler uses for quantised models.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from medsr.networks.blocks import ResidualBlocks

__all__ = ["Int8ResidualBlocks", "native_int8"]

_ROOM = 1.1
"""How far beyond the range that the examples showed an activation may go before it is cut off."""

_LEVELS = 255
_WEIGHT_LEVELS = 127
"""Of unsigned activations and of signed weights."""

_ONES = [1, 1]
"""Stride, padding and dilation of the convolutions."""


def native_int8(device: torch.device | str) -> bool:
    """Whether a CPU multiplies 8 bit integers in hardware, and PyTorch can ask it to.

    Without these instructions the sums of products of neighbours are cut off at 16 bits.

    Example:
        >>> native_int8("cpu") in (True, False)
        True
    """
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(torch.cpu, "get_capabilities") and hasattr(torch.ops.onednn, "qconv2d_pointwise")):
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_vnni") or found.get("avx_vnni") or found.get("amx_int8"))


class Int8ResidualBlocks(nn.Module):
    """Residual blocks whose convolutions multiply 8 bit integers; what they add to stays float32.

    Each convolution gets one scale for its input, from the range that examples show, and one per channel for its
    weights. The sums over the blocks are never rounded, so that errors of the blocks do not add up in them.

    Args:
        blocks: the :class:`~medsr.networks.blocks.ResidualBlocks` that are approximated; 3 x 3 convolutions, zero
            padding. Not changed, and not followed if they change.
        examples: features as the blocks will see them.

    Shape:
        as :class:`~medsr.networks.blocks.ResidualBlocks`; float32, without gradients.

    Raises:
        ValueError: if the examples give features that are not finite.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
        >>> exact, image = ResidualBlocks([block]), torch.rand(1, 2, 9, 9)
        >>> fast = Int8ResidualBlocks(exact, [image]) if native_int8("cpu") else exact
        >>> torch.allclose(fast(image), exact(image), atol=0.05)
        True

    Reference:
        doi:10.1109/CVPR.2018.00286
    """

    def __init__(self, blocks: ResidualBlocks, examples: Iterable[Tensor]) -> None:
        super().__init__()
        ranges = _ranges(blocks, examples)
        if not ranges.isfinite().all():
            raise ValueError("features are not finite")
        self._pairs = [
            (_Int8Convolution(block[0], low, high), _Int8Convolution(block[2], 0.0, highest))
            for block, (low, high, highest) in zip(blocks, ranges.tolist(), strict=True)
        ]

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Run all blocks."""
        total = features.float().clone(memory_format=torch.channels_last)
        for first, second in self._pairs:
            hidden = first.with_relu(first.rounded(total), second)
            total = second.added(hidden, total)
        return total


class _Int8Convolution:
    """Weights of one convolution, packed, and the scale of its input."""

    def __init__(self, convolution: nn.Conv2d, low: float, high: float) -> None:
        low, high = _ROOM * min(low, 0.0), _ROOM * max(high, 0.0)
        self.scale = max(high - low, 1e-12) / _LEVELS
        # Zero has a level of its own: the padding is exact.
        self.zero = round(-low / self.scale)
        weight = convolution.weight.detach().float()
        self.weight_scales = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / _WEIGHT_LEVELS
        rounded = (weight / self.weight_scales.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.weight_zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = convolution.bias.detach().float()
        self.packed = torch.ops.onednn.qconv_prepack(
            rounded, self.weight_scales, self.scale, self.zero, _ONES, _ONES, _ONES, 1, None
        )

    def rounded(self, features: Tensor) -> Tensor:
        """Features as levels of the input; what lies beyond becomes the last level."""
        # The conversion cuts off, with a half it rounds.
        half = features.new_tensor(self.zero + 0.5)
        return torch.add(half, features, alpha=1 / self.scale).clamp_(0, _LEVELS).to(torch.uint8)

    def with_relu(self, levels: Tensor, following: _Int8Convolution) -> Tensor:
        """Convolution and ReLU, as levels of the input of the following convolution."""
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            *self._operands(levels),
            self.bias,
            *(_ONES, _ONES, _ONES, 1),
            *(following.scale, following.zero, torch.uint8),
            *("relu", [], ""),
        )
        return result

    def added(self, levels: Tensor, total: Tensor) -> Tensor:
        """Add the convolution, in float32 and in place."""
        result: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            *self._operands(levels),
            total,
            self.bias,
            *(_ONES, _ONES, _ONES, 1),
            *(1.0, 0, torch.float32),
            *(1.0, 0, "sum", 1.0),
            *("none", [], ""),
        )
        return result

    def _operands(self, levels: Tensor) -> tuple[Tensor, float, int, Tensor, Tensor, Tensor]:
        return levels, self.scale, self.zero, self.packed, self.weight_scales, self.weight_zeros


@torch.no_grad()
def _ranges(blocks: ResidualBlocks, examples: Iterable[Tensor]) -> Tensor:
    """Per block the least and the largest that it sees, and the largest behind its ReLU, over all examples."""
    found = torch.zeros(len(blocks), 3)
    for features in examples:
        total = features
        for block, seen in zip(blocks, found, strict=True):
            hidden = block[:2](total)
            seen[0] = torch.minimum(seen[0], total.min())
            seen[1:] = torch.maximum(seen[1:], torch.stack([total.max(), hidden.max()]))
            total = total + block[2](hidden)
    return found
