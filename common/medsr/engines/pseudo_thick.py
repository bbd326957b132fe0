"""Thick slices out of pseudo high-resolution volumes: what the segmentation network is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.settings import as_number, as_span, as_whole
from medsr.transforms.labels import drawn_classes, with_background
from medsr.transforms.thick_slices import ThickSliceParameters, whole_span

__all__ = ["PreparePseudoThick", "block_size", "block_step"]


def block_size(patch_size: Sequence[int], ratio: float | Sequence[float], phase: float) -> list[int]:
    """Block of thin voxels that a stack of thick slices is drawn from, with room for the phase on either side.

    Args:
        patch_size: ``(H, W, slices)`` of the stack.
        ratio: slice spacing divided by thin spacing; a pair is a range.
        phase: largest shift of the slices, in slice spacings, to either side.

    Example:
        >>> block_size((160, 160, 8), 4.0, phase=0.5), block_size((160, 160, 8), 4.0, phase=0)
        ([160, 160, 36], [160, 160, 32])
    """
    *plane, slices = (int(size) for size in patch_size)
    count = whole_span(slices, as_span("ratio", ratio)[1])
    return [*plane, math.ceil(count * (1 + 2 * phase / slices))]


def block_step(ratio: float | Sequence[float], phase: float) -> float:
    """Voxels between the places where a block may start: anywhere, but for phase 0, which wants whole slices.

    Raises:
        SettingError: if the phase is 0 and the ratio a range, which no scan's own slices have.

    Example:
        >>> block_step(4.0, phase=0.5), block_step(4.0, phase=0)
        (1.0, 4.0)
    """
    if phase:
        return 1.0
    low, high = as_span("ratio", ratio)
    if low != high:
        raise SettingError(f"phase 0 needs one ratio, got the range {low:g} to {high:g}; give the scan's own")
    return low


class PreparePseudoThick:
    """Acquire blocks of pseudo high-resolution volumes as thick slices: the ``prepare_batch`` of a trainer.

    The slices of the scan are one sampling of the anatomy. Here the slice profile blurs the super-resolved volume
    along its slice axis, and slices are taken at a random phase: many scans that the same head could have
    given. The mask of a thick slice is what fills most of it, the weights follow from the uncertainty. The contrast
    changes before the acquisition, so that image, mask and teacher stay one scene.

    Args:
        ratio: slice spacing divided by thin spacing; a pair is a range.
        slices: thick slices of a stack.
        thickness: slice thickness divided by slice spacing; a pair is a range.
        profile: slice profile.
        phase: largest shift of the slices, in slice spacings, to either side; 0 repeats the slices of the scan, if the
            block holds them whole and nothing else.
        gamma: range of a gamma change of the image.
        brightness: largest relative change of the image's scale.
        noise: largest standard deviation of Gaussian noise on the thick slices.
        seed: seed of the draws.
        thin: also ask for the thin grid; False for a network of the thick slices alone.

    Shape:
        ``batch["image"]`` ``(B, 1, H, W, L)`` and foreground probabilities ``batch["label"]`` ``(B, K - 1, H, W, L)``,
        if known ``batch["uncertainty"]`` ``(B, 1, H, W, L)``, give inputs ``(B, 1, H, W, slices)`` and a mapping:
        ``thick`` ``(B, K, H, W, slices)``, if asked for ``thin`` ``(B, K, H, W, round(slices * ratio))``,
        ``uncertainty`` and ``teacher_image`` ``(B, K, H, W, slices)``; then the keyword arguments ``scale``,
        ``thickness`` and ``thin``.

    Raises:
        SettingError: if a block is too short for the slices.

    Example:
        >>> prepare = PreparePseudoThick(ratio=4, slices=6)
        >>> batch = {"image": torch.rand(2, 1, 8, 8, 36), "label": torch.zeros(2, 1, 8, 8, 36)}
        >>> inputs, targets, _, _ = prepare(batch)
        >>> tuple(inputs.shape), tuple(targets["thin"].shape)
        ((2, 1, 8, 8, 6), (2, 2, 8, 8, 24))

    Reference:
        arXiv 2410.10097; doi:10.1016/j.neucom.2025.129425
    """

    def __init__(
        self,
        ratio: float | Sequence[float] = 4.0,
        slices: int = 12,
        thickness: float | Sequence[float] = 1.0,
        *,
        profile: str = "slr",
        phase: float = 0.5,
        gamma: Sequence[float] = (0.7, 1.5),
        brightness: float = 0.25,
        noise: float = 0.03,
        seed: int = 0,
        thin: bool = True,
    ) -> None:
        self.ratio, self.thickness = as_span("ratio", ratio), as_span("thickness", thickness)
        self.slices, self.profile = as_whole("slices", slices, 1), profile
        self.gamma, self.phase = as_span("gamma", gamma), as_number("phase", phase)
        self.brightness, self.noise = as_number("brightness", brightness), as_number("noise", noise)
        self.random, self.thin = np.random.default_rng(seed), bool(thin)

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor], tuple[()], dict[str, float]]:
        """Return ``(inputs, targets, args, kwargs)`` as MONAI's trainers expect."""
        given = {
            key: torch.as_tensor(batchdata[key]).to(device=device, non_blocking=non_blocking).float()
            for key in ("image", "label", "uncertainty")
            if key in batchdata
        }
        given = {k: v.as_tensor() if hasattr(v, "as_tensor") else v for k, v in given.items()}
        length = given["image"].shape[-1]
        count = whole_span(self.slices, float(self.random.uniform(*self.ratio)))
        ratio = count / self.slices
        room = (length - count) / 2
        if room < self.phase * ratio:
            raise SettingError(
                f"a block of {length} voxels is too short for {self.slices} slices of {ratio:.3g} voxels with a phase "
                f"of {self.phase:g}; {math.ceil(count + 2 * self.phase * ratio)} are needed"
            )
        # The thin target is cut out of the block, hence the phase is a whole number of voxels.
        reach = int(self.phase * ratio)
        start = (length - count) // 2 + int(self.random.integers(-reach, reach + 1))
        start = min(max(start, 0), length - count)
        center = start + (count - 1) / 2 - (length - 1) / 2
        thickness = float(self.random.uniform(*self.thickness))
        parameters = ThickSliceParameters(ratio, thickness, self.profile, center)
        area = torch.as_tensor(parameters.label_matrix(length, self.slices)).to(given["image"]).T
        image = self._recontrast(given["image"])
        thick = image @ torch.as_tensor(parameters.matrix(length, self.slices)).to(image).T
        probabilities = with_background(given["label"], dim=1)
        drawn = F.one_hot(drawn_classes(probabilities[:, 1:] @ area, dim=1), probabilities.shape[1])
        drawn = drawn.movedim(-1, 1).float()
        targets = {
            "thick": drawn,
            "teacher_image": torch.cat([thick, drawn[:, 1:]], dim=1),
        }
        if self.thin:
            targets["thin"] = probabilities[..., start : start + count]
        if "uncertainty" in given:
            targets["uncertainty"] = (given["uncertainty"] @ area).clamp(0, 1)
        asked = {"scale": ratio, "thickness": thickness, "thin": self.thin}
        return self._with_noise(thick), targets, (), asked

    def _recontrast(self, image: Tensor) -> Tensor:
        exponent, gain = (
            torch.as_tensor(self.random.uniform(*span, size=len(image))).to(image).view(-1, 1, 1, 1, 1)
            for span in (self.gamma, (1 - self.brightness, 1 + self.brightness))
        )
        inside = image.clamp(0, 1)
        return (inside**exponent + (image - inside)) * gain

    def _with_noise(self, thick: Tensor) -> Tensor:
        sigma = self.random.uniform(0, self.noise, size=len(thick)) * (self.random.random(len(thick)) < 0.5)
        return thick + torch.randn_like(thick) * torch.as_tensor(sigma).to(thick).view(-1, 1, 1, 1, 1)
