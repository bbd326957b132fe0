"""Taking a network's output apart."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

__all__ = ["SplitUncertaintyd"]


class SplitUncertaintyd(MapTransform):
    """Move the second half of the channels of a result to ``uncertainty``, if the network has such a head.

    Both become ``MetaTensor``: ``monai.transforms.Invertd`` leaves out plain tensors with no more than a warning, and
    the axes of a sagittal result would stay exchanged.

    Args:
        keys: the result.
        source_key: the input, whose number of channels is the number of images in the result.

    Shape:
        ``(2 C, ...)`` to ``(C, ...)`` at the key and ``(C, ...)`` at ``uncertainty``.

    Example:
        >>> import torch
        >>> item = {"image": torch.zeros(1, 2, 2, 2), "pred": torch.zeros(2, 2, 2, 6)}
        >>> SplitUncertaintyd("pred")(item)["uncertainty"].shape
        torch.Size([1, 2, 2, 6])
    """

    def __init__(self, keys: KeysCollection, source_key: str = "image") -> None:
        super().__init__(keys)
        self.source_key = source_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split every key."""
        result = dict(data)
        count = len(result[self.source_key])
        for key in self.key_iterator(result):
            values = convert_to_tensor(result[key], track_meta=True)
            result[key] = values
            if len(values) > count:
                result["uncertainty"] = values[count : 2 * count]
                result[key] = values[:count]
            result[key].meta = dict(values.meta)
        return result
