"""Plane-wise inference of a volume: both planes that hold the slice axis, averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

__all__ = ["PlaneAverageInferer"]


class PlaneAverageInferer(Inferer):
    """Runs a plane network over all planes ``(H, D)`` and all planes ``(W, D)`` and averages the two volumes.

    ``monai.inferers.SliceInferer`` was considered: it knows one slicing direction and keeps the size of the input.

    Args:
        planes: number of planes in a batch.

    Shape:
        ``(1, 1, H, W, D)`` to ``(1, 1, H, W, D')``.

    Example:
        >>> from medsr.networks.wdsr import PlaneSRNet
        >>> PlaneAverageInferer()(torch.zeros(1, 1, 6, 5, 4), PlaneSRNet(2.0, channels=8, blocks=1)).shape
        torch.Size([1, 1, 6, 5, 8])
    """

    def __init__(self, planes: int = 16) -> None:
        super().__init__()
        self.planes = int(planes)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Super-resolve one volume."""
        if isinstance(network, nn.Module):
            network.eval()
        volume = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        with torch.inference_mode():
            first = self._run(volume[0, 0].transpose(0, 1), network).transpose(0, 1)
            second = self._run(volume[0, 0], network)
            average = ((first + second) / 2)[None, None]
        # A tensor made in inference mode could not be changed afterwards.
        return average.clone()

    def _run(self, stack: Tensor, network: Callable[..., Tensor]) -> Tensor:
        parts = [network(part.unsqueeze(1))[:, 0] for part in stack.split(self.planes)]
        return torch.cat(parts)
