"""One table of all methods: thick slices simulated from isotropic volumes, results compared on the physical grid."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

import medsr
from medsr import metrics
from medsr.engines.adaptation import AdaptingInferer
from medsr.engines.case_comparison import CaseComparison, thick_parameters
from medsr.engines.case_evaluator import one_line
from medsr.engines.self_training import SelfTraining
from medsr.errors import SettingError
from medsr.geometry import rescaled_affine, spacing_of
from medsr.handlers.qc_figure import draw_qc
from medsr.inferers.planes import PlaneAverageInferer
from medsr.inferers.volume import VolumeInferer, make_consistent
from medsr.io.loading import LoadVolumed
from medsr.io.writing import probe_folder, write_figure
from medsr.networks.layout import channels_last
from medsr.networks.wdsr import PlaneSRNet
from medsr.resampling import interpolation_matrix
from medsr.settings import as_flag, as_number, as_numbers
from medsr.transforms.intensity import PercentileToUnitd
from medsr.transforms.orientation import permute_spatial
from medsr.transforms.slice_profile import as_profile
from medsr.transforms.thick_slices import ThickSliceParameters, acquire_whole_slabs
from medsr.transforms.through_plane import ResampleThroughPlaned

__all__ = ["ThroughPlaneComparison", "on_reference_grid", "table"]

_log = logging.getLogger(__name__)

PROTOCOL = (
    "psnr-head-v1: intensities mapped so that the 0.1 and 99.9 percentiles of the foreground are 0 and 1, thick slices "
    "by slice profile on the same field of view, slice count cut to whole slabs, results read through their affine, "
    "clipped to [0, 1], PSNR with data range 1 in the mask reference > 0.02"
)

_AXES = ("SI", "AP", "LR")

_PROJECTED = ("cubic", "smore-like")
"""Baselines that are also made consistent with the measured slices, as the network's result is: what the projection
alone brings is then seen."""

_Result: TypeAlias = tuple[Tensor, npt.NDArray[np.float64]]
"""Values and affine."""


class ThroughPlaneComparison(CaseComparison):
    """Simulates thick slices from isotropic volumes and compares every method on the same slices.

    The network's result is made consistent with the measured slices; ``cubic`` and the SMORE-like network stand in the
    table as they are and, as ``... + consistency``, after the same projection.

    Args:
        cases: items ``{"image": path, "case": name}`` of near-isotropic volumes.
        network: the trained network, or None for the interpolations alone.
        inferer: settings of :class:`~medsr.inferers.volume.VolumeInferer` other than geometry and profile; its
            ``consistency`` holds for the baselines too, and 0 leaves their second rows out.
        ratios: slice spacings to simulate, in voxels.
        gaps: gaps between slices to simulate, in voxels; thickness = ratio - gap.
        profile: the profile that makes the slices.
        assumed_profile: the profile that the methods are told; default the true one.
        plane_minutes: train the SMORE-like network on each scan for so long; 0 leaves the method out.
        adapt: adaptation of the network to each scan: ``training`` and other settings of
            :class:`~medsr.engines.adaptation.AdaptingInferer`, before those of ``inferer``; None leaves the method out.
        axis: anatomical axis of the slices, as one of ``SI``, ``AP``, ``LR``.
        load: makes an image of an item's path, as :class:`~medsr.io.loading.LoadVolumed` does.
        output: file of the results, JSON.
        figures: also draw a page of each case and setting beside ``output``: slices, cubic interpolation, the last
            method, its uncertainty, its error, and the truth.
        device: where to compute.

    Raises:
        SettingError: if ratio, gap, profile or axis cannot be simulated.

    Example:
        >>> ThroughPlaneComparison([], None).run()
        []
    """

    header: ClassVar[Mapping[str, str]] = {"protocol": PROTOCOL}
    what = "volumes"

    def __init__(
        self,
        cases: Sequence[Mapping[str, str]],
        network: nn.Module | None,
        inferer: Mapping[str, Any] | None = None,
        *,
        ratios: Sequence[float] = (4.0,),
        gaps: Sequence[float] = (0.0,),
        profile: str = "slr",
        assumed_profile: str | None = None,
        plane_minutes: float = 0.0,
        adapt: Mapping[str, Any] | None = None,
        axis: str = "SI",
        load: Callable[[Mapping[Hashable, Any]], Mapping[Hashable, Any]] | None = None,
        output: str | Path | None = None,
        figures: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(cases, output)
        self.figures = as_flag("figure", figures)
        self.network, self.inferer = network, dict(inferer or {})
        self.consistency = as_number("consistency", self.inferer.get("consistency", 1.0))
        self.ratios, self.gaps = as_numbers("ratios", ratios, above=0), as_numbers("gaps", gaps)
        self.profile, self.assumed_profile = as_profile(profile), as_profile(assumed_profile or profile)
        for ratio, gap in product(self.ratios, self.gaps):
            thick_parameters(ratio, gap, self.profile, name="ratios", gap_name="gaps")
        self.plane_minutes, self.adapt = as_number("plane_minutes", plane_minutes), adapt
        if not (adapt is None or isinstance(adapt, Mapping)):
            raise SettingError(f"adapt must hold settings, training among them, got {type(adapt).__name__}")
        if axis not in _AXES:
            raise SettingError(f"slice_axis must be {', '.join(_AXES[:-1])} or {_AXES[-1]}, got {axis!r}")
        self.axis, self.load = axis, load or LoadVolumed("image")
        self.device = torch.device(device)

    def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
        """One row per setting and method."""
        volume = self._volume(case["image"])
        self.note_thick_truth(case["case"], volume.affine)
        return [
            row
            for ratio in self.ratios
            for gap in self.gaps
            for row in self._compare_at(case["case"], volume, ratio, gap)
        ]

    def _table(self) -> str:
        return table(self.rows)

    def _volume(self, path: str) -> MetaTensor:
        """Unit intensities, slice axis last."""
        import nibabel as nib

        image = self.load({"image": path})["image"]
        codes = nib.orientations.aff2axcodes(np.asarray(image.affine))
        last = next(i for i, code in enumerate(codes) if code in self.axis)
        image = permute_spatial(image, [i for i in range(3) if i != last] + [last])
        return PercentileToUnitd("image")({"image": image})["image"]

    def _compare_at(self, case: str, volume: MetaTensor, ratio: float, gap: float) -> list[dict[str, Any]]:
        true, assumed = (
            thick_parameters(ratio, gap, profile) for profile in (self.profile, self.assumed_profile)
        )
        reference, thick, matrix = acquire_whole_slabs(volume, true)
        rows: list[dict[str, Any]] = []
        shown: dict[str, npt.NDArray[np.float32]] = {}
        truth = np.asarray(reference.as_tensor()[0])
        mask = truth > 0.02
        edge = metrics.edge_band(truth, mask=mask)
        for method, (found, affine), seconds in self._results(thick, assumed, reference.shape[-1]):
            values = on_reference_grid(
                np.asarray(found),
                affine,
                reference_affine=np.asarray(reference.affine),
                size=reference.shape[-1],
            )
            if method in ("nearest", "cubic", "network", "adapted"):
                shown[method] = values
            image = values[0].clip(0, 1)
            goal = truth.clip(0, 1)
            row: dict[str, Any] = {
                "case": case,
                "ratio": ratio,
                "gap": gap,
                "profile": self.profile,
                "assumed_profile": self.assumed_profile,
                "method": method,
                "psnr_db": metrics.psnr_3d(image, goal, data_range=1.0, mask=mask),
                "edge_psnr_db": metrics.psnr_3d(image, goal, data_range=1.0, mask=edge),
                "ssim": metrics.ssim_3d(image, goal, data_range=1.0, mask=mask),
                "data_consistency_db": metrics.data_consistency(
                    values[0], np.asarray(thick.as_tensor()[0]), np.asarray(matrix), data_range=1.0
                ),
                "seconds": round(seconds, 1),
            }
            if len(values) > 1:
                error = np.abs(values[0] - truth)
                row["spearman"] = metrics.spearman(values[1], error, mask=mask)
                row["ause"] = metrics.ause(values[1], error, mask=mask)
                row["coverage_2u"] = metrics.coverage(values[0], truth, values[1], mask=mask)
            rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
            _log.info("%s r=%g gap=%g %s: %.2f dB", case, ratio, gap, method, row["psnr_db"])
        if self.figures and self.output:
            try:
                self._draw(rows, shown, reference)
            except Exception as error:  # matplotlib raises many kinds
                self.note(case, f"no page was drawn: {one_line(error)}")
        return rows

    def _draw(
        self, rows: list[dict[str, Any]], shown: Mapping[str, npt.NDArray[np.float32]], reference: MetaTensor
    ) -> None:
        """The page of one case and setting."""
        last, values = list(shown.items())[-1]
        truth = np.asarray(reference.as_tensor()[0])
        volumes = {"input slices": shown["nearest"][0], "cubic": shown["cubic"][0], last: values[0]}
        if len(values) > 1:
            volumes["uncertainty"] = values[1]
        volumes |= {"absolute error": np.abs(values[0] - truth), "reference": truth}
        case, ratio, gap = (rows[0][key] for key in ("case", "ratio", "gap"))
        scores = ", ".join(
            f"{row['method']} {row['psnr_db']:.2f} dB" for row in rows if row["method"] in ("cubic", last)
        )
        spacing = spacing_of(np.asarray(reference.affine))
        figure = draw_qc(
            volumes,
            spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
            affine=np.asarray(reference.affine),
            title=f"{case}: simulated slices of {ratio * spacing[2]:.3g} mm, against the truth",
            footer=(
                f"{scores}; ratio {ratio:g}, gap {gap:g}, slice profile {self.profile}, told "
                f"{self.assumed_profile}; maps are of {last}, in units of the image, whose percentiles are at 0 and 1; "
                f"{PROTOCOL.partition(':')[0]}; medsr {medsr.__version__}. Not for diagnosis."
            ),
        )
        folder = probe_folder(Path(str(self.output)).parent)
        write_figure(folder / f"{case}_ratio{ratio:g}_gap{gap:g}_qc.png", figure)

    def _results(
        self, thick: MetaTensor, assumed: ThickSliceParameters, size: int
    ) -> Iterator[tuple[str, _Result, float]]:
        """Name, result and seconds of every method, which is told what is ``assumed``."""
        told = torch.as_tensor(assumed.matrix(size, thick.shape[-1]), dtype=torch.float32)
        for method, run in self._methods(assumed).items():
            since = time.monotonic()
            found, affine = run(thick)
            seconds = time.monotonic() - since
            yield method, (found, affine), seconds
            if self.consistency and method in _PROJECTED:
                since = time.monotonic()
                found = found.clone()
                make_consistent(found[0], thick.as_tensor()[0], told, share=self.consistency)
                yield f"{method} + consistency", (found, affine), seconds + time.monotonic() - since

    def _methods(self, assumed: ThickSliceParameters) -> dict[str, Callable[[MetaTensor], _Result]]:
        methods: dict[str, Callable[[MetaTensor], _Result]] = {
            kind: (lambda thick, kind=kind: self._interpolated(thick, assumed.ratio, kind))
            for kind in ("nearest", "linear", "cubic")
        }
        if self.plane_minutes:
            methods["smore-like"] = lambda thick: self._planes(thick, assumed)
        if self.network is not None:
            methods["network"] = lambda thick: self._network(thick, assumed)
        if self.network is not None and self.adapt is not None:
            methods["adapted"] = lambda thick: self._network(thick, assumed, self.adapt)
        return methods

    @staticmethod
    def _interpolated(thick: MetaTensor, ratio: float, kind: str) -> _Result:
        item = ResampleThroughPlaned("image", float(_spacing(thick)[2]) / ratio, kind)({"image": thick})
        return item["image"].as_tensor(), np.asarray(item["image"].affine)

    def _planes(self, thick: MetaTensor, assumed: ThickSliceParameters) -> _Result:
        training = SelfTraining(self.plane_minutes)
        network = training(
            channels_last(PlaneSRNet(assumed.ratio)),
            MetaTensor(thick.as_tensor(), meta={"sharp_axes": (0, 1)}),
            ratio=assumed.ratio,
            thickness=assumed.thickness,
            profile=assumed.profile,
            planes=True,
            device=self.device,
        )
        found = PlaneAverageInferer()(thick.as_tensor()[None].to(self.device), network)[0]
        return found.cpu(), _fine_affine(thick, found.shape[-1], assumed.ratio)

    def _network(
        self, thick: MetaTensor, assumed: ThickSliceParameters, adapt: Mapping[str, Any] | None = None
    ) -> _Result:
        spacing = float(_spacing(thick)[2])
        settings = {
            "spacing_mm": spacing / assumed.ratio,
            "slice_thickness_mm": spacing * assumed.thickness,
            "slice_profile": assumed.profile,
            **self.inferer,
        }
        inferer = VolumeInferer(**settings) if adapt is None else AdaptingInferer(**{**settings, **adapt})
        batch = MetaTensor(thick.as_tensor()[None].to(self.device), affine=thick.affine)
        found = inferer(batch, self.network)[0].cpu()
        return found, _fine_affine(thick, found.shape[-1], assumed.ratio)


def on_reference_grid(
    values: npt.NDArray[Any],
    affine: npt.ArrayLike,
    *,
    reference_affine: npt.ArrayLike,
    size: int,
) -> npt.NDArray[np.float32]:
    """Read a result ``(C, X, Y, Z)`` at the slice centres of the reference, through both affines.

    A result whose voxels are right and whose origin is wrong is compared where it claims to be: shifts count.

    Example:
        >>> values = np.arange(4.0).reshape(1, 1, 1, 4)
        >>> on_reference_grid(values, np.eye(4), reference_affine=np.eye(4), size=4).ravel().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    to_result = np.linalg.inv(np.asarray(affine, dtype=np.float64)) @ np.asarray(
        reference_affine, dtype=np.float64
    )
    positions = to_result[2, 2] * np.arange(size) + to_result[2, 3]
    if values.shape[-1] == size and np.allclose(positions, np.arange(size), atol=1e-3):
        return np.asarray(values, dtype=np.float32)
    matrix = interpolation_matrix(values.shape[-1], positions, kind="linear").astype(np.float32)
    return np.asarray(values, dtype=np.float32) @ matrix.T


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """PSNR per case and setting as a Markdown table, methods as columns, with the mean gain over cubic.

    Example:
        >>> print(table([{"case": "a", "ratio": 4, "gap": 0, "method": "cubic", "psnr_db": 25.0}]))
        | case | ratio | gap | cubic |
        |---|---|---|---|
        | a | 4 | 0 | 25.00 |
        | mean gain over cubic | | | +0.00 |
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    keys = list(dict.fromkeys((row["case"], row["ratio"], row["gap"]) for row in rows))
    found = {(row["case"], row["ratio"], row["gap"], row["method"]): row["psnr_db"] for row in rows}
    lines = ["| case | ratio | gap | " + " | ".join(methods) + " |", "|---|---|---|" + "---|" * len(methods)]
    for key in keys:
        values = [found.get((*key, m)) for m in methods]
        cells = ["" if v is None else f"{v:.2f}" for v in values]
        lines.append(f"| {key[0]} | {key[1]:g} | {key[2]:g} | " + " | ".join(cells) + " |")
    gains = []
    for method in methods:
        pairs = [
            (found[(*k, method)], found[(*k, "cubic")])
            for k in keys
            if (*k, method) in found and (*k, "cubic") in found
        ]
        gains.append(f"{np.mean([a - b for a, b in pairs]):+.2f}" if pairs else "")
    lines.append("| mean gain over cubic | | | " + " | ".join(gains) + " |")
    return "\n".join(lines)


def _spacing(image: MetaTensor) -> npt.NDArray[np.float64]:
    return spacing_of(np.asarray(image.affine))


def _fine_affine(thick: MetaTensor, new_size: int, ratio: float) -> npt.NDArray[np.float64]:
    return rescaled_affine(np.asarray(thick.affine), 2, size=thick.shape[-1], new_size=new_size, ratio=ratio)
