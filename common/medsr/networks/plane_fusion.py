"""One estimate of a volume from the planes of both in-plane axes.

Papers:
    SMORE (planes of both in-plane axes, joined): IEEE TMI 40 (2021) 805-817, doi:10.1109/TMI.2020.3037187.
Code: written from the papers; the network that joins the planes is this project's own. Weights: part of a bundle's
``model.pt``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.geometry import thin_positions
from medsr.networks.plane_prior import HIDDEN, PlanePrior
from medsr.networks.position_readout import slabs_and_conditions

__all__ = ["JoinedPlanes", "PlaneFusion", "estimate_from_planes"]

_PIXELS_AT_ONCE = 40_000
"""Pixels that pass the plane prior together: measured on a CPU, a third faster than ten times as many."""

_SLOPE = 0.1
"""Of the activations below zero."""

_ROWS, _COLUMNS = 12, 32
"""Size of the blocks that are joined without gradients: larger ones need more memory, smaller ones more time."""


class PlaneFusion(nn.Module):
    """Joins what the planes of two axes say of the same volume, better than their mean does.

    Where the two agree they are mostly right; where they differ, the neighbourhood in all three directions tells
    which one to trust. A few 3D convolutions on the fine grid see both, and how far each thin slice lies from the
    middle of its thick one. The result starts as the mean. Labels are averaged.

    Args:
        channels: width.
        layers: number of convolutions, at least 2.

    Shape:
        Two readings ``(B, H, W, K)`` and ``(K, 3)`` conditions of
        :func:`~medsr.networks.position_readout.slabs_and_conditions` to ``(B, H, W, K)``.

    Raises:
        SettingError: if ``channels`` or ``layers`` is too small.

    Example:
        >>> reading = torch.rand(1, 8, 8, 4)
        >>> bool((PlaneFusion(4)(reading, reading, torch.zeros(4, 3)) == reading).all())
        True

    Reference:
        doi:10.1109/TMI.2020.3037187 (the mean's place in the method)
    """

    half_precision_safe = True

    def __init__(self, channels: int = 16, *, layers: int = 3) -> None:
        super().__init__()
        if channels < 1 or layers < 2:
            raise SettingError(f"channels must be >= 1 and layers >= 2, got {channels} and {layers}")
        self.first = nn.Conv3d(2, channels, 3, padding=1)
        self.condition = nn.Linear(4, channels, bias=False)
        self.middle = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=1) for _ in range(layers - 2))
        self.last = nn.Conv3d(channels, 1, 3, padding=1)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.exact_halo = layers

    def forward(self, first: Tensor, second: Tensor, conditions: Tensor) -> Tensor:
        """Join two readings of one volume; see the class for shapes."""
        mean = (first + second) / 2
        distances = torch.cat([conditions, conditions[:, :1].abs()], dim=1)
        # Differences are small beside intensities.
        features = self.first(torch.stack([mean, 4 * (first - second)], dim=1))
        # Leaky: the last layer starts at zero, and units that die before it has grown never learn.
        features += self.condition(distances).T[:, None, None, :]
        features = F.leaky_relu(features, _SLOPE, inplace=True)
        for layer in self.middle:
            features = F.leaky_relu(layer(features), _SLOPE, inplace=True)
        return mean + self.last(features)[:, 0].float()


class JoinedPlanes(nn.Module):
    """A plane prior and the network that joins its readings: the first estimate of a slice network, by itself.

    This is what the fusion is trained as: :class:`~medsr.networks.slice_sr.SliceSRNet` takes both from it.

    Args:
        channels: width of the fusion.
        label_classes: number of label channels behind the image channel.
        hidden: channels inside the blocks of the plane prior.
        scale: ratio that is used when ``forward`` is given none.

    Shape:
        ``(B, 1 + label_classes, H, W, D)`` to ``(B, 1 + label_classes, H, W, round(D * scale))``.

    Example:
        >>> JoinedPlanes(channels=2)(torch.zeros(1, 1, 8, 8, 4), scale=2.5).shape
        torch.Size([1, 1, 8, 8, 10])

    Reference:
        doi:10.1109/TMI.2020.3037187
    """

    size_multiple = 1
    half_precision_safe = True

    def __init__(
        self,
        channels: int = 16,
        *,
        label_classes: int = 0,
        hidden: Sequence[int] = HIDDEN,
        scale: float = 4.0,
    ) -> None:
        super().__init__()
        self.scale, self.label_classes = float(scale), int(label_classes)
        self.prior = PlanePrior(hidden=hidden, label_classes=label_classes, scale=scale)
        self.fusion = PlaneFusion(channels)
        self.exact_halo = self.prior.exact_halo + self.fusion.exact_halo

    def forward(
        self,
        image: Tensor,
        scale: float | None = None,
        thickness: float = 1.0,
        positions: Sequence[float] | None = None,
    ) -> Tensor:
        """Super-resolve a stack; arguments as :meth:`medsr.networks.slice_sr.SliceSRNet.forward`."""
        scale = self.scale if scale is None else float(scale)
        if positions is None:
            positions = thin_positions(image.shape[-1], scale)
        return estimate_from_planes(
            self.prior, self.fusion, image, scale=scale, thickness=thickness, positions=positions
        )


def estimate_from_planes(
    prior: PlanePrior,
    fusion: PlaneFusion | None,
    image: Tensor,
    *,
    scale: float,
    thickness: float,
    positions: Sequence[float] | npt.NDArray[np.float64],
    out: Tensor | None = None,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Read the planes of both in-plane axes and join them: by their mean, or by a fusion for the image channel.

    Without gradients a few planes at a time are read, and small blocks are joined, so that little memory is needed
    beside the result.

    Args:
        prior: reads planes.
        fusion: joins the readings; None for the mean.
        image: stack of thick slices.
        scale: slice spacing divided by the new slice spacing.
        thickness: slice thickness divided by slice spacing.
        positions: centres of the new slices in units of old slices, ascending where a fusion joins neighbours.
        out: where the result is written.
        advance: told, without gradients, how many more of the ``H + W`` planes have been read.

    Shape:
        ``(B, C, H, W, D)`` to ``(B, C, H, W, len(positions))``.

    Raises:
        SettingError: if there is a fusion and the positions do not ascend.

    Example:
        >>> planes = PlanePrior(channels=4, hidden=[8])
        >>> args = {"scale": 2.0, "thickness": 1.0, "positions": [-0.25, 0.25, 0.75, 1.25]}
        >>> estimate_from_planes(planes, None, torch.zeros(1, 1, 4, 6, 2), **args).shape
        torch.Size([1, 1, 4, 6, 4])
    """
    places = np.asarray(positions, dtype=np.float64)
    if fusion is not None and (np.diff(places) <= 0).any():
        raise SettingError(
            "positions of thin slices must ascend: each one is joined with its neighbours; sort them"
        )
    _, conditions = slabs_and_conditions(places, image.shape[-1], scale=scale, thickness=thickness)
    conditions = conditions.to(image.device)

    def read(planes: Tensor) -> Tensor:
        return (
            prior(planes.transpose(1, 2).flatten(0, 1), scale, thickness, places)
            .unflatten(0, (planes.shape[0], planes.shape[2]))
            .transpose(1, 2)
        )

    def read_into(planes: Tensor, target: Tensor) -> None:
        """Read a few planes ``(W, D)`` at a time, which stay in the processor's cache."""
        batch, _, height, width, depth = planes.shape
        few = max(1, _PIXELS_AT_ONCE // (batch * width * depth))
        for k in range(0, height, few):
            part = slice(k, min(k + few, height))
            target[:, :, part] = read(planes[:, :, part])
            if advance is not None:
                advance(part.stop - part.start)

    if torch.is_grad_enabled():
        # Training blocks are small, and a frozen prior saves nothing for gradients by itself.
        joined = _joined(fusion, read(image.transpose(2, 3)).transpose(2, 3), read(image), conditions)
        return joined if out is None else out.copy_(joined)
    if out is None:
        out = torch.empty(*image.shape[:4], len(places), device=image.device)
    read_into(image.transpose(2, 3), out.transpose(2, 3))
    _join_in_bands(read_into, fusion, image, conditions=conditions, out=out)
    return out


def _join_in_bands(
    read_into: Callable[[Tensor, Tensor], None],
    fusion: PlaneFusion | None,
    image: Tensor,
    *,
    conditions: Tensor,
    out: Tensor,
) -> None:
    """Read the planes of the rows and join them with the readings of the columns, which ``out`` holds."""
    halo = 0 if fusion is None else fusion.exact_halo
    height = image.shape[2]
    first_above = second_above = out[:, :, :0]
    for start in range(0, height, _ROWS):
        stop = min(start + _ROWS, height)
        seen = min(stop + halo, height)
        # Rows that the band before has read already.
        have = min(start + halo, height) if start else 0
        fresh = torch.empty_like(out[:, :, have:seen])
        read_into(image[:, :, have:seen], fresh)
        first = torch.cat([first_above, out[:, :, start:seen]], dim=2)
        second = torch.cat([second_above, fresh], dim=2)
        above = first_above.shape[2]
        end = above + stop - start
        out[:, :, start:stop] = _joined_in_blocks(fusion, first, second, conditions)[:, :, above:end]
        # The next band needs them as they were read.
        kept = slice(max(0, end - halo), None)
        first_above, second_above = first[:, :, kept.start : end], second[:, :, kept]


def _joined_in_blocks(
    fusion: PlaneFusion | None, first: Tensor, second: Tensor, conditions: Tensor
) -> Tensor:
    """Join two blocks of columns at a time: PyTorch's CPU gives 3D convolutions of one sample to a slow kernel."""
    if fusion is None:
        return _joined(None, first, second, conditions)
    width, halo = first.shape[3], fusion.exact_halo
    step = math.ceil(width / (2 * math.ceil(width / (2 * _COLUMNS))))
    size = min(width, step + 2 * halo)
    starts = [min(max(0, left - halo), width - size) for left in range(0, width, step)]
    result = torch.empty_like(first)
    for k in range(0, len(starts), 2):
        pair = starts[k : k + 2]
        blocks = (torch.cat([part[:, :, :, left : left + size] for left in pair]) for part in (first, second))
        for number, (left, joined) in enumerate(
            zip(pair, _joined(fusion, *blocks, conditions).split(len(first)), strict=True), start=k
        ):
            kept = slice(number * step, (number + 1) * step)
            result[:, :, :, kept] = joined[:, :, :, kept.start - left : kept.stop - left]
    return result


def _joined(fusion: PlaneFusion | None, first: Tensor, second: Tensor, conditions: Tensor) -> Tensor:
    mean = (first + second) / 2
    if fusion is None:
        return mean
    image = fusion(first[:, 0], second[:, 0], conditions).unsqueeze(1)
    return torch.cat([image, mean[:, 1:]], dim=1) if mean.shape[1] > 1 else image
