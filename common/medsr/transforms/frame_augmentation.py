"""Changes of endoscopic frames that few labelled scenes do not show: another cast of colour, another field of view."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from medsr.io.loading import LUMA
from medsr.transforms.frame_labels import IGNORED

__all__ = ["RandHueSaturationd", "RandRoundFieldd"]

_COLOUR_DIFFERENCES = ((0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
"""I and Q of YIQ, by red, green and blue: a turn in their plane is a change of hue."""


class RandHueSaturationd(RandomizableTransform, MapTransform):
    """Turn the colours about grey, and bring them nearer to it or away from it, at constant brightness.

    One 3 x 3 matrix: the two differences of colour are turned by an angle and scaled, the brightness (ITU-R BT.601)
    stays. Grey stays grey, which is what tells metal from tissue. MONAI changes intensities but no colours;
    ``torchvision.transforms.ColorJitter`` was considered, for which MONAI would need another package.

    Args:
        keys: images, which all get the same.
        hue_degrees: largest angle, to either side.
        saturation: range of the factor; 0 is grey.
        prob: how often.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(3, H, W)`` to the same; values may leave [0, 1].

    Example:
        >>> grey = torch.full((3, 2, 2), 0.5)
        >>> changed = RandHueSaturationd("image", hue_degrees=90, prob=1.0)({"image": grey})["image"]
        >>> torch.allclose(changed, grey)
        True
    """

    def __init__(
        self,
        keys: KeysCollection,
        hue_degrees: float = 20.0,
        saturation: tuple[float, float] = (0.5, 1.5),
        *,
        prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.hue_degrees, self.saturation = float(hue_degrees), (float(saturation[0]), float(saturation[1]))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the colours of all images, or of none."""
        result = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return result
        angle = self.R.uniform(-self.hue_degrees, self.hue_degrees)
        matrix = _hue_matrix(angle, self.R.uniform(*self.saturation))
        for key in self.key_iterator(result):
            image = result[key]
            result[key] = torch.einsum("ij,j...->i...", matrix.to(image.dtype), image)
        return result


def _hue_matrix(degrees: float, saturation: float) -> Tensor:
    """The map of colours that keeps brightness and grey, and turns and scales all else."""
    basis = torch.tensor([LUMA, *_COLOUR_DIFFERENCES], dtype=torch.float64)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.eye(3, dtype=torch.float64)
    turn[1:, 1:] = saturation * torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
    return torch.linalg.solve(basis, turn @ basis)


class RandRoundFieldd(RandomizableTransform, MapTransform):
    """Make black what lies outside of a circle, as many endoscopes show it; no instrument is there.

    ``monai.transforms.RandCoarseDropoutd`` was considered; its holes are rectangles, and it keeps the label.

    Args:
        keys: images, set to 0 outside.
        label_key: their mask of class indices, set to 0 outside, the background; pixels to ignore stay so.
        radius: range of the radius, as a share of the longer side; the centre lies in the middle 40 percent.
        ignore: class index that stays.
        prob: how often.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(C, H, W)`` to the same, label ``(1, H, W)``.

    Example:
        >>> field = RandRoundFieldd("image", "label", prob=1.0)
        >>> item = field({"image": torch.ones(3, 64, 64), "label": torch.ones(1, 64, 64)})
        >>> torch.equal(item["image"][:1], item["label"])
        True
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str = "label",
        radius: tuple[float, float] = (0.35, 0.7),
        *,
        ignore: int = IGNORED,
        prob: float = 0.3,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.label_key, self.ignore = label_key, int(ignore)
        self.radius = (float(radius[0]), float(radius[1]))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw one circle for all, or none."""
        result = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return result
        label = result[self.label_key]
        height, width = label.shape[1:]
        radius = self.R.uniform(*self.radius) * max(height, width)
        row, column = self.R.uniform(0.3, 0.7, size=2) * (height, width)
        distance = torch.hypot(torch.arange(height)[:, None] - row, torch.arange(width)[None] - column)
        inside = distance <= radius
        for key in self.key_iterator(result):
            result[key] = result[key] * inside
        result[self.label_key] = torch.where(label == self.ignore, label, label * inside)
        return result
