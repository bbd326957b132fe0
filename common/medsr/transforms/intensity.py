"""Intensities to about [0, 1] and back, without clipping."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
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
    ``meta["intensity_scale"]`` do: ``original = unit * scale + offset``.

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
            low, high = percentile_range(np.asarray(image[0]))
            if not high > low:
                raise DataError(f"{key}: no contrast between the 0.1 and 99.9 percentiles ({low:g})")
            scaled = (image.as_tensor().float() - low) / (high - low)
            result[key] = MetaTensor(scaled).copy_meta_from(image)
            result[key].meta.update(intensity_offset=float(low), intensity_scale=float(high - low))
            if self.foreground_key and self.foreground_key not in result:
                result[self.foreground_key] = torch.as_tensor(head_mask(np.asarray(scaled[0])))
        return result


class RestoreIntensityd(MapTransform):
    """Undo :class:`PercentileToUnitd` on a result: offset and scale for images, the scale alone for magnitudes.

    Args:
        keys: results to restore.
        source_key: the scaled input whose metadata hold offset and scale.
        magnitude_keys: those of ``keys`` that are differences or errors, which an offset must not shift.

    Example:
        >>> source = MetaTensor(torch.zeros(1, 2, 2, 2), meta={"intensity_offset": 5.0, "intensity_scale": 2.0})
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
        offset, scale = float(meta["intensity_offset"]), float(meta["intensity_scale"])
        for key in self.key_iterator(result):
            result[key] = result[key] * scale + (0.0 if key in self.magnitude_keys else offset)
        return result
