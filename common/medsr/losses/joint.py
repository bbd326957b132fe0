"""Loss of super-resolution and segmentation trained as one: masks like the truth, from an image that stays true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.losses.terms import TermLoss, refuse_other_shape
from medsr.networks.superres_segmentation import SuperResSegmentationOutput

__all__ = ["JointLoss"]


class JointLoss(TermLoss):
    """Segmentation loss of the first view, and L1 of the enlarged pair.

    A loss on the masks alone would let the super-resolution draw whatever the segmenter likes to see; L1 holds it to
    the frame. ``last_terms`` holds the value of every term after a call, as it enters the sum. MONAI has no loss of
    an image and its mask; ``torch.nn.L1Loss`` is the second term.

    Args:
        segmentation: loss of logits and class indexes, for example
            :class:`~medsr.losses.jaccard.ClassJaccardLoss`.
        segmentation_weight: its weight.
        l1_weight: weight of the mean absolute error of the pair, whose values are small: 0.02 is a usual error, where
            the loss of a mask is 0.2. 0 leaves it out.

    Shape:
        - pred: :class:`~medsr.networks.superres_segmentation.SuperResSegmentationOutput` of one view's logits;
        - target: ``image`` ``(B, 2C, H, W)`` and ``label`` ``(B, 1, H, W)``.

    Raises:
        SettingError: for a weight of the masks that is not positive or a negative one of the pair, and for a pair of
            another size than the truth.

    Example:
        >>> import torch
        >>> loss = JointLoss(nn.BCEWithLogitsLoss(), l1_weight=2)
        >>> pred = SuperResSegmentationOutput(torch.full((1, 6, 2, 2), 0.5), torch.zeros(1, 1, 2, 2))
        >>> truth = {"image": torch.zeros(1, 6, 2, 2), "label": torch.zeros(1, 1, 2, 2)}
        >>> round(loss(pred, truth).item(), 4), loss.last_terms["l1"]
        (1.6931, 1.0)

    Reference:
        arXiv 2404.13330, which trains both parts apart
    """

    def __init__(
        self, segmentation: nn.Module, *, segmentation_weight: float = 1.0, l1_weight: float = 10.0
    ) -> None:
        super().__init__()
        if segmentation_weight <= 0 or l1_weight < 0:
            raise SettingError(
                "segmentation_weight must be positive and l1_weight not negative, "
                f"got {segmentation_weight:g} and {l1_weight:g}"
            )
        self.segmentation = segmentation
        self.segmentation_weight, self.l1_weight = float(segmentation_weight), float(l1_weight)

    def forward(self, pred: SuperResSegmentationOutput, target: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of both terms."""
        image, label = target["image"], target["label"]
        refuse_other_shape(pred.image, image)
        masks = self.segmentation_weight * self.segmentation(pred.logits, label)
        terms = {"segmentation": masks}
        if self.l1_weight:
            terms["l1"] = self.l1_weight * F.l1_loss(pred.image.float(), image.float())
        return self.summed(terms)

    def describe(self) -> dict[str, Any]:
        """Return what a record of the run should hold: the weights, and the settings of the loss of the masks."""
        inner = self.segmentation.describe() if hasattr(self.segmentation, "describe") else {}
        return {**inner, "segmentation_weight": self.segmentation_weight, "l1_weight": self.l1_weight}
