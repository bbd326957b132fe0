"""Self-ensemble over the symmetries of an image or of a stereo pair, and how much its members disagree."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from monai.inferers import Inferer
from torch import Tensor

__all__ = ["SelfEnsemble"]


class _Symmetry(NamedTuple):
    """A change that leaves an image one of its kind: mirrored columns, then rows, then quarter turns."""

    columns: bool = False
    rows: bool = False
    turns: int = 0

    def there(self, image: Tensor, views: int) -> Tensor:
        return self._turned(self._mirrored(image, views), self.turns)

    def back(self, image: Tensor, views: int) -> Tensor:
        return self._mirrored(self._turned(image, -self.turns), views)

    @staticmethod
    def _turned(image: Tensor, turns: int) -> Tensor:
        # Where there is nothing to do, PyTorch copies nevertheless.
        return torch.rot90(image, turns, (-2, -1)) if turns else image

    def _mirrored(self, image: Tensor, views: int) -> Tensor:
        axes = [axis for axis, wanted in ((-1, self.columns), (-2, self.rows)) if wanted]
        if views > 1 and self.columns:
            # In a mirror the left camera stands on the right.
            return torch.cat([view.flip(axes) for view in image.chunk(views, 1)[::-1]], 1)
        return image.flip(axes) if axes else image


_SYMMETRIES = {
    1: tuple(_Symmetry(columns=flipped, turns=turns) for turns in range(4) for flipped in (False, True)),
    2: tuple(_Symmetry(columns=columns, rows=rows) for rows in (False, True) for columns in (False, True)),
}
"""By the number of views: the eight of a square; the four that keep the rows of a rectified pair where they match."""


class SelfEnsemble(Inferer):
    """Averages what an inferer gives for an image seen in all ways that leave it an image, each brought back.

    A network knows no preferred direction of a fundus photograph; where its eight answers differ, it guesses. A
    stereo pair may be turned upside down in both views, or mirrored if its views change places, which makes four.
    The standard deviation of the members is kept as ``uncertainty``: that of the last image of the calling thread,
    since MONAI Label shares one inferer between threads. MONAI has ``monai.data.TestTimeAugmentation``, which draws
    random transforms over a dataset and holds all results at once; here the members are exact, and their mean and
    variance are updated one by one (Welford), in the memory of four results, for pairs five.

    ``facts`` are those of the inferer for the last member, with the warnings of all, ``members`` and
    ``mean_uncertainty``.

    Args:
        inferer: runs one image, for example :class:`~medsr.inferers.tiles.TileInferer`.
        views: 1, or 2 for rectified pairs, whose channels are those of the left view and then of the right one.

    Shape:
        ``(1, C, H, W)`` to what the inferer gives, ``(1, C', s * H, s * W)``; ``uncertainty`` is
        ``(1, views, s * H, s * W)``, the mean over the channels of the standard deviation, in units of the result.

    Example:
        >>> from monai.inferers import SimpleInferer
        >>> infer = SelfEnsemble(SimpleInferer())
        >>> infer(torch.rand(1, 3, 4, 6), torch.nn.Upsample(scale_factor=2)).shape
        torch.Size([1, 3, 8, 12])
        >>> float(infer.uncertainty.max())
        0.0

    Reference:
        doi:10.1109/CVPRW.2017.151 (self-ensemble); doi:10.1080/00401706.1962.10490022 (running variance)
    """

    def __init__(self, inferer: Inferer, *, views: int = 1) -> None:
        super().__init__()
        self.inferer, self.views = inferer, views
        self._last = threading.local()
        self.facts: dict[str, Any] = {}

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Average over the members; other arguments go to the inferer."""
        image = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        mean = squares = torch.empty(0)
        warnings: dict[str, None] = {}
        members = _SYMMETRIES[self.views]
        with torch.no_grad():
            for count, member in enumerate(members, start=1):
                seen = member.there(image, self.views)
                found = member.back(self.inferer(seen, network, *args, **kwargs), self.views)
                if count == 1:
                    # The first member is the image as it is: its result may be the network's own, or the image.
                    mean, squares = found.clone(), torch.zeros_like(found)
                else:
                    found -= mean
                    mean.add_(found, alpha=1 / count)
                    squares.addcmul_(found, found, value=1 - 1 / count)
                # The next member needs the memory.
                del found
                warnings |= dict.fromkeys(getattr(self.inferer, "facts", {}).get("warnings", []))
            # The members are all that there are, not a sample of more.
            deviation = (squares / len(members)).sqrt_().unflatten(1, (self.views, -1)).mean(2)
        self._last.uncertainty = deviation
        self.facts = {
            **getattr(self.inferer, "facts", {}),
            "members": len(members),
            "mean_uncertainty": float(deviation.mean()),
            "warnings": list(warnings),
        }
        return mean

    @property
    def uncertainty(self) -> Tensor:
        """Standard deviation of the members for this thread's last image, ``(1, views, s * H, s * W)``."""
        return getattr(self._last, "uncertainty", torch.empty(0))
