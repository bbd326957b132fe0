"""Intensities to about [0, 1] and back, without clipping."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from medsr.errors import DataError
from medsr.metrics.volume import head_mask, percentile_range

__all__ = ["PercentileToUnitd", "RestoreIntensityd"]


class PercentileToUnitd(MapTransform):
    """Map the 0.1 and 99.9 percentiles of the foreground to 0 and 1, affinely; negatives and outliers survive.

    ``monai.transforms.ScaleIntensityRangePercentilesd`` was considered: it takes the percentiles over the
    background too and keeps nothing by which the map could be inverted. Here ``meta["intensity_offset"]`` and
    ``meta["intensity_scale"]`` do, one number per channel: ``original = unit * scale + offset``. Each channel has a map
    of its own, since contrasts in one file may differ a thousandfold; what is restored is comparable again. A channel
    without contrast beside others that have some keeps its scale.

    Args:
        keys: images; each gets its own map.
        foreground_key: if given, a boolean foreground mask of the first key is stored under it.
        allow_missing_keys: skip items that a sample does not have.

    Raises:
        DataError: for an image without contrast.

    Example:
        >>> image = MetaTensor(torch.linspace(0, 900, 1000).reshape(1, 10, 10, 10))
        >>> bool(PercentileToUnitd("image")({"image": image})["image"].max() > 1)
        True
    """

    def __init__(
        self, keys: KeysCollection, *, foreground_key: str | None = None, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.foreground_key = foreground_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            ends = [_ends(np.asarray(channel), alone=len(image) == 1) for channel in image]
            low, high = torch.tensor(ends, dtype=torch.float64).T
            has_contrast = high > low
            if not has_contrast.any():
                raise DataError(f"{key}: no contrast between the 0.1 and 99.9 percentiles ({low[0]:g})")
            offset, scale = low, torch.where(has_contrast, high - low, 1.0)
            scaled = (image.as_tensor().float() - _per_channel(offset)) / _per_channel(scale)
            result[key] = MetaTensor(scaled).copy_meta_from(image)
            result[key].meta.update(intensity_offset=offset, intensity_scale=scale)
            if self.foreground_key and self.foreground_key not in result:
                result[self.foreground_key] = torch.as_tensor(head_mask(np.asarray(scaled[0])))
        return result


def _ends(channel: npt.NDArray[Any], *, alone: bool) -> tuple[float, float]:
    """What is mapped to 0 and 1; twice the same where a channel of several is constant."""
    if not alone and channel.min() == channel.max():
        return float(channel.min()), float(channel.min())
    return percentile_range(channel)


def _per_channel(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


class RestoreIntensityd(MapTransform):
    """Undo :class:`PercentileToUnitd` on a result: offset and scale for images, the scale alone for magnitudes.

    Args:
        keys: results to restore.
        source_key: the scaled input whose metadata hold offset and scale.
        magnitude_keys: those of ``keys`` that are differences or errors, which an offset must not shift.

    Example:
        >>> meta = {"intensity_offset": torch.tensor([5.0]), "intensity_scale": torch.tensor([2.0])}
        >>> source = MetaTensor(torch.zeros(1, 2, 2, 2), meta=meta)
        >>> RestoreIntensityd("pred", "image")({"image": source, "pred": torch.ones(1, 2, 2, 2)})["pred"].max()
        tensor(7.)
    """

    def __init__(
        self,
        keys: KeysCollection,
        source_key: str = "image",
        magnitude_keys: str | Sequence[str] = (),
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source_key, self.magnitude_keys = source_key, ensure_tuple(magnitude_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Restore every key."""
        result = dict(data)
        meta = result[self.source_key].meta
        offset, scale = (_per_channel(meta[f"intensity_{name}"]) for name in ("offset", "scale"))
        for key in self.key_iterator(result):
            restored = result[key] * scale.to(result[key].device)
            result[key] = restored if key in self.magnitude_keys else restored + offset.to(restored.device)
        return result
