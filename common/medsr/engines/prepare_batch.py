"""What happens between a batch and the training step: what a network is asked for, and what is drawn per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.engines import PrepareBatch
from monai.engines.utils import default_prepare_batch
from torch import Tensor

from medsr.errors import SettingError
from medsr.settings import as_number, as_span, as_whole, as_wholes
from medsr.transforms.frame_labels import IGNORED
from medsr.transforms.labels import drawn_classes
from medsr.transforms.thick_slices import (
    MIN_RATIO,
    RandSimulateThickSlices,
    ThickSliceParameters,
    whole_span,
)

__all__ = ["PreparePair", "PreparePasted", "PrepareThickSlices"]


class PreparePair(PrepareBatch):
    """Ask a stereo network for what its loss needs besides the image: the ``prepare_batch`` of a trainer.

    ``monai.engines.PrepareBatchExtraInput`` was considered; it takes the arguments of the network from the batch.

    Args:
        parallax: argument of networks for pairs (:class:`~medsr.networks.stereo_fmen.StereoFMEN`): ``maps`` for all
            terms of :class:`~medsr.losses.stereo.StereoLoss`, ``none`` where only L1 is left.

    Shape:
        ``batch["image"]`` of ``(B, 2C, H, W)`` and ``batch["label"]`` of ``(B, 2C, scale * H, scale * W)``.

    Example:
        >>> pair = {"image": torch.rand(1, 6, 4, 6), "label": torch.rand(1, 6, 8, 12)}
        >>> PreparePair()(pair)[2:]
        ((), {'parallax': 'maps'})
    """

    def __init__(self, parallax: str = "maps") -> None:
        self.parallax = parallax

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **settings: Any,
    ) -> tuple[Tensor, Tensor, tuple[()], dict[str, str]]:
        """Return ``(inputs, targets, args, kwargs)`` as MONAI's trainers expect."""
        image, label = default_prepare_batch(batchdata, device, non_blocking, **settings)
        return image, label, (), {"parallax": self.parallax}


class PreparePasted(PrepareBatch):
    """Paste what is labelled in one frame of a batch into another: the ``prepare_batch`` of a trainer.

    Few labelled scenes show each instrument before one background, and a network may learn the background. Frames are
    augmented each for itself before, so that an instrument comes with its own size, place and colours. No edge is
    smoothed; the publication found that blending adds nothing.

    Args:
        share: of the frames, in [0, 1], for which another frame of the batch is drawn; it may be the frame itself,
            and in a batch of one always is.
        ignore: class index that is not pasted.
        seed: seed of the draws.

    Shape:
        ``batch["image"]`` of ``(B, C, H, W)`` and ``batch["label"]`` of ``(B, 1, H, W)``, class indices with 0 for
        what is not pasted, to the same.

    Raises:
        SettingError: if ``share`` is no share.

    Example:
        >>> batch = {"image": torch.rand(2, 3, 4, 6), "label": torch.zeros(2, 1, 4, 6, dtype=torch.long)}
        >>> image, label = PreparePasted(share=1.0)(batch)
        >>> torch.equal(image, batch["image"])
        True

    Reference:
        doi:10.1109/CVPR46437.2021.00294
    """

    def __init__(self, share: float = 0.5, *, ignore: int = IGNORED, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise SettingError(f"the share of frames to paste into must lie in [0, 1], got {share:g}")
        self.share, self.ignore = float(share), int(ignore)
        self.random = np.random.default_rng(seed)

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **settings: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(inputs, targets)`` as MONAI's trainers expect."""
        image, label = default_prepare_batch(batchdata, device, non_blocking, **settings)
        count = len(image)
        source = torch.as_tensor(self.random.integers(count, size=count), device=label.device)
        taken = torch.as_tensor(self.random.random(count) < self.share, device=label.device)
        new = label[source]
        pasted = (new > 0) & (new != self.ignore) & taken.view(-1, 1, 1, 1)
        return torch.where(pasted, image[source], image), torch.where(pasted, new, label)


class PrepareThickSlices:
    """Acquire a batch of sharp blocks as thick slices on the training device: the ``prepare_batch`` of a trainer.

    One draw of ratio, thickness and profile serves the batch, so that its stacks have one size; the degradation is
    one matrix product. The profile reaches beyond the target on both ends, hence the thick end slices are
    acquired from real neighbours and not from padding.

    Args:
        ratio: range of slice spacing divided by voxel size; drawn uniformly in its logarithm.
        thickness: range of slice thickness divided by slice spacing.
        max_slices: largest number of thick slices in a stack.
        min_slices: smallest number; a block that is too short for it is a setting error.
        noise: largest standard deviation of Gaussian noise, added to half of the stacks only.
        gamma: range of a gamma change applied to the sharp block before the acquisition.
        contrast: share of blocks whose intensities pass a random curve before the acquisition: few volumes then
            teach the borders of many sequences.
        profiles: profiles and their probabilities; default as in
            :class:`~medsr.transforms.thick_slices.RandSimulateThickSlices`.
        label_classes: number of label channels after the image channel.
        seed: seed of the draws.

    Shape:
        ``batch["image"]`` of ``(B, 1 + label_classes, H, W, L)`` gives inputs ``(B, C, H, W, n)``, targets
        ``(B, C, H, W, round(n * ratio))`` and the keyword arguments ``scale`` and ``thickness`` of the network.

    Raises:
        SettingError: if the block is too short for ``min_slices`` thick slices.

    Example:
        >>> prepare = PrepareThickSlices(ratio=(4, 4), noise=0)
        >>> inputs, targets, _, _ = prepare({"image": torch.rand(2, 1, 8, 8, 64)})
        >>> inputs.shape[-1], targets.shape[-1]
        (12, 48)
    """

    def __init__(
        self,
        ratio: float | Sequence[float] = (2.0, 8.0),
        thickness: float | Sequence[float] = (0.6, 1.1),
        *,
        max_slices: int = 12,
        min_slices: int = 4,
        noise: float = 0.02,
        gamma: float | Sequence[float] = (0.8, 1.25),
        contrast: float = 0.0,
        profiles: Mapping[str | tuple[float, ...], float] | None = None,
        label_classes: int = 0,
        seed: int = 0,
    ) -> None:
        self.ratio, self.gamma = as_span("ratio", ratio), as_span("gamma", gamma)
        if self.ratio[0] < MIN_RATIO:
            raise SettingError(f"the ratio of slice spacings must be >= {MIN_RATIO}, got {self.ratio[0]:g}")
        self.noise, self.contrast = as_number("noise", noise), as_number("contrast", contrast)
        self.max_slices, self.min_slices = as_wholes(1, max_slices=max_slices, min_slices=min_slices)
        self.label_classes = as_whole("label_classes", label_classes, 0)
        self.draw = RandSimulateThickSlices(self.ratio, as_span("thickness", thickness), profiles)
        self.draw.set_random_state(seed)
        self.random = np.random.default_rng(seed)

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor, tuple[()], dict[str, float]]:
        """Return ``(inputs, targets, args, kwargs)`` as MONAI's trainers expect."""
        sharp = torch.as_tensor(batchdata["image"]).to(device=device, non_blocking=non_blocking)
        sharp = sharp.as_tensor() if hasattr(sharp, "as_tensor") else sharp
        drawn = self.draw.make_parameters()
        length = sharp.shape[-1]
        wanted = float(np.exp(self.random.uniform(*np.log(self.ratio))))
        slices = min(self.max_slices, int((length - 2 * wanted) // wanted))
        if slices < self.min_slices:
            raise SettingError(
                f"a block of {length} voxels is too short for {self.min_slices} slices at ratio {wanted:.2f}; "
                "lengthen the block or lower the ratio"
            )
        count = whole_span(slices, wanted)
        ratio = count / slices
        sharp = self._recontrast(sharp)
        start = (length - count) // 2
        target = sharp[..., start : start + count]
        phase = start + (count - 1) / 2 - (length - 1) / 2
        parameters = ThickSliceParameters(ratio, drawn.thickness, drawn.profile, phase)
        inputs = sharp @ torch.as_tensor(parameters.matrix(length, slices)).to(sharp).T
        if self.label_classes:
            area = torch.as_tensor(parameters.label_matrix(length, slices)).to(sharp)
            mask = drawn_classes(sharp[:, 1:] @ area.T, dim=1).unsqueeze(1)
            labels = torch.cat([mask == k + 1 for k in range(self.label_classes)], dim=1).to(sharp)
            inputs = torch.cat([inputs[:, :1], labels], dim=1)
        return self._with_noise(inputs), target, (), {"scale": ratio, "thickness": drawn.thickness}

    def _recontrast(self, sharp: Tensor) -> Tensor:
        """One gamma or curve per block, on the sharp side, so that the pair stays a true pair."""
        exponent = torch.as_tensor(self.random.uniform(*self.gamma, size=len(sharp))).to(sharp)
        image = sharp[:, :1]
        inside = image.clamp(0, 1)
        changed = inside ** exponent.view(-1, 1, 1, 1, 1)
        for k in np.flatnonzero(self.random.random(len(sharp)) < self.contrast):
            changed[k] = self._curve(inside[k])
        return torch.cat([changed + (image - inside), sharp[:, 1:]], dim=1)

    def _curve(self, image: Tensor) -> Tensor:
        """Pass intensities in [0, 1] through random straight pieces that keep the background dark.

        From nearly the identity to an order of tissues that no real sequence has.
        """
        knots = np.linspace(0, 1, 6)
        share = self.random.random()
        heights = np.concatenate([[0.0], (1 - share) * knots[1:] + share * self.random.random(5)])
        heights = torch.as_tensor(heights).to(image)
        place = image * 5
        left = place.floor().clamp(max=4)
        low, high = heights[left.long()], heights[left.long() + 1]
        return low + (high - low) * (place - left)

    def _with_noise(self, inputs: Tensor) -> Tensor:
        if not self.noise:
            return inputs
        sigma = self.random.uniform(0, self.noise, size=len(inputs)) * (self.random.random(len(inputs)) < 0.5)
        scale = torch.as_tensor(sigma).to(inputs).view(-1, 1, 1, 1, 1)
        noisy = inputs[:, :1] + torch.randn_like(inputs[:, :1]) * scale
        return torch.cat([noisy, inputs[:, 1:]], dim=1)
