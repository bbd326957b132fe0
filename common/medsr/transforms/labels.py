"""Masks as files hold them: on the grid of their image, with declared values, one channel per class."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from medsr.errors import DataError, SettingError
from medsr.io.loading import loaded_name

__all__ = ["ClassesToChannelsd", "SameGridd", "drawn_classes", "with_background"]

GRID_TOLERANCE_MM = 1e-2
"""How far the corner voxels of two grids may lie apart and still be one grid: headers are rounded."""

_ROUNDING = 1e-3
"""A stored scale factor may turn 1 into 0.9999999."""


class SameGridd(MapTransform):
    """Refuse a mask that does not lie on the grid of its image.

    A mask that was drawn on another series, or saved by a tool that lost the origin, trains a network on wrong voxels
    without any error. ``monai.transforms.ResampleToMatchd`` was considered: it would move the mask in silence.

    Args:
        keys: masks.
        image_key: their image.

    Raises:
        DataError: if shape or affine differ, with both.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 2, 2, 2))
        >>> SameGridd("label")({"image": image, "label": MetaTensor(torch.zeros(1, 2, 2, 3))})
        Traceback (most recent call last):
        medsr.errors.DataError: label: 2 x 2 x 3 voxels, but image has 2 x 2 x 2; draw the mask on the image itself
    """

    def __init__(
        self, keys: KeysCollection, image_key: str = "image", *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check every key."""
        image = data[self.image_key]
        for key in self.key_iterator(dict(data)):
            mask = data[key]
            names = [loaded_name(mask, key), loaded_name(image, self.image_key)]
            if names[0] == names[1]:
                # In a labelled folder the mask is called like its image.
                names = [f"{kind} {name}" for kind, name in zip((key, self.image_key), names, strict=True)]
            if mask.shape[1:] != image.shape[1:]:
                sizes = [" x ".join(str(int(n)) for n in x.shape[1:]) for x in (mask, image)]
                raise DataError(
                    f"{names[0]}: {sizes[0]} voxels, but {names[1]} has {sizes[1]}; draw the mask on the image itself"
                )
            apart = _corner_distance_mm(mask, image)
            if apart > GRID_TOLERANCE_MM:
                raise DataError(
                    f"{names[0]}: lies {apart:.3g} mm away from {names[1]} (affines differ); save it with the image's"
                )
        return dict(data)


class ClassesToChannelsd(MapTransform):
    """One channel of zeros and ones per declared class; a class may unite several values of the file.

    ``monai.transforms.AsDiscreted`` was considered: it needs values 0, 1, 2, ... and takes what is not declared for
    an index error or for background.

    Args:
        keys: masks ``(1, X, Y, Z)`` of whole numbers.
        classes: foreground class name to the values of the file; 0 is the background. None for masks that hold the
            probabilities of the classes already, which stay as they are.

    Shape:
        ``(1, X, Y, Z)`` to ``(len(classes), X, Y, Z)``.

    Raises:
        DataError: if the mask has several channels or a value that no class declares, or without classes one above 1.
        SettingError: if a value is declared twice or as foreground 0.

    Example:
        >>> mask = MetaTensor(torch.tensor([0.0, 1.0, 4.0]).view(1, 3, 1, 1))
        >>> ClassesToChannelsd("label", {"tumour": [1, 2, 3, 4]})({"label": mask})["label"].ravel().tolist()
        [0.0, 1.0, 1.0]
    """

    def __init__(
        self,
        keys: KeysCollection,
        classes: Mapping[str, Sequence[int]] | None,
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.classes = None
        if classes is None:
            return
        self.classes = {name: [int(v) for v in np.atleast_1d(values)] for name, values in classes.items()}
        declared = [value for values in self.classes.values() for value in values]
        if not declared or 0 in declared or len(set(declared)) != len(declared):
            raise SettingError(
                f"classes must map names to distinct values other than 0, got {dict(self.classes)}"
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            mask = result[key]
            if self.classes is None:
                highest = float(mask.max())
                if highest > 1 + _ROUNDING:
                    raise DataError(
                        f"{loaded_name(mask, key)}: value {highest:g} is no probability; set classes, such as "
                        f"{{'tumour': [{highest:g}]}}"
                    )
                continue
            if len(mask) != 1:
                raise DataError(
                    f"{loaded_name(mask, key)}: {len(mask)} channels, and one with the number of the class is wanted; "
                    "save it as one mask"
                )
            declared = [value for values in self.classes.values() for value in values]
            values = mask.as_tensor() if isinstance(mask, MetaTensor) else mask
            whole = torch.where((values - values.round()).abs() < _ROUNDING, values.round(), values)
            foreign = [value for value in torch.unique(whole).tolist() if value not in (0, *declared)]
            if foreign:
                raise DataError(
                    f"{loaded_name(mask, key)}: value {foreign[0]:g} belongs to no class of "
                    f"{', '.join(f'{name} {values}' for name, values in self.classes.items())}; set classes"
                )
            channels = [torch.isin(whole, torch.tensor(v).to(whole)) for v in self.classes.values()]
            one_hot = MetaTensor(torch.cat(channels).float())
            result[key] = one_hot.copy_meta_from(mask) if isinstance(mask, MetaTensor) else one_hot
        return result


def drawn_classes(shares: Tensor, *, dim: int = 0) -> Tensor:
    """What somebody who draws on thick slices makes of each voxel: the class that fills most of it.

    A voxel that is half background, as every second one at the end of a lesion and an even ratio, counts as foreground:
    with the background preferred, lesions of one or two slices would shrink or vanish.

    Args:
        shares: share of each foreground class in a voxel.
        dim: axis of the classes.

    Shape:
        ``K - 1`` along ``dim`` to class indices without that axis, 0 is the background.

    Example:
        >>> drawn_classes(torch.tensor([[0.4, 0.5, 0.0], [0.1, 0.0, 0.7]])).tolist()
        [0, 1, 2]
    """
    background = 1 - shares.sum(dim, keepdim=True)
    return torch.cat([background - 1e-4, shares], dim=dim).argmax(dim)


def with_background(foreground: Tensor, *, dim: int = 0) -> Tensor:
    """Probabilities of all classes; the foreground's may add up to more than one, as after super-resolution.

    Args:
        foreground: probability of each foreground class.
        dim: axis of the classes.

    Shape:
        ``K - 1`` along ``dim`` to ``K``, the background first, adding up to one.

    Example:
        >>> with_background(torch.tensor([[1.5, 0.25], [1.0, 0.25]])).tolist()
        [[0.0, 0.5], [0.5, 0.25], [0.5, 0.25]]
    """
    foreground = foreground.clamp(0, 1)
    foreground = foreground / foreground.sum(dim, keepdim=True).clamp_min(1)
    return torch.cat([1 - foreground.sum(dim, keepdim=True), foreground], dim=dim)


def _corner_distance_mm(first: MetaTensor, second: MetaTensor) -> float:
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in first.shape[1:]])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    places = [np.asarray(image.affine, dtype=np.float64) @ corners for image in (first, second)]
    return float(np.linalg.norm((places[0] - places[1])[:3], axis=0).max())
