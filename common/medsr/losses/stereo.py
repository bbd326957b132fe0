"""Loss of stereo super-resolution: both views like the truth, and a matching of the views that explains them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.losses.terms import TermLoss, refuse_other_shape
from medsr.networks.blocks import without_autocast
from medsr.networks.parallax import StereoPrediction

__all__ = ["StereoLoss"]

_IMAGE = {"l1": F.l1_loss, "mse": F.mse_loss}
"""Terms that hold the views to the truth, and need no maps."""

_USUAL_MISS = 0.02
"""Mean absolute error of the enlargement, of a usual sharp photograph: what weighs 1 when crops are balanced."""
_ROUNDING = 1 / 510
"""Half a grey level of 8 bits: of crops that interpolation misses by less, nothing can be learnt."""


class StereoLoss(TermLoss):
    """L1 + 0.1 (consistency + photometric + smoothness + cycle), with settable weights, and a squared error on demand.

    The maps M of the parallax attention say which pixels of the other view a pixel is made of. They have no truth of
    their own; what they carry over must fit instead. Intensities of the two cameras differ, so what is compared is
    not the views, but how much the bicubic enlargement misses in each, X = shrunk(|truth - enlarged(low)|):

    - ``l1``: each view is like its truth;
    - ``mse``: the same by its squared error, which is what PSNR measures; not in the published loss;
    - ``consistency``: the errors that are left, E = shrunk(|truth - result|), agree between the views. The maps
      are held fast here: only the result may give way;
    - ``photometric``: X of the other view, carried over, is X of this one;
    - ``smoothness``: the weights of neighbours, a row further or one column further in both views, are alike;
    - ``cycle``: X, carried over and back, is X.

    Consistency, photometric and cycle term count where the valid masks say so; the masks carry no gradient. Means are
    over all pixels, and the terms of left and right are added. ``last_terms`` holds the value of every term after a
    call, as it enters the sum; a term whose weight is 0 is left out.

    All but the first two need the attention maps: call the network with ``parallax="maps"``. A map has
    ``4 B H W ** 2`` bytes, so crops should be as wide as the disparities ask for and no wider. MONAI has no such loss.

    Args:
        l1_weight: weight of the mean absolute error.
        mse_weight: weight of the mean squared error; that of a trained network is about a tenth of the absolute one.
        consistency_weight: weight of the consistency term.
        photometric_weight: weight of the photometric term.
        smoothness_weight: weight of the smoothness term.
        cycle_weight: weight of the cycle term.
        sr_only: leave out the terms of the matching; then a result without maps will do.
        balance: what a crop counts among the others, in [0, 1]. 0: its error counts as it is, so that a soft crop,
            which interpolation hardly misses, counts next to nothing. 1: its error counts relative to that of the
            enlargement, as differences of PSNR do. Powers between. It weighs the first two terms, and needs a
            :class:`~medsr.networks.parallax.StereoPrediction`.

    Shape:
        - pred: :class:`~medsr.networks.parallax.StereoPrediction`, or the pair alone with ``sr_only``;
        - target: ``(B, 2C, scale * H, scale * W)`` in [0, 1], left before right.

    Raises:
        SettingError: for a negative weight, neither L1 nor squared error, a balance out of range, a result of another
            shape than the truth, or missing maps.

    Example:
        >>> import torch
        >>> loss = StereoLoss(sr_only=True)
        >>> loss(torch.full((1, 6, 4, 4), 0.5), torch.zeros(1, 6, 4, 4)).item(), loss.last_terms
        (1.0, {'l1': 1.0})

    Reference:
        arXiv 2011.03802
    """

    def __init__(
        self,
        *,
        l1_weight: float = 1.0,
        mse_weight: float = 0.0,
        consistency_weight: float = 0.1,
        photometric_weight: float = 0.1,
        smoothness_weight: float = 0.1,
        cycle_weight: float = 0.1,
        sr_only: bool = False,
        balance: float = 0.0,
    ) -> None:
        super().__init__()
        matching = {
            "consistency": float(consistency_weight),
            "photometric": float(photometric_weight),
            "smoothness": float(smoothness_weight),
            "cycle": float(cycle_weight),
        }
        image = {"l1": float(l1_weight), "mse": float(mse_weight)}
        if min(*image.values(), *matching.values()) < 0:
            raise SettingError("the weights of the terms must not be negative; 0 leaves a term out")
        if not any(image.values()):
            raise SettingError(
                "l1_weight and mse_weight are both 0; nothing else holds the views to the truth"
            )
        if not 0 <= balance <= 1:
            raise SettingError(f"balance must be from 0 to 1, not {balance:g}")
        self.balance = float(balance)
        self.weights = {name: weight for name, weight in image.items() if weight}
        if not sr_only:
            self.weights |= {name: weight for name, weight in matching.items() if weight}

    def forward(self, pred: StereoPrediction | Tensor, target: Tensor) -> Tensor:
        """Return the sum of all terms."""
        image = pred.image if isinstance(pred, StereoPrediction) else pred
        refuse_other_shape(image, target)
        with without_autocast(image):
            image, target = image.float(), target.float()
            share = self._shares(pred, target)
            # The mean over both views is half the sum of their means.
            terms = {
                name: 2 * error(share * image, share * target)
                for name, error in _IMAGE.items()
                if name in self.weights
            }
            if len(self.weights) > len(terms):
                terms |= self._matching(pred, (image - target).abs(), target)
        return self.summed({name: weight * terms[name] for name, weight in self.weights.items()})

    def describe(self) -> dict[str, Any]:
        """Return what a record of the run should hold: the weights of the terms in use, and the balance."""
        found = {f"{name}_weight": weight for name, weight in self.weights.items()}
        return {**found, "balance": self.balance} if self.balance else found

    def _shares(self, pred: StereoPrediction | Tensor, target: Tensor) -> Tensor:
        """What the intensities of each crop are multiplied by, ``(B, 1, 1, 1)``."""
        if not self.balance:
            return target.new_ones(())
        if not isinstance(pred, StereoPrediction):
            raise SettingError(
                "balance needs the small pair: call the network with parallax='disparity' or 'maps'"
            )
        missed = (target - _resized(pred.low.float(), target)).abs().mean((1, 2, 3), keepdim=True)
        return (_USUAL_MISS / (missed + _ROUNDING)) ** self.balance

    def _matching(self, pred: StereoPrediction | Tensor, error: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms that need the maps, without weights."""
        if not isinstance(pred, StereoPrediction) or pred.parallax.to_left is None:
            raise SettingError(
                "the terms of the matching need its maps: call the network with parallax='maps', or set sr_only"
            )
        low, found = pred.low.float(), pred.parallax
        maps = found.to_left.float(), found.to_right.float()
        valid = found.valid.float().detach().chunk(2)
        missed = _resized((target - _resized(low, target)).abs(), low).chunk(2, 1)
        left = _resized(error, low).chunk(2, 1)
        terms = {name: error.new_zeros(()) for name in self.weights if name not in _IMAGE}
        for side, other in ((0, 1), (1, 0)):
            here, back = maps[side], maps[other]
            if "consistency" in terms:
                carried = _carried(here.detach(), left[other])
                terms["consistency"] = terms["consistency"] + _gap(left[side], carried, valid[side])
            if "photometric" in terms:
                carried = _carried(here, missed[other])
                terms["photometric"] = terms["photometric"] + _gap(missed[side], carried, valid[side])
            if "cycle" in terms:
                carried = _carried(here, _carried(back, missed[side]))
                terms["cycle"] = terms["cycle"] + _gap(missed[side], carried, valid[side])
            if "smoothness" in terms:
                terms["smoothness"] = terms["smoothness"] + _roughness(here)
        return terms


def _carried(weights: Tensor, image: Tensor) -> Tensor:
    """The image of the other view ``(B, C, H, W)``, brought here by a map ``(B, H, W, W)``."""
    return (weights @ image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _gap(image: Tensor, carried: Tensor, valid: Tensor) -> Tensor:
    return (valid * (image - carried)).abs().mean()


def _roughness(weights: Tensor) -> Tensor:
    """Mean change of the weights to the next row, and along the diagonal; a crop may be one pixel high or wide."""
    pairs = (
        (weights[:, :-1], weights[:, 1:]),
        (weights[:, :, :-1, :-1], weights[:, :, 1:, 1:]),
    )
    return sum((F.l1_loss(*pair) for pair in pairs if pair[0].numel()), start=weights.new_zeros(()))


def _resized(image: Tensor, like: Tensor) -> Tensor:
    """The image at the size of another, bicubic without antialiasing: right for residuals, not for a degradation."""
    return F.interpolate(image, size=like.shape[-2:], mode="bicubic", align_corners=False)
