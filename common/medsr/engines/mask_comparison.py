"""One table of all masks: thick slices simulated from isotropic labelled volumes, masks compared on the fine grid."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import nn

from medsr.engines.case_comparison import CaseComparison, thick_parameters
from medsr.errors import SettingError
from medsr.geometry import spacing_of
from medsr.inferers.thick_segmentation import ThickSegmentationInferer
from medsr.io.loading import LoadVolumed
from medsr.metrics.segmentation import dice, segmentation_scores
from medsr.transforms.intensity import PercentileToUnitd
from medsr.transforms.islands import checked_fraction, remove_islands
from medsr.transforms.label_interpolation import signed_distance_interpolation
from medsr.transforms.labels import ClassesToChannelsd, SameGridd, drawn_classes
from medsr.transforms.thick_slices import acquire_whole_slabs

__all__ = ["MaskComparison", "mask_table"]

_log = logging.getLogger(__name__)

PROTOCOL = (
    "mask-v2: thick slices by slice profile from isotropic volumes on the same field of view, slice count cut to whole "
    "slabs; a thick mask is what fills at least half of a slice; in every mask, of all networks and of the perfect "
    "thick mask alike, connected components (26 neighbours) with less than min_island_fraction of the voxels of the "
    "largest one of their class are background, before and after it is brought to the isotropic grid; masks compared "
    "on the isotropic grid, distances in mm with the spacing in array order, HD95 the larger of both directions; thick "
    "Dice on the thick grid; class by class"
)


class MaskComparison(CaseComparison):
    """Segments simulated thick slices with several networks and reads each in every way, on the same slices.

    A network's thick mask is brought to the fine grid by repeating it (``nearest``) and by shape-based interpolation
    (``signed distance``); its thin mask is there already (``thin head``), and its probabilities are averaged over the
    slices for the Dice on the thick grid. What a perfect thick mask would give is in the table too.
    :func:`~medsr.transforms.islands.remove_islands` cleans every mask on its own grid, a thick one before it is
    interpolated and after: no method is compared with its islands against one without, and where the perfect mask
    loses, the step removes true foci.

    Args:
        cases: items of :func:`~medsr.io.cases.find_labelled_cases`, near-isotropic, slices along the last axis.
        networks: name to network.
        classes: foreground class name to values of the mask file.
        ratio: slice spacing to simulate, in voxels.
        gap: gap between slices, in voxels; thickness = ratio - gap.
        profile: slice profile.
        inferer: settings of :class:`~medsr.inferers.thick_segmentation.ThickSegmentationInferer` other than geometry.
        min_island_fraction: see :func:`~medsr.transforms.islands.remove_islands`; 0 removes nothing. It stands in the
            output.
        output: file of the results, JSON.
        device: where to compute.

    Example:
        >>> MaskComparison([], {}).run()
        []
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, str]],
        networks: Mapping[str, nn.Module],
        classes: Mapping[str, Sequence[int]] | None = None,
        *,
        ratio: float = 4.0,
        gap: float = 0.0,
        profile: str = "slr",
        inferer: Mapping[str, Any] | None = None,
        min_island_fraction: float = 0.0,
        output: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(cases, output)
        self.networks = dict(networks)
        self.classes = dict(classes or {"foreground": [1]})
        self.parameters = thick_parameters(ratio, gap, profile)
        self.min_island_fraction = checked_fraction(min_island_fraction)
        self.header = {"protocol": PROTOCOL, "min_island_fraction": self.min_island_fraction}
        self.inferer, self.device = dict(inferer or {}), torch.device(device)
        self._load = Compose(
            [
                LoadVolumed(keys="image"),
                LoadVolumed(keys="label", allow_constant=True),
                SameGridd("label"),
                ClassesToChannelsd("label", self.classes),
                PercentileToUnitd("image"),
            ]
        )

    def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
        item = self._load(dict(case))
        self.note_thick_truth(case["case"], item["image"].affine)
        ratio = self.parameters.ratio
        image = acquire_whole_slabs(item["image"], self.parameters)
        label = acquire_whole_slabs(item["label"], self.parameters, is_label=True)
        truth = drawn_classes(label.thin.as_tensor()).numpy()
        thick_truth = drawn_classes(label.thick.as_tensor()).numpy()
        volume = MetaTensor(image.thick.as_tensor()[None].to(self.device), affine=image.thick.affine)
        spacing = spacing_of(image.thin.affine)
        results: dict[str, dict[str, tuple[Any, Any]]] = {}
        thick_spacing = spacing * (1, 1, ratio)
        results["perfect thick mask"] = self._readings(thick_truth, ratio, thick_spacing)
        for name, network in self.networks.items():
            inferer = ThickSegmentationInferer(float(spacing[2]), **self.inferer)
            thin = inferer(volume, network.to(self.device))[0].cpu()
            on_thick = inferer.thick[0].argmax(0).cpu().numpy()
            results[name] = self._readings(on_thick, ratio, thick_spacing)
            fine, averaged = (
                self._without_islands(p.argmax(0).numpy()) for p in (thin, thin @ label.matrix.T)
            )
            results[name]["thin head"] = fine, averaged
        rows = []
        for name, readings in results.items():
            for reading, (mask, on_thick) in readings.items():
                for index, label_name in enumerate(self.classes, start=1):
                    scores = segmentation_scores(mask == index, truth == index, spacing)
                    row = {
                        "case": case["case"],
                        "class": label_name,
                        "network": name,
                        "reading": reading,
                        **scores,
                        "thick_dice": dice(on_thick == index, thick_truth == index),
                    }
                    rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        return rows

    def _readings(
        self, mask: np.ndarray, ratio: float, spacing_mm: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """A thick mask on the fine grid, in both ways, and on its own."""
        thick = self._without_islands(mask)
        found = {}
        for reading, kind in (("nearest", "nearest"), ("signed distance", "linear")):
            fine = signed_distance_interpolation(thick, ratio, spacing_mm=spacing_mm, kind=kind)
            found[reading] = self._without_islands(fine), thick
        return found

    def _without_islands(self, mask: np.ndarray) -> np.ndarray:
        return remove_islands(mask, min_fraction=self.min_island_fraction)[0]

    def _table(self) -> str:
        return mask_table(self.rows)


def mask_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores per case, class, network and reading as a Markdown table, means over the cases at the end.

    A score that is not defined, as the distance to an empty mask, stays empty and is left out of the mean.

    Example:
        >>> row = {"case": "a", "class": "c", "network": "n", "reading": "nearest", "dice": 0.5, "hd95_mm": None}
        >>> print(mask_table([row]))
        | case | class | network | reading | dice | hd95_mm |
        |---|---|---|---|---|---|
        | a | c | n | nearest | 0.500 |  |
        | mean | c | n | nearest | 0.500 |  |
    """
    if not rows:
        raise SettingError("there are no rows to put into a table; check the cases")
    keys = ("case", "class", "network", "reading")
    scores = [name for name in rows[0] if name not in keys]
    lines = ["| " + " | ".join([*keys, *scores]) + " |", "|---" * (len(keys) + len(scores)) + "|"]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys[1:]), []).append(row)
        lines.append(_line([row[key] for key in keys], [row.get(name) for name in scores]))
    for group, members in groups.items():
        means = []
        for name in scores:
            values = [row[name] for row in members if row.get(name) is not None]
            means.append(float(np.mean(values)) if values else None)
        lines.append(_line(["mean", *group], means))
    return "\n".join(lines)


def _line(names: Sequence[str], values: Sequence[float | None]) -> str:
    return "| " + " | ".join([*names, *("" if v is None else f"{v:.3f}" for v in values)]) + " |"
