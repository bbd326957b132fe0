"""Through-plane super-resolution of single planes: a WDSR-B network, the SMORE-like baseline.

Papers:
    WDSR: arXiv 1808.08718. SMORE: IEEE TMI 40 (2021) 805-817, doi:10.1109/TMI.2020.3037187.
Code: written from the papers. Weights: none shipped; it is trained on the scan itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from medsr.errors import SettingError
from medsr.geometry import thin_positions
from medsr.networks.blocks import without_autocast
from medsr.resampling import interpolation_matrix

__all__ = ["PlaneSRNet"]


class PlaneSRNet(nn.Module):
    """Turns a plane whose last axis is coarse into a fine one: wide-activation blocks and a one-axis pixel shuffle.

    It sees one plane at a time, so that a few minutes on the planes of one scan train it. The residual is added to
    the cubic B-spline interpolation of the same field of view. A ratio that is not an integer is served by the next
    integer, followed by resampling on the same field of view. Weight normalisation is left out: with the cubic
    skip, training from scratch is stable without it.

    Args:
        scale: ratio of the coarse to the fine spacing, at least 1.2.
        channels: width of the trunk.
        blocks: number of wide-activation blocks.
        expansion: channels inside a block divided by ``channels``.

    Shape:
        ``(B, 1, H, n)`` to ``(B, 1, H, round(n * scale))``.

    Raises:
        SettingError: if the scale is less than 1.2.

    Example:
        >>> PlaneSRNet(scale=2.5, channels=8, blocks=1)(torch.zeros(1, 1, 16, 4)).shape
        torch.Size([1, 1, 16, 10])

    Reference:
        doi:10.1109/TMI.2020.3037187
    """

    size_multiple = 1
    half_precision_safe = True

    def __init__(
        self, scale: float = 4.0, channels: int = 32, blocks: int = 6, *, expansion: int = 4
    ) -> None:
        super().__init__()
        if scale < 1.2:
            raise SettingError(f"scale must be at least 1.2, got {scale:g}")
        self.scale = float(scale)
        self.factor = math.ceil(round(scale, 3))
        linear = int(channels * 0.8)
        self.head = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels * expansion, 1),
                nn.ReLU(),
                nn.Conv2d(channels * expansion, linear, 1),
                nn.Conv2d(linear, channels, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.tail = nn.Conv2d(channels, self.factor, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)
        # Input planes per pixel of receptive field: head, blocks and tail add one each.
        self.exact_halo = blocks + 2

    def forward(
        self,
        image: Tensor,
        scale: float | None = None,
        thickness: float = 1.0,
        positions: Sequence[float] | None = None,
    ) -> Tensor:
        """Super-resolve planes; ``scale`` and ``thickness`` are fixed by training and accepted for a common call."""
        size = image.shape[-1]
        if positions is None:
            positions = thin_positions(size, self.scale)
        features = self.head(image)
        for block in self.blocks:
            features = features + block(features)
        fine = self.tail(features).permute(0, 2, 3, 1).flatten(2).unsqueeze(1)
        # Position of the wanted rows on the integer grid of the shuffle, which has the same field of view.
        on_grid = (np.asarray(positions) + 0.5) * self.factor - 0.5
        # bfloat16 would round the intensities themselves.
        with without_autocast(image):
            residual = fine.float() @ self._matrix(size * self.factor, on_grid, image).T
            return image.float() @ self._matrix(size, positions, image).T + residual

    @staticmethod
    def _matrix(size: int, positions: Sequence[float] | np.ndarray, like: Tensor) -> Tensor:
        return torch.as_tensor(interpolation_matrix(size, positions), dtype=torch.float32, device=like.device)
