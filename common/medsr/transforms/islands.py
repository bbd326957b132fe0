"""Masks without islands: what a network finds far from everything else that it finds, and too small to count."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medsr.errors import DataError, SettingError
from medsr.geometry import spacing_of
from medsr.io.loading import loaded_name

__all__ = ["RemoveIslandsd", "RemovedIslands", "checked_fraction", "remove_islands"]

_log = logging.getLogger(__name__)


class RemovedIslands(NamedTuple):
    """What was removed of one class: the number of islands, and of their voxels together."""

    islands: int
    voxels: int


def checked_fraction(value: float) -> float:
    """The setting ``min_island_fraction``, refused where it is no share, before hours of computing.

    Args:
        value: as it was given.

    Raises:
        SettingError: if it is not a number in [0, 1].

    Example:
        >>> checked_fraction(10)
        Traceback (most recent call last):
        medsr.errors.SettingError: min_island_fraction must be a number in [0, 1], 0 removes nothing; got 10
    """
    if not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise SettingError(
            f"min_island_fraction must be a number in [0, 1], 0 removes nothing; got {value!r}"
        )
    return float(value)


def remove_islands(
    mask: npt.NDArray[Any], *, min_fraction: float
) -> tuple[npt.NDArray[Any], dict[int, RemovedIslands]]:
    """Set connected components to background that are small beside the largest one of their class.

    Voxels that touch with a face, an edge or a corner are connected (26 neighbours). The limit is a fraction, so that
    disease with several foci of comparable size keeps all of them.
    ``monai.transforms.KeepLargestConnectedComponent`` was considered: it keeps a fixed number of components.
    ``monai.transforms.RemoveSmallObjects`` knows absolute sizes only, which a small lesion falls below as a whole.
    Both label with scikit-image, which is optional here; SciPy is not.

    Args:
        mask: class indices, 0 is the background.
        min_fraction: a component with less than this share of the voxels of the largest one is an island, from 0,
            nothing is one, to 1, only the largest stays.

    Shape:
        ``(X, Y, Z)`` to the same, a copy; and what was removed, for each foreground class of the mask.

    Raises:
        DataError: if the mask does not hold integers.
        SettingError: if the fraction is not in [0, 1].

    Example:
        >>> mask = np.zeros((9, 1, 1), dtype=np.uint8)
        >>> mask[:4], mask[5], mask[7:] = 1, 1, 2
        >>> cleaned, removed = remove_islands(mask, min_fraction=0.5)
        >>> cleaned.ravel().tolist(), removed[1]
        ([1, 1, 1, 1, 0, 0, 0, 2, 2], RemovedIslands(islands=1, voxels=1))
    """
    from scipy.ndimage import find_objects, generate_binary_structure, label

    limit = checked_fraction(min_fraction)
    if not np.issubdtype(mask.dtype, np.integer):
        raise DataError(
            f"a mask must hold class indices as integers, got {mask.dtype}; take the argmax first"
        )
    cleaned, removed = mask.copy(), {}
    touching = generate_binary_structure(mask.ndim, mask.ndim)
    # A class is looked at in its box: a lesion is a thousandth of a head.
    for index, box in enumerate(find_objects(mask), start=1):
        if box is None:
            continue
        components, _ = label(mask[box] == index, touching)
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        # The quotient, because 0.1 * 70 voxels is more than 7.
        is_island = sizes / sizes.max() < limit
        is_island[0] = False
        cleaned[box][is_island[components]] = 0
        removed[index] = RemovedIslands(int(is_island.sum()), int(sizes[is_island].sum()))
    return cleaned, removed


class RemoveIslandsd(MapTransform):
    """Apply :func:`remove_islands` to masks, and note in their metadata what was removed.

    ``meta["islands_removed"]`` maps the foreground classes of the mask to ``islands``, their number, and ``ml``, their
    volume on the grid of the mask: nothing vanishes in silence. Hence this comes after
    :class:`~medsr.transforms.through_plane.UpdateGeometryd`, which says what that grid is. Probabilities are no
    masks: they stay as the network gave them.

    Args:
        keys: masks, each on a grid of its own.
        min_fraction: see :func:`remove_islands`; 0 removes nothing.

    Shape:
        ``(1, X, Y, Z)`` class indices, to the same.

    Raises:
        DataError: if a mask does not hold integers.
        SettingError: if the fraction is not in [0, 1].

    Example:
        >>> mask = MetaTensor(torch.tensor([[[[1, 1, 1, 0, 1]]]]), affine=torch.diag(torch.tensor([10.0, 10, 4, 1])))
        >>> found = RemoveIslandsd("pred", min_fraction=0.5)({"pred": mask})["pred"]
        >>> found.ravel().tolist(), found.meta["islands_removed"]
        ([1, 1, 1, 0, 0], {1: {'islands': 1, 'ml': 0.4}})
    """

    def __init__(
        self, keys: KeysCollection, min_fraction: float = 0.1, *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.min_fraction = checked_fraction(min_fraction)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Clean every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            mask = result[key]
            values = mask.as_tensor()
            cleaned, removed = remove_islands(values[0].cpu().numpy(), min_fraction=self.min_fraction)
            voxel_ml = float(spacing_of(np.asarray(mask.affine, dtype=np.float64)).prod()) / 1000
            result[key] = MetaTensor(torch.as_tensor(cleaned)[None].to(values)).copy_meta_from(mask)
            result[key].meta["islands_removed"] = {
                index: {"islands": one.islands, "ml": round(one.voxels * voxel_ml, 6)}
                for index, one in removed.items()
            }
            for index, one in removed.items():
                if one.islands:
                    # Servers that write no report have a log.
                    _log.info(
                        "%s: %s: islands of class %d removed: %d, %.3g ml",
                        loaded_name(mask, "mask"), key, index, one.islands, one.voxels * voxel_ml,
                    )  # fmt: skip
        return result
