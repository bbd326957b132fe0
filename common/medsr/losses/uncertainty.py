"""Loss of joint image and label super-resolution, with or without a predicted uncertainty."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.losses.terms import TermLoss

__all__ = ["UncertaintyAwareLoss"]


class UncertaintyAwareLoss(TermLoss):
    """L1 on the image, cross-entropy and Dice on the labels, and two terms that teach the uncertainty.

    With ``e = |pred - target|`` and the predicted error ``U``: ``mean(e) + a mean(e / U + ln U) + b mean|U - e|``.
    The middle term is the Laplace likelihood, whose optimum is ``U = E[e]``; the last pins ``U`` to the error.
    ``U`` must be bounded from below, which the network does. The likelihood divides the image's gradient by ``U``,
    about 0.02 in a head and 0.001 in the background; unless told otherwise it therefore teaches ``U`` alone, and
    the image keeps the plain L1. ``last_terms`` holds the value of every term after a call.

    Args:
        label_classes: number of label channels after the image channel (logits).
        uncertainty: whether the last channel is ``U``.
        likelihood_weight: ``a``.
        error_weight: ``b``.
        image_from_likelihood: let the likelihood teach the image too, as published.

    Shape:
        - pred: ``(B, 1 + label_classes [+ 1], ...)``;
        - target: ``(B, 1 + label_classes, ...)``, labels in [0, 1].

    Raises:
        SettingError: if the number of channels does not fit the settings.

    Example:
        >>> import torch
        >>> loss = UncertaintyAwareLoss(uncertainty=True)
        >>> loss(torch.full((1, 2, 4, 4, 4), 0.5), torch.zeros(1, 1, 4, 4, 4)).item() > 0
        True

    Reference:
        arXiv 2410.10097; arXiv 1904.06807; doi:10.1016/j.neucom.2025.129425
    """

    def __init__(
        self,
        label_classes: int = 0,
        uncertainty: bool = False,
        *,
        likelihood_weight: float = 1.0,
        error_weight: float = 1.0,
        image_from_likelihood: bool = False,
    ) -> None:
        super().__init__()
        self.label_classes, self.uncertainty = int(label_classes), bool(uncertainty)
        self.likelihood_weight, self.error_weight = float(likelihood_weight), float(error_weight)
        self.image_from_likelihood = image_from_likelihood

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the sum of all terms."""
        expected = 1 + self.label_classes + self.uncertainty
        if pred.shape[1] != expected or target.shape[1] != 1 + self.label_classes:
            raise SettingError(
                f"the loss expects {expected} predicted and {1 + self.label_classes} target channels, "
                f"got {pred.shape[1]} and {target.shape[1]}"
            )
        pred, target = pred.float(), target.float()
        error = (pred[:, :1] - target[:, :1]).abs()
        terms = {"l1": error.mean()}
        if self.uncertainty:
            predicted = pred[:, -1:]
            numerator = error if self.image_from_likelihood else error.detach()
            terms["likelihood"] = self.likelihood_weight * (numerator / predicted + predicted.log()).mean()
            terms["error"] = self.error_weight * (predicted - error.detach()).abs().mean()
        if self.label_classes:
            logits, labels = pred[:, 1 : 1 + self.label_classes], target[:, 1:]
            probability = logits.sigmoid()
            overlap = (probability * labels).sum()
            total = (probability**2).sum() + (labels**2).sum()
            terms["cross_entropy"] = F.binary_cross_entropy_with_logits(logits, labels)
            terms["dice"] = 1 - 2 * overlap / total.clamp_min(1e-6)
        return self.summed(terms)
