"""Make labelled folders of thick scans from isotropic volumes with masks, as if they had been acquired and drawn thick.

    python -m benchmarks.quality.thick_folder tumour OUT [--ratio 4] [--gap 0] [--data FOLDER]

OUT gets ``images/`` and ``labels/`` (thick; a voxel is foreground if at least half of it is), and ``true/images``
and ``true/labels`` (the same field of view, isotropic: for evaluation and for the upper bound only).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from medsr.geometry import spacing_of
from medsr.io.cases import read_case
from medsr.io.writing import probe_folder, write_json, write_nifti
from medsr.transforms.labels import ClassesToChannelsd, drawn_classes
from medsr.transforms.thick_slices import ThickSliceParameters, thick_slice_affine
from monai.data import MetaTensor

STUDIES = {
    "tumour": {
        f"glioma-{n}": (
            f"mri/brats2013/pat000{n}/T1c_subtrMeanDivStd.nii.gz",
            f"mri/brats2013/pat000{n}/OTMultiClass.nii.gz",
        )
        for n in (3, 4, 5, 6)
    },
    "ms_lesion": {
        f"ms-{n}": (
            f"mri/ms_flair_1mm/patient{n}/FLAIR_mni1mm_brain.nii.gz",
            f"mri/ms_flair_1mm/patient{n}/lesion_gold_mni1mm.nii.gz",
        )
        for n in ("07", "19")
    },
}
"""Case to image and mask; all foreground values are one class."""


def main() -> None:
    """Write one study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--gap", type=float, default=0.0)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MEDSR_DATA", "../shared/data")))
    arguments = parser.parse_args()
    write_study(arguments.study, arguments.output, arguments.data, ratio=arguments.ratio, gap=arguments.gap)


def write_study(study: str, output: Path, data: Path, *, ratio: float, gap: float = 0.0) -> None:
    """Write all cases of a study that are not there yet."""
    parameters = ThickSliceParameters(ratio, (ratio - gap) / ratio)
    for case, (image, mask) in STUDIES[study].items():
        # What is written last tells that a case is complete.
        if not (output / "images" / f"{case}.json").exists():
            write_case(case, (data / image, data / mask), parameters, output=output)
            print(f"{case}: written")


def write_case(
    case: str, paths: tuple[Path, Path], parameters: ThickSliceParameters, *, output: Path
) -> None:
    """Write a case thick and, cut to whole slabs, isotropic."""
    image, header = read_case(paths[0])
    mask, _ = read_case(paths[1], allow_constant=True)
    classes = {"foreground": sorted({int(v) for v in np.unique(mask)} - {0})}
    label = ClassesToChannelsd("label", classes)({"label": MetaTensor(torch.as_tensor(mask)[None])})["label"]
    depth = image.shape[-1]
    thick_depth = parameters.thick_size(depth)
    kept = round(thick_depth * parameters.ratio)
    start = (depth - kept) // 2
    affine = header.affine.copy()
    affine[:3, 3] += affine[:3, 2] * start
    image, truth = image[..., start : start + kept], label[0, ..., start : start + kept].numpy()
    thick = image @ parameters.matrix(kept, thick_depth).T
    shares = torch.as_tensor(truth @ parameters.label_matrix(kept, thick_depth).T)
    drawn = drawn_classes(shares[None]).numpy()
    thick_affine = thick_slice_affine(affine, parameters, size=kept)
    for folder, values, place in (
        ("images", thick, thick_affine),
        ("labels", drawn, thick_affine),
        ("true/images", image, affine),
        ("true/labels", truth, affine),
    ):
        probe_folder(output / folder)
        write_nifti(
            output / folder / f"{case}.nii.gz",
            values,
            affine=place,
            dtype=np.float32 if "images" in folder else np.uint8,
        )
    thickness_mm = parameters.thickness * parameters.ratio * float(spacing_of(affine)[2])
    write_json(output / "images" / f"{case}.json", {"SliceThickness": round(thickness_mm, 4)})


if __name__ == "__main__":
    main()
