"""Read-outs of learned features at any position inside a thick slice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["PositionReadout", "slabs_and_conditions"]


class PositionReadout(nn.Module):
    """A 1 x 1 convolution whose weights are a learned function of the thin slice's position in its slab.

    Args:
        basis: number of input maps.
        channels: number of output maps.
        gain: scale of the initial weights; 0 makes the read-out start at zero.

    Shape:
        conditions ``(K, 3)`` of :func:`slabs_and_conditions` to weights ``(K, M, C)`` and biases ``(K, C)``.

    Example:
        >>> weights, bias = PositionReadout(basis=8, channels=2)(torch.zeros(5, 3))
        >>> tuple(weights.shape), tuple(bias.shape)
        ((5, 8, 2), (5, 2))
    """

    def __init__(self, basis: int, channels: int, gain: float = 0.0) -> None:
        super().__init__()
        self.basis, self.channels = basis, channels
        self.hidden = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.weights = nn.Linear(64, channels * (basis + 1))
        nn.init.normal_(self.weights.weight, std=gain * (64 * basis) ** -0.5)
        nn.init.normal_(self.weights.bias, std=gain * basis**-0.5)

    def forward(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases of the read-out, one set per position."""
        with torch.autocast(conditions.device.type, enabled=False):
            weights = self.weights(self.hidden(conditions.float())).view(-1, self.channels, self.basis + 1)
        return weights[..., :-1].transpose(1, 2), weights[..., -1]


def slabs_and_conditions(
    positions: npt.ArrayLike, depth: int, *, scale: float, thickness: float
) -> tuple[npt.NDArray[np.int64], Tensor]:
    """The thick slice that each thin slice lies in, and what a read-out needs to know about it.

    Args:
        positions: centres of the thin slices in units of thick slices.
        depth: number of thick slices.
        scale: slice spacing divided by the new slice spacing.
        thickness: slice thickness divided by slice spacing.

    Returns:
        indices ``(K,)``, and ``(K, 3)``: offset from the thick slice's centre in half slices, ``1 / scale``,
        ``thickness``.

    Example:
        >>> slabs, conditions = slabs_and_conditions([-0.25, 0.25, 0.75], 2, scale=2.0, thickness=1.0)
        >>> slabs.tolist(), conditions[:, 0].tolist()
        ([0, 0, 1], [-0.5, 0.5, -0.5])
    """
    places = np.asarray(positions, dtype=np.float64)
    slabs = np.clip(np.floor(places + 0.5).astype(np.int64), 0, depth - 1)
    columns = [(places - slabs) * 2, np.full_like(places, 1 / scale), np.full_like(places, thickness)]
    return slabs, torch.tensor(np.stack(columns, 1), dtype=torch.float32)
