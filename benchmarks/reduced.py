"""Truth that is sharp to the pixel, from an image that has more pixels than detail."""

from __future__ import annotations

from medsr.transforms.bicubic import bicubic_resize
from torch import Tensor


def reduced(image: Tensor, factor: float) -> Tensor:
    """An image ``(C, H, W)`` in [0, 1] made smaller by a factor, antialiased, its size rounded."""
    height, width = (round(n / factor) for n in image.shape[1:])
    return bicubic_resize(image, (height, width)).clamp(0, 1)
