"""Through-plane super-resolution of single planes at any ratio: the estimate that the slice network starts from.

Papers:
    SMORE (learning from the sharp in-plane axes): IEEE TMI 40 (2021) 805-817, doi:10.1109/TMI.2020.3037187.
    WDSR (wide activation): arXiv 1808.08718.
Code: written from the papers. Weights: part of a bundle's ``model.pt``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.geometry import thin_positions
from medsr.networks.blocks import ResidualBlocks, with_parts, without_autocast
from medsr.networks.int8 import Int8ResidualBlocks
from medsr.networks.position_readout import PositionReadout, slabs_and_conditions
from medsr.resampling import interpolation_matrix
from medsr.settings import as_whole_list, as_wholes

__all__ = ["HIDDEN", "PlanePrior", "interpolated"]

HIDDEN = (8, 16, 48, 56, 64, 48, 48, 48, 48, 48)
"""Channels inside the blocks: what training left of 64 each. The others never answered, or hardly ever."""


class PlanePrior(nn.Module):
    """Turns a plane whose last axis is coarse into a fine one, for any ratio, with one set of weights.

    Wide-activation blocks on the coarse grid, then a position-conditioned read-out: the residual on the cubic B-spline
    interpolation of the same field of view. Planes need far fewer examples than volumes: it learns in minutes what
    takes a slice network hours, and it is trained on the planes of a thick scan itself without any mismatch,
    because no through-plane context enters. :class:`~medsr.networks.wdsr.PlaneSRNet` is the published form with
    one weight set per ratio.

    Args:
        channels: width of the trunk.
        hidden: channels inside each wide-activation block, before and after its activation.
        basis: number of maps that are read out.
        label_classes: number of label channels behind the image channel; their results are logits.
        scale: ratio that is used when ``forward`` is given none.

    Shape:
        ``(B, 1 + label_classes, H, D)`` to ``(B, 1 + label_classes, H, round(D * scale))``.

    Raises:
        SettingError: if a size is not positive.

    Example:
        >>> PlanePrior(channels=8, hidden=[16])(torch.zeros(1, 1, 16, 4), scale=2.5).shape
        torch.Size([1, 1, 16, 10])

    Reference:
        doi:10.1109/TMI.2020.3037187
    """

    size_multiple = 1
    half_precision_safe = True

    def __init__(
        self,
        channels: int = 32,
        hidden: Sequence[int] = HIDDEN,
        *,
        basis: int = 32,
        label_classes: int = 0,
        scale: float = 4.0,
    ) -> None:
        super().__init__()
        channels, basis = as_wholes(1, channels=channels, basis=basis)
        hidden = as_whole_list("hidden", hidden, 1)
        if not hidden:
            raise SettingError("hidden must hold a number for each block, got none")
        self.scale, self.label_classes = float(scale), int(label_classes)
        self.head = nn.Conv2d(1 + label_classes, channels, 3, padding=1)
        self.condition = nn.Linear(2, channels)
        self.blocks = ResidualBlocks(
            nn.Sequential(
                nn.Conv2d(channels, inside, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(inside, channels, 3, padding=1),
            )
            for inside in hidden
        )
        self.to_basis = nn.Conv2d(channels, basis, 3, padding=1)
        self.readout = PositionReadout(basis, 1 + label_classes)
        nn.init.zeros_(self.condition.weight)
        for block in self.blocks:
            # Starts as the identity: weights of a shallower network can be trained on in a deeper one.
            nn.init.zeros_(block[2].weight)
            nn.init.zeros_(block[2].bias)
        # Head, two convolutions per block, and the basis read one neighbour each.
        self.exact_halo = 2 * len(hidden) + 2

    def forward(
        self,
        image: Tensor,
        scale: float | None = None,
        thickness: float = 1.0,
        positions: Sequence[float] | None = None,
    ) -> Tensor:
        """Super-resolve planes; arguments as :meth:`medsr.networks.slice_sr.SliceSRNet.forward`."""
        scale = self.scale if scale is None else float(scale)
        depth = image.shape[-1]
        if positions is None:
            positions = thin_positions(depth, scale)
        positions = np.asarray(positions, dtype=np.float64)
        slabs, conditions = slabs_and_conditions(positions, depth, scale=scale, thickness=float(thickness))
        weights, bias = self.readout(conditions.to(image.device))
        residual = _read(self._basis_maps(image, scale, thickness), slabs, weights, bias)
        return interpolated(image, positions) + residual

    @torch.no_grad()
    def pruned(self, hidden: Sequence[int], examples: Iterable[tuple[Tensor, float, float]]) -> PlanePrior:
        """A smaller prior without the channels that add least inside the blocks.

        What counts is a channel's mean over the examples times the sum of its outgoing weights' sizes. Of a channel
        that goes the mean stays, in the bias behind it.

        Args:
            hidden: how many channels each block keeps.
            examples: planes, scale and thickness, as :meth:`forward` takes them.

        Raises:
            SettingError: if a block has fewer channels, or there are more or fewer blocks.

        Example:
            >>> planes = PlanePrior(channels=8, hidden=[16, 16]).pruned([4, 12], [(torch.rand(2, 1, 8, 4), 2.0, 1.0)])
            >>> [block[0].out_channels for block in planes.blocks]
            [4, 12]
        """
        there = [block[0].out_channels for block in self.blocks]
        if len(hidden) != len(there) or any(map(operator.gt, hidden, there)):
            raise SettingError(f"hidden must be at most {there}, got {list(hidden)}")
        sums, count = [torch.zeros(size) for size in there], 0
        hooks = [
            block[1].register_forward_hook(partial(_add_means, sums[number]))
            for number, block in enumerate(self.blocks)
        ]
        try:
            for planes, scale, thickness in examples:
                self(planes, scale, thickness)
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
        state = self.state_dict()
        for number, (size, total) in enumerate(zip(hidden, sums, strict=True)):
            into, out = f"blocks.{number}.0", f"blocks.{number}.2"
            means, weight = total / max(1, count), state[f"{out}.weight"]
            order = (means * weight.abs().sum((0, 2, 3))).argsort(descending=True, stable=True)
            kept, gone = order[:size].sort().values, order[size:]
            state[f"{out}.bias"] = state[f"{out}.bias"] + weight[:, gone].sum((2, 3)) @ means[gone]
            state[f"{out}.weight"] = weight[:, kept]
            for part in ("weight", "bias"):
                state[f"{into}.{part}"] = state[f"{into}.{part}"][kept]
        smaller = PlanePrior(
            self.head.out_channels,
            hidden,
            basis=self.readout.basis,
            label_classes=self.label_classes,
            scale=self.scale,
        )
        smaller.load_state_dict(state)
        return smaller

    @torch.no_grad()
    def in_int8(self, examples: Iterable[tuple[Tensor, float, float]]) -> PlanePrior:
        """The same for inference, with the blocks in 8 bit integers; everything else is shared.

        The result can be neither copied deeply nor pickled: its packed weights are oneDNN's.

        Args:
            examples: planes, scale and thickness, as :meth:`forward` takes them: they show the range of the features.

        Raises:
            ValueError: if the examples give features that are not finite.

        Example:
            >>> from medsr.networks.int8 import native_int8
            >>> prior, planes = PlanePrior(channels=8, hidden=[16]).eval(), torch.rand(2, 1, 8, 4)
            >>> fast = prior.in_int8([(planes, 2.0, 1.0)]) if native_int8("cpu") else prior
            >>> torch.allclose(fast(planes, 2.0), prior(planes, 2.0), atol=0.01)
            True
        """
        features = (self._features(*example) for example in examples)
        return with_parts(self, blocks=Int8ResidualBlocks(self.blocks, features))

    def _features(self, image: Tensor, scale: float, thickness: float) -> Tensor:
        """What the blocks see."""
        settings = torch.tensor(
            [1 / float(scale), float(thickness)], dtype=torch.float32, device=image.device
        )
        return self.head(image) + self.condition(settings).view(1, -1, 1, 1)

    def _basis_maps(self, image: Tensor, scale: float, thickness: float) -> Tensor:
        """Maps ``(B, M, H, D)`` that are read out, float32."""
        features = self.blocks(self._features(image, scale, thickness))
        return F.relu(self.to_basis(features)).float()


def _add_means(total: Tensor, _: nn.Module, __: tuple[Tensor], features: Tensor) -> None:
    total += features.mean((0, 2, 3))


def interpolated(image: Tensor, positions: npt.NDArray[np.float64]) -> Tensor:
    """Cubic B-spline interpolation of the first channel, linear interpolation of the label channels as logits.

    Exact under autocast, too: bfloat16 would round the intensities themselves.

    Shape:
        ``(B, 1 + K, ..., D)`` to ``(B, 1 + K, ..., len(positions))``, float32.

    Example:
        >>> interpolated(torch.ones(1, 2, 3, 2), np.array([0.25, 0.75])).shape
        torch.Size([1, 2, 3, 2])
    """
    with without_autocast(image):
        return _interpolated(image, positions)


def _interpolated(image: Tensor, positions: npt.NDArray[np.float64]) -> Tensor:
    depth = image.shape[-1]
    kinds = ("cubic", "linear") if image.shape[1] > 1 else ("cubic",)
    cubic, *linear = (
        torch.as_tensor(interpolation_matrix(depth, positions, kind=kind)).to(image.device, torch.float32).T
        for kind in kinds
    )
    if not linear:
        return image.float() @ cubic
    labels = (image[:, 1:].float() @ linear[0]).clamp(0.01, 0.99).logit()
    return torch.cat([image[:, :1].float() @ cubic, labels], dim=1)


def _read(basis: Tensor, slabs: npt.NDArray[np.int64], weights: Tensor, bias: Tensor) -> Tensor:
    """Weighted sums of the maps of each position's slab, ``(B, C, H, K)``.

    All positions of a slab are read in one product, padded to the largest number of positions in a slab.
    """
    depth = basis.shape[-1]
    counts = np.bincount(slabs, minlength=depth)
    # In the order of the slabs the rank in the slab is the distance to the slab's first position.
    order = np.argsort(slabs, kind="stable")
    ranks = np.empty_like(slabs)
    ranks[order] = np.arange(len(slabs)) - (np.cumsum(counts) - counts)[slabs[order]]
    most = int(counts.max())
    place = torch.as_tensor(slabs * most + ranks, device=basis.device)
    padded = weights.new_zeros(depth * most, *weights.shape[1:]).index_copy(0, place, weights)
    padded = padded.unflatten(0, (depth, most)).permute(0, 2, 1, 3).flatten(2)
    with torch.autocast(basis.device.type, enabled=False):
        read = basis.permute(3, 0, 2, 1).flatten(1, 2) @ padded
    read = read.permute(1, 0, 2).unflatten(2, (most, -1)).flatten(1, 2).index_select(1, place) + bias
    return read.unflatten(0, (basis.shape[0], -1)).permute(0, 3, 1, 2)
