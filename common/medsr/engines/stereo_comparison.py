"""One table of stereo super-resolution: pairs degraded and restored by every method, with and without a partner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medsr.engines.case_comparison import CaseComparison
from medsr.engines.image_comparison import DEGRADATION, finite, image_table, refuse_other_scales
from medsr.errors import DataError, SettingError
from medsr.inferers.stereo_superres import StereoSuperResInferer
from medsr.io.loading import LoadImageFiled
from medsr.io.masks import group_of
from medsr.metrics.image import SSIM_TAPS, ImageProtocol, psnr
from medsr.metrics.stereo import disparity_error, row_disparity
from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize, modcrop
from medsr.transforms.stereo import AlignRowsd, JoinViewsd

__all__ = ["LEFT_CROP", "StereoComparison"]

LEFT_CROP = 64
"""Left columns that the older protocol leaves out: they have no match in the right view."""

_VIEW = ImageProtocol()
_BOTH, _LEFT = (f"{_VIEW.identifier}:{which}" for which in ("both-views", f"left-crop{LEFT_CROP}"))


class StereoComparison(CaseComparison):
    """Degrades pairs, restores them by interpolation and by networks, and scores all of them alike.

    Two protocols, both on RGB after rounding to 8 bits and without a border: the mean of the scores of both views,
    which decides; and the left view without its first 64 columns, as in the first papers, where enough of it is left
    for the window of SSIM; else ``notes`` says so. ``disparity_mae_px`` is
    the stereo consistency, see :func:`medsr.metrics.stereo.disparity_error`: fidelity does not tell whether the views
    still fit together. SSIM has the Gaussian window of this project; papers on stereo often use 7 x 7 equal weights.

    What the other view gives is told by running a network without it: each view is given twice, as an image from one
    camera would be.

    Args:
        cases: items of :func:`medsr.io.stereo.find_stereo_cases`; what comes before the first hyphen of a name is its
            group, for example the kind of scene.
        networks: name to network, all of one scale.
        scale: factor.
        one_view: names of networks that also run without the other view.
        rows: see :class:`~medsr.transforms.stereo.AlignRowsd`; in pixels of the sharp pair.
        inferer: settings of :class:`~medsr.inferers.stereo_superres.StereoSuperResInferer`.
        output: file of the results, JSON.
        device: where to compute.

    Raises:
        SettingError: if a network has another scale, or a name is unknown.

    Example:
        >>> StereoComparison([], {}, scale=4).run()
        []
    """

    header: ClassVar[Mapping[str, str]] = {"degradation": DEGRADATION}
    what = "pairs"

    def __init__(
        self,
        cases: Sequence[Mapping[str, str]],
        networks: Mapping[str, nn.Module],
        *,
        scale: int,
        one_view: Sequence[str] = (),
        rows: int | str = 0,
        inferer: Mapping[str, Any] | None = None,
        output: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(cases, output)
        refuse_other_scales(networks, scale)
        one_view = tuple(one_view or ())
        unknown = [name for name in one_view if name not in networks]
        if unknown:
            raise SettingError(
                f"one_view: there is no network '{unknown[0]}' to run with one view; there are {', '.join(networks)}"
            )
        self.networks, self.one_view, self.scale = dict(networks), one_view, int(scale)
        self.inferer, self.device = dict(inferer or {}), torch.device(device)
        self.transforms = (
            LoadImageFiled(("image", "image_right")),
            JoinViewsd(channels=None),
            AlignRowsd("image", rows),
        )

    def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
        sharp = modcrop(self._read(case), self.scale)
        low = BicubicDownsample(self.scale, rounding="end")(sharp)
        size = (sharp.shape[-2], sharp.shape[-1])
        results = {"bicubic": bicubic_resize(low, size).clamp(0, 1)}
        for name, network in self.networks.items():
            results[name] = self._enlarged(low, network)
            if name in self.one_view:
                # Of a pair of equal views either result would do.
                alone = [self._enlarged(view.repeat(2, 1, 1), network) for view in low.chunk(2)]
                results[f"{name}, one view"] = torch.cat([alone[0].chunk(2)[0], alone[1].chunk(2)[1]])
        truth = row_disparity(sharp)
        least = LEFT_CROP + SSIM_TAPS
        if size[1] < least:
            self.note(case["case"], f"{size[1]} px wide: {_LEFT} needs {least}, and is left out")
        rows = []
        for method, result in results.items():
            common = {
                "case": case["case"],
                "group": group_of(case["case"]),
                "method": method,
                "scale": self.scale,
                "data_consistency_db": finite(psnr(BicubicDownsample(self.scale)(result), low)),
                "disparity_mae_px": disparity_error(result, truth),
            }
            views = list(zip(result.chunk(2), sharp.chunk(2), strict=True))
            scored = {_BOTH: views}
            if size[1] >= least:
                scored[_LEFT] = [tuple(one[:, :, LEFT_CROP:] for one in views[0])]
            for protocol, pairs in scored.items():
                scores = [_VIEW.score(*pair) for pair in pairs]
                means = {
                    key: finite(sum(float(one[key]) for one in scores) / len(scores))
                    for key in ("psnr_db", "ssim")
                }
                rows.append({**common, "protocol": protocol, **means})
        return rows

    def _read(self, case: Mapping[str, str]) -> Tensor:
        if "image_right" not in case:
            raise DataError(case.get("error", f"{case['case']}: there is no second view to compare with"))
        item: dict[Any, Any] = dict(case)
        for transform in self.transforms:
            item = transform(item)
        pair: Tensor = item["image"].as_tensor()
        return pair

    def _enlarged(self, low: Tensor, network: nn.Module) -> Tensor:
        infer = StereoSuperResInferer(**self.inferer)
        return infer(low[None].to(self.device), network.to(self.device))[0].float()

    def _table(self) -> str:
        return image_table(self.rows, {"disparity_mae_px": "disparity error, px"})
