"""Masks of single frames: loaded exactly, checked against their image, mapped to classes, resized with it.

A mask holds grey values that a label map gives a meaning: ``{"background": [0], "instrument": [10, 20, 30]}`` lists
the values of every class, in order of class index. Augmentation stays MONAI's: ``RandFlipd``, ``RandSpatialCropd`` and
their like move image and mask together.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Resize
from monai.utils import MetaKeys, ensure_tuple

from medsr.errors import DataError, SettingError
from medsr.io.loading import loaded_name
from medsr.io.masks import read_mask
from medsr.settings import as_whole_list
from medsr.transforms.bicubic import bicubic_resize

__all__ = [
    "IGNORED",
    "GreysToClassesd",
    "LoadMaskd",
    "ResizeFramed",
    "SameSized",
    "reduced_size",
]

_log = logging.getLogger(__name__)

IGNORED = 255
"""Class index of pixels that nobody labelled: losses and scores leave them out."""


class LoadMaskd(MapTransform):
    """Load masks with the values of their files, or fail with the reason.

    :class:`~medsr.io.loading.LoadImageFiled` was considered; it scales to [0, 1] and gives a palette its colours.
    ``monai.transforms.LoadImaged`` swaps rows and columns, and reads grey that was saved as RGB as three channels.

    Args:
        keys: items that hold a path; each is replaced by the mask.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        - Output: ``(1, H, W)`` int32.

    Raises:
        DataError: if a file cannot be read exactly, see :func:`medsr.io.masks.read_mask`.

    Example:
        >>> LoadMaskd("label")({"label": "none.png"})
        Traceback (most recent call last):
        medsr.errors.DataError: none.png: no such file
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the path at every key by its mask."""
        result = dict(data)
        for key in self.key_iterator(result):
            values = read_mask(result[key])
            meta = {
                MetaKeys.SPATIAL_SHAPE.value: np.asarray(values.shape),
                MetaKeys.ORIGINAL_CHANNEL_DIM.value: 0,
                "filename_or_obj": str(result[key]),
            }
            result[key] = MetaTensor(torch.from_numpy(values)[None], meta=meta)
        return result


class SameSized(MapTransform):
    """Refuse a mask that has not the size of its image.

    :class:`~medsr.transforms.labels.SameGridd` was considered; it compares the affines of volumes, and photographs
    have none.

    Args:
        keys: masks.
        image_key: their image.
        allow_missing_keys: skip items that a sample does not have.

    Raises:
        DataError: if rows or columns differ, with both.

    Example:
        >>> SameSized("label")({"image": torch.zeros(3, 4, 5), "label": torch.zeros(1, 4, 6)})
        Traceback (most recent call last):
        medsr.errors.DataError: label: 4 x 6 pixels, but its image has 4 x 5; both must be of one size
    """

    def __init__(
        self, keys: KeysCollection, image_key: str = "image", *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check every key."""
        result = dict(data)
        image = result[self.image_key]
        for key in self.key_iterator(result):
            mask = result[key]
            if mask.shape[1:] != image.shape[1:]:
                sizes = [" x ".join(str(n) for n in one.shape[1:]) for one in (mask, image)]
                raise DataError(
                    f"{loaded_name(mask, key)}: {sizes[0]} pixels, but its image has {sizes[1]}; both must be of one "
                    "size"
                )
        return result


class GreysToClassesd(MapTransform):
    """Map the grey values of masks to class indices.

    ``monai.transforms.MapLabelValued`` was considered: it leaves a value that is not listed as it is, which then is
    another class or the end of the training. A mask with nothing but background and pixels to ignore is pointed out,
    once: 255 may mean the instrument.

    Args:
        keys: masks of whole numbers.
        label_map: class name to the grey values of the file, in order of class index; the background first.
        ignore: grey values of pixels that nobody labelled; they become :data:`IGNORED`.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(1, H, W)`` to the same, int64.

    Raises:
        DataError: if a mask holds a value that is not listed.
        SettingError: if there are fewer than two classes, one has no value, or a value is listed twice.

    Example:
        >>> classes = GreysToClassesd("label", {"background": [0], "instrument": [10, 20, 30]})
        >>> classes({"label": torch.tensor([[[0, 20, 255]]])})["label"].tolist()
        [[[0, 1, 255]]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_map: Mapping[str, Sequence[int]],
        ignore: Sequence[int] = (IGNORED,),
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        classes = {
            name: as_whole_list(f"classes: {name}", ensure_tuple(values), 0)
            for name, values in label_map.items()
        }
        ignored = as_whole_list("ignore", ensure_tuple(ignore), 0)
        values = [value for listed in (*classes.values(), ignored) for value in listed]
        if not 2 <= len(classes) <= IGNORED or not all(classes.values()) or len(set(values)) < len(values):
            raise SettingError(
                f"classes must give two classes or more grey values of their own, none of them twice "
                f"or in ignore, got {classes} and ignore {ignored}"
            )
        self.listed = "; ".join(f"{name} {values}" for name, values in classes.items())
        indices = {value: index for index, listed in enumerate(classes.values()) for value in listed}
        indices |= dict.fromkeys(ignored, IGNORED)
        self.ignored = ignored
        self._has_warned = False
        self.greys = torch.tensor(sorted(indices))
        self.indices = torch.tensor([indices[value] for value in sorted(indices)])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map every mask."""
        result = dict(data)
        for key in self.key_iterator(result):
            mask = result[key]
            greys = mask.as_tensor() if isinstance(mask, MetaTensor) else mask
            place = torch.searchsorted(self.greys, greys).clamp_max(len(self.greys) - 1)
            foreign = greys[self.greys[place] != greys]
            if len(foreign):
                raise DataError(
                    f"{loaded_name(mask, key)}: grey value {foreign.min().item()} belongs to no class of "
                    f"{self.listed}; add it to classes or to ignore"
                )
            found = self.indices[place]
            self._warn_of_nothing(loaded_name(mask, key), found)
            result[key] = MetaTensor(found).copy_meta_from(mask) if isinstance(mask, MetaTensor) else found
        return result

    def _warn_of_nothing(self, name: str, found: torch.Tensor) -> None:
        """Say once when a mask has no class but what does not count: 255 is also how many programs write a mask."""
        ignored = found == IGNORED
        if not self._has_warned and ignored.any() and not ((found > 0) & ~ignored).any():
            self._has_warned = True
            _log.warning(
                "%s: has nothing but background and pixels that do not count (%s); if these are a class, say so in "
                "classes and ignore",
                name,
                self.ignored,
            )


class ResizeFramed(MapTransform):
    """Resize frames and their masks on the same field of view: images by antialiased bicubic, masks by nearest.

    ``monai.transforms.Resized`` was considered; its bicubic is not antialiased. Its ``nearest-exact``, which is right
    to half a pixel where ``nearest`` is not, is used for the masks.

    Args:
        keys: images in [0, 1].
        label_keys: masks.
        size: new rows and columns, in pixels.
        longest: new length of the longer side, in pixels; the other follows in proportion.
        factor: by what both sides are divided; sizes are rounded.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(C, H, W)`` to ``(C, H', W')``.

    Raises:
        SettingError: if not exactly one of ``size``, ``longest`` and ``factor`` is given, or it is not positive.

    Example:
        >>> frame = {"image": torch.rand(3, 48, 64), "label": torch.zeros(1, 48, 64, dtype=torch.int64)}
        >>> resized = ResizeFramed("image", "label", longest=32)(frame)
        >>> resized["image"].shape, resized["label"].shape
        (torch.Size([3, 24, 32]), torch.Size([1, 24, 32]))
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection = (),
        *,
        size: Sequence[int] | None = None,
        longest: int | None = None,
        factor: float | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__((*ensure_tuple(keys), *ensure_tuple(label_keys)), allow_missing_keys)
        given = [one for one in (size, longest, factor) if one is not None]
        if len(given) != 1 or min(ensure_tuple(given[0])) <= 0:
            raise SettingError(
                f"one positive size, longest or factor is needed, got {size}, {longest} and {factor}"
            )
        self.label_keys = ensure_tuple(label_keys)
        self.size, self.longest, self.factor = size, longest, factor

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize every image and every mask."""
        result = dict(data)
        for key in self.key_iterator(result):
            frame = result[key]
            size = self._new_size(*frame.shape[1:])
            if key in self.label_keys:
                # MONAI resizes in float32, which holds the values of a mask exactly.
                result[key] = Resize(size, mode="nearest-exact")(frame).to(frame.dtype)
            else:
                result[key] = bicubic_resize(frame, size).clamp(0, 1)
        return result

    def _new_size(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            rows, columns = self.size
            return int(rows), int(columns)
        factor = self.factor or max(height, width) / (self.longest or 1)
        return reduced_size(height, width, factor)


def reduced_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """Rows and columns of a frame whose sides are divided by a factor: rounded, and at least 1.

    Example:
        >>> reduced_size(360, 640, 640 / 100)
        (56, 100)
    """
    return max(1, round(height / factor)), max(1, round(width / factor))
