"""Inference of one stereo pair: both views enlarged, and segmented as they are then."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from monai.inferers import Inferer
from torch import Tensor

from medsr.errors import DataError
from medsr.inferers.frame_segmentation import FrameSegmentationInferer
from medsr.inferers.stereo_superres import StereoSuperResInferer

__all__ = ["StereoSegmentationInferer"]


class _Networks(Protocol):
    """What is asked: see :class:`~medsr.networks.superres_segmentation.SuperResSegmentation`."""

    superres: Any
    segmenter: Any


class StereoSegmentationInferer(Inferer):
    """Super-resolves one pair and gives the class of every pixel of both enlarged views.

    Each part runs as it does alone, in bands of rows or at the scale of its training, and hence gives the same result.
    Of the probabilities only the class of the largest is kept: those of an enlarged pair would be several times the
    size of the pair.

    ``facts`` holds those of the super-resolution, and under ``segmentation`` those of the views, which are equal.

    Args:
        superres: how pairs are enlarged.
        segmentation: how frames are segmented.

    Shape:
        ``(1, 2C, H, W)`` in [0, 1] to ``superres``, ``(1, 2C, s * H, s * W)`` in [0, 1], and ``seg_left`` and
        ``seg_right``, ``(1, 1, s * H, s * W)`` uint8, in a dictionary, on the CPU. ``monai.transforms.FlattenSubKeysd``
        takes it apart.

    Raises:
        DataError: if the number of channels is odd.

    Example:
        >>> from medsr.networks.segsrnet import SEGSRNet
        >>> from medsr.networks.superres_segmentation import SuperResSegmentation
        >>> class Frame(torch.nn.Conv2d):
        ...     size_multiple, half_precision_safe = 4, True
        >>> both = SuperResSegmentation(SEGSRNet(2, features=8, growth=4, blocks=2), Frame(3, 1, 1))
        >>> infer = StereoSegmentationInferer(StereoSuperResInferer(), FrameSegmentationInferer())
        >>> {name: tuple(part.shape) for name, part in infer(torch.rand(1, 6, 5, 7), both).items()}
        {'superres': (1, 6, 10, 14), 'seg_left': (1, 1, 10, 14), 'seg_right': (1, 1, 10, 14)}
    """

    def __init__(self, superres: StereoSuperResInferer, segmentation: FrameSegmentationInferer) -> None:
        super().__init__()
        self.superres, self.segmentation = superres, segmentation
        self.facts: dict[str, Any] = {}

    def __call__(self, inputs: Tensor, network: _Networks, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Enlarge and segment the first (only) pair of the batch; other arguments are ignored."""
        if inputs.shape[1] % 2:
            raise DataError(f"{inputs.shape[1]} channels are no pair of views")
        found = {"superres": self.superres(inputs, network.superres)}
        for side, view in zip(("left", "right"), found["superres"].chunk(2, 1), strict=True):
            probabilities = self.segmentation(view.to(inputs.device), network.segmenter)
            found[f"seg_{side}"] = probabilities.argmax(1, keepdim=True).to(torch.uint8).cpu()
        facts, more = dict(self.superres.facts), dict(self.segmentation.facts)
        warnings = [*facts.pop("warnings", []), *more.pop("warnings", [])]
        self.facts = {**facts, "segmentation": more, "warnings": warnings}
        return found
