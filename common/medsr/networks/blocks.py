"""What several networks are built of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["convolve_exactly", "without_autocast"]


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
    """Apply a last convolution in float32 at least: in bfloat16 its rounding alone would be up to half a grey level.

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
