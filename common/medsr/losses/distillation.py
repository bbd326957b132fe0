"""Structural knowledge distillation: a student's feature map learns the structure of a frozen teacher's.

Papers:
    Structured knowledge distillation (pair-wise affinity of pooled nodes): Liu et al., arXiv 1903.04197.
    REHRSeg (pair-wise and spatial distillation from a super-resolution encoder): arXiv 2410.10097,
    Neurocomputing 624 (2025) 129425, doi:10.1016/j.neucom.2025.129425.
Code: written from the papers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.settings import as_whole_list

__all__ = ["PairwiseAffinityLoss", "SpatialCosineLoss"]

_EPSILON = 1e-8
"""Smallest length of a feature vector that has a direction."""


class PairwiseAffinityLoss(nn.Module):
    """Squared difference between the affinities of image regions in the student's and in the teacher's features.

    Which regions of a slice look alike does not depend on the number or the order of the channels: no adapter is
    needed. Every slice is max-pooled to a grid of nodes, and the affinity of two nodes is the cosine between their
    channel vectors. The mean runs over node pairs, slices and batch, once, so that neither grid nor slab changes
    the weight of the term. The released 2 x 2 grid hardly tells two networks apart, because maxima over a quarter
    of a slice are alike everywhere; finer is the default. MONAI has no distillation loss.

    Args:
        nodes: nodes along ``H`` and ``W``; ``(2, 2)`` as published. No finer than the student's map.

    Shape:
        - student: ``(B, C, H, W, D)``, slices last;
        - teacher: ``(B, C', H', W', D')``, brought to the student's grid; gets no gradient.

    Raises:
        SettingError: for less than one node, or features that do not belong to the same batch.

    Example:
        >>> features = torch.rand(1, 4, 16, 16, 3)
        >>> PairwiseAffinityLoss()(features, features.flip(1)).item() < 1e-9
        True

    Reference:
        arXiv 1903.04197; arXiv 2410.10097; doi:10.1016/j.neucom.2025.129425
    """

    def __init__(self, nodes: Sequence[int] = (8, 8)) -> None:
        super().__init__()
        found = as_whole_list("nodes", nodes, 1)
        if len(found) != 2:
            raise SettingError(f"nodes must be two positive numbers, for H and W, got {found}")
        self.nodes = (found[0], found[1])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared difference of affinities."""
        student, teacher = _on_one_grid(student, teacher)
        # Differences of cosines near 1 need all the digits.
        with torch.autocast(student.device.type, enabled=False):
            return F.mse_loss(self._affinity(student), self._affinity(teacher))

    def _affinity(self, features: Tensor) -> Tensor:
        """Cosines between all nodes of a slice, ``(B * D, N, N)``."""
        slices = features.permute(0, 4, 1, 2, 3).flatten(0, 1)
        height, width = (min(pair) for pair in zip(self.nodes, slices.shape[-2:], strict=True))
        nodes = F.adaptive_max_pool2d(slices, (height, width)).flatten(2)
        norm = nodes.detach().norm(dim=1, keepdim=True)
        # A node without any activation has no direction: dividing by epsilon would let its gradient drown all others.
        nodes = nodes * ((norm > _EPSILON) / (norm + _EPSILON))
        return nodes.mT @ nodes


class SpatialCosineLoss(nn.Module):
    """One minus the cosine between the spatial maps of the teacher's channels and of the adapted student's.

    A 1 x 1 x 1 convolution, trained together with the student and discarded after, maps the student's channels to
    the teacher's. Both are scaled to unit length over the channels, so that every voxel counts alike. What is
    compared is where a channel is active, not how strongly. ``torch.nn.CosineEmbeddingLoss`` was considered: it
    compares the vectors of single voxels.

    Args:
        student_channels: channels of the student's feature map.
        teacher_channels: channels of the teacher's.

    Shape:
        - student: ``(B, student_channels, H, W, D)``, slices last;
        - teacher: ``(B, teacher_channels, H', W', D')``, brought to the student's grid; gets no gradient.

    Raises:
        SettingError: if the numbers of channels do not fit, or the features do not belong to the same batch.

    Example:
        >>> loss = SpatialCosineLoss(4, 8)
        >>> loss(torch.rand(1, 4, 8, 8, 3), torch.rand(1, 8, 4, 4, 3)).item() <= 2
        True

    Reference:
        arXiv 2410.10097; doi:10.1016/j.neucom.2025.129425
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.adapter = nn.Conv3d(int(student_channels), int(teacher_channels), 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean of ``1 - cosine`` over channels and batch."""
        expected, got = self.adapter.weight.shape[1::-1], torch.Size([student.shape[1], teacher.shape[1]])
        if got != expected:
            raise SettingError(
                f"the adapter expects {expected[0]} student and {expected[1]} teacher channels, "
                f"got {got[0]} and {got[1]}"
            )
        student, teacher = _on_one_grid(student, teacher)
        with torch.autocast(student.device.type, enabled=False):
            adapted, wanted = (
                F.normalize(features, dim=1, eps=_EPSILON).flatten(2)
                for features in (self.adapter(student), teacher)
            )
            return (1 - F.cosine_similarity(adapted, wanted, dim=2)).mean()


def _on_one_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, the teacher without gradient and on the student's grid (same field of view)."""
    if student.ndim != 5 or teacher.ndim != 5 or len(student) != len(teacher):
        raise SettingError(
            "distillation compares feature maps (B, C, H, W, D) of one batch, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    student, teacher = student.float(), teacher.detach().float()
    if teacher.shape[2:] != student.shape[2:]:
        teacher = F.interpolate(teacher, size=student.shape[2:], mode="trilinear", align_corners=False)
    return student, teacher
