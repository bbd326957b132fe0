"""One table of 2D super-resolution: images degraded and restored by every method, under every named protocol."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from medsr.engines.case_comparison import CaseComparison, total_of
from medsr.errors import SettingError
from medsr.inferers.image_superres import ImageSuperResInferer
from medsr.io.images import read_image
from medsr.io.masks import group_of
from medsr.metrics.image import ImageProtocol, mean_score, psnr
from medsr.settings import as_whole
from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize, modcrop
from medsr.transforms.field_of_view import field_of_view

__all__ = [
    "DEFAULT_PROTOCOLS",
    "DEGRADATION",
    "ImageComparison",
    "finite",
    "image_table",
    "lanczos_resize",
    "refuse_other_scales",
]

_log = logging.getLogger(__name__)

DEFAULT_PROTOCOLS = (ImageProtocol(mask="fov"), ImageProtocol(), ImageProtocol(channel="y"))
"""RGB inside the field of view, which decides; RGB and luma over the whole frame."""

DEGRADATION = "MATLAB-style antialiased bicubic, rounded to 8 bits at the end"


class ImageComparison(CaseComparison):
    """Degrades images, restores them by interpolation and by networks, and scores all of them alike.

    Args:
        cases: items ``{"image": path, "case": name}`` of sharp images; what comes before the first hyphen of a name is
            its group, for example the camera.
        networks: name to network, all of one scale.
        scale: factor.
        protocols: how to score; the first one decides.
        enlarge_to: resize the sharp images to this square first. The seed study seems to have done so: its numbers are
            5 dB higher for it, and compare with nothing else.
        inferer: settings of :class:`~medsr.inferers.image_superres.ImageSuperResInferer`.
        output: file of the results, JSON.
        device: where to compute.

    Example:
        >>> ImageComparison([], {}, scale=4).run()
        []
    """

    header: ClassVar[Mapping[str, str]] = {"degradation": DEGRADATION}
    what = "images"

    def __init__(
        self,
        cases: Sequence[Mapping[str, str]],
        networks: Mapping[str, nn.Module],
        *,
        scale: int,
        protocols: Sequence[ImageProtocol] = DEFAULT_PROTOCOLS,
        enlarge_to: int | None = None,
        inferer: Mapping[str, Any] | None = None,
        output: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(cases, output)
        refuse_other_scales(networks, scale)
        self.networks, self.scale = dict(networks), int(scale)
        self.protocols = list(protocols)
        self.enlarge_to = None if enlarge_to is None else as_whole("enlarge_to", enlarge_to, self.scale)
        self.inferer, self.device = dict(inferer or {}), torch.device(device)

    def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
        sharp = torch.from_numpy(read_image(case["image"]).values)
        if self.enlarge_to:
            sharp = bicubic_resize(sharp, (self.enlarge_to, self.enlarge_to)).clamp(0, 1)
        sharp = modcrop(sharp, self.scale)
        low = BicubicDownsample(self.scale, rounding="end")(sharp)
        size = (sharp.shape[-2], sharp.shape[-1])
        results = {
            "bicubic": bicubic_resize(low, size).clamp(0, 1),
            "lanczos": lanczos_resize(low, size).clamp(0, 1),
        }
        for name, network in self.networks.items():
            infer = ImageSuperResInferer(**self.inferer)
            results[name] = infer(low[None].to(self.device), network.to(self.device))[0]
        # A dark image has none, and can be scored over the whole frame all the same.
        wanted = any(protocol.mask == "fov" for protocol in self.protocols)
        mask = field_of_view(sharp) if wanted else None
        rows = []
        for method, result in results.items():
            consistency = finite(psnr(BicubicDownsample(self.scale)(result), low))
            for protocol in self.protocols:
                scores = protocol.score(result, sharp, mask)
                rows.append(
                    {
                        "case": case["case"],
                        "group": group_of(case["case"]),
                        "method": method,
                        "scale": self.scale,
                        "enlarged_to": self.enlarge_to,
                        "protocol": scores["protocol"],
                        "psnr_db": finite(scores["psnr_db"]),
                        "ssim": finite(scores["ssim"]),
                        "data_consistency_db": consistency,
                    }
                )
        return rows

    def _table(self) -> str:
        return image_table(self.rows)


def lanczos_resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize each channel with Pillow's Lanczos kernel, in float32: a second interpolation to compare with.

    Shape:
        ``(C, H, W)`` to ``(C, *size)``.

    Example:
        >>> lanczos_resize(torch.full((3, 4, 4), 0.25), (8, 8)).unique().tolist()
        [0.25]
    """
    planes = [Image.fromarray(np.asarray(plane, dtype=np.float32)) for plane in image]
    resized = [plane.resize((size[1], size[0]), Image.Resampling.LANCZOS) for plane in planes]
    return torch.stack([torch.from_numpy(np.array(plane)) for plane in resized])


def refuse_other_scales(networks: Mapping[str, nn.Module], scale: int) -> None:
    """Refuse to compare networks of different scales.

    Raises:
        SettingError: if one is of another scale.

    Example:
        >>> refuse_other_scales({}, 4)
    """
    wrong = [name for name, network in networks.items() if network.scale != scale]
    if wrong:
        raise SettingError(f"'{wrong[0]}' is a network for x{networks[wrong[0]].scale}, not for x{scale}")


def image_table(rows: Sequence[Mapping[str, Any]], extra: Mapping[str, str] | None = None) -> str:
    """Means per group and over all images as a Markdown table: one line per method, one column pair per protocol.

    An image that a method restores exactly, as interpolation does a black one, has no finite PSNR. It counts in the
    PSNR of no method under that protocol, because their means would be those of different images; a line below says
    how many there are.

    Args:
        rows: scores of every image by every method under every protocol.
        extra: further keys of the rows, which do not depend on the protocol, to the titles of their columns.

    Example:
        >>> row = {"case": "a-1", "group": "a", "method": "bicubic", "protocol": "p", "psnr_db": 30.0, "ssim": 0.9}
        >>> print(image_table([row]))
        | group | images | method | p: dB | SSIM |
        |---|---|---|---|---|
        | a | 1 | bicubic | 30.00 | 0.9000 |
        | all | 1 | bicubic | 30.00 | 0.9000 |
    """
    if not rows:
        raise SettingError("there are no rows to put into a table; check the images")
    protocols, methods, groups = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("protocol", "method", "group")
    )
    extra = dict(extra or {})
    names = [*(name for protocol in protocols for name in (f"{protocol}: dB", "SSIM")), *extra.values()]
    lines = [
        "| " + " | ".join(["group", "images", "method", *names]) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    exact = {(row["case"], row["protocol"]) for row in rows if row["psnr_db"] is None}
    for group in [*groups, None]:
        inside = [row for row in rows if group in (None, row["group"])]
        count = len({row["case"] for row in inside})
        for method in methods:
            cells = []
            for protocol in protocols:
                found = [row for row in inside if row["method"] == method and row["protocol"] == protocol]
                finite_ones = [row for row in found if (row["case"], protocol) not in exact]
                for key, digits, those in (("psnr_db", 2, finite_ones), ("ssim", 4, found)):
                    cells.append(f"{mean_score(row[key] for row in those).mean:.{digits}f}" if those else "-")
            for key in extra:
                known = [row[key] for row in inside if row["method"] == method and row[key] is not None]
                cells.append(f"{mean_score(known).mean:.3f}" if known else "-")
            lines.append("| " + " | ".join([total_of(groups, group), str(count), method, *cells]) + " |")
    if exact:
        cases = {case for case, _ in exact}
        lines += ["", f"In no PSNR above, because a method restores them exactly: {len(cases)} images."]
    return "\n".join(lines)


def finite(value: float | str) -> float | None:
    """A score as JSON can hold it: None for equal images.

    Example:
        >>> finite(30.12345), finite(math.inf)
        (30.1234, None)
    """
    number = float(value)
    return round(number, 4) if math.isfinite(number) else None
