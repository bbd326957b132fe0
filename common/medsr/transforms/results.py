"""Taking a network's output apart, and what follows from it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor
from torch import Tensor

from medsr.errors import SettingError
from medsr.transforms.labels import with_background

__all__ = [
    "AddUncertaintyd",
    "MaskResultsd",
    "PseudoUncertaintyd",
    "SplitChannelsd",
    "SplitUncertaintyd",
    "border_uncertainty",
]

_SOURCES = ("image", "label", "both")


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


class _HasUncertainty(Protocol):
    uncertainty: Tensor | None


class AddUncertaintyd(MapTransform):
    """Put what an inferer found uncertain about its last result beside it, if it did.

    Args:
        key: the result.
        inferer: holds ``uncertainty`` of its last result, batch axis first, or None.

    Shape:
        ``uncertainty`` is ``(V, ...)``, a map for each of the V views that the result is of.

    Example:
        >>> from types import SimpleNamespace
        >>> item = {"pred": torch.zeros(3, 2, 2)}
        >>> sorted(AddUncertaintyd("pred", SimpleNamespace(uncertainty=torch.zeros(1, 1, 2, 2)))(item))
        ['pred', 'uncertainty']
    """

    def __init__(self, key: str, inferer: _HasUncertainty) -> None:
        super().__init__(key)
        self.inferer = inferer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add it."""
        result = dict(data)
        if self.inferer.uncertainty is not None:
            found = MetaTensor(self.inferer.uncertainty[0].float())
            result["uncertainty"] = found.copy_meta_from(
                convert_to_tensor(result[self.keys[0]], track_meta=True)
            )
        return result


class SplitChannelsd(MapTransform):
    """Give groups of a result's channels keys of their own.

    As :class:`SplitUncertaintyd`, for results of more than two parts; ``monai.transforms.SplitDimd`` makes one item
    per channel.

    Args:
        key: the result.
        counts: new key to number of channels, in their order; ``key`` itself may be among them.

    Shape:
        ``(sum(counts), ...)`` to ``(count, ...)`` per key.

    Raises:
        SettingError: if the counts do not add up to the channels of the result.

    Example:
        >>> found = SplitChannelsd("pred", {"pred": 1, "label": 2})({"pred": torch.zeros(3, 2, 2, 2)})
        >>> {key: len(value) for key, value in found.items()}
        {'pred': 1, 'label': 2}
    """

    def __init__(self, key: str, counts: Mapping[str, int]) -> None:
        super().__init__(key)
        self.counts = {name: int(count) for name, count in counts.items()}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split the result."""
        result = dict(data)
        values = convert_to_tensor(result[self.keys[0]], track_meta=True)
        if len(values) != sum(self.counts.values()):
            raise SettingError(
                f"{self.keys[0]}: {len(values)} channels cannot be split into {dict(self.counts)}"
            )
        parts = values.split(list(self.counts.values()))
        for name, part in zip(self.counts, parts, strict=True):
            result[name] = part
            result[name].meta = dict(values.meta)
        return result


def border_uncertainty(probabilities: Tensor) -> Tensor:
    """One minus the margin between the two likeliest classes: 0 where the network is sure, 1 where two are as likely.

    The entropy was considered: between two of many classes it never reaches its largest value.

    Shape:
        ``(K, ...)`` to ``(1, ...)``.

    Example:
        >>> border_uncertainty(torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.0, 0.0]])).tolist()
        [[0.0, 1.0]]
    """
    first, second = probabilities.topk(2, dim=0).values
    return (1 - (first - second)).clamp(0, 1)[None]


class PseudoUncertaintyd(MapTransform):
    """What pseudo data should be trusted how much: the uncertainty of their image, of their labels, or of both.

    The network knows the error of its image, as a share of the intensity range. That is small everywhere, and says
    little about the labels. Hence it is scaled to reach 1 at its highest quantile, and joined, by the larger value,
    with the :func:`border_uncertainty` of the labels.

    Args:
        keys: image uncertainty ``(1, ...)``; replaced.
        label_key: foreground probabilities ``(K - 1, ...)`` on the same grid.
        source: ``image``, ``label`` or ``both``.
        quantile: of the image's uncertainty, becomes 1.

    Raises:
        SettingError: for another source or a quantile outside (0, 1].

    Example:
        >>> item = {"uncertainty": torch.tensor([[0.0, 0.02]]), "label": torch.tensor([[0.5, 1.0]])}
        >>> PseudoUncertaintyd("uncertainty", source="both", quantile=1.0)(item)["uncertainty"].tolist()
        [[1.0, 1.0]]

    Reference:
        arXiv 2410.10097; doi:10.1016/j.neucom.2025.129425
    """

    def __init__(
        self, keys: KeysCollection, label_key: str = "label", *, source: str = "both", quantile: float = 0.999
    ) -> None:
        super().__init__(keys)
        if source not in _SOURCES:
            raise SettingError(f"uncertainty_of must be one of {', '.join(_SOURCES)}, got '{source}'")
        if not 0 < quantile <= 1:
            raise SettingError(f"quantile must lie in (0, 1], got {quantile:g}")
        self.label_key, self.source, self.quantile = label_key, source, float(quantile)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            found = convert_to_tensor(result[key], track_meta=True)
            parts = []
            if self.source != "label":
                values = found.as_tensor()
                # torch.quantile refuses as many values as a volume has.
                top = float(np.quantile(values.cpu().numpy(), self.quantile))
                parts.append((values / top).clamp(0, 1) if top > 0 else torch.zeros_like(values))
            if self.source != "image":
                parts.append(border_uncertainty(with_background(torch.as_tensor(result[self.label_key]))))
            result[key] = MetaTensor(torch.stack(parts).amax(0)).copy_meta_from(found)
        return result


class _HasThick(Protocol):
    thick: Tensor


class MaskResultsd(MapTransform):
    """Turn class probabilities into masks, foreground probabilities and the uncertainty of the borders.

    The uncertainty is that of :func:`border_uncertainty`. ``monai.transforms.AsDiscreted`` makes the mask alone.

    Args:
        key: thin probabilities; replaced by the mask.
        inferer: holds the probabilities of the thick grid as ``thick``, batch axis first.

    Shape:
        ``(K, H, W, D')`` to ``pred`` and ``pred_thick`` ``(1, ...)`` uint8, ``probability`` ``(K - 1, ...)`` and
        ``uncertainty`` ``(1, ...)``.

    Example:
        >>> from types import SimpleNamespace
        >>> certain, unsure = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
        >>> thin = torch.stack([certain, unsure], 1).view(2, 2, 1, 1)
        >>> found = MaskResultsd("pred", SimpleNamespace(thick=thin[None]))({"pred": thin})
        >>> found["pred"].ravel().tolist(), found["uncertainty"].ravel().tolist()
        ([1, 0], [0.0, 1.0])
    """

    def __init__(self, key: str, inferer: _HasThick) -> None:
        super().__init__(key)
        self.inferer = inferer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Derive all results."""
        result = dict(data)
        key = self.keys[0]
        thin = convert_to_tensor(result[key], track_meta=True)
        values = thin.as_tensor()
        found = {
            key: _mask(values),
            f"{key}_thick": _mask(self.inferer.thick[0].to(values)),
            "probability": values[1:],
            "uncertainty": border_uncertainty(values),
        }
        # Plain tensors would be left out by Invertd.
        result.update({name: MetaTensor(part).copy_meta_from(thin) for name, part in found.items()})
        return result


def _mask(probabilities: Tensor) -> Tensor:
    return probabilities.argmax(0, keepdim=True).to(torch.uint8)
