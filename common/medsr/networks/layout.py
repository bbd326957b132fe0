"""Memory layout of networks."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["channels_last"]


def channels_last(network: nn.Module) -> nn.Module:
    """Store the weights of 2D and 3D convolutions with the channels last, the order that the fast kernels want.

    ``Module.to(memory_format=...)`` knows one of the two orders per call and refuses a network that holds both kinds.

    Args:
        network: changed in place, and returned.

    Example:
        >>> network = channels_last(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3)))
        >>> network[0].weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.parameters():
        if parameter.ndim in orders:
            parameter.data = parameter.data.contiguous(memory_format=orders[parameter.ndim])
    return network
