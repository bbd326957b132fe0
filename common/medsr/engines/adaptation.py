"""Adapting shipped weights to the user's own scans, then inference with the adapted weights."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from medsr.engines.self_training import SelfTraining
from medsr.handlers.training import save_weights
from medsr.inferers.volume import MIN_SLICES, VolumeInferer
from medsr.io.cases import case_name

__all__ = ["AdaptingInferer"]

_log = logging.getLogger(__name__)


class AdaptingInferer(VolumeInferer):
    """A volume inferer that first adapts a copy of the network to the volume, for a few minutes.

    A network with a plane prior adapts that alone, on the native slices: their planes are sharp along both axes, so
    that the scan's own ratio, thickness and profile make true pairs of them. A network without one adapts as a
    whole, on blocks of a first isotropic estimate that are sharp along an in-plane axis. The shipped weights stay
    as they are; the adapted ones are saved on request, and serve further scans of the same protocol.

    Args:
        training: budget and settings of the adaptation.
        weights_dir: folder for ``<case>_adapted.pt``, one file per volume, named after the file that it was read from
            as the results are, or ``scan`` without one; those of an earlier run are replaced, and the warnings say so.
            None saves nothing.
        **settings: of :class:`~medsr.inferers.volume.VolumeInferer`.

    Shape:
        as :class:`~medsr.inferers.volume.VolumeInferer`.

    Example:
        >>> AdaptingInferer(SelfTraining(minutes=1)).training.minutes
        1
    """

    def __init__(
        self,
        training: SelfTraining,
        weights_dir: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.training, self.weights_dir = training, None if weights_dir is None else Path(weights_dir)

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Adapt to the first channel, then super-resolve all channels."""
        if inputs.shape[-1] < MIN_SLICES:
            return super().__call__(inputs, network)
        _log.info("adapting to the scan")
        adapted = self._adapted(inputs, network)
        warnings = list(self.training.warnings)
        path = self._weights_path(inputs)
        if path is not None:
            if path.exists():
                warnings.append(f"{path.name} of an earlier run was replaced")
            path.parent.mkdir(parents=True, exist_ok=True)
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
            trained = self.training(
                network.prior if planes else network,
                scan,
                ratio=ratio,
                thickness=thickness,
                profile=self.slice_profile,
                planes=planes,
                device=inputs.device,
            )
        if not planes:
            return trained
        adapted = copy.copy(network)
        # A shallow copy shares everything with the shipped network but the list of its parts.
        adapted._modules = {**network._modules, "prior": trained}
        return adapted
