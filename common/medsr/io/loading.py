"""The loading transforms of all bundles: volumes, and photographs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import MetaKeys, SpaceKeys

from medsr.errors import DataError, SettingError
from medsr.io.cases import read_case
from medsr.io.images import read_image

__all__ = ["LUMA", "LoadImageFiled", "LoadVolumed", "loaded_name"]

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in brightness, ITU-R BT.601."""


class LoadVolumed(MapTransform):
    """Load NIfTI files and DICOM series folders as channel-first ``MetaTensor``, or fail with the reason.

    ``monai.transforms.LoadImaged`` was considered: when its reader fails it goes on to the next one, also if
    a reader was named, and ITK accepts truncated files, turns NaN into finite values and opens ``x.nii`` when
    asked for ``x.nii.gz``. A wrong volume is worse than none.

    The metadata hold ``affine`` and ``original_affine`` (RAS+, mm, float64), ``spatial_shape``,
    ``filename_or_obj``, ``sform_code``, ``qform_code`` and ``notes``, one warning per line;
    ``slice_thickness_mm`` is present only when it is known (use ``meta.get``), and so are ``step``, the distance of
    the volumes of a 4D image, and ``step_unit``. Text and absence survive the default collate function of a loader;
    a list of varying length or None would stop it.

    Args:
        keys: items that hold a path; each is replaced by the image.
        allow_constant: accept images whose voxels are all equal, for example empty label maps.
        allow_missing_keys: skip items that a sample does not have.
        series_uid: which series of a DICOM folder that holds several: its SeriesInstanceUID or the end of it.
        follow_links: read slices behind links that leave their folder, see :func:`~medsr.io.cases.list_folder`.

    Shape:
        - Output: ``(C, X, Y, Z)`` float32; C is the fourth axis of the file, or 1.

    Raises:
        DataError: if a file cannot be read whole, see :func:`medsr.io.cases.read_case`.

    Example:
        >>> LoadVolumed(keys="image")({"image": "none.nii.gz"})
        Traceback (most recent call last):
        medsr.errors.DataError: none.nii.gz: no such file
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        allow_constant: bool = False,
        allow_missing_keys: bool = False,
        series_uid: str | None = None,
        follow_links: bool | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reading: dict[str, Any] = {
            "allow_constant": allow_constant,
            "series_uid": series_uid,
            "follow_links": follow_links,
        }

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the path at every key by its image."""
        result = dict(data)
        for key in self.key_iterator(result):
            try:
                result[key] = self._load(result[key])
            except DataError as error:
                if key == "image":
                    raise
                # In a labelled folder the mask is called like its image.
                raise type(error)(f"{key} {error}") from None
        return result

    def _load(self, path: Any) -> MetaTensor:
        array, header = read_case(path, **self.reading)
        array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
        affine = torch.from_numpy(header.affine.copy())
        meta: dict[str, Any] = {
            MetaKeys.ORIGINAL_AFFINE.value: affine.clone(),
            MetaKeys.SPATIAL_SHAPE.value: np.asarray(header.shape[:3]),
            MetaKeys.ORIGINAL_CHANNEL_DIM.value: 0,
            MetaKeys.SPACE.value: SpaceKeys.RAS.value,
            "filename_or_obj": str(path),
            "sform_code": header.sform_code,
            "qform_code": header.qform_code,
            "notes": "\n".join(header.notes),
        }
        if header.slice_thickness_mm is not None:
            meta["slice_thickness_mm"] = header.slice_thickness_mm
        if header.step is not None:
            meta.update(step=header.step, step_unit=header.step_unit)
        return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=affine, meta=meta)


class LoadImageFiled(MapTransform):
    """Load PNG, JPEG, TIFF, BMP and DICOM photographs as channel-first ``MetaTensor``, or fail with the reason.

    ``monai.transforms.LoadImaged`` with ``PILReader`` was considered: it leaves the values in 0..255 or 0..65535
    without telling which, reads 16-bit colour as 8 bits and palettes as their indices, swaps rows and columns,
    ignores the EXIF orientation and keeps neither colour profile nor resolution.

    The metadata hold ``spatial_shape`` (rows, columns), ``filename_or_obj``, ``notes``, one warning per line, and the
    encoding of the file as text and numbers, which survive the default collate function of a loader:
    :meth:`medsr.io.image_encoding.ImageEncoding.from_meta` gives it back to the writer. The affine is the identity, in
    pixels.

    Args:
        keys: items that hold a path; each is replaced by the image. An alpha channel is added under
            ``f"{key}_alpha"`` when the file has one, and only then.
        allow_missing_keys: skip items that a sample does not have.
        channels: give every image so many, for training on a mixed folder: 3 repeats grey, 1 takes the luma of
            colour. The metadata stay those of the file. Default: as in the file.

    Shape:
        - Output: ``(C, H, W)`` float32 in [0, 1], C = 1 or 3; alpha ``(1, H, W)``.

    Raises:
        DataError: if a file cannot be read whole and exactly, see :func:`medsr.io.images.read_image`.
        SettingError: for another number of channels.

    Example:
        >>> LoadImageFiled(keys="image")({"image": "none.png"})
        Traceback (most recent call last):
        medsr.errors.DataError: none.png: no such file

    Reference:
        Luma: Recommendation ITU-R BT.601-7, 2011, full range.
    """

    def __init__(
        self, keys: KeysCollection, allow_missing_keys: bool = False, *, channels: int | None = None
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if channels not in (None, 1, 3):
            raise SettingError(f"channels must be 1 or 3, got {channels}")
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the path at every key by its image."""
        result = dict(data)
        for key in self.key_iterator(result):
            path = result[key]
            image = read_image(path)
            meta: dict[str, Any] = {
                MetaKeys.SPATIAL_SHAPE.value: np.asarray(image.values.shape[1:]),
                MetaKeys.ORIGINAL_CHANNEL_DIM.value: 0,
                "filename_or_obj": str(path),
                "notes": "\n".join(image.notes),
                **image.encoding.to_meta(),
            }
            result[key] = MetaTensor(self._with_channels(torch.from_numpy(image.values)), meta=meta)
            if image.alpha is not None:
                result[f"{key}_alpha"] = MetaTensor(torch.from_numpy(image.alpha), meta=dict(meta))
        return result

    def _with_channels(self, image: torch.Tensor) -> torch.Tensor:
        if self.channels in (None, len(image)):
            return image
        if self.channels == 3:
            return image.repeat(3, 1, 1)
        return torch.einsum("c,chw->hw", image.new_tensor(LUMA), image)[None]


def loaded_name(image: Any, key: Hashable) -> str:
    """What to call an image in a message: its file's name, for the folder may say more than it should, else its key.

    Args:
        image: a tensor, with the metadata of its reader or without.
        key: where it is in its item.

    Example:
        >>> loaded_name(MetaTensor(torch.zeros(1), meta={"filename_or_obj": "jane_doe/scan.png"}), "image")
        'scan.png'
    """
    path = str(image.meta.get("filename_or_obj", "")) if isinstance(image, MetaTensor) else ""
    return path.replace("\\", "/").rsplit("/", 1)[-1] or str(key)
