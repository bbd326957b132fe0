"""The loading transform of all bundles."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import MetaKeys, SpaceKeys

from medsr.io.cases import read_case

__all__ = ["LoadVolumed"]


class LoadVolumed(MapTransform):
    """Load NIfTI files and DICOM series folders as channel-first ``MetaTensor``, or fail with the reason.

    ``monai.transforms.LoadImaged`` was considered: when its reader fails it goes on to the next one, also if
    a reader was named, and ITK accepts truncated files, turns NaN into finite values and opens ``x.nii`` when
    asked for ``x.nii.gz``. A wrong volume is worse than none.

    The metadata hold ``affine`` and ``original_affine`` (RAS+, mm, float64), ``spatial_shape``,
    ``filename_or_obj``, ``sform_code``, ``qform_code`` and ``notes``, one warning per line;
    ``slice_thickness_mm`` is present only when it is known (use ``meta.get``). Text and absence survive the
    default collate function of a loader; a list of varying length or None would stop it.

    Args:
        keys: items that hold a path; each is replaced by the image.
        allow_constant: accept images whose voxels are all equal, for example empty label maps.
        allow_missing_keys: skip items that a sample does not have.

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
        self, keys: KeysCollection, *, allow_constant: bool = False, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.allow_constant = allow_constant

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the path at every key by its image."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._load(result[key])
        return result

    def _load(self, path: Any) -> MetaTensor:
        array, header = read_case(path, allow_constant=self.allow_constant)
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
        return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=affine, meta=meta)
