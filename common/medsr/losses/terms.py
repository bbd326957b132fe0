"""What losses of several terms have in common: a sum whose parts can be recorded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medsr.errors import SettingError

__all__ = ["TermLoss", "refuse_other_shape"]


class TermLoss(nn.Module):
    """A loss that is the sum of named terms; subclasses call :meth:`summed` at the end of ``forward``.

    Attributes:
        last_terms: the value of every term of the last call, as it entered the sum.

    Example:
        >>> loss = TermLoss()
        >>> loss.summed({"l1": torch.tensor(0.5), "mse": torch.tensor(0.25)}).item(), loss.last_terms
        (0.75, {'l1': 0.5, 'mse': 0.25})
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_terms: dict[str, float] = {}

    def summed(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the terms and remember each."""
        values = torch.stack(list(terms.values()))
        # One transfer from the device for all of them.
        self.last_terms = dict(zip(terms, values.detach().tolist(), strict=True))
        return values.sum()


def refuse_other_shape(result: Tensor, truth: Tensor) -> None:
    """Refuse a result of another shape than the truth, which PyTorch might broadcast.

    Raises:
        SettingError: naming both shapes.

    Example:
        >>> refuse_other_shape(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
    """
    if result.shape != truth.shape:
        raise SettingError(
            f"output and truth must have one shape, got {tuple(result.shape)} and {tuple(truth.shape)}; "
            "check the scale of the network"
        )
