"""Self-ensemble over the eight flips and rotations of an image, and how much its members disagree."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

__all__ = ["DihedralEnsemble"]

_MEMBERS = [(turns, flipped) for turns in range(4) for flipped in (False, True)]
"""Quarter turns, and whether the image is flipped before."""


class DihedralEnsemble(Inferer):
    """Averages what an inferer gives for the eight flips and rotations of an image, each brought back.

    A network knows no preferred direction of a fundus photograph; where its eight answers differ, it guesses.
    Their standard deviation is kept as ``uncertainty``: that of the last image of the calling thread, since MONAI
    Label shares one inferer between threads. MONAI has ``monai.data.TestTimeAugmentation``, which draws random
    transforms over a dataset and holds all results at once; here the eight are exact, and their mean and variance
    are updated one by one (Welford), in the memory of four results.

    ``facts`` are those of the inferer for the last member, with the warnings of all, ``members`` and
    ``mean_uncertainty``.

    Args:
        inferer: runs one image, for example :class:`~medsr.inferers.tiles.TileInferer`.

    Shape:
        ``(1, C, H, W)`` to what the inferer gives, ``(1, C', s * H, s * W)``; ``uncertainty`` is
        ``(1, 1, s * H, s * W)``, the mean over the channels of the standard deviation, in units of the result.

    Example:
        >>> from monai.inferers import SimpleInferer
        >>> infer = DihedralEnsemble(SimpleInferer())
        >>> infer(torch.rand(1, 3, 4, 6), torch.nn.Upsample(scale_factor=2)).shape
        torch.Size([1, 3, 8, 12])
        >>> float(infer.uncertainty.max())
        0.0

    Reference:
        doi:10.1109/CVPRW.2017.151 (self-ensemble); doi:10.1080/00401706.1962.10490022 (running variance)
    """

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer
        self._last = threading.local()
        self.facts: dict[str, Any] = {}

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Average over the eight members; other arguments go to the inferer."""
        image = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        mean = squares = torch.empty(0)
        warnings: dict[str, None] = {}
        with torch.no_grad():
            for count, (turns, flipped) in enumerate(_MEMBERS, start=1):
                seen = torch.rot90(image.flip(-1) if flipped else image, turns, (-2, -1))
                found = torch.rot90(self.inferer(seen, network, *args, **kwargs), -turns, (-2, -1))
                found = found.flip(-1) if flipped else found
                if count == 1:
                    mean, squares = found, torch.zeros_like(found)
                else:
                    found -= mean
                    mean.add_(found, alpha=1 / count)
                    squares.addcmul_(found, found, value=1 - 1 / count)
                warnings |= dict.fromkeys(getattr(self.inferer, "facts", {}).get("warnings", []))
            # The eight are all that there are, not a sample of more.
            deviation = (squares / len(_MEMBERS)).sqrt_().mean(dim=1, keepdim=True)
        self._last.uncertainty = deviation
        self.facts = {
            **getattr(self.inferer, "facts", {}),
            "members": len(_MEMBERS),
            "mean_uncertainty": float(deviation.mean()),
            "warnings": list(warnings),
        }
        return mean

    @property
    def uncertainty(self) -> Tensor:
        """Standard deviation of the members for this thread's last image, ``(1, 1, s * H, s * W)``."""
        return getattr(self._last, "uncertainty", torch.empty(0))
