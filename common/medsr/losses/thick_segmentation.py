"""Loss of high-resolution segmentation from thick slices: two masks, and a frozen teacher's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from medsr.errors import DataError, SettingError
from medsr.losses.distillation import PairwiseAffinityLoss, SpatialCosineLoss
from medsr.losses.terms import TermLoss

if TYPE_CHECKING:
    from medsr.networks.thick_segmentation import ThickSegmentation

__all__ = ["ThickSegmentationLoss"]

_SMOOTH = 1e-5
"""Added to both sides of the Dice fraction: an empty class has a Dice."""

_ROUNDING = 1e-2
"""How far an average in half precision may leave [0, 1]."""


class ThickSegmentationLoss(TermLoss):
    """Cross-entropy on the thick grid, cross-entropy and Dice on the thin one, and structural distillation.

    The pseudo labels come from super-resolution, which knows where it is unsure: a voxel of the thick grid with
    uncertainty ``u`` weighs ``1 - uncertainty_weight * u``. Published is either that weighting or Dice on the thick
    grid; here one does not depend on the other. A term whose weight is 0 is left out entirely, with its inputs and
    its adapter. The adapter's parameters belong to this loss: give the optimiser, and a guard of the gradients,
    those of the network and of the loss. ``last_terms`` holds the value of every term after a call, as it enters
    the sum.

    ``monai.losses.DiceLoss`` is used, in its form for soft labels, whose optimum is the label itself.
    ``monai.losses.DiceCELoss`` was considered: it knows no voxel weights and returns one number for two terms.

    Args:
        classes: number of classes, background included.
        student_channels: channels of the student's feature map; only the cosine term needs it.
        teacher_channels: channels of the teacher's; likewise.
        uncertainty_weight: 0 to 1; share of its weight that a voxel loses at uncertainty 1.
        thick_dice_weight: weight of Dice on the thick grid.
        thin_weight: weight of both terms of the thin grid.
        cosine_weight: weight of :class:`~medsr.losses.distillation.SpatialCosineLoss`.
        pairwise_weight: weight of :class:`~medsr.losses.distillation.PairwiseAffinityLoss`.
        nodes: nodes of the pair-wise term along ``H`` and ``W``.

    Shape:
        - pred: logits ``thick`` ``(B, K, H, W, D)`` and ``thin`` ``(B, K, H, W, D')``, ``feature``
          ``(B, student_channels, H'', W'', D)``;
        - target: mapping with class probabilities ``thick`` and ``thin`` of the same shapes, ``uncertainty``
          ``(B, 1, H, W, D)`` in [0, 1] (area-averaged where it is known on the thin grid), and the teacher's feature
          map ``teacher`` ``(B, teacher_channels, ...)`` on any grid of the same field of view.

    Raises:
        SettingError: for a setting outside its range, for shapes that do not fit, and for a target without what a
            term needs.
        DataError: if the uncertainty leaves [0, 1].

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> loss = ThickSegmentationLoss(
        ...     uncertainty_weight=0, thick_dice_weight=1, cosine_weight=0, pairwise_weight=0
        ... )
        >>> pred = SimpleNamespace(thick=torch.zeros(1, 2, 4, 4, 2), thin=torch.zeros(1, 2, 4, 4, 8))
        >>> target = {"thick": torch.full((1, 2, 4, 4, 2), 0.5), "thin": torch.full((1, 2, 4, 4, 8), 0.5)}
        >>> round(loss(pred, target).item(), 4), list(loss.last_terms)
        (1.3863, ['thick_cross_entropy', 'thick_dice', 'thin_cross_entropy', 'thin_dice'])

    Reference:
        arXiv 2410.10097; doi:10.1016/j.neucom.2025.129425
    """

    def __init__(
        self,
        classes: int = 2,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        uncertainty_weight: float = 0.99,
        thick_dice_weight: float = 0.0,
        thin_weight: float = 1.0,
        cosine_weight: float = 1.0,
        pairwise_weight: float = 1.0,
        nodes: Sequence[int] = (8, 8),
    ) -> None:
        super().__init__()
        if classes < 2:
            raise SettingError(f"classes must be at least 2, background included, got {classes}")
        if not 0 <= uncertainty_weight <= 1:
            raise SettingError(f"uncertainty_weight must lie in [0, 1], got {uncertainty_weight:g}")
        if min(thick_dice_weight, thin_weight, cosine_weight, pairwise_weight) < 0:
            raise SettingError("the weights of the terms must not be negative; 0 leaves a term out")
        if cosine_weight and not (student_channels and teacher_channels):
            raise SettingError(
                "the cosine term needs student_channels and teacher_channels; give both or set cosine_weight to 0"
            )
        self.classes, self.uncertainty_weight = int(classes), float(uncertainty_weight)
        self.thick_dice_weight, self.thin_weight = float(thick_dice_weight), float(thin_weight)
        self.cosine_weight, self.pairwise_weight = float(cosine_weight), float(pairwise_weight)
        self.dice = DiceLoss(
            include_background=False, softmax=True, soft_label=True, smooth_nr=_SMOOTH, smooth_dr=_SMOOTH
        )
        self.cosine = SpatialCosineLoss(student_channels, teacher_channels) if cosine_weight else None
        self.pairwise = PairwiseAffinityLoss(nodes) if pairwise_weight else None

    def forward(self, pred: ThickSegmentation, target: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of all terms."""
        logits, labels = self._pair(pred.thick, target, "thick")
        cross_entropy = F.cross_entropy(logits, labels, reduction="none")
        if self.uncertainty_weight:
            uncertainty = self._uncertainty(target, cross_entropy)
            cross_entropy = cross_entropy * (1 - self.uncertainty_weight * uncertainty)
        terms = {"thick_cross_entropy": cross_entropy.mean()}
        if self.thick_dice_weight:
            terms["thick_dice"] = self.thick_dice_weight * self.dice(logits, labels)
        if self.thin_weight:
            logits, labels = self._pair(pred.thin, target, "thin")
            terms["thin_cross_entropy"] = self.thin_weight * F.cross_entropy(logits, labels)
            terms["thin_dice"] = self.thin_weight * self.dice(logits, labels)
        if self.cosine is not None:
            terms["cosine"] = self.cosine_weight * self.cosine(pred.feature, _teacher(target))
        if self.pairwise is not None:
            terms["pairwise"] = self.pairwise_weight * self.pairwise(pred.feature, _teacher(target))
        return self.summed(terms)

    def _pair(self, logits: Tensor | None, target: Mapping[str, Tensor], grid: str) -> tuple[Tensor, Tensor]:
        """Logits and class probabilities of one grid, in float32."""
        labels = target.get(grid)
        if (
            logits is None
            or labels is None
            or logits.shape[1] != self.classes
            or labels.shape != logits.shape
        ):
            given, wanted = (None if one is None else tuple(one.shape) for one in (logits, labels))
            raise SettingError(
                f"the {grid} grid needs logits and labels of one shape with {self.classes} classes, "
                f"got {given} and {wanted}"
            )
        return logits.float(), labels.float()

    def _uncertainty(self, target: Mapping[str, Tensor], voxels: Tensor) -> Tensor:
        uncertainty = target.get("uncertainty")
        if uncertainty is None:
            raise SettingError("the labels come without uncertainty; give it or set uncertainty_weight to 0")
        if uncertainty.shape != voxels.unsqueeze(1).shape:
            raise SettingError(
                f"uncertainty must have one value per thick voxel, {tuple(voxels.unsqueeze(1).shape)}, "
                f"got {tuple(uncertainty.shape)}"
            )
        lowest, highest = (float(end) for end in uncertainty.aminmax())
        if lowest < -_ROUNDING or highest > 1 + _ROUNDING:
            raise DataError(f"uncertainty must lie in [0, 1], got {lowest:g} to {highest:g}; rescale it")
        return uncertainty[:, 0].float().clamp(0, 1)


def _teacher(target: Mapping[str, Tensor]) -> Tensor:
    feature = target.get("teacher")
    if feature is None:
        raise SettingError(
            "distillation needs a teacher's features; give a teacher or set cosine_weight and pairwise_weight to 0"
        )
    return feature
