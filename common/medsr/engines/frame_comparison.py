"""One table of frame segmentation: every network on every labelled frame, sharp or made small and restored."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from monai.transforms import Compose
from torch import Tensor, nn

from medsr.engines.case_comparison import CaseComparison, total_of
from medsr.engines.image_comparison import DEGRADATION, refuse_other_scales
from medsr.errors import SettingError
from medsr.handlers.run_conditions import RunConditions
from medsr.inferers.frame_segmentation import FrameSegmentationInferer
from medsr.inferers.image_superres import ImageSuperResInferer
from medsr.inferers.stereo_superres import StereoSuperResInferer
from medsr.io.loading import LoadImageFiled
from medsr.io.masks import group_of
from medsr.metrics.frames import frame_scores, summary
from medsr.settings import as_whole
from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize, modcrop
from medsr.transforms.frame_labels import GreysToClassesd, LoadMaskd, SameSized

__all__ = ["FRAME_PROTOCOL", "SHARP", "FrameComparison", "frame_table", "with_facts"]

_log = logging.getLogger(__name__)

FRAME_PROTOCOL = (
    "frames-v1: class of the largest probability, against the mask on the pixels of the file; pixels to ignore left "
    "out; the background is no class; scores by the names of medsr.metrics.frames"
)

SHARP = "sharp"
"""Input of a row: the frame as it is in the file."""

_TABLE = {
    "iou_present": "IoU",
    "dice_present": "Dice",
    "challenge_iou": "challenge IoU",
    "isi_iou": "ISI IoU",
    "mean_class_iou": "mean class IoU",
    "pooled_iou": "pooled IoU",
}


class FrameComparison(CaseComparison):
    """Segments labelled frames with several networks and scores all of them alike.

    With ``scale`` it tells what super-resolution is worth to the segmentation: each frame is made small, restored by
    bicubic interpolation and by every super-resolution network, segmented, and scored against the same mask as the
    sharp frame, which is the upper bound. A network for pairs gets the frame as both views.

    Args:
        cases: items of :func:`medsr.io.masks.find_labelled_frames`.
        networks: name to segmentation network.
        classes: label map, class name to grey values of the mask file, background first.
        ignore: grey values of pixels that do not count.
        scale: factor by which frames are made small; None compares the networks on the sharp frames alone.
        superres: name to super-resolution network, all of this scale.
        inferer: settings of :class:`~medsr.inferers.frame_segmentation.FrameSegmentationInferer`.
        output: file of the results, JSON.
        device: where to compute.

    Raises:
        SettingError: if a network has other classes or another scale, or there are super-resolution networks and no
            scale.

    Example:
        >>> FrameComparison([], {}, classes={"background": [0], "instrument": [255]}).run()
        []

    Reference:
        arXiv 2404.13330, which segments super-resolved frames but compares with no others.
    """

    header: ClassVar[Mapping[str, str]] = {"protocol": FRAME_PROTOCOL, "degradation": DEGRADATION}
    what = "frames"

    def __init__(
        self,
        cases: Sequence[Mapping[str, str]],
        networks: Mapping[str, nn.Module],
        *,
        classes: Mapping[str, Sequence[int]],
        ignore: Sequence[int] = (),
        scale: int | None = None,
        superres: Mapping[str, nn.Module] | None = None,
        inferer: Mapping[str, Any] | None = None,
        output: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(cases, output)
        self.networks, self.classes, self.superres = dict(networks), dict(classes), dict(superres or {})
        wanted = len(self.classes) if len(self.classes) > 2 else 1
        wrong = [name for name, network in self.networks.items() if network.out_channels != wanted]
        if wrong:
            raise SettingError(
                f"'{wrong[0]}' gives {self.networks[wrong[0]].out_channels} logits per pixel, {len(self.classes)} "
                f"classes need {wanted}"
            )
        if self.superres and scale is None:
            raise SettingError("super-resolution networks need a scale by which frames are made small")
        self.scale = 1 if scale is None else as_whole("scale", scale, 1)
        refuse_other_scales(self.superres, self.scale)
        self.inferer, self.device = dict(inferer or {}), torch.device(device)
        self._load = Compose(
            [
                LoadImageFiled("image"),
                LoadMaskd("label"),
                SameSized("label"),
                GreysToClassesd("label", self.classes, ignore),
            ]
        )

    def run(self, conditions: RunConditions | None = None) -> list[dict[str, Any]]:
        """As :meth:`CaseComparison.run`; say so if no mask holds anything to find."""
        rows = super().run(conditions)
        if rows and not any(counts["target"] for row in rows for counts in row["classes"].values()):
            _log.warning(
                "none of the masks has a class other than %s: there is nothing to score; check classes and ignore",
                next(iter(self.classes)),
            )
        return rows

    def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
        item = self._load(dict(case))
        image, truth = (modcrop(item[key].as_tensor(), self.scale) for key in ("image", "label"))
        rows = []
        for source, frame in self._inputs(image).items():
            for name, network in self.networks.items():
                infer = FrameSegmentationInferer(**self.inferer)
                found = infer(frame[None].to(self.device), network.to(self.device))[0].argmax(0).cpu()
                rows.append(
                    {
                        "case": case["case"],
                        "group": group_of(case["case"]),
                        "network": name,
                        "input": source,
                        "scale": self.scale,
                        "protocol": FRAME_PROTOCOL.partition(":")[0],
                        **frame_scores(found, truth, self.classes),
                    }
                )
        return rows

    def _inputs(self, image: Tensor) -> dict[str, Tensor]:
        """The frame, and what can be made of it once it was small."""
        found = {SHARP: image}
        if self.scale > 1:
            low = BicubicDownsample(self.scale, rounding="end")(image)
            found["bicubic"] = bicubic_resize(low, (image.shape[-2], image.shape[-1])).clamp(0, 1)
            for name, network in self.superres.items():
                found[name] = self._enlarged(low, network.to(self.device))
        return found

    def _enlarged(self, low: Tensor, network: nn.Module) -> Tensor:
        colours = low.expand(3, -1, -1)[None].to(self.device)
        if network.in_channels == 2 * colours.shape[1]:
            pair = StereoSuperResInferer()(colours.repeat(1, 2, 1, 1), network)
            return pair[0].float().chunk(2)[0]
        return ImageSuperResInferer()(colours, network)[0].float()

    def _table(self) -> str:
        return frame_table(self.rows)


def frame_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores per group and over all frames as a Markdown table: one line for each network and input.

    IoU and Dice are those of ``present``, with their standard deviation over the frames; the others as
    :mod:`medsr.metrics.frames` names them, and the IoU of every class where there are several.

    Args:
        rows: those of :class:`FrameComparison`.

    Raises:
        SettingError: if there are no rows.

    Example:
        >>> mask = torch.tensor([[0, 1]])
        >>> scores = frame_scores(mask, mask, ["background", "instrument"])
        >>> table = frame_table([{"case": "a-1", "group": "a", "network": "n", "input": "sharp", **scores}])
        >>> table.splitlines()[-1].split(" | ")[:5]
        ['| all', '1', 'sharp', 'n', '1.000 ± 0.000']
    """
    if not rows:
        raise SettingError("there are no rows to put into a table; check the frames")
    groups, methods = (
        list(dict.fromkeys(keys))
        for keys in ((row["group"] for row in rows), ((row["input"], row["network"]) for row in rows))
    )
    names = list(rows[0]["classes"])
    names = names if len(names) > 1 else []
    titles = ["group", "frames", "input", "network", *_TABLE.values(), *names]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for group in [*groups, None]:
        for source, network in methods:
            found = [
                row
                for row in rows
                if group in (None, row["group"]) and (row["input"], row["network"]) == (source, network)
            ]
            if not found:
                continue
            scores = summary(found)
            cells = [_cell(scores[key], scores.get(f"{key}_std_over_frames")) for key in _TABLE]
            cells += [_cell(scores["class_iou"][name]) for name in names]
            lines.append(
                "| " + " | ".join([total_of(groups, group), str(len(found)), source, network, *cells]) + " |"
            )
    return "\n".join(lines)


def with_facts(network: nn.Module, classes: int, *, momentum: float = 0.1) -> nn.Module:
    """State the facts that callers ask of a frame network, for one of MONAI's that halves its input five times.

    MONAI's networks do not state them, as :class:`~medsr.networks.spp_linknet.SPPLinkNet` does; with them a baseline
    such as ``monai.networks.nets.FlexibleUNet`` is trained, run and compared by the same configs.

    Its batch normalisation follows as soon as that of SPPLinkNet. MONAI's EfficientNet follows ten times slower, for
    trainings of many epochs: after some hundred iterations from random weights the variances that it would use are
    still those that it began with, and what has learnt the frames of its training finds nothing on them.

    Args:
        network: for frames of three channels; is returned.
        classes: its logits per pixel.
        momentum: share of a batch in the running statistics.

    Example:
        >>> with_facts(nn.Conv2d(3, 1, 1), classes=1).size_multiple
        32
    """
    facts = {
        "scale": 1,
        "in_channels": 3,
        "out_channels": classes,
        "size_multiple": 32,
        "exact_halo": None,
        "half_precision_safe": False,
    }
    for name, value in facts.items():
        setattr(network, name, value)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    return network


def _cell(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
