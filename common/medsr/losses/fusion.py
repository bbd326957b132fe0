"""Fusion loss of the retinal SE-GAN: features, pixels and a relativistic discriminator in one sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.losses.adversarial import RelativisticLoss
from medsr.losses.feature import FeatureLoss
from medsr.losses.terms import TermLoss, refuse_other_shape

__all__ = ["FusionLoss"]


class FusionLoss(TermLoss):
    """Feature loss + L1 + 0.005 relativistic adversarial loss + 0.5 mean squared error, with settable weights.

    L1 and the squared error hold the image to the truth, and the discriminator adds 0.005 for what a pixel-wise
    mean blurs away. The balance is that of intensities in [0, 1]: twice the range doubles L1 and quadruples the
    squared error. A term whose weight is 0 is left out entirely, and so is a feature loss without a backbone.
    ``last_terms`` holds the value of every term after a call, as it enters the sum. Without the adversarial
    term this is a loss for any supervised trainer; with it, for
    :class:`~medsr.engines.adversarial.AdversarialSRTrainer`, which warms up on :meth:`pixel`. MONAI has the single
    terms and no sum that takes the logits of both sides.

    Args:
        feature: feature loss; None has no backbone, and says so.
        adversarial: relativistic loss; None is the average form.
        feature_weight: weight of the feature loss.
        l1_weight: weight of the mean absolute error.
        adversarial_weight: weight of the generator's adversarial loss; the discriminator's is never weighted.
        mse_weight: weight of the mean squared error.

    Shape:
        - pred, target: ``(B, C, H, W)`` in [0, 1];
        - real_logits, fake_logits: as :class:`~medsr.losses.adversarial.RelativisticLoss`.

    Raises:
        SettingError: for a negative weight, for a sum without a pixel term, for images of different shapes, and if
            the adversarial term comes without logits.

    Example:
        >>> import torch
        >>> loss = FusionLoss(feature_weight=0, adversarial_weight=0)
        >>> loss(torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, 1, 4, 4)).item(), loss.last_terms
        (0.625, {'l1': 0.5, 'mse': 0.125})

    Reference:
        after Bing et al., doi:10.1109/ACCESS.2019.2944862
    """

    def __init__(
        self,
        feature: FeatureLoss | None = None,
        adversarial: RelativisticLoss | None = None,
        *,
        feature_weight: float = 1.0,
        l1_weight: float = 1.0,
        adversarial_weight: float = 0.005,
        mse_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if min(feature_weight, l1_weight, adversarial_weight, mse_weight) < 0:
            raise SettingError("the weights of the terms must not be negative; 0 leaves a term out")
        if not l1_weight and not mse_weight:
            raise SettingError(
                "l1_weight and mse_weight are both 0; a pixel term must hold the image to the truth"
            )
        self.feature_weight, self.l1_weight = float(feature_weight), float(l1_weight)
        self.adversarial_weight, self.mse_weight = float(adversarial_weight), float(mse_weight)
        if feature is None and feature_weight:
            feature = FeatureLoss()
        self.feature = feature if feature_weight else None
        self.adversarial = RelativisticLoss() if adversarial is None else adversarial

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        *,
        real_logits: Tensor | None = None,
        fake_logits: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of all terms."""
        terms = self._pixel_terms(pred, target)
        if self.feature is not None and self.feature.backbone != "none":
            terms["feature"] = self.feature_weight * self.feature(pred, target)
        if self.adversarial_weight:
            if real_logits is None or fake_logits is None:
                raise SettingError(
                    "the adversarial term needs the logits of both images; give them or set adversarial_weight to 0"
                )
            terms["adversarial"] = self.adversarial_weight * self.adversarial.generator(
                real_logits, fake_logits
            )
        return self.summed(terms)

    def pixel(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the pixel terms alone, with their weights."""
        return self.summed(self._pixel_terms(pred, target))

    def describe(self) -> dict[str, Any]:
        """Return what a record of the run should hold: the weights, the adversarial form and the feature network."""
        return {
            "feature_weight": self.feature_weight,
            "l1_weight": self.l1_weight,
            "adversarial_weight": self.adversarial_weight,
            "mse_weight": self.mse_weight,
            "relativistic_average": self.adversarial.average,
            **({"perceptual": "none"} if self.feature is None else self.feature.describe()),
        }

    def _pixel_terms(self, pred: Tensor, target: Tensor) -> dict[str, Tensor]:
        refuse_other_shape(pred, target)
        pred, target = pred.float(), target.float()
        terms = {}
        if self.l1_weight:
            terms["l1"] = self.l1_weight * F.l1_loss(pred, target)
        if self.mse_weight:
            terms["mse"] = self.mse_weight * F.mse_loss(pred, target)
        return terms
