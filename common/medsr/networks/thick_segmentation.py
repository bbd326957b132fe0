"""Segmentation on thin slices from an image of thick ones: an anisotropic U-Net with two heads.

Papers:
    REHRSeg (thick and thin head on one U-Net): arXiv 2410.10097, Neurocomputing 624 (2025) 129425,
    doi:10.1016/j.neucom.2025.129425.
    nnU-Net (kernels and strides planned from spacing and patch): doi:10.1038/s41592-020-01008-z.
Code: written from the papers, the U-Net's blocks are MONAI's. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.networks.nets import DynUNet
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.geometry import thin_positions
from medsr.resampling import interpolation_matrix
from medsr.settings import as_whole

__all__ = ["ThickSegmentation", "ThickSegmentationNet", "UNetPlan", "plan_unet"]

_MIN_SIZE = 4
"""Voxels that an axis keeps at least at the bottom of the U-Net, nnU-Net's choice."""

_VOXELS_AT_ONCE = 2_000_000
"""Thin voxels that pass the thin head together without gradients: 128 MB per 16 channels."""


class UNetPlan(NamedTuple):
    """Kernel sizes and strides of a U-Net, one triple per stage; the first stage keeps the full resolution."""

    kernels: tuple[tuple[int, int, int], ...]
    strides: tuple[tuple[int, int, int], ...]

    @property
    def size_multiple(self) -> tuple[int, int, int]:
        """Product of all strides: what a size must be divisible by, per axis."""
        first, second, third = (int(n) for n in np.prod(self.strides, axis=0))
        return first, second, third


class ThickSegmentation(NamedTuple):
    """What the losses look at: logits on both grids, or on the thick one alone, and the encoder's stage-1 feature."""

    thick: Tensor
    thin: Tensor | None
    feature: Tensor


def plan_unet(spacing_mm: Sequence[float], patch_size: Sequence[int], *, max_stages: int = 6) -> UNetPlan:
    """Plan kernels and strides so that the voxels of the deep stages are nearly isotropic, as nnU-Net does.

    From one stage to the next an axis is halved if its size is at least twice 4 voxels and its spacing less than
    twice the finest spacing among such axes. An axis has kernel size 1 while its spacing is more than twice the
    finest of all axes, and 3 from then on. Planning ends where no axis can be halved. MONAI has the network for
    such a plan (``DynUNet``), and leaves the planning to its users.

    Args:
        spacing_mm: voxel spacing along each axis, in mm.
        patch_size: size of the training patch, in voxels.
        max_stages: where planning ends at the latest; the first stage counts.

    Raises:
        SettingError: if spacing or patch are no positive triples, or halving the patch leaves a remainder.

    Example:
        >>> plan = plan_unet((1, 1, 4), (32, 32, 8))
        >>> plan.strides
        ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2))
        >>> plan.kernels
        ((3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3))

    Reference:
        doi:10.1038/s41592-020-01008-z
    """
    spacing, size = np.asarray(spacing_mm, dtype=np.float64), np.asarray(patch_size)
    if spacing.shape != (3,) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise SettingError(f"spacing_mm must hold three lengths > 0 mm, got {spacing_mm}")
    if size.shape != (3,) or size.dtype.kind not in "iu" or (size < 1).any():
        raise SettingError(f"patch_size must hold three whole numbers >= 1, got {patch_size}")
    stride, convolved = np.ones(3, dtype=int), np.zeros(3, dtype=bool)
    kernels, strides = [], []
    while True:
        convolved |= spacing <= 2 * spacing.min()
        kernels.append(_triple(np.where(convolved, 3, 1)))
        strides.append(_triple(stride))
        large = size >= 2 * _MIN_SIZE
        if len(strides) >= max_stages or not large.any():
            break
        stride = np.where(large & (spacing < 2 * spacing[large].min()), 2, 1)
        spacing, size = spacing * stride, size // stride
    plan = UNetPlan(tuple(kernels), tuple(strides))
    fitting = _triple(-(-np.asarray(patch_size) // plan.size_multiple) * plan.size_multiple)
    if fitting != _triple(np.asarray(patch_size)):
        raise SettingError(
            f"patch_size {_triple(np.asarray(patch_size))} cannot be halved without remainder; use {fitting}"
        )
    return plan


class ThickSegmentationNet(nn.Module):
    """Segments a stack of thick slices on its own grid and on thin slices of the same field of view, at any ratio.

    The trunk is a U-Net of MONAI's ``DynUNet`` blocks (instance norm, leaky ReLU, no deep supervision) with kernels
    and strides of :func:`plan_unet`. The thick head is ``DynUNet``'s own 1 x 1 x 1 output convolution. The thin head
    brings the last decoder feature to the centres of the thin slices by linear interpolation along the slices, reads
    it as the thick head does, and adds what two convolutions find there. ``DynUNet`` alone ends on the grid of its
    input, and ``monai.networks.blocks.UpSample`` takes neither a ratio nor positions at run time. ``DynUNet`` gives
    each decoder block the kernel of the stage below its own, so that the last one sees neighbouring slices whatever
    their spacing.

    The published thin head has the two convolutions alone. Here the last one starts at zero: a network that was
    trained on thick slices first then interpolates its logits, a good mask already, while random ones would spend
    the next hundreds of iterations on pulling the trunk away from what it knows. The published network also aligns
    the corners of both grids, which stretches the result; here the field of view is the same and any ratio is
    served. :meth:`features` and the two heads are public so that an inferer can blend the features of overlapping
    windows before the heads read them.

    Args:
        classes: number of softmax classes with the background.
        spacing_mm: spacing of the thick grid that the U-Net is planned for, slices last.
        patch_size: training patch on the thick grid, slices last; also the window of the inferer.
        width: channels at full resolution; they double per stage up to ten times as many. Published: 32.
        max_stages: see :func:`plan_unet`.
        scale: ratio of slice spacing to thin slice spacing that is used when ``forward`` is given none.
        thin_channels: channels between the convolutions of the thin head; default ``width // 2``, as published.
        thin_kernel: size of the thin head's last kernel. Published: 5.

    Shape:
        - image: ``(B, 1, H, W, D)``, slices last, intensities about [0, 1] as
          :class:`~medsr.transforms.intensity.PercentileToUnitd` maps them, of any size;
        - output: thin logits ``(B, classes, H, W, D')`` with ``D' = round(D * scale)``; with ``complete=True`` also
          thick logits ``(B, classes, H, W, D)`` and the stage-1 feature ``(B, feature_channels, H/2, W/2, D)`` for
          an anisotropic plan, sizes rounded up.

    Raises:
        SettingError: for settings out of range or a patch too small for three stages.

    Example:
        >>> net = ThickSegmentationNet(classes=3, patch_size=(32, 32, 16), width=4)
        >>> net(torch.zeros(1, 1, 33, 32, 5), scale=3.5).shape
        torch.Size([1, 3, 33, 32, 18])
        >>> net(torch.zeros(1, 1, 32, 32, 5), complete=True).feature.shape
        torch.Size([1, 8, 16, 16, 5])

    Reference:
        arXiv 2410.10097; doi:10.1016/j.neucom.2025.129425
    """

    half_precision_safe = True
    """bfloat16 autocast is safe: it moves the features by 2 % of their spread. float16 is not tested."""

    exact_halo = None
    """No finite halo makes tiling exact: instance norm looks at the whole window."""

    def __init__(
        self,
        classes: int = 2,
        spacing_mm: Sequence[float] = (1.0, 1.0, 4.0),
        patch_size: Sequence[int] = (96, 96, 16),
        *,
        width: int = 16,
        max_stages: int = 6,
        scale: float = 4.0,
        thin_channels: int | None = None,
        thin_kernel: int = 5,
    ) -> None:
        super().__init__()
        width, classes = as_whole("width", width), as_whole("classes", classes)
        thin_channels = width // 2 if thin_channels is None else thin_channels
        if classes < 2 or width < 2 or thin_channels < 1 or thin_kernel < 1 or thin_kernel % 2 == 0:
            raise SettingError(
                "classes >= 2, width >= 2, thin_channels >= 1 and an odd thin_kernel are needed, "
                f"got {classes}, {width}, {thin_channels}, {thin_kernel}"
            )
        self.plan = plan_unet(spacing_mm, patch_size, max_stages=max_stages)
        kernels, strides = self.plan
        if len(strides) < 3:
            raise SettingError(
                f"patch_size {tuple(patch_size)} with max_stages {max_stages} gives {len(strides)} stages of at "
                "least 3; use a larger patch"
            )
        self.classes, self.scale = int(classes), float(scale)
        self.spacing_mm = tuple(float(one) for one in spacing_mm)
        self.patch_size = tuple(int(one) for one in patch_size)
        self.size_multiple = self.plan.size_multiple
        channels = [min(width * 2**stage, 10 * width) for stage in range(len(strides))]
        self.feature_channels = channels[1]
        unet = DynUNet(3, 1, classes, kernels, strides, strides[1:], filters=channels)
        # Its parts without itself: DynUNet keeps all weights under a second name as well.
        self.input_block, self.downsamples = unet.input_block, unet.downsamples
        self.bottleneck, self.upsamples = unet.bottleneck, unet.upsamples
        self.thick_head = unet.output_block
        self.thin_head = nn.Sequential(
            nn.Conv3d(width, thin_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv3d(thin_channels, classes, thin_kernel, padding=thin_kernel // 2),
        ).apply(DynUNet.initialize_weights)
        nn.init.zeros_(self.thin_head[-1].weight)
        nn.init.zeros_(self.thin_head[-1].bias)
        # With so few channels on so fine a grid four times as fast on a CPU as the default order; the trunk is not.
        self.thin_head = self.thin_head.to(memory_format=torch.channels_last_3d)
        self.thin_halo = 1 + thin_kernel // 2

    def forward(
        self,
        image: Tensor,
        scale: float | None = None,
        positions: Sequence[float] | None = None,
        *,
        complete: bool = False,
        thin: bool = True,
    ) -> Tensor | ThickSegmentation:
        """Segment a stack.

        Args:
            image: stack of thick slices.
            scale: slice spacing divided by the thin slice spacing; default ``self.scale``.
            positions: centres of neighbouring thin slices in units of thick slices; default the same field of view.
                The convolutions of the thin head end where these do.
            complete: return all that the losses need instead of the thin logits alone.
            thin: False leaves the thin logits out of what is complete: a fifth of the time of a training step.
        """
        last, stage1 = self._trunk(image)
        if complete and not thin:
            return ThickSegmentation(self.read_thick(last), None, stage1)
        logits = self.read_thin(last, scale, positions)
        return ThickSegmentation(self.read_thick(last), logits, stage1) if complete else logits

    def features(self, image: Tensor) -> Tensor:
        """Last decoder feature, ``(B, 1, H, W, D)`` to ``(B, width, H, W, D)`` float32: what both heads read."""
        return self._trunk(image)[0]

    def read_thick(self, features: Tensor) -> Tensor:
        """Logits ``(B, classes, H, W, D)`` of the thick slices; linear, hence the same before and after blending."""
        return self.thick_head(features)

    def read_thin(
        self,
        features: Tensor,
        scale: float | None = None,
        positions: Sequence[float] | np.ndarray | None = None,
    ) -> Tensor:
        """Logits ``(B, classes, H, W, D')`` of the thin slices; ``scale`` and ``positions`` as for ``forward``.

        Without gradients a few slices at a time pass the head, with a halo that makes the result the same: the
        interpolated features need ``scale`` times the memory of the thick ones.
        """
        depth = features.shape[-1]
        scale = self.scale if scale is None else float(scale)
        if positions is None:
            positions = thin_positions(depth, scale)
        matrix = interpolation_matrix(depth, positions, kind="linear")
        rows = torch.as_tensor(matrix, dtype=torch.float32, device=features.device)
        count = len(rows)
        step = count if torch.is_grad_enabled() else max(1, _VOXELS_AT_ONCE // features[:, 0, ..., 0].numel())
        parts = []
        for first in range(0, count, step):
            low, stop = max(0, first - self.thin_halo), min(count, first + step)
            # In bfloat16 the weights would not add up to one.
            with torch.autocast(features.device.type, enabled=False):
                fine = features @ rows[low : stop + self.thin_halo].T
            fine = fine.contiguous(memory_format=torch.channels_last_3d)
            logits = self.thick_head(fine) + self.thin_head(fine)
            parts.append(logits[..., first - low : stop - low])
        return torch.cat(parts, dim=-1)

    def _trunk(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Last decoder feature, float32, and stage-1 encoder feature, without the padding."""
        levels = [self.input_block(self._padded(image))]
        for downsample in self.downsamples:
            levels.append(downsample(levels[-1]))
        last = self.bottleneck(levels[-1])
        for upsample, skip in zip(self.upsamples, reversed(levels), strict=True):
            last = upsample(last, skip)
        height, width, depth = image.shape[-3:]
        h, w, d = (-(-n // s) for n, s in zip(image.shape[-3:], self.plan.strides[1], strict=True))
        return last[..., :height, :width, :depth].float(), levels[1][..., :h, :w, :d]

    def _padded(self, image: Tensor) -> Tensor:
        """Replicate the far ends up to a size that the strides divide."""
        blocks = [-(-n // multiple) for n, multiple in zip(image.shape[-3:], self.size_multiple, strict=True)]
        # A bottleneck of one voxel has no statistics for the instance norm.
        blocks[:2] = (max(2, n) for n in blocks[:2])
        missing = [
            n * multiple - size
            for n, multiple, size in zip(blocks, self.size_multiple, image.shape[-3:], strict=True)
        ]
        if not any(missing):
            return image
        return F.pad(image, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")


def _triple(values: np.ndarray) -> tuple[int, int, int]:
    first, second, third = (int(one) for one in values)
    return first, second, third
