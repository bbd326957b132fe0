"""Field of view of a fundus photograph: the lit part of the frame, without the dark surround of the camera."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple
from scipy import ndimage

from medsr.errors import DataError, SettingError

__all__ = ["FieldOfViewd", "field_of_view"]

ImageT = TypeVar("ImageT")

SMALLEST_SURROUND = 0.02
"""Share of the frame below which a dark region counts as picture, not as surround."""


def field_of_view(image: ImageT, *, threshold: float = 20 / 255, erosion: int = 0) -> ImageT:
    """Mask of the lit part of a fundus photograph: the largest region brighter than a threshold, holes filled.

    The surround is black and easy: over the full frame it flatters every method, and a mean over all pixels
    depends on how much of it the camera stored. Where less than 2 % of the frame lies outside, there is no
    surround and the whole frame is returned. ``monai.transforms.ForegroundMask``, ``KeepLargestConnectedComponent``
    and ``FillHoles`` were considered; they need scikit-image, which is not among the requirements, and do not
    erode. SciPy has the pieces.

    Args:
        image: intensities in [0, 1], or uint8; array or tensor.
        threshold: mean over the channels above which a pixel is lit, as a share of full intensity.
        erosion: pixels that the mask withdraws from the surround, so that no window of ``2 * erosion + 1`` pixels
            about a pixel inside touches it. The edges of the frame do not erode.

    Shape:
        ``(C, H, W)`` to ``(H, W)``, boolean; a tensor gives a tensor on its device.

    Raises:
        DataError: if the image is not ``(C, H, W)``, or nothing is lit or left after erosion.
        SettingError: if ``threshold`` lies outside [0, 1) or ``erosion`` is negative.

    Example:
        >>> frame = np.zeros((3, 8, 8))
        >>> frame[:, 2:6, 2:6] = 0.5
        >>> int(field_of_view(frame).sum()), int(field_of_view(frame, erosion=1).sum())
        (16, 4)
    """
    if not 0 <= threshold < 1:
        raise SettingError(f"threshold must lie in [0, 1), got {threshold}")
    if erosion < 0 or int(erosion) != erosion:
        raise SettingError(f"erosion must be a whole number of pixels >= 0, got {erosion}")
    values: Any = image.detach().cpu() if isinstance(image, torch.Tensor) else image
    if isinstance(values, torch.Tensor) and values.dtype == torch.bfloat16:
        values = values.float()
    array = np.asarray(values)
    if array.ndim != 3 or array.size == 0:
        raise DataError(f"field_of_view: the image must be (C, H, W), got shape {array.shape}")
    full = 255 if array.dtype == np.uint8 else 1
    lit = array.mean(axis=0, dtype=np.float32) > threshold * full
    if not lit.any():
        raise DataError(f"field_of_view: no pixel is brighter than {threshold:.3g} of full intensity")
    regions, _ = ndimage.label(lit)
    sizes = np.bincount(regions.ravel())
    inside = np.asarray(ndimage.binary_fill_holes(regions == 1 + np.argmax(sizes[1:])))
    if inside.mean() > 1 - SMALLEST_SURROUND:
        inside = np.ones_like(inside)
    if erosion:
        inside = np.asarray(ndimage.minimum_filter(inside, size=2 * int(erosion) + 1, mode="nearest"))
    if not inside.any():
        raise DataError(f"field_of_view: nothing is left after an erosion of {erosion} pixels")
    result: Any = torch.from_numpy(inside).to(image.device) if isinstance(image, torch.Tensor) else inside
    return result  # type: ignore[no-any-return]


class FieldOfViewd(MapTransform):
    """Dictionary form of :func:`field_of_view`, with a channel axis so that spatial transforms take the mask along.

    Args:
        keys: photographs.
        mask_keys: where the masks go, one for each key.
        threshold: as in :func:`field_of_view`.
        erosion: as in :func:`field_of_view`, in pixels.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(C, H, W)`` to ``(1, H, W)``, boolean; the mask of a MetaTensor has its metadata.

    Raises:
        SettingError: if there are not as many ``mask_keys`` as keys.

    Example:
        >>> FieldOfViewd("image")({"image": torch.ones(3, 4, 4)})["fov"].shape
        torch.Size([1, 4, 4])
    """

    def __init__(
        self,
        keys: KeysCollection,
        mask_keys: str | Sequence[str] = "fov",
        *,
        threshold: float = 20 / 255,
        erosion: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_keys = ensure_tuple(mask_keys)
        if len(self.mask_keys) != len(self.keys):
            raise SettingError(f"as many mask_keys as keys are needed, got {self.mask_keys} for {self.keys}")
        self.threshold, self.erosion = threshold, erosion

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Find the field of view of every key."""
        result = dict(data)
        for key, mask_key in self.key_iterator(result, self.mask_keys):
            image = result[key]
            mask = torch.as_tensor(field_of_view(image, threshold=self.threshold, erosion=self.erosion))[None]
            result[mask_key] = (
                MetaTensor(mask).copy_meta_from(image) if isinstance(image, MetaTensor) else mask
            )
        return result
