"""Inference of one stereo pair: whole or in bands of rows, and what each view has to do with its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from medsr.inferers.image_superres import ImageSuperResInferer, decibels

__all__ = ["StereoSuperResInferer"]


class StereoSuperResInferer(ImageSuperResInferer):
    """Super-resolves one pair and says how well each view of the result agrees with its input.

    As :class:`~medsr.inferers.image_superres.ImageSuperResInferer`, for networks whose channels are the left and then
    the right view: ``facts`` holds ``data_consistency_left_db`` and ``data_consistency_right_db`` besides. A pair that
    is too large to be run at once runs in bands of whole rows, with the same result, see
    :class:`~medsr.inferers.tiles.TileInferer`: each pixel sees its whole row in the other view.

    Args:
        ensemble: average over the four symmetries of a pair, at four times the time: both views upside down, or
            mirrored, where they change places. Turned by a quarter, a pair is none.
        back_projection: number of back-projection steps.
        **tiles: settings of :class:`~medsr.inferers.tiles.TileInferer`.

    Shape:
        ``(1, 2C, H, W)`` in [0, 1], C = 1 or 3, to ``(1, 2C, s * H, s * W)`` in [0, 1], on the CPU.

    Raises:
        SettingError: if a setting is out of range.
        DataError: if the number of channels does not fit the network.

    Example:
        >>> import torch
        >>> from medsr.networks.segsrnet import SEGSRNet
        >>> infer = StereoSuperResInferer()
        >>> infer(torch.rand(1, 6, 12, 16), SEGSRNet(2, features=8, growth=4, blocks=2)).shape
        torch.Size([1, 6, 24, 32])
        >>> sorted(name for name in infer.facts if "view" in name or "left" in name)
        ['data_consistency_left_db']
    """

    views = 2

    def _consistency(self, difference: Tensor) -> dict[str, Any]:
        left, right = difference.chunk(2, 1)
        return {
            **super()._consistency(difference),
            "data_consistency_left_db": decibels(left),
            "data_consistency_right_db": decibels(right),
        }
