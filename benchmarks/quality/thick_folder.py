"""Make labelled folders of thick scans from isotropic volumes with masks, as if they had been acquired and drawn thick.

    python -m benchmarks.quality.thick_folder tumour OUT [--ratio 4] [--gap 0] [--data FOLDER]

OUT gets ``images/`` and ``labels/`` (thick axial slices; a voxel is foreground if at least half of it is; classes are
numbered from 1), and ``true/images`` and ``true/labels`` (the same field of view, isotropic: for evaluation and for the
upper bound only).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from medsr.geometry import spacing_of
from medsr.io.cases import read_case
from medsr.io.writing import probe_folder, write_json, write_nifti
from medsr.transforms.labels import ClassesToChannelsd, drawn_classes
from medsr.transforms.thick_slices import ThickSliceParameters, acquire_whole_slabs
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

from benchmarks.data import add_data


class Source(NamedTuple):
    """Files of a case.

    Attributes:
        image: relative to the data folder.
        mask: relative to the data folder.
        classes: class to values of the mask; by default all values are one class.
        axes: what the axes of the array are, where the file tells it wrongly.
    """

    image: str
    mask: str
    classes: Mapping[str, Sequence[int]] | None = None
    axes: str | None = None


_STRUCTURES = {
    "oasis-a": Source(
        "mri/oasis_1mm/subjA_T1.nii.gz",
        "mri/oasis_1mm/subjA_labels13.nii.gz",
        {
            "ventricle": [3],
            "thalamus": [1],
            "striatum": [5, 6],
            "hippocampus": [8],
            "brain_stem": [13],
            "cortex": [10],
        },
    ),
    "vxm": Source(
        "mri/healthy_iso/vxm_test_scan_T1_1mm.nii.gz",
        "mri/healthy_iso/vxm_test_scan_aseg.nii.gz",
        {
            "ventricle": [4, 43],
            "thalamus": [10, 49],
            "striatum": [11, 12, 50, 51],
            "hippocampus": [17, 53],
            "brain_stem": [16],
            "cortex": [3, 42],
        },
        # Its affine is the identity, and its form that of FreeSurfer's.
        axes="LIA",
    ),
}


def _of(*classes: str) -> dict[str, Source]:
    """The subjects with structures, some of these alone."""
    return {
        case: source._replace(classes={name: (source.classes or {})[name] for name in classes})
        for case, source in _STRUCTURES.items()
    }


STUDIES: dict[str, dict[str, Source]] = {
    "tumour": {
        f"glioma-{n}": Source(
            f"mri/brats2013/pat000{n}/T1c_subtrMeanDivStd.nii.gz",
            f"mri/brats2013/pat000{n}/OTMultiClass.nii.gz",
        )
        for n in (3, 4, 5, 6)
    },
    "ms_lesion": {
        f"ms-{n}": Source(
            f"mri/ms_flair_1mm/patient{n}/FLAIR_mni1mm_brain.nii.gz",
            f"mri/ms_flair_1mm/patient{n}/lesion_gold_mni1mm.nii.gz",
        )
        for n in ("07", "19")
    },
    "structures": _of("ventricle", "thalamus", "striatum", "hippocampus", "brain_stem"),
    # One subject is enough to learn what is dark on T1, and where grey meets white: here thin slices can decide, not
    # what is found at all.
    "ventricle": _of("ventricle"),
    "cortex": _of("cortex"),
}
"""Study and case to its files. All cases of a study have the same classes in the same order."""


def written_classes(study: str) -> dict[str, list[int]]:
    """Classes of a study to the values that they have in the masks that are written.

    Example:
        >>> written_classes("tumour")
        {'foreground': [1]}
    """
    source = next(iter(STUDIES[study].values()))
    return {name: [number] for number, name in enumerate(source.classes or ["foreground"], start=1)}


def main() -> None:
    """Write one study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--gap", type=float, default=0.0)
    add_data(parser)
    arguments = parser.parse_args()
    write_study(arguments.study, arguments.output, arguments.data, ratio=arguments.ratio, gap=arguments.gap)


def write_study(study: str, output: Path, data: Path, *, ratio: float, gap: float = 0.0) -> None:
    """Write all cases of a study that are not there yet."""
    parameters = ThickSliceParameters(ratio, (ratio - gap) / ratio)
    for case, source in STUDIES[study].items():
        # What is written last tells that a case is complete.
        if not (output / "images" / f"{case}.json").exists():
            write_case(case, source, parameters, data=data, output=output)
            print(f"{case}: written")


def write_case(
    case: str, source: Source, parameters: ThickSliceParameters, *, data: Path, output: Path
) -> None:
    """Write a case thick and, cut to whole slabs, isotropic."""
    image, affine = _axial(data / source.image, source.axes)
    mask, _ = _axial(data / source.mask, source.axes)
    classes = source.classes or {"foreground": sorted({int(v) for v in np.unique(mask)} - {0})}
    declared = [value for values in classes.values() for value in values]
    mask[~np.isin(mask, declared)] = 0
    label = ClassesToChannelsd("label", classes)({"label": MetaTensor(torch.as_tensor(mask)[None])})["label"]
    images = acquire_whole_slabs(MetaTensor(torch.as_tensor(image)[None], affine=affine), parameters)
    labels = acquire_whole_slabs(label, parameters, is_label=True)
    for folder, values, place in (
        ("images", images.thick[0], images.thick),
        ("labels", drawn_classes(labels.thick.as_tensor()), images.thick),
        ("true/images", images.thin[0], images.thin),
        ("true/labels", drawn_classes(labels.thin.as_tensor()), images.thin),
    ):
        probe_folder(output / folder)
        write_nifti(
            output / folder / f"{case}.nii.gz",
            values.numpy(),
            affine=place.affine.numpy(),
            dtype=np.float32 if "images" in folder else np.uint8,
        )
    thickness_mm = parameters.thickness * parameters.ratio * float(spacing_of(affine)[2])
    write_json(output / "images" / f"{case}.json", {"SliceThickness": round(thickness_mm, 4)})


def _axial(path: Path, axes: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine, the slices axial."""
    values, header = read_case(path, allow_constant=True)
    affine = header.affine
    if axes:
        turn = np.linalg.inv(inv_ornt_aff(axcodes2ornt(axes), values.shape))
        affine = turn @ np.diag([*spacing_of(affine), 1.0])
    turned = Orientation("RAS", labels=None)(MetaTensor(torch.as_tensor(values)[None], affine=affine))
    return turned[0].numpy(), turned.affine.numpy()


if __name__ == "__main__":
    main()
