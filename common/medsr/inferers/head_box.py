"""The part of a field of view that is worth a network's time."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from medsr.errors import DataError
from medsr.metrics.volume import head_mask

__all__ = ["head_box"]


def head_box(volume: Tensor, *, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns that the head reaches, in any slice.

    A field of view is mostly air around the head, in skull-stripped volumes even more so. A volume without any
    contrast is taken whole. ``monai.transforms.CropForeground`` was considered: it needs the background's value.

    Args:
        volume: image, slices last.
        margin: voxels that are added on each side, as far as there are any.

    Shape:
        ``(1, 1, H, W, D)``.

    Example:
        >>> import torch
        >>> volume = torch.nn.functional.pad(torch.rand(1, 1, 4, 5, 3) + 1, (0, 0, 6, 6, 2, 9))
        >>> head_box(volume, margin=3)
        (slice(0, 9, None), slice(3, 14, None))
    """
    height, width = volume.shape[2:4]
    try:
        mask = head_mask(volume[0, 0].cpu().numpy()).any(axis=-1)
    except DataError:
        return slice(0, height), slice(0, width)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return _widened(rows, margin, height), _widened(columns, margin, width)


def _widened(indices: np.ndarray, margin: int, size: int) -> slice:
    return slice(max(0, int(indices[0]) - margin), min(size, int(indices[-1]) + 1 + margin))
