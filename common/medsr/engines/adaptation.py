"""Adapting shipped weights to the user's own scans, then inference with the adapted weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from medsr.engines.self_training import SelfTraining
from medsr.geometry import rescaled_affine, spacing_of
from medsr.handlers.training import save_weights
from medsr.inferers.volume import MIN_SLICES, VolumeInferer

__all__ = ["AdaptingInferer"]

_log = logging.getLogger(__name__)


class AdaptingInferer(VolumeInferer):
    """A volume inferer that first adapts a copy of the network to the volume, for a few minutes.

    The first pass gives an isotropic estimate; blocks of it, sharp along an in-plane axis, are acquired with the
    scan's own ratio, thickness and profile, and the network learns to undo that. The shipped weights stay as they
    are; the adapted ones are saved on request, and serve further scans of the same protocol.

    Args:
        training: budget and settings of the adaptation.
        weights_dir: folder for ``<n>_adapted.pt``, one file per volume; None saves nothing.
        **settings: of :class:`~medsr.inferers.volume.VolumeInferer`.

    Shape:
        as :class:`~medsr.inferers.volume.VolumeInferer`.

    Example:
        >>> AdaptingInferer(SelfTraining(minutes=1)).training.minutes
        1
    """

    def __init__(
        self, training: SelfTraining, weights_dir: str | Path | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.training, self.weights_dir = training, None if weights_dir is None else Path(weights_dir)
        self._count = 0

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Adapt to the first channel, then super-resolve all channels."""
        if inputs.shape[-1] < MIN_SLICES:
            return super().__call__(inputs, network)
        ratio, thickness, _ = self._acquisition(inputs)
        estimate = super().__call__(inputs, network)
        affine = np.asarray(inputs.affine, dtype=np.float64).reshape(-1, 4, 4)[0]
        fine = rescaled_affine(affine, 2, size=inputs.shape[-1], new_size=estimate.shape[-1], ratio=ratio)
        image = MetaTensor(estimate[0, :1].cpu(), affine=torch.as_tensor(fine), meta={"sharp_axes": (0, 1)})
        _log.info("adapting to the scan (spacing %s mm)", spacing_of(affine).round(3).tolist())
        # An evaluator runs its inferer without gradients.
        with torch.inference_mode(False), torch.enable_grad():
            adapted = self.training(
                network,
                image,
                ratio=ratio,
                thickness=thickness,
                profile=self.slice_profile,
                device=inputs.device,
            )
        self._count += 1
        if self.weights_dir is not None:
            self.weights_dir.mkdir(parents=True, exist_ok=True)
            save_weights(adapted.state_dict(), self.weights_dir / f"{self._count}_adapted.pt")
        result = super().__call__(inputs, adapted)
        self.facts["adaptation"] = dict(self.training.done)
        return result
