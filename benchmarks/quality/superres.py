"""Quality of through-plane super-resolution, baselines beside it in the same run.

    python -m benchmarks.quality.superres [--data FOLDER] [-o results.json]

Thick slices are simulated from isotropic volumes of subjects that training did not see; every method gets the same
slices. Without ``--data`` and ``$MEDSR_DATA``, where there is no ``../shared/data`` either, the MNI152 template inside
nilearn stands in (a smoke test, no result).
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch
from medsr.engines.comparison import ThroughPlaneComparison, table
from medsr.engines.self_training import SelfTraining

from benchmarks.measure import machine
from benchmarks.shipped import settings, shipped_network

SUBJECTS = {
    "glioma-t1c-3": "mri/brats2013/pat0003/T1c_subtrMeanDivStd.nii.gz",
    "glioma-t1c-4": "mri/brats2013/pat0004/T1c_subtrMeanDivStd.nii.gz",
    "glioma-t1c-5": "mri/brats2013/pat0005/T1c_subtrMeanDivStd.nii.gz",
    "glioma-t1c-6": "mri/brats2013/pat0006/T1c_subtrMeanDivStd.nii.gz",
    "glioma-t1ce-reg": "mri/bratsreg_002/t1ce.nii.gz",
    "ms-flair-19": "mri/ms_flair_1mm/patient19/FLAIR_mni1mm_brain.nii.gz",
    "head-t1": "mri/healthy_iso/chris_t1.nii.gz",
    "oasis-t1-a": "mri/oasis_1mm/subjA_T1.nii.gz",
    "oasis-t1-e": "mri/oasis_1mm/subjE_T1.nii.gz",
    "oasis-t1-f": "mri/oasis_1mm/subjF_T1.nii.gz",
}

LOOKED_AT = ("glioma-t1c-3", "ms-flair-19", "head-t1", "oasis-t1-e")
"""Subjects on which the architecture was chosen; see the bundle's ``models/README.md``."""


def main() -> None:
    """Print one table per group of settings and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MEDSR_DATA"))
    parser.add_argument("--subjects", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--ratios", nargs="*", type=float, default=[3.0, 4.0, 5.0])
    parser.add_argument("--gaps", nargs="*", type=float, default=[0.0, 1.0])
    parser.add_argument("--profile", default="slr")
    parser.add_argument("--assumed-profile", default=None)
    parser.add_argument(
        "--plane-minutes", type=float, default=0.0, help="train the SMORE-like baseline so long"
    )
    parser.add_argument(
        "--adapt-minutes", type=float, default=0.0, help="adapt the weights to each scan so long"
    )
    parser.add_argument("--consistency", type=float, default=1.0)
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/superres.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("ignite").setLevel(logging.WARNING)

    chosen = settings()
    data = arguments.data or Path("../shared/data")
    cases = [{"case": name, "image": str(data / SUBJECTS[name])} for name in arguments.subjects]
    absent = [case["image"] for case in cases if not Path(case["image"]).is_file()]
    if arguments.data is None and len(absent) == len(cases):
        cases = _stand_in(arguments.output.parent)
    elif absent:
        parser.error(f"{absent[0]}: there is no such file; name the subjects that are there with --subjects")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = ThroughPlaneComparison(
        cases,
        shipped_network(arguments.weights),
        {"consistency": arguments.consistency, "group": chosen["group"], "tile": chosen["tile"]},
        ratios=arguments.ratios,
        gaps=arguments.gaps,
        profile=arguments.profile,
        assumed_profile=arguments.assumed_profile,
        plane_minutes=arguments.plane_minutes,
        adapt=_adaptation(arguments.adapt_minutes) if arguments.adapt_minutes else None,
        output=arguments.output,
    ).run()
    print(table(rows))
    for name in ("ssim", "edge_psnr_db", "data_consistency_db", "spearman", "ause", "coverage_2u", "seconds"):
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [row[name] for row in rows if row["method"] == method and name in row]
            if found:
                print(f"{name:20s} {method:12s} mean {sum(found) / len(found):8.3f}  worst {min(found):8.3f}")


def _adaptation(minutes: float) -> dict[str, Any]:
    """As the bundle's ``adapt.json`` does it."""
    overlay = settings("adapt.json")
    return {
        "training": SelfTraining(minutes, learning_rate=overlay["adapt_learning_rate"]),
        "share": overlay["adapt_share"],
        "both_directions": overlay["both_directions"],
    }


def _stand_in(folder: Path) -> list[dict[str, str]]:
    import warnings

    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn.datasets import load_mni152_template

        load_mni152_template(resolution=1).to_filename(folder / "mni152.nii.gz")
    print("no data folder: the MNI152 template stands in; a smoke test, no result")
    return [{"case": "mni152", "image": str(folder / "mni152.nii.gz")}]


if __name__ == "__main__":
    main()
