"""Axis order: the slice axis last, by exchanging axes and never by resampling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, RandomizableTransform
from torch import Tensor

from medsr.errors import SettingError
from medsr.geometry import slice_axis, to_slice_last
from medsr.metrics.volume import head_mask
from medsr.settings import as_whole_list

__all__ = ["RandSharpAxisLastd", "SliceAxisLast", "SliceAxisLastd", "permute_spatial"]


def permute_spatial(image: Tensor, order: Sequence[int]) -> MetaTensor:
    """Exchange the spatial axes of a channel-first image and the columns of its affine alike.

    Shape:
        ``(C, X, Y, Z)`` to ``(C, *[X, Y, Z][order])``.

    Example:
        >>> permute_spatial(MetaTensor(torch.zeros(1, 2, 3, 4)), (1, 2, 0)).shape
        torch.Size([1, 3, 4, 2])
    """
    affine = np.asarray(image.affine if isinstance(image, MetaTensor) else np.eye(4), dtype=np.float64)
    meta = {k: v for k, v in image.meta.items() if k != "affine"} if isinstance(image, MetaTensor) else {}
    values = image.as_tensor() if isinstance(image, MetaTensor) else image
    values = values.permute(0, *(1 + axis for axis in order))
    return MetaTensor(values, affine=torch.as_tensor(affine[:, [*order, 3]]), meta=meta)


class SliceAxisLast(InvertibleTransform):
    """Bring the slice axis, the one with the largest spacing, to the end.

    Sagittal and coronal stacks keep their voxels: only axes are exchanged. ``monai.transforms.Orientation`` was
    considered: it sorts axes by anatomy, which puts the slice axis of a sagittal scan first.

    Args:
        force: accept near-isotropic volumes; their last axis then counts as the slice axis.

    Shape:
        ``(C, X, Y, Z)``, any axis order, to ``(C, H, W, D)``.

    Raises:
        GeometryError: for a near-isotropic volume without ``force``, and for an unusable affine.

    Example:
        >>> sagittal = MetaTensor(torch.zeros(1, 4, 32, 32), affine=torch.diag(torch.tensor([4.0, 1, 1, 1])))
        >>> SliceAxisLast()(sagittal).shape
        torch.Size([1, 32, 32, 4])
    """

    def __init__(self, *, force: bool = False) -> None:
        self.force = force

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """Permute, and remember the permutation."""
        name = str(image.meta.get("filename_or_obj", "image")).replace("\\", "/").rsplit("/", 1)[-1]
        order = to_slice_last(slice_axis(image.affine, force=self.force, name=name))
        result = permute_spatial(image, order)
        result.applied_operations = list(image.applied_operations)
        self.push_transform(result, extra_info={"order": order})
        return result

    def inverse(self, image: MetaTensor) -> MetaTensor:
        """Restore the order of the axes; the number of slices may have changed."""
        order = self.pop_transform(image)["extra_info"]["order"]
        operations = list(image.applied_operations)
        result = permute_spatial(image, [int(i) for i in np.argsort([int(o) for o in order])])
        result.applied_operations = operations
        return result


class SliceAxisLastd(MapTransform, InvertibleTransform):
    """Dictionary form of :class:`SliceAxisLast`.

    Example:
        >>> item = {"image": MetaTensor(torch.zeros(1, 4, 8, 8), affine=torch.diag(torch.tensor([4.0, 1, 1, 1])))}
        >>> SliceAxisLastd("image")(item)["image"].shape
        torch.Size([1, 8, 8, 4])
    """

    def __init__(
        self, keys: KeysCollection, *, force: bool = False, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = SliceAxisLast(force=force)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Permute every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.transform(result[key])
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Restore the order of the axes of every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.transform.inverse(result[key])
        return result


class RandSharpAxisLastd(MapTransform, RandomizableTransform):
    """Cut a random block whose last axis is one along which the volume is sharp, in a random orientation.

    This is where self-supervision comes from: an in-plane axis plays the slice axis, so that degrading it gives
    a pair with a known answer. All axes of an isotropic volume qualify; of a thick-slice volume that was
    interpolated, only the two in-plane axes (``meta["sharp_axes"]``).

    Args:
        keys: images on one grid; the first decides where the foreground is.
        size: block size ``(H, W, L)``, ``L`` along the sharp axis. A volume that is smaller is padded by its edge.
        foreground: smallest share of foreground voxels; after ten draws the best block is taken.
        shuffle: exchange the first two axes at random.
        label_key: a mask or probabilities; every second block is the best of ten in how much of it it holds.
        axes: the sharp axes, instead of what the metadata say.
        step: blocks start at whole multiples of it along the last axis, rounded to voxels: with the ratio of a
            super-resolved scan they hold whole slices of it.
        foreground_key: where :class:`~medsr.transforms.intensity.PercentileToUnitd` has put the foreground; without it
            the foreground is found anew.

    Shape:
        ``(C, X, Y, Z)`` to ``(C, H, W, L)``.

    Example:
        >>> item = {"image": MetaTensor(torch.rand(1, 20, 20, 20))}
        >>> RandSharpAxisLastd("image", size=(8, 8, 16))(item)["image"].shape
        torch.Size([1, 8, 8, 16])
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Sequence[int] = (48, 48, 64),
        foreground: float = 0.3,
        *,
        shuffle: bool = True,
        label_key: str | None = None,
        axes: Sequence[int] | None = None,
        step: float = 1.0,
        foreground_key: str = "foreground",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        if step < 1:
            raise SettingError(f"step must be at least 1 voxel, got {step:g}")
        self.step = float(step)
        self.size = tuple(as_whole_list("block_size", size, 1))
        self.foreground, self.shuffle = float(foreground), shuffle
        self.label_key, self.axes, self.foreground_key = label_key, axes, foreground_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Cut the same block from every key."""
        result = dict(data)
        keys = list(self.key_iterator(result))
        first = result[keys[0]]
        mask = result.get(self.foreground_key)
        mask = torch.as_tensor(head_mask(first[0])) if mask is None else torch.as_tensor(mask)
        # A head is told from every fourth voxel; a lesion may lie between them.
        share, every = self.foreground, 4
        if self.label_key is not None and self.R.random() < 0.5:
            label = torch.as_tensor(result[self.label_key]).amax(dim=0) > 0.5
            mask, share, every = (label, 1.0, 1) if label.any() else (mask, share, every)
        order, block = self._draw(first, mask, share, every)
        flips = [axis + 1 for axis in range(3) if self.R.random() < 0.5]
        for key in keys:
            values = result[key].as_tensor() if isinstance(result[key], MetaTensor) else result[key]
            values = values.permute(0, *(1 + axis for axis in order))[(slice(None), *block)]
            result[key] = self._padded(values).flip(flips).contiguous()
        return result

    def _draw(
        self, image: Tensor, mask: Tensor, wanted: float, every: int
    ) -> tuple[list[int], tuple[slice, ...]]:
        meta = image.meta if isinstance(image, MetaTensor) else {}
        sharp = [int(axis) for axis in self.axes or meta.get("sharp_axes", (0, 1, 2))]
        best: tuple[float, list[int], tuple[slice, ...]] | None = None
        for _ in range(10):
            last = sharp[self.R.randint(len(sharp))]
            others = [axis for axis in range(3) if axis != last]
            order = [*(self.R.permutation(others).tolist() if self.shuffle else others), last]
            shape = [image.shape[1 + axis] for axis in order]
            steps = (1.0, 1.0, self.step)
            starts = [
                round(step * self.R.randint(max(1, int((n - s) / step) + 1)))
                for n, s, step in zip(shape, self.size, steps, strict=True)
            ]
            block = tuple(slice(start, start + s) for start, s in zip(starts, self.size, strict=True))
            looked_at = mask.permute(order)[block][::every, ::every, ::every]
            share = int(looked_at.count_nonzero()) / looked_at.numel()
            if best is None or share > best[0]:
                best = (share, order, block)
            if share >= wanted:
                break
        assert best is not None
        return best[1], best[2]

    def _padded(self, values: Tensor) -> Tensor:
        """Repeat the edges of a volume that is smaller than a block, along the last axis in whole steps before it."""
        missing = [max(0, s - n) for s, n in zip(self.size, values.shape[1:], strict=True)]
        if not any(missing):
            return values
        before = [missing[0] // 2, missing[1] // 2, round(missing[2] // 2 // self.step * self.step)]
        pads = [p for m, b in zip(reversed(missing), reversed(before), strict=True) for p in (b, m - b)]
        return torch.nn.functional.pad(values[None], pads, mode="replicate")[0]
