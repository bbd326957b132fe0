"""FMEN for stereo pairs: the body of the single-image network, and parallax attention between the views inside it.

Papers:
    FMEN (the body): CVPR Workshops (NTIRE) 2022, doi:10.48550/arXiv.2204.08397.
    iPASSR (the exchange): CVPR Workshops (NTIRE) 2021, arXiv 2011.03802.
    SEGSRNet: arXiv 2404.13330. NAFSSR, the pattern: single-image blocks with an exchange between them, CVPR Workshops
    (NTIRE) 2022, arXiv 2204.08714.
Code: written from the papers. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medsr.errors import SettingError
from medsr.networks.blocks import convolve_exactly
from medsr.networks.fmen import FMEN
from medsr.networks.parallax import BiPAM, StereoPrediction, by_view, checked_pair, side_by_side, wanted_of
from medsr.settings import as_whole

__all__ = ["StereoFMEN"]


class StereoFMEN(FMEN):
    """Enlarges both views of a rectified stereo pair, each by an FMEN and what the other view shows.

    One :class:`~medsr.networks.fmen.FMEN` serves both views. Inside its body, behind some of the attention blocks,
    whose outputs are compared, :class:`~medsr.networks.parallax.BiPAM` brings features of the other view, and two
    convolutions add what they make of both to the view's own. The last of them starts with zeros: weights of an FMEN
    for single images are a start, and each view is enlarged as by these until the exchange has learnt something.

    Of the networks for pairs it is the fast one: :class:`~medsr.networks.segsrnet.SEGSRNet` at the published width has
    three times the weights, and sees the whole image through its gates, which this one does not.

    A pair is one tensor with six channels, left before right, as the MONAI tools need it. Where there is one camera,
    its image twice gives a pair without disparity. Pixels are matched along rows: pairs must be rectified.

    What tiling is exact: bands of whole rows with ``row_halo`` more on either side, without statistics. None across
    columns, as each pixel sees its whole row, unless ``cross_view`` is False.

    MONAI has no stereo network.

    Args:
        scale: enlargement, a whole number of at least 1.
        channels: channels of one view, 1 (grey) or 3 (red, green, blue).
        levels: attention blocks before the exchange, each a level of what is compared; at most all of them.
        cross_view: exchange features; without, each view is enlarged on its own, for comparison.
        path: see :func:`~medsr.networks.parallax.parallax_attention`.
        tied: see :class:`~medsr.networks.parallax.BiPAM`.
        band: the same; in pixels of the coarse pair.
        **body: other arguments of :class:`~medsr.networks.fmen.FMEN`. ``features`` must be a multiple of ``levels``.

    Shape:
        ``(B, 2 * channels, H, W)``, intensities in [0, 1], to ``(B, 2 * channels, scale * H, scale * W)``; any size.

    Raises:
        SettingError: for an unknown word, or a setting that makes no network.
        DataError: for another number of channels.

    Example:
        >>> tiny = {"features": 8, "mid_features": 6, "down_blocks": 1, "up_blocks": (1, 1)}
        >>> net = StereoFMEN(4, **tiny).eval()
        >>> pair = torch.rand(1, 6, 10, 7)
        >>> net(pair).shape, net(pair, parallax="maps").parallax.to_left.shape
        (torch.Size([1, 6, 40, 28]), torch.Size([1, 10, 7, 7]))

    Reference:
        doi:10.48550/arXiv.2204.08397; arXiv 2011.03802; arXiv 2404.13330
    """

    exact_halo: int | None

    grey_from_colour = False
    """Not offered for pairs."""

    def __init__(
        self,
        scale: int = 4,
        channels: int = 3,
        *,
        levels: int = 2,
        cross_view: bool = True,
        path: str = "chunked",
        tied: bool = False,
        band: tuple[int, int] | None = None,
        **body: Any,
    ) -> None:
        super().__init__(scale, channels, **body)
        self.in_channels, features = 2 * self.in_channels, self.head.out_channels
        self.exchange = None
        if not cross_view:
            return
        self.levels = as_whole("levels", levels, 1)
        # Behind the first convolution, attention blocks take turns with residual blocks.
        self._compared = range(1, 2 * self.levels, 2)
        blocks = len(self.body) // 2
        if self.levels > blocks or features % self.levels:
            raise SettingError(
                f"levels must divide features ({features}) and be at most the number of attention blocks ({blocks}), "
                f"got {self.levels}"
            )
        # The merge has two convolutions.
        self.row_halo, self.exact_halo = self.exact_halo + BiPAM.row_reach + 2, None
        self.exchange = BiPAM(features, self.levels, path=path, tied=tied, band=band)
        self.merge = nn.Sequential(
            nn.Conv2d(2 * features, features, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(features, features, 3, padding=1),
        )
        for silent in self.merge[-1].parameters():
            nn.init.zeros_(silent)
        self.exchange.match_from_the_start()

    def forward(self, image: Tensor, *, parallax: str = "none") -> Tensor | StereoPrediction:
        """Enlarge a pair.

        Args:
            image: the pair, left before right.
            parallax: ``none`` returns the enlarged pair alone; ``disparity`` returns a
                :class:`~medsr.networks.parallax.StereoPrediction` with masks and disparity; ``maps`` one with masks and
                attention maps, which training losses need.
        """
        wanted, found = wanted_of(parallax, self.exchange), None
        head = convolve_exactly(self.head, by_view(checked_pair(image, self.in_channels)))
        features, levels = head, []
        for place, stage in enumerate(self.body):
            features = stage(features)
            if self.exchange is None or place not in self._compared:
                continue
            levels.append(features)
            if place == self._compared[-1]:
                found = self.exchange(torch.cat(levels, 1), features, **wanted)
                levels.clear()
                features = features + self.merge(torch.cat([features, found.features], 1))
        fine = self.enlarged(head, features)
        return StereoPrediction(side_by_side(fine), image, found) if wanted else side_by_side(fine)
