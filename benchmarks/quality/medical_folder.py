"""Turn the medical images of the data folder into grey truth that is sharp to the pixel, for training and for tests.

    python -m benchmarks.quality.medical_folder OUTPUT [--data FOLDER]

Two folders are written, ``train/`` and ``test/``: fundus photographs and endoscopic frames in grey, and slices of MRI
volumes across the axes along which they are sharp. Names begin with the kind. Subjects and scenes are split, not
images: nothing in ``test/`` comes from an eye, a volume or a scene that ``train/`` has seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from medsr import catalog
from medsr.geometry import spacing_of
from medsr.io.cases import case_name, read_case
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.writing import probe_folder
from medsr.metrics.volume import head_mask
from medsr.transforms.intensity import PercentileToUnitd
from monai.data import MetaTensor
from torch import Tensor

from benchmarks.data import add_data
from benchmarks.quality import fundus_folder, stereo_folder
from benchmarks.quality.superres import SUBJECTS
from benchmarks.reduced import reduced

_ANISOTROPY = 1.2
"""Spacing divided by the smallest one up to which an axis counts as sharp."""

SLICES = 3
"""Slices of a volume and an axis."""

TEST_SUBJECTS = ("glioma-t1c-3", "ms-flair-19", "head-t1", "oasis-t1-a", "oasis-t1-e")


def main() -> None:
    """Write ``train/`` and ``test/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    add_data(parser)
    arguments = parser.parse_args()
    for part in ("train", "test"):
        written = write_part(part, probe_folder(arguments.output / part), arguments.data)
        print(f"{part}: {written} images")


def write_part(part: str, folder: Path, data: Path) -> int:
    """Write ``train`` or ``test`` into a folder, and return the number of images."""
    return (
        write_photographs(fundus(part), data, folder / "fundus")
        + write_photographs(endoscopy(part, data), data, folder / "endoscopy")
        + write_slices(volumes(part), data, folder / "mri")
    )


def fundus(part: str) -> dict[str, float]:
    """Photographs below the data folder, and by what they are reduced: one size each."""
    found = {
        "train": {name: by[len(by) // 2] for name, by in fundus_folder.TRAIN.items()},
        "test": fundus_folder.TEST,
    }
    return {f"retina/{name}": by for name, by in found[part].items()}


def endoscopy(part: str, data: Path) -> dict[str, float]:
    """Left views and single frames below the data folder, and by what they are reduced."""
    if part == "test":
        return {f"stereo_endo/{stereo_folder.TEST['scared-d1k1'].left}": 1.0}
    pairs = {f"stereo_endo/{p.left}": 1.0 for k, p in stereo_folder.TRAIN.items() if k.startswith("davinci")}
    frames = {
        path.relative_to(data).as_posix(): factor
        for folder, factor in stereo_folder.SINGLE.values()
        for path in sorted((data / folder).glob("*.png"))
    }
    return pairs | frames


def volumes(part: str) -> list[str]:
    """Volumes below the data folder: those of the shipped weights, or unseen subjects."""
    if part == "test":
        return [SUBJECTS[name] for name in TEST_SUBJECTS]
    shipped = catalog.read_settings(catalog.bundle_root("mri_rehrseg_superres"), "train_shipped.json")
    return list(shipped["train_files"])


def write_photographs(sources: Mapping[str, float], data: Path, target: Path) -> int:
    """Write photographs in grey, reduced; names begin with that of the target."""
    for number, (name, factor) in enumerate(sources.items()):
        path = Path(name)
        image = stereo_folder.read_frame(data / name, channels=1).as_tensor()
        write_grey(target, f"{number:02d}-{case_name(path, suffixes=(path.suffix,))}", reduced(image, factor))
    return len(sources)


def write_slices(names: list[str], data: Path, target: Path) -> int:
    """Write slices of volumes, cut to the head."""
    written = 0
    for number, name in enumerate(names):
        values, header = read_case(data / name)
        image = PercentileToUnitd("image")({"image": MetaTensor(torch.from_numpy(values)[None])})["image"]
        for axis, plane in slices(image.as_tensor()[0], spacing_of(header.affine)):
            case = case_name(data / name)
            write_grey(target, f"{number:02d}-{case}-{axis}", plane.clamp(0, 1))
            written += 1
    return written


def slices(volume: Tensor, spacing: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """Slices ``(1, H, W)`` of a volume ``(X, Y, Z)`` that are sharp along both axes, from the middle of the head."""
    sharp = spacing < _ANISOTROPY * spacing.min()
    inside = np.argwhere(head_mask(volume.numpy()))
    low, high = inside.min(0), inside.max(0) + 1
    head = volume[tuple(slice(*ends) for ends in zip(low, high, strict=True))]
    for axis in range(3):
        if all(sharp[other] for other in range(3) if other != axis):
            size = head.shape[axis]
            for place in np.unique(np.linspace(0.25 * size, 0.75 * size, SLICES).astype(int)):
                yield f"{'xyz'[axis]}{place}", head.select(axis, int(place))[None]


def write_grey(target: Path, name: str, image: Tensor) -> None:
    """Write a grey image of 16 bits as ``<target>-<name>.png``."""
    path = target.with_name(f"{target.name}-{name}.png")
    write_image(path, image.numpy(), ImageEncoding("PNG", 16, 1))


if __name__ == "__main__":
    main()
