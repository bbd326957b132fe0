"""What several networks are built of."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError

__all__ = [
    "ResidualBlocks",
    "border_sides",
    "channel_means",
    "convolve_exactly",
    "with_parts",
    "without_autocast",
]

_Network = TypeVar("_Network", bound=nn.Module)


class ResidualBlocks(nn.ModuleList):
    """Blocks of convolution, ReLU and convolution, each of which adds to what it sees.

    Shape:
        ``(B, C, H, W)`` to the same.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
        >>> ResidualBlocks([block])(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 2, 5, 5])
    """

    def forward(self, features: Tensor) -> Tensor:
        """Run all blocks."""
        for block in self:
            features = features + block(features)
        return features


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context without autocast on the device of a tensor.

    Example:
        >>> with without_autocast(torch.zeros(1)):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    kind = x.device.type
    # Where autocast is off already, the context would only burden an exported graph.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def convolve_exactly(conv: nn.Conv2d, features: Tensor) -> Tensor:
    """Apply a first or last convolution, which carries the image, in float32 at least: bfloat16 rounds by half a level.

    Args:
        conv: zero padding, stride 1.
        features: what it reads, of any precision.

    Shape:
        ``(B, C, H, W)`` to ``(B, C', H', W')``.

    Example:
        >>> convolve_exactly(nn.Conv2d(2, 1, 3, padding=1), torch.zeros(1, 2, 4, 4).bfloat16()).dtype
        torch.float32
    """
    exact = torch.promote_types(features.dtype, torch.float32)
    with without_autocast(features):
        return F.conv2d(features.to(exact), conv.weight.to(exact), conv.bias.to(exact), padding=conv.padding)


def with_parts(network: _Network, **parts: nn.Module) -> _Network:
    """The same network with other parts in the place of those of these names; all else is shared.

    Example:
        >>> network = nn.Sequential(nn.ReLU())
        >>> other = with_parts(network, **{"0": nn.Sigmoid()})
        >>> type(network[0]).__name__, type(other[0]).__name__
        ('ReLU', 'Sigmoid')
    """
    other = copy.copy(network)
    # A shallow copy shares the list of the parts, too.
    other._modules = {**network._modules, **parts}
    return other


def channel_means(x: Tensor) -> Tensor:
    """Means over height and width at float32 or more: what gates see, and what is averaged over tiles.

    Shape:
        ``(B, C, H, W)`` to ``(B, C)``.

    Example:
        >>> channel_means(torch.ones(2, 3, 4, 4).bfloat16()).dtype
        torch.float32
    """
    return x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def border_sides(border: int | Sequence[int], size: Sequence[int]) -> tuple[int, int, int, int]:
    """Pixels that statistics leave out at the top, at the bottom, on the left and on the right.

    Args:
        border: one number for all sides, or four.
        size: height and width of the image.

    Raises:
        SettingError: if no pixel is left.

    Example:
        >>> border_sides(2, (8, 9))
        (2, 2, 2, 2)
    """
    sides = tuple(border) if isinstance(border, Sequence) else (border,) * 4
    height, width = size
    if len(sides) != 4 or min(sides) < 0 or sum(sides[:2]) >= height or sum(sides[2:]) >= width:
        raise SettingError(
            f"border must be one or four numbers >= 0 that leave pixels of {height} x {width}, got {border}"
        )
    top, bottom, left, right = sides
    return top, bottom, left, right
