"""Loss of frame segmentation: cross-entropy and the logarithm of the soft Jaccard index of the classes at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medsr.errors import DataError, SettingError
from medsr.losses.terms import TermLoss

__all__ = ["ClassJaccardLoss"]


class ClassJaccardLoss(TermLoss):
    """Cross-entropy and negative logarithm of the mean soft Jaccard index, ``(1 - a) H - a log J``.

    The index is that of whole classes over the whole batch, where cross-entropy counts pixels: a thin instrument
    weighs as much as the background. Only classes that the truth of the batch holds are averaged. An absent class
    has an index of 0 whatever the network says: where every class adds its own logarithm, as first published for
    instruments, an absent one adds tens to the loss and pushes its logits down as hard as ever long after they are
    low, which drowns the few types in view. Here, calling an absent class costs the classes whose pixels it takes.

    With one logit the foreground alone is averaged, and a batch without any has no Jaccard term; with more, the
    background is a class like the others. Both are as published. Pixels to be ignored count nowhere.
    ``last_terms`` holds the value of every term after a call, as it enters the sum; a term of weight 0 is left out.
    All is computed in float32, whatever the precision of the logits.

    ``monai.losses.DiceCELoss(jaccard=True, batch=True)`` was considered: it adds 1 - J without a logarithm, averages
    absent classes too, cannot ignore pixels, and returns one number for two terms.

    Args:
        jaccard_weight: ``a``, from 0 to 1; cross-entropy gets the rest.
        ignore: value of the truth that marks pixels to be ignored.
        smooth: pixels added to both sides of the fraction, more than 0: a class that is missed altogether then has
            a finite logarithm.

    Shape:
        - pred: logits ``(B, K, H, W)``; K = 1 for foreground against background, else one for each class;
        - target: class indexes ``(B, 1, H, W)`` of any type, background 0.

    Raises:
        SettingError: for a setting outside its range, and for shapes that do not fit.
        DataError: if the truth holds anything but class indexes and ``ignore``.

    Example:
        >>> loss = ClassJaccardLoss()
        >>> target = torch.tensor([[[[0, 1], [2, 255]]]])
        >>> round(loss(torch.zeros(1, 3, 2, 2), target).item(), 4)
        1.2519
        >>> {name: round(value, 4) for name, value in loss.last_terms.items()}
        {'cross_entropy': 0.769, 'jaccard': 0.4828}

    Reference:
        after Shvets et al., Automatic instrument segmentation in robot-assisted surgery using deep learning, 2018,
        doi:10.1101/275867
    """

    def __init__(self, jaccard_weight: float = 0.3, *, ignore: int = 255, smooth: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= jaccard_weight <= 1:
            raise SettingError(f"jaccard_weight must lie in [0, 1], got {jaccard_weight:g}")
        if not smooth > 0:
            raise SettingError(f"smooth must be more than 0, got {smooth:g}; the logarithm needs it")
        self.jaccard_weight, self.ignore, self.smooth = float(jaccard_weight), int(ignore), float(smooth)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the sum of both terms."""
        index, judged = self._class_index(pred, target)
        logits, terms = pred.float(), {}
        if self.jaccard_weight < 1:
            terms["cross_entropy"] = (1 - self.jaccard_weight) * _cross_entropy(logits, index, judged)
        if self.jaccard_weight:
            terms["jaccard"] = self.jaccard_weight * self._jaccard(logits, index, judged)
        return self.summed(terms)

    def describe(self) -> dict[str, Any]:
        """Return what a record of the run should hold: the settings."""
        return {"jaccard_weight": self.jaccard_weight, "ignore": self.ignore, "smooth": self.smooth}

    def _class_index(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Class of every pixel, 0 where it is to be ignored, and which pixels count."""
        if pred.ndim != 4 or target.shape != (len(pred), 1, *pred.shape[2:]):
            raise SettingError(
                "the loss needs logits (B, K, H, W) and class indexes (B, 1, H, W), "
                f"got {tuple(pred.shape)} and {tuple(target.shape)}"
            )
        classes, judged = max(2, pred.shape[1]), target != self.ignore
        # Random transforms leave whole numbers as floats.
        index = torch.where(judged, target, 0).long()
        wrong = judged & ((index != target) | (index < 0) | (index >= classes))
        if wrong.any():
            raise DataError(
                f"the truth holds {target[wrong][0].item():g}, which is neither one of {classes} class indexes nor "
                f"{self.ignore} for ignored pixels; check the label map"
            )
        return index, judged

    def _jaccard(self, logits: Tensor, index: Tensor, judged: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            probability, classes = logits.sigmoid(), index.new_ones(1)
        else:
            probability = logits.softmax(1)
            classes = torch.arange(logits.shape[1], device=index.device)
        truth = judged & (index == classes.view(1, -1, 1, 1))
        size = _per_class(truth)
        if not size.any():
            # Still a part of the graph, for a loss that has no other term.
            return 0 * probability.sum()
        overlap = _per_class(probability * truth)
        union = _per_class(probability * judged) + size - overlap
        index_of_class = (overlap + self.smooth) / (union + self.smooth)
        return -index_of_class[size > 0].mean().log()


def _cross_entropy(logits: Tensor, index: Tensor, judged: Tensor) -> Tensor:
    """Mean over the pixels that count; 0 if none does, where PyTorch has NaN."""
    if logits.shape[1] == 1:
        entropy = F.binary_cross_entropy_with_logits(logits, index.float(), reduction="none")
    else:
        entropy = F.cross_entropy(logits, index[:, 0], reduction="none")[:, None]
    return (entropy * judged).sum() / judged.sum().clamp(min=1)


def _per_class(pixels: Tensor) -> Tensor:
    return pixels.sum((0, 2, 3))
