"""Turn the fundus photographs of the data folder into truth that is sharp to the pixel, for training and for tests.

    python -m benchmarks.quality.fundus_folder OUTPUT [--data FOLDER]

Published fundus JPEGs have several times more pixels than optical detail: reduced by 4 and enlarged again, they lose
almost nothing, and super-resolution of them would be measured on noise. Each image is reduced first, antialiased, by
the factor of its camera, which also removes the blocks of the compression. Training images are written at several
reductions, so that vessels come in several widths. ``test/`` holds other images, and cameras that training never saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from medsr.io.image_writing import write_image
from medsr.io.images import read_image
from medsr.io.writing import probe_folder

from benchmarks.data import add_data
from benchmarks.reduced import reduced

IDRID = "idrid_crops/IDRiD_{:02d}.jpg"
TRAIN = {
    **{IDRID.format(n): (3.0, 4.0, 5.5) for n in (*range(1, 4), *range(5, 15), *range(17, 24))},
    "hrf/HRF_01_h.jpg": (3.0, 4.0, 5.5),
    "hrf_small/HRF_02_h_1051px.jpg": (1.0, 1.4),
    "hrf_small/HRF_07_h_1051px.jpg": (1.0, 1.4),
}
"""Reductions of each training image: all CC BY."""

TEST = {
    **{IDRID.format(n): 4.0 for n in range(24, 29)},
    "hrf/HRF_07_dr.jpg": 4.0,
    "hrf_small/HRF_10_h_1051px.jpg": 1.0,
    "chasedb1/CHASEDB1_08L.png": 1.0,
    **{f"drive/images/{n}_training.tif": 1.0 for n in range(33, 41)},
}
"""Reduction of each test image; CHASE_DB1 and DRIVE are cameras that training does not see."""

PARTS = {"train": TRAIN, "test": {name: (by,) for name, by in TEST.items()}}


def main() -> None:
    """Write ``train/`` and ``test/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    add_data(parser)
    arguments = parser.parse_args()
    for part in PARTS:
        print(f"{part}: {write_part(part, arguments.output, arguments.data)}")


def write_part(part: str, output: Path, data: Path) -> Path:
    """Write ``train/`` or ``test/`` below a folder, and return it."""
    folder = probe_folder(output / part)
    for name, factors in PARTS[part].items():
        for factor in factors:
            reduce(data / "retina" / name, folder, factor)
    return folder


def reduce(path: Path, folder: Path, factor: float) -> None:
    """Write one image at one reduction, named after its camera, file and reduction."""
    loaded = read_image(path)
    camera = path.parts[-3] if path.parent.name == "images" else path.parent.name
    values = reduced(torch.from_numpy(loaded.values), factor).numpy()
    write_image(folder / f"{camera}-{path.stem}-{factor:g}.png", values, loaded.encoding)


if __name__ == "__main__":
    main()
