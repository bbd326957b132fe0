"""Through-plane super-resolution of slice stacks: the FLAVR layout with a position-conditioned head.

Papers:
    REHRSeg (self-supervised through-plane super-resolution, uncertainty-aware head): arXiv 2410.10097,
    Neurocomputing 624 (2025) 129425, doi:10.1016/j.neucom.2025.129425.
    FLAVR (3D ResNet-18 encoder without strides along time, channel gating): arXiv 2012.08512.
    SelectionGAN (multi-channel attention selection with an uncertainty map): arXiv 1904.06807.
Code: written from the papers. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.geometry import thin_positions
from medsr.networks.blocks import without_autocast
from medsr.networks.checkpoints import load_checkpoint, rename_tensors
from medsr.networks.plane_fusion import PlaneFusion, estimate_from_planes
from medsr.networks.plane_prior import PlanePrior, interpolated
from medsr.networks.position_readout import PositionReadout, slabs_and_conditions
from medsr.settings import as_number

__all__ = ["SliceSRNet", "convert_flavr"]

_STAGES = (64, 64, 128, 256, 512)
"""Channels at width 1: stem and four residual stages."""

_PIXELS_AT_ONCE = 40_000
"""Pixels that are interpolated together, so that the intermediate tensors are small beside the result."""

_SLOW_BELOW = 20_480
"""Channels x slices x rows: with fewer, PyTorch's CPU gives a 3D convolution of one sample to a slow kernel."""

_BAND = 24
"""Columns of the result that are made together without gradients: fewer need less memory, but their halos more time."""

_BAND_HALO = 10
"""Columns beside them that the layers at full resolution see (``detail``, two blocks, ``fuse``, ``to_basis``: 9),
even because the layers before have half as many."""

_MIN_UNCERTAINTY, _MAX_UNCERTAINTY = 1e-3, 1.0
"""Bounds of the predicted absolute error, in units of the normalised intensity range: without the lower one the
loss ``e / U + ln U`` has no minimum where the error is zero (background)."""


class SliceSRNet(nn.Module):
    """Turns a stack of thick slices into the thin slices inside them, for any ratio, with one set of weights.

    A 3D encoder-decoder of the FLAVR layout sees the whole in-plane context and never strides along the slices.
    It runs on a stack of any length at once; each slice is encoded once, where windows of four slices would
    encode it four times. The published heads emit ``r`` channels, hence one head per integer ratio. Here a small
    network maps *where* a thin slice lies (its offset from the thick slice's centre, the ratio, the thickness) to
    the weights of a 1 x 1 read-out over a learned basis, so that one set of weights serves every ratio, integer
    or not, at its exact position. The published stem halves the in-plane resolution at once; two blocks at full
    resolution beside it learn the fine detail several times sooner. The output is a residual on the cubic
    B-spline interpolation of the same field of view; no tanh, no subtracted mean.

    With ``prior`` the residual is on what a :class:`~medsr.networks.plane_prior.PlanePrior` reads from the planes of
    both in-plane axes instead, joined by a :class:`~medsr.networks.plane_fusion.PlaneFusion`. Those
    small networks learn from far fewer examples, and the prior is what adapts to a scan; the volume network adds
    what they cannot show, and the uncertainty.

    With ``head="uncertainty"`` the read-out is the multi-branch attention of REHRSeg: the residual is the
    attention-weighted sum of ``branches`` candidates, and the expected absolute error is read from the attention.

    MONAI has no network whose output is finer than its input along one axis by a factor chosen at run time.

    Args:
        width: multiplier of all channel numbers; 1.0 is the published size (42 M parameters), 0.25 has 2.7 M.
        label_classes: number of label channels that are super-resolved jointly with the image (as logits).
        head: ``plain`` or ``uncertainty``.
        branches: number of candidates of the uncertainty head.
        scale: ratio that is used when ``forward`` is given none.
        basis: number of through-plane basis maps; default ``64 * width``, at least 16.
        prior: start from planes instead of from the cubic interpolation.

    Shape:
        - image: ``(B, 1 + label_classes, H, W, D)``, slices last, ``H`` and ``W`` of at least 8;
        - output: ``(B, 1 + label_classes [+ 1], H, W, D')``: image, label logits, and with the uncertainty head
          the expected absolute error as the last channel. ``D' = round(D * scale)``.

    Raises:
        SettingError: for an unknown head or a width that gives no channels.

    Example:
        >>> net = SliceSRNet(width=0.125, head="uncertainty", branches=4)
        >>> net(torch.zeros(1, 1, 16, 16, 5), scale=3.0).shape
        torch.Size([1, 2, 16, 16, 15])

    Reference:
        arXiv 2410.10097; doi:10.1016/j.neucom.2025.129425
    """

    size_multiple = 8
    """In-plane sizes are padded (replicated) to this multiple inside ``forward``."""

    half_precision_safe = True
    """bfloat16 autocast is safe; float16 is not tested."""

    exact_halo = None
    """No finite halo makes tiling exact: the channel gates pool over the window."""

    def __init__(
        self,
        width: float = 0.25,
        label_classes: int = 0,
        head: str = "plain",
        *,
        branches: int = 16,
        scale: float = 4.0,
        basis: int | None = None,
        prior: bool = False,
    ) -> None:
        super().__init__()
        if head not in ("plain", "uncertainty"):
            raise SettingError(f"head must be 'plain' or 'uncertainty', got '{head}'")
        width = as_number("width", width)
        channels = [int(c * width) for c in _STAGES]
        if min(channels) < 4:
            raise SettingError(f"width must be at least {4 / _STAGES[0]}, got {width:g}")
        self.scale = float(scale)
        self.label_classes = int(label_classes)
        self.head = head
        # Rows x slices from which a window needs no other beside it: see _SLOW_BELOW, at an eighth of the rows.
        self.alone_from = 8 * _SLOW_BELOW // channels[3]
        self.branches = branches if head == "uncertainty" else 0
        basis = max(16, channels[0]) if basis is None else basis

        self.encoder = _Encoder(1 + label_classes, channels)
        self.decoder = _Decoder(channels)
        self.detail = nn.Conv3d(1 + label_classes, channels[0], 3, padding=1)
        self.detail_blocks = nn.ModuleList(_PlainBlock(channels[0]) for _ in range(2))
        self.fuse = nn.Conv3d(channels[0], channels[0], 3, padding=1)
        self.to_basis = nn.Conv3d(channels[0], basis, (1, 7, 7))
        self.condition = nn.Linear(2, channels[0])
        self.apply(_initialise)
        nn.init.zeros_(self.condition.weight)
        self.residual = PositionReadout(basis, 1 + label_classes)
        if self.branches:
            self.candidates = PositionReadout(basis, self.branches * (1 + label_classes))
            self.attention = PositionReadout(basis, self.branches, gain=1.0)
            self.log_uncertainty = nn.Linear(self.branches, 1)
            nn.init.normal_(self.log_uncertainty.weight, std=0.5)
            nn.init.constant_(self.log_uncertainty.bias, -4.0)
        self.prior = PlanePrior(label_classes=label_classes, scale=scale) if prior else None
        self.fusion = PlaneFusion() if prior else None

    def forward(
        self,
        image: Tensor,
        scale: float | None = None,
        thickness: float = 1.0,
        positions: Sequence[float] | None = None,
    ) -> Tensor:
        """Super-resolve a stack.

        Args:
            image: stack of thick slices, intensities about [0, 1].
            scale: slice spacing divided by the new slice spacing; default ``self.scale``.
            thickness: slice thickness divided by slice spacing; below 1 with a gap.
            positions: centres of the new slices in units of old slices; default the same field of view. With a prior
                they must ascend.
        """
        scale = self.scale if scale is None else float(scale)
        depth = image.shape[-1]
        if positions is None:
            positions = thin_positions(depth, scale)
        estimate = self.first_estimate(image, scale, thickness, positions=positions)
        return self.refine(estimate, image, scale=scale, thickness=thickness, positions=positions)

    def refine(
        self,
        estimate: Tensor,
        image: Tensor,
        *,
        scale: float,
        thickness: float,
        positions: Sequence[float] | np.ndarray,
        keep: tuple[slice, slice] | None = None,
    ) -> Tensor:
        """Turn a first estimate into the result, in place: beside the result itself, little memory is needed.

        Without gradients the layers at full resolution and the read-out, which together take many times the memory
        of the result, see a band of columns and a few slices at a time.

        Args:
            estimate: what :meth:`first_estimate` gives for these positions; changed.
            image: as for :meth:`forward`.
            scale: as for :meth:`forward`.
            thickness: as for :meth:`forward`.
            positions: as for :meth:`forward`.
            keep: rows and columns of the image that the estimate holds; default all.
        """
        height, width, depth = image.shape[-3:]
        rows, columns = keep or (slice(0, height), slice(0, width))
        padded, (top, left) = self._padded(image.permute(0, 1, 4, 2, 3))
        half = self.decoder(self.encoder(padded, self._condition(scale, thickness, image)))
        gate = self.decoder.last_gate(half)
        slabs, conditions = slabs_and_conditions(positions, depth, scale=scale, thickness=float(thickness))
        index = torch.as_tensor(slabs, device=image.device)
        weights, bias = self._readout_weights(conditions.to(image.device))
        learns = torch.is_grad_enabled()
        # On a GPU, which has the memory, narrow bands would only take time.
        band = width if learns or image.device.type != "cpu" else _BAND
        few = len(slabs) if learns else 4
        for start in range(columns.start, columns.stop, band):
            stop = min(start + band, columns.stop)
            basis = self._basis(padded, half, gate, (left + start, left + stop))
            basis = basis[:, :, top + rows.start : top + rows.stop]
            target = estimate[..., start - columns.start : stop - columns.start, :]
            for k in range(0, len(slabs), few):
                part = slice(k, k + few)
                read = self._read(basis.index_select(1, index[part]), weights[part], bias[part])
                target[..., part].add_(read.permute(0, 4, 2, 3, 1))
            # The next band needs the memory.
            del basis
        return estimate

    def _readout_weights(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(K, M, C)`` and biases ``(K, C)`` of all read-outs side by side."""
        readouts = [self.residual, self.attention, self.candidates] if self.branches else [self.residual]
        parts = [readout(conditions) for readout in readouts]
        weights, biases = zip(*parts, strict=True)
        return torch.cat(weights, dim=-1), torch.cat(biases, dim=-1)

    def _read(self, basis: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        """Residuals, and with the uncertainty head the error as last channel, ``(B, K, H, W, C)``."""
        batch, count, height, width, maps = basis.shape
        with torch.autocast(basis.device.type, enabled=False):
            flat = torch.matmul(basis.reshape(batch, count, height * width, maps), weights) + bias[:, None]
        read = flat.view(batch, count, height, width, -1)
        outputs = 1 + self.label_classes
        if not self.branches:
            return read
        attention = read[..., outputs : outputs + self.branches].softmax(dim=-1)
        candidates = read[..., outputs + self.branches :].unflatten(-1, (outputs, self.branches))
        chosen = read[..., :outputs] + (candidates * attention.unsqueeze(-2)).sum(-1)
        log_uncertainty = self.log_uncertainty(attention).clamp(
            float(np.log(_MIN_UNCERTAINTY)), float(np.log(_MAX_UNCERTAINTY))
        )
        # The first estimate, to which all channels are added, holds zero here.
        return torch.cat([chosen, log_uncertainty.exp()], dim=-1)

    def encoder_features(
        self, image: Tensor, scale: float | None = None, thickness: float = 1.0, *, count: int = 5
    ) -> list[Tensor]:
        """The first ``count`` feature maps of stem and stages, ``(B, C, H', W', D)``: what distillation looks at.

        They cover the field of view of the image, to the nearest of their voxels.
        """
        padded, before = self._padded(image.permute(0, 1, 4, 2, 3))
        condition = self._condition(self.scale if scale is None else scale, thickness, image)
        features = []
        for level in self.encoder(padded, condition, count=count):
            stride = padded.shape[-1] // level.shape[-1]
            rows, columns = (
                slice(start // stride, start // stride + -(-size // stride))
                for start, size in zip(before, image.shape[2:4], strict=True)
            )
            features.append(level[..., rows, columns].permute(0, 1, 3, 4, 2))
        return features

    def _basis(
        self, padded: Tensor, half: tuple[Tensor, Tensor], gate: Tensor, columns: tuple[int, int]
    ) -> Tensor:
        """Basis maps of some columns in channels-last order ``(B, D, H, W, M)``, float32."""
        start, stop = columns
        low = max(0, start - start % 2 - _BAND_HALO)
        high = min(padded.shape[-1], stop + stop % 2 + _BAND_HALO)
        detail = self.detail(padded[..., low:high])
        for block in self.detail_blocks:
            detail = block(detail)
        detail += self.decoder.last([part[..., low // 2 : high // 2] for part in half], gate)
        decoded = F.leaky_relu(self.fuse(detail), 0.2, inplace=True)
        del detail
        with without_autocast(decoded):
            # Under autocast, as in a layer with this padding mode, a copy in float32 would be padded.
            decoded = F.pad(decoded, (3, 3, 3, 3, 0, 0), mode="replicate")
        basis = self.to_basis(decoded)[..., start - low : stop - low]
        return basis.permute(0, 2, 3, 4, 1).float()

    def _condition(self, scale: float, thickness: float, like: Tensor) -> Tensor:
        values = torch.tensor([1 / float(scale), float(thickness)], dtype=torch.float32, device=like.device)
        return self.condition(values).view(1, -1, 1, 1, 1)

    def _padded(self, stack: Tensor) -> tuple[Tensor, tuple[int, int]]:
        missing = [-size % self.size_multiple for size in stack.shape[-2:]]
        if not any(missing):
            return stack, (0, 0)
        top, left = missing[0] // 2, missing[1] // 2
        pads = (left, missing[1] - left, top, missing[0] - top, 0, 0)
        return F.pad(stack, pads, mode="replicate"), (top, left)

    def first_estimate(
        self,
        image: Tensor,
        scale: float,
        thickness: float,
        *,
        positions: Sequence[float] | np.ndarray,
        advance: Callable[[int], object] | None = None,
    ) -> Tensor:
        """What the residual is added to: planes of both in-plane axes, or the interpolation.

        It needs little memory, so that an inferer may ask for it at once where it runs the network in tiles.

        Args:
            image: as for :meth:`forward`.
            scale: as for :meth:`forward`.
            thickness: as for :meth:`forward`.
            positions: as for :meth:`forward`.
            advance: told how many more of the ``H + W`` planes have been read.

        Shape:
            ``(B, 1 + label_classes, H, W, D)`` to ``(B, 1 + label_classes [+ 1], H, W, len(positions))``, float32;
            where the uncertainty will be added it holds zero.
        """
        places = np.asarray(positions, dtype=np.float64)
        count, (batch, _, height, width, depth) = 1 + self.label_classes, image.shape
        result = torch.zeros(
            batch, count + bool(self.branches), height, width, len(places), device=image.device
        )
        estimate = result[:, :count]
        if self.prior is None:
            few = max(1, _PIXELS_AT_ONCE // (width * depth))
            for k in range(0, height, few):
                estimate[:, :, k : k + few] = interpolated(image[:, :, k : k + few], places)
            return result
        estimate_from_planes(
            self.prior,
            self.fusion,
            image,
            scale=scale,
            thickness=thickness,
            positions=places,
            out=estimate,
            advance=advance,
        )
        return result


def _initialise(module: nn.Module) -> None:
    """Keep the variance of the activations through the trunk, which has no normalisation layer.

    PyTorch's default shrinks it about threefold per layer: the first thousand iterations would go into undoing
    that. Gates start nearly open.
    """
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        fan_in = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose3d):
            # Each output voxel is reached by the taps of its own phase only.
            fan_in = module.weight.shape[0] * module.weight[0, 0].numel() // int(np.prod(module.stride))
        nn.init.normal_(module.weight, std=float(np.sqrt(2 / (1.04 * fan_in))))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, _Gate):
        nn.init.normal_(module.linear.weight, std=0.1 * module.linear.weight.shape[1] ** -0.5)
        nn.init.constant_(module.linear.bias, 2.0)
    if isinstance(module, (_ResidualBlock, _PlainBlock)):
        module.conv2.weight.data.mul_(0.5)


class _Gate(nn.Module):
    """Multiplies each channel by a sigmoid of a linear function of all channel means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiplied(x, self.values(x.mean(dim=(2, 3, 4), keepdim=True)))

    def values(self, means: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(means))

    @staticmethod
    def multiplied(x: Tensor, values: Tensor) -> Tensor:
        # Gradients need what comes in.
        return x * values if torch.is_grad_enabled() else x.mul_(values)


class _ResidualBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions without normalisation, gated, on a skip; strides in-plane only."""

    rectified_convolutions = ("conv1", "conv2")

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride=(1, stride, stride), padding=1, bias=False)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.gate = _Gate(outputs)
        changes = stride != 1 or inputs != outputs
        self.project = (
            nn.Conv3d(inputs, outputs, 1, stride=(1, stride, stride), bias=False) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        found = self.gate(self.conv2(F.relu(self.conv1(x), inplace=True)))
        found += x if self.project is None else self.project(x)
        return F.relu(found, inplace=True)


class _PlainBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions on a skip at full resolution."""

    rectified_convolutions = ("conv1", "conv2")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv2(F.relu(self.conv1(x), inplace=True))
        found += x
        return found


class _Encoder(nn.Module):
    """3D ResNet-18 whose strides, all in-plane, are 2 (stem), 1, 2, 2, 1."""

    def __init__(self, inputs: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv3d(inputs, channels[0], (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(_ResidualBlock(before, after, stride), _ResidualBlock(after, after, 1))
            for before, after, stride in zip(channels[:-1], channels[1:], (1, 2, 2, 1), strict=True)
        )

    def forward(self, x: Tensor, condition: Tensor, *, count: int = 5) -> list[Tensor]:
        first = self.stem(x)
        first += condition
        levels = [F.relu(first, inplace=True)]
        for stage in self.stages[: count - 1]:
            levels.append(stage(levels[-1]))
        return levels


class _Decoder(nn.Module):
    """Five gated (transposed) convolutions, each joined with the encoder level of its size."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        c0, c1, c2, c3, c4 = channels
        self.layers = nn.ModuleList(
            [
                nn.Conv3d(c4, c3, 3, padding=1),
                nn.ConvTranspose3d(2 * c3, c2, (3, 4, 4), stride=(1, 2, 2), padding=1),
                nn.ConvTranspose3d(2 * c2, c1, (3, 4, 4), stride=(1, 2, 2), padding=1),
                nn.Conv3d(2 * c1, c0, 3, padding=1),
                nn.ConvTranspose3d(2 * c0, c0, (3, 4, 4), stride=(1, 2, 2), padding=1),
            ]
        )
        self.gates = nn.ModuleList(_Gate(c) for c in (c3, c2, c1, c0, c0))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Both parts of the input of the last layer; the levels are let go as soon as they are joined."""
        x = levels.pop()
        for layer, gate in zip(self.layers[:-1], self.gates[:-1], strict=True):
            x = F.leaky_relu(gate(layer(x)), 0.2, inplace=True)
            if len(levels) > 1:
                x = torch.cat([x, levels.pop()], dim=1)
        return x, levels.pop()

    def last_gate(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        """Gate of the last layer, whose means follow from sums of its input: its output may come in bands."""
        layer = cast(nn.ConvTranspose3d, self.layers[-1])
        with torch.autocast(parts[0].device.type, enabled=False):
            # One after the other: each is copied to float32.
            shares = torch.cat([_shares_of_taps(part.float(), layer) for part in parts], dim=1)
            means = torch.einsum("bcdhw,codhw->bo", shares, layer.weight) + layer.bias
        return self.gates[-1].values(means[..., None, None, None])

    def last(self, parts: Sequence[Tensor], gate: Tensor) -> Tensor:
        """The last layer."""
        found = self.layers[-1](torch.cat(tuple(parts), dim=1))
        return F.leaky_relu(_Gate.multiplied(found, gate), 0.2, inplace=True)


def _shares_of_taps(x: Tensor, layer: nn.ConvTranspose3d) -> Tensor:
    """What each tap of a transposed convolution adds to the mean of its output, ``(B, C, D, H, W)`` to its taps."""
    for count, taps, step, pad in zip(
        x.shape[2:], layer.kernel_size, layer.stride, layer.padding, strict=True
    ):
        size = (count - 1) * step - 2 * pad + taps
        # The inputs that the tap does not throw over the border.
        places = torch.arange(count) * step - pad + torch.arange(taps)[:, None]
        inside = ((places >= 0) & (places < size)).to(x)
        x = torch.tensordot(x, inside / size, dims=([2], [1]))
    return x


def convert_flavr(path: str | Path) -> OrderedDict[str, Tensor]:
    """Map a public FLAVR checkpoint onto the trunk of ``SliceSRNet(width=1.0)``.

    The stem (3 colour channels), the frame fusion and the output layer have no counterpart and are dropped;
    every other tensor must be present with the right shape.

    Args:
        path: the checkpoint file that the user has; a state dict or a dict with key ``state_dict``.

    Returns:
        tensors for ``load_state_dict(..., strict=False)``.

    Raises:
        WeightsError: if the file cannot be read safely, or a tensor is missing, unknown or of another shape.
    """
    file, kind = Path(path), "a FLAVR checkpoint without batch norm"
    dropped = ("encoder.stem.", "feature_fuse.", "outconv.")
    state = {k: v for k, v in load_checkpoint(file, kind=kind).items() if not k.startswith(dropped)}
    return rename_tensors(state, _flavr_names(), SliceSRNet(width=1.0).state_dict(), file=file, kind=kind)


def _flavr_names() -> dict[str, str]:
    """FLAVR's tensor names and ours."""
    names = {}
    for stage in range(4):
        for block in range(2):
            theirs, ours = f"encoder.layer{stage + 1}.{block}", f"encoder.stages.{stage}.{block}"
            names[f"{theirs}.conv1.0.weight"] = f"{ours}.conv1.weight"
            names[f"{theirs}.conv2.0.weight"] = f"{ours}.conv2.weight"
            for part in ("weight", "bias"):
                names[f"{theirs}.fg.attn_layer.0.{part}"] = f"{ours}.gate.linear.{part}"
        if stage:
            names[f"encoder.layer{stage + 1}.0.downsample.0.weight"] = (
                f"encoder.stages.{stage}.0.project.weight"
            )
    for layer, kind in enumerate(("conv", "upconv", "upconv", "conv", "upconv")):
        for part in ("weight", "bias"):
            names[f"decoder.{layer}.{kind}.0.{part}"] = f"decoder.layers.{layer}.{part}"
            names[f"decoder.{layer}.{kind}.1.attn_layer.0.{part}"] = f"decoder.gates.{layer}.linear.{part}"
    return names
