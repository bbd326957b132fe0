"""Adapting shipped weights to the user's own scans, then inference with the adapted weights.

Papers:
    SMORE (a scan's own planes as training data): IEEE TMI 40 (2021) 805-817, doi:10.1109/TMI.2020.3037187.
    Robust fine-tuning (weights between those before and after): CVPR 2022, doi:10.1109/CVPR52688.2022.00780.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from medsr.engines.self_training import SelfTraining
from medsr.errors import SettingError
from medsr.handlers.training import save_weights
from medsr.inferers.volume import MIN_SLICES, VolumeInferer
from medsr.io.cases import case_name
from medsr.io.writing import probe_folder
from medsr.networks.blocks import with_parts
from medsr.settings import as_number

__all__ = ["AdaptingInferer"]

_log = logging.getLogger(__name__)


class AdaptingInferer(VolumeInferer):
    """A volume inferer that first adapts a copy of the network to the volume, for a few minutes.

    A network with a plane prior adapts that alone, on the native slices: their planes are sharp along both axes, so
    that the scan's own ratio, thickness and profile make true pairs of them. A network without one adapts as a
    whole, on blocks of a first isotropic estimate that are sharp along an in-plane axis. The shipped weights stay
    as they are; the adapted ones are saved on request, and serve further scans of the same protocol.

    Training on one scan forgets some of what many scans taught. Weights on the line from the shipped to the trained
    ones, near the latter, give better results than either, and cost nothing: ``share`` says how near.

    Args:
        training: budget and settings of the adaptation.
        share: of the way from the shipped weights to the trained ones, in (0, 1]; 1 takes the trained ones.
        weights_dir: folder for ``<case>_adapted.pt``, one file per volume, named after the file that it was read from
            as the results are, or ``scan`` without one; those of an earlier run are replaced, and the warnings say so.
            None saves nothing.
        **settings: of :class:`~medsr.inferers.volume.VolumeInferer`.

    Shape:
        as :class:`~medsr.inferers.volume.VolumeInferer`.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> AdaptingInferer(SelfTraining(minutes=1)).training.minutes
        1

    Reference:
        doi:10.1109/CVPR52688.2022.00780 (weights between two)
    """

    def __init__(
        self,
        training: SelfTraining,
        weights_dir: str | Path | None = None,
        *,
        share: float = 0.75,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 < as_number("adapt_share", share) <= 1:
            raise SettingError(f"adapt_share must lie in (0, 1], got {share}")
        self.share = float(share)
        self.training, self.weights_dir = training, None if weights_dir is None else Path(weights_dir)

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Adapt to the first channel, then super-resolve all channels."""
        if inputs.shape[-1] < MIN_SLICES:
            return super().__call__(inputs, network)
        path = self._weights_path(inputs)
        if path is not None:
            # Before minutes of training are in vain.
            probe_folder(path.parent)
        _log.info("adapting to the scan")
        adapted = self._adapted(inputs, network)
        warnings = list(self.training.warnings)
        if path is not None:
            if path.exists():
                warnings.append(f"{path.name} of an earlier run was replaced")
            save_weights(adapted.state_dict(), path)
        result = super().__call__(inputs, adapted)
        self.facts["adaptation"] = dict(self.training.done)
        self.facts["warnings"] += warnings
        return result

    def _weights_path(self, inputs: Tensor) -> Path | None:
        """Where the weights go, if they are to be kept."""
        if self.weights_dir is None:
            return None
        source = getattr(inputs, "meta", {}).get("filename_or_obj", "scan")
        # A loader makes a list of what the volumes of a batch hold.
        source = source[0] if isinstance(source, (list, tuple)) else source
        return self.weights_dir / f"{case_name(source)}_adapted.pt"

    def _adapted(self, inputs: Tensor, network: nn.Module) -> nn.Module:
        ratio, thickness, _ = self._acquisition(inputs)
        planes = getattr(network, "prior", None) is not None
        image = inputs[0, :1] if planes else super().__call__(inputs, network)[0, :1]
        scan = MetaTensor(torch.as_tensor(image).cpu(), meta={"sharp_axes": (0, 1)})
        # An evaluator runs its inferer without gradients.
        with torch.inference_mode(False), torch.enable_grad():
            start = network.prior if planes else network
            trained = self.training(
                start,
                scan,
                ratio=ratio,
                thickness=thickness,
                profile=self.slice_profile,
                planes=planes,
                device=inputs.device,
            )
        _go_back(trained, start, 1 - self.share)
        return with_parts(network, prior=trained) if planes else trained


@torch.no_grad()
def _go_back(trained: nn.Module, start: nn.Module, share: float) -> None:
    """Take trained weights back, in place, along the straight way to where they started."""
    for new, old in zip(trained.parameters(), start.parameters(), strict=True):
        new.lerp_(old.to(new.device), share)
