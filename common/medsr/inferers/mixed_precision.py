"""What a trainer runs its network with: fewer bits in the convolutions where the hardware is faster with them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from medsr.inferers.precision import checked_precision, native_bfloat16, precision_name

__all__ = ["MixedPrecisionInferer"]


class MixedPrecisionInferer(SimpleInferer):
    """Runs a network in training, under autocast to bfloat16 where that is faster.

    Weights, their gradients, the optimiser and the loss stay in float32; bfloat16 has its range, so that no gradient
    needs scaling. The trainers of MONAI have ``amp`` for CUDA alone; processors with the instructions for bfloat16
    train up to twice as fast with it, too.

    Args:
        amp: ``auto``, ``float32`` or ``bfloat16``. ``auto`` is bfloat16 where the device has it and is faster with it,
            for a network that says that it is safe (``half_precision_safe``); another network keeps the precision of
            the trainer. ``bfloat16`` asks neither device nor network.

    Attributes:
        used_dtype: of the convolutions in the last step.

    Raises:
        SettingError: for an unknown word.

    Example:
        >>> infer = MixedPrecisionInferer(amp="bfloat16")
        >>> infer(torch.ones(1, 4), torch.nn.Linear(4, 2)).dtype, infer.used_dtype
        (torch.float32, torch.bfloat16)
    """

    def __init__(self, amp: str = "auto") -> None:
        super().__init__()
        self.amp = checked_precision(amp)
        self.used_dtype = torch.float32

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the network; results that are bfloat16 come as float32, for the loss."""
        kind = inputs.device.type
        with self.precision(network, inputs.device):
            active = torch.is_autocast_enabled(kind)
            self.used_dtype = torch.get_autocast_dtype(kind) if active else torch.float32
            found = super().__call__(inputs, network, *args, **kwargs)
        return _in_float32(found)

    @property
    def used_precision(self) -> str:
        """``used_dtype`` as a record of a training has it."""
        return precision_name(self.used_dtype)

    def precision(self, network: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
        """Context in which a network runs, also one that is asked beside the one that learns."""
        if self.amp != "auto":
            return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp == "bfloat16")
        inner = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
        if getattr(inner, "half_precision_safe", False) and native_bfloat16(device):
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()


def _in_float32(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.float() if found.dtype == torch.bfloat16 else found
    if not isinstance(found, (list, tuple)):
        return found
    parts = [_in_float32(part) for part in found]
    return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
