"""Super-resolution of a stereo pair and segmentation of its views as one network, for training end to end.

Paper:
    SEGSRNet: arXiv 2404.13330. It trains the two networks one after the other; here a loss on the masks may reach both.
Code: written from the paper. It has no weights of its own: each part keeps its own file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError

__all__ = ["SuperResSegmentation", "SuperResSegmentationOutput"]

_VIEWS = ("both", "left")


class SuperResSegmentationOutput(NamedTuple):
    """A super-resolved pair and the logits of its views.

    Args:
        image: the pair, left before right.
        logits: those of the left view, and then of the right one if it was segmented.

    Shape:
        - image: ``(B, 2C, scale * H, scale * W)``;
        - logits: ``(B, 2K, scale * H, scale * W)``, or ``(B, K, ...)`` of the left view alone.

    Example:
        >>> SuperResSegmentationOutput(torch.zeros(1, 6, 8, 8), torch.zeros(1, 2, 8, 8)).logits.shape
        torch.Size([1, 2, 8, 8])
    """

    image: Tensor
    logits: Tensor


class SuperResSegmentation(nn.Module):
    """Enlarges a stereo pair and segments what it made of it.

    Masks that are trained on sharp frames expect sharp frames: a loss on these logits teaches the super-resolution
    which detail matters to them. Freeze either part with ``requires_grad_(False)``, and a frozen segmenter with
    ``eval()`` besides, or its batch norm goes on learning. The enlarged pair is not clamped to [0, 1] on its way, as
    pixels outside would get no gradient. ``torch.nn.Sequential`` was considered: it knows neither views nor padding.

    Args:
        superres: network for pairs, such as :class:`~medsr.networks.stereo_fmen.StereoFMEN`.
        segmenter: network for single frames, such as :class:`~medsr.networks.spp_linknet.SPPLinkNet`.
        views: ``both`` segments both views, ``left`` the left one, where masks of the right one are missing.

    Shape:
        ``(B, 2C, H, W)``, intensities in [0, 1], to a :class:`SuperResSegmentationOutput`.

    Raises:
        SettingError: for another word, or networks whose channels do not fit.

    Example:
        >>> from medsr.networks.segsrnet import SEGSRNet
        >>> class Frame(nn.Conv2d):
        ...     size_multiple, half_precision_safe = 4, True
        >>> net = SuperResSegmentation(SEGSRNet(2, features=8, growth=4, blocks=2), Frame(3, 1, 1))
        >>> [tuple(part.shape) for part in net(torch.rand(1, 6, 5, 7))]
        [(1, 6, 10, 14), (1, 2, 10, 14)]

    Reference:
        arXiv 2404.13330
    """

    exact_halo = None
    """No finite halo makes tiling exact: pixels of a stereo network see their whole row."""

    def __init__(self, superres: nn.Module, segmenter: nn.Module, *, views: str = "both") -> None:
        super().__init__()
        if views not in _VIEWS:
            raise SettingError(f"views must be one of {', '.join(_VIEWS)}, got '{views}'")
        if superres.in_channels != 2 * segmenter.in_channels:
            raise SettingError(
                f"a super-resolution network of {superres.in_channels} channels makes no views for a segmentation "
                f"network of {segmenter.in_channels}"
            )
        self.superres, self.segmenter, self.views = superres, segmenter, views
        self.scale, self.in_channels = superres.scale, superres.in_channels
        self.size_multiple = superres.size_multiple
        self.half_precision_safe = superres.half_precision_safe and segmenter.half_precision_safe

    def forward(self, image: Tensor) -> SuperResSegmentationOutput:
        """Enlarge a pair and segment its views."""
        pair = self.superres(image)
        views = pair.chunk(2, 1)
        if self.views == "left":
            views = views[:1]
        height, width = pair.shape[-2:]
        multiple = self.segmenter.size_multiple
        padded = F.pad(torch.cat(views), (0, -width % multiple, 0, -height % multiple), mode="replicate")
        logits = self.segmenter(padded)[..., :height, :width]
        return SuperResSegmentationOutput(pair, torch.cat(logits.chunk(len(views)), 1))
