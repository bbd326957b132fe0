"""Through-plane inference in groups of slices and in-plane tiles: every slice is written once, none is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers import Inferer
from torch import Tensor, nn
from tqdm.auto import tqdm

from medsr.geometry import thin_positions
from medsr.inferers.precision import Example, checked_precision, choose_planes, choose_precision
from medsr.inferers.windows import Span, covering
from medsr.networks.blocks import with_parts
from medsr.settings import as_flag, as_whole

__all__ = ["SliceGroupInferer"]

_TRIAL = 32
"""Rows and columns of the block on which the precision is chosen."""


_PLANES = 4
"""Of each axis, that show the range of the features: beside some hundred planes to be read, few."""


class _Window(NamedTuple):
    """Thick slices that are read, thin slices that are made, and where in the plane."""

    thick: slice
    thin: slice
    tiles: list[tuple[Span, Span]]
    alone: bool


class SliceGroupInferer(Inferer):
    """Runs a slice network over a stack of any size in bounded memory.

    ``monai.inferers.SlidingWindowInferer`` was considered: its buffered mode cannot change the scale, it truncates
    non-integer zooms, blends along the slices and needs a count map of the size of the result. Here a group of
    thick slices is read together with ``context`` neighbours on either side, and only the thin slices inside the
    group are kept; in the plane, tiles overlap by ``halo`` voxels that are cut away. At the ends of the stack the
    group simply has fewer neighbours, as in training.

    A network that has ``first_estimate`` and ``refine`` makes its first estimate once for the whole stack, without
    tiles, and then turns it into the result in place, window by window. Nothing else has the size of the result.

    Args:
        group: thick slices per window whose results are kept.
        context: thick slices on either side that are read only.
        tile: in-plane size of a window without halo; None runs whole planes.
        halo: voxels around a tile that are read only, at least; windows at the border are shifted inwards, so that
            all have one size.
        batch: tiles that are processed together, where they are so small that this is faster.
        amp: ``auto``, ``float32`` or ``bfloat16``, see :func:`medsr.inferers.precision.choose_precision`. With
            ``auto`` the plane prior of a network runs in 8 bit integers where
            :func:`~medsr.inferers.precision.choose_planes` finds these faster and the result the same.
        both_directions: also run the reversed stack and average; reversing the input then exactly reverses the
            result, at twice the time.
        progress: show a progress bar.

    Shape:
        ``(B, C, H, W, D)`` to ``(B, C', H, W, round(D * scale))``, float32, on the device of the input.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> from medsr.networks.slice_sr import SliceSRNet
        >>> inferer = SliceGroupInferer(group=4, tile=16, halo=4, amp="float32")
        >>> inferer(torch.zeros(1, 1, 24, 24, 5), SliceSRNet(width=0.125), scale=2.5).shape
        torch.Size([1, 1, 24, 24, 13])
    """

    def __init__(
        self,
        group: int = 12,
        context: int = 3,
        tile: int | None = 96,
        *,
        halo: int = 8,
        batch: int = 2,
        amp: str = "auto",
        both_directions: bool = False,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.amp = checked_precision(amp)
        self.group, self.context, self.halo = (
            as_whole(name, value, least)
            for name, value, least in (("group", group, 1), ("context", context, 0), ("halo", halo, 0))
        )
        self.tile = None if tile is None else as_whole("tile", tile, 8)
        self.batch, self.progress = max(1, batch), progress
        self.both_directions = as_flag("both_directions", both_directions)
        self.used_dtype, self.int8_planes = torch.float32, False

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        scale: float | None = None,
        thickness: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        """Super-resolve the stack; ``scale`` defaults to the network's."""
        scale = float(getattr(network, "scale", 1.0) if scale is None else scale)
        if isinstance(network, nn.Module):
            network.eval()
        stack = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        settings = {"scale": scale, "thickness": float(thickness)}
        # In inference mode the result would have to be copied before anyone may change it.
        with torch.no_grad():
            self.used_dtype = self._precision(stack, network, settings)
            network = self._in_int8(stack, network, settings)
            result = self._run(stack, network, settings)
            if self.both_directions:
                other = self._run(stack.flip(-1), network, settings)
                for rows, reversed_rows in zip(result.unbind(2), other.unbind(2), strict=True):
                    rows.add_(reversed_rows.flip(-1)).mul_(0.5)
        return result

    def _precision(self, stack: Tensor, network: Any, settings: dict[str, float]) -> torch.dtype:
        """Tried on a block from the middle, where the head is."""
        sizes = (_TRIAL, _TRIAL, self.group)
        starts = [max(0, (n - size) // 2) for n, size in zip(stack.shape[2:], sizes, strict=True)]
        rows, columns, slices = (slice(k, k + size) for k, size in zip(starts, sizes, strict=True))
        # Two of it: PyTorch gives one small sample to a kernel that needs more memory than the whole result.
        block = stack[:1, :, rows, columns, slices].expand(2, -1, -1, -1, -1)
        positions = thin_positions(block.shape[-1], settings["scale"])
        return choose_precision(self.amp, partial(network, positions=positions, **settings), block)

    def _in_int8(self, stack: Tensor, network: Any, settings: dict[str, float]) -> Any:
        """The network with a faster plane prior, where it has one and that is the same."""
        # Not by attribute: a compiled network passes those of the network inside on, and would not use another one.
        prior = getattr(network, "_modules", {}).get("prior")
        self.int8_planes = False
        if self.amp != "auto" or prior is None:
            return network
        chosen = choose_planes(prior, *_some_planes(stack, **settings), other=self.used_dtype)
        self.int8_planes = chosen is not prior
        return with_parts(network, prior=chosen) if self.int8_planes else network

    def _run(self, stack: Tensor, network: Any, settings: dict[str, float]) -> Tensor:
        lower = self.used_dtype == torch.bfloat16
        autocast = partial(torch.autocast, stack.device.type, dtype=torch.bfloat16, enabled=lower)
        depth = stack.shape[-1]
        positions = thin_positions(depth, settings["scale"])
        refines = hasattr(network, "refine")
        result: Tensor | None = None
        if refines:
            with self._bar("first estimate", "plane", total=sum(stack.shape[2:4])) as bar, autocast():
                result = network.first_estimate(stack, positions=positions, advance=bar.update, **settings)
        for window in self._bar("super-resolution", "window", self._windows(stack, network, positions)):
            thin = window.thin
            parts = torch.cat(
                [stack[..., row.read, column.read, window.thick] for row, column in window.tiles]
            )
            given: dict[str, Any] = {**settings, "positions": positions[thin] - window.thick.start}
            estimate: Tensor | None = None
            if window.alone:
                row, column = window.tiles[0]
                estimate = result[..., row.place, column.place, thin]
                given["keep"] = (row.keep, column.keep)
            elif refines:
                # What lies in the halo may be refined already: it is cut away.
                estimate = torch.cat(
                    [result[..., row.read, column.read, thin] for row, column in window.tiles]
                )
            with autocast():
                found = (
                    network(parts, **given) if estimate is None else network.refine(estimate, parts, **given)
                )
            if window.alone:
                continue
            if result is None:
                result = found.new_empty(
                    len(stack), found.shape[1], *stack.shape[2:4], len(positions), dtype=torch.float32
                )
            for (row, column), one in zip(window.tiles, found.split(len(stack)), strict=True):
                result[..., row.place, column.place, thin] = one[..., row.keep, column.keep, :]
        assert result is not None
        return result

    def _windows(self, stack: Tensor, network: Any, positions: npt.NDArray[np.float64]) -> list[_Window]:
        height, width, depth = stack.shape[-3:]
        slabs = np.clip(np.floor(positions + 0.5).astype(int), 0, depth - 1)
        rows_of, columns_of = (covering(size, self.tile or size, self.halo) for size in (height, width))
        tiles = [(row, column) for row in rows_of for column in columns_of]
        rows = tiles[0][0].read.stop - tiles[0][0].read.start
        windows = []
        for first in range(0, depth, self.group):
            wanted = np.nonzero((slabs >= first) & (slabs < first + self.group))[0]
            if not len(wanted):
                continue
            thick = slice(max(0, first - self.context), min(depth, first + self.group + self.context))
            thin = slice(int(wanted[0]), int(wanted[-1]) + 1)
            on_cpu = stack.device.type == "cpu"
            alone = on_cpu and rows * (thick.stop - thick.start) > getattr(network, "alone_from", np.inf)
            together = 1 if alone else self.batch
            for k in range(0, len(tiles), together):
                chosen = tiles[k : k + together]
                # PyTorch gives small 3D convolutions on one sample to a kernel several times slower than for two.
                if len(chosen) * len(stack) == 1 and not alone and on_cpu:
                    chosen = chosen * 2
                windows.append(_Window(thick, thin, chosen, alone))
        return windows

    def _bar(
        self, what: str, unit: str, windows: list[_Window] | None = None, *, total: int | None = None
    ) -> tqdm[_Window]:
        # Disabled or not said: TQDM_DISABLE counts only where nothing is said.
        quiet = {} if self.progress else {"disable": True}
        return tqdm(windows, desc=what, unit=unit, total=total, leave=False, **quiet)


def _some_planes(stack: Tensor, *, scale: float, thickness: float) -> tuple[list[Example], list[Example]]:
    """Planes that show the range of features, the brightest and darkest voxels among them, and others for a trial."""
    image = stack[:, 0]
    extremes = [int(image.argmax()), int(image.argmin())]
    _, rows, columns, _ = np.unravel_index(extremes, tuple(image.shape))
    examples, trials = [], []
    for axis, through in ((2, rows), (3, columns)):
        even = np.linspace(0, stack.shape[axis] - 1, 2 * _PLANES + 1).round().astype(int)
        for chosen, planes in ((np.r_[even[1::2], through], examples), (even[2:-1:2], trials)):
            picked = stack.index_select(axis, torch.as_tensor(np.unique(chosen), device=stack.device))
            # One at a time: what the C library gets for the features of all together it keeps beside the result.
            one_by_one = picked.movedim(axis, 1).flatten(0, 1).split(1)
            planes.extend((plane, scale, thickness) for plane in one_by_one)
    return examples, trials
