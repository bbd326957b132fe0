"""Steps of a training of super-resolution and segmentation as one: what its batches are, and which part learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.utils import CommonKeys
from torch import Tensor

from medsr.inferers.mixed_precision import MixedPrecisionInferer
from medsr.networks.superres_segmentation import SuperResSegmentation, SuperResSegmentationOutput

__all__ = ["JointInferer", "PrepareFramePair"]


class PrepareFramePair(PrepareBatch):
    """Give a labelled frame as both views of a pair: the ``prepare_batch`` of a trainer.

    Masks exist for one view, and most labelled frames have no other. ``monai.engines.PrepareBatchDefault`` was
    considered; it has one target, and here the image and the mask are both.

    Shape:
        - ``batch["low"]``: ``(B, C, H, W)``, the frame made small;
        - ``batch["image"]`` and ``batch["label"]``: ``(B, C, scale * H, scale * W)`` and ``(B, 1, ...)``.

    Example:
        >>> batch = {"low": torch.rand(1, 3, 4, 4), "image": torch.rand(1, 3, 8, 8), "label": torch.zeros(1, 1, 8, 8)}
        >>> pair, target = PrepareFramePair()(batch)
        >>> pair.shape, target["image"].shape
        (torch.Size([1, 6, 4, 4]), torch.Size([1, 6, 8, 8]))
    """

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **settings: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``(inputs, targets)`` as MONAI's trainers expect."""
        low, image, label = (
            batchdata[key].to(device=device, non_blocking=non_blocking, **settings)
            for key in ("low", CommonKeys.IMAGE, CommonKeys.LABEL)
        )
        return low.repeat(1, 2, 1, 1), {"image": image.repeat(1, 2, 1, 1), "label": label}


class JointInferer(MixedPrecisionInferer):
    """Run the network, with a segmenter that stays as it is where its parameters are frozen.

    A trainer calls ``train()`` before every step, and the batch norm of a frozen segmenter would go on learning.

    Args:
        amp: see :class:`~medsr.inferers.mixed_precision.MixedPrecisionInferer`.

    Example:
        >>> JointInferer()(torch.zeros(1), torch.neg)
        tensor([-0.])
    """

    def __call__(
        self, inputs: Tensor, network: SuperResSegmentation, *args: Any, **kwargs: Any
    ) -> SuperResSegmentationOutput:
        """Return what the network does."""
        segmenter = getattr(network, "segmenter", None)
        if segmenter is not None and not any(one.requires_grad for one in segmenter.parameters()):
            segmenter.eval()
        found: SuperResSegmentationOutput = super().__call__(inputs, network, *args, **kwargs)
        return found
