"""Turn the frames of surgical instruments of the data folder into labelled folders, for training and for tests.

    python -m benchmarks.quality.instrument_folder OUTPUT [--data FOLDER]

``all/`` holds frames of five scenes for the binary task, ``parts/`` the frames of EndoVis 2017 and what shows no
instrument. What stands before the hyphen of a name is the source, which is one video of one patient, or one kind of
photograph, and which a split leaves out as a whole. Masks of EndoVis 2017 and CholecSeg8k are those of their authors.
Cholec80 and the da Vinci scenes come without; their instruments were outlined by hand for this project, by nobody who
operates, in ``instrument_outlines.json``. SCARED shows tissue and no instrument, and fundus photographs, which are red
with vessels as tissue is, show none either: their masks are empty. Masks keep the grey values of their source where
they show an instrument, so that one label map, ``LABEL_MAP``, reads them all. All else is 0, and 255 where nobody
labelled: the border of one pixel in CholecSeg8k. The black around its circular image is background.

Frames are 512 to 640 pixels wide. Those of EndoVis 2017 are interlaced: they lose every second row, their border,
and half of their pixels, which leaves them sharp along both axes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.loading import LoadImageFiled
from medsr.io.masks import write_mask
from medsr.io.writing import probe_folder
from medsr.transforms.frame_labels import IGNORED, LoadMaskd, ResizeFramed, SameSized
from medsr.transforms.stereo import EndoVis17Framed
from PIL import Image, ImageDraw

from benchmarks.data import add_data
from benchmarks.quality.fundus_folder import TRAIN as FUNDUS

PARTS = {"shaft": [10], "wrist": [20], "clasper": [30]}
"""Grey values in EndoVis 2017."""

INSTRUMENTS = (31, 32)
"""Grey values of grasper and L-hook in CholecSeg8k."""

OUTLINES = Path(__file__).with_name("instrument_outlines.json")
"""By frame its file and the outlines of its instruments: columns and rows, from the upper left corner."""

OUTLINED = 10
"""Grey value inside an outline."""

LABEL_MAP = {
    "background": [0],
    "instrument": [*(grey for greys in PARTS.values() for grey in greys), *INSTRUMENTS],
}
"""What the masks of ``all/`` mean; those of ``parts/`` mean the background and ``PARTS``."""

WIDTH = 640


def main() -> None:
    """Write ``all/`` and ``parts/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    add_data(parser)
    arguments = parser.parse_args()
    for folder, sources in (("all", SOURCES), ("parts", PARTS_SOURCES)):
        for write in sources:
            count = write(arguments.data, arguments.output / folder)
            print(f"{folder} {write.__name__.removeprefix('write_')}: {count} frames")
    print(f"label map of all/: {LABEL_MAP}, to ignore: {IGNORED}")


def write_endovis17(data: Path, output: Path) -> int:
    """Write the frames of EndoVis 2017, and return how many there are."""
    paths = sorted((data / "instrument_seg" / "endovis17" / "images").glob("*.png"))
    transforms = (
        EndoVis17Framed("image"),
        EndoVis17Framed("label", deinterlace=False),
        ResizeFramed("image", "label", factor=2),
    )
    for path in paths:
        item = load(path, path.parents[1] / "labels_parts" / path.name)
        for transform in transforms:
            item = transform(item)
        write_frame(item, output, f"endovis17-{path.stem}")
    return len(paths)


def write_cholecseg8k(data: Path, output: Path) -> int:
    """Write the frames of CholecSeg8k, and return how many there are."""
    paths = sorted((data / "instrument_seg" / "cholecseg8k" / "images").glob("*.png"))
    resize = ResizeFramed("image", "label", longest=WIDTH)
    for path in paths:
        item = resize(load(path, path.parents[1] / "labels_watershed" / path.name))
        mask = item["label"].as_tensor()
        item["label"] = mask * torch.isin(mask, torch.tensor([*INSTRUMENTS, IGNORED]))
        write_frame(item, output, f"cholec-{path.stem.removesuffix('_endo')}")
    return len(paths)


def write_tissue(data: Path, output: Path) -> int:
    """Write both views of SCARED, in which there is no instrument, and return how many there are."""
    return _write_without(sorted((data / "stereo_endo" / "scared_d1k1").glob("*.png")), output, "scared")


def write_fundus(data: Path, output: Path) -> int:
    """Write fundus photographs, in which there is no instrument, and return how many there are."""
    return _write_without([data / "retina" / name for name in FUNDUS], output, "fundus")


def _write_without(paths: Sequence[Path], output: Path, source: str) -> int:
    resize = ResizeFramed("image", longest=WIDTH)
    for path in paths:
        item = resize(LoadImageFiled("image", channels=3)({"image": path}))
        nothing = torch.zeros(1, *item["image"].shape[1:], dtype=torch.uint8)
        write_frame({**item, "label": nothing}, output, f"{source}-{path.stem}")
    return len(paths)


def write_outlined(data: Path, output: Path) -> int:
    """Write the frames that were outlined by hand, and return how many there are."""
    frames = json.loads(OUTLINES.read_text(encoding="utf-8"))
    for name, frame in frames.items():
        item = LoadImageFiled("image")({"image": data / frame["image"]})
        mask = Image.new("L", tuple(item["image"].shape[:0:-1]))
        for outline in frame["outlines"]:
            ImageDraw.Draw(mask).polygon([tuple(corner) for corner in outline], fill=OUTLINED)
        write_frame({**item, "label": torch.from_numpy(np.array(mask))[None]}, output, name)
    return len(frames)


SOURCES = (write_endovis17, write_cholecseg8k, write_outlined, write_tissue)
"""What writes the frames of ``all/``."""

PARTS_SOURCES = (write_endovis17, write_tissue, write_fundus)
"""What writes the frames of ``parts/``."""


def load(image: Path, label: Path) -> dict[Any, Any]:
    """A frame with its mask."""
    item = LoadMaskd("label")(LoadImageFiled("image")({"image": image, "label": label}))
    return SameSized("label")(item)


def write_frame(item: dict[Any, Any], output: Path, name: str) -> None:
    """Write image and mask below ``images/`` and ``labels/``."""
    image, mask = item["image"], item["label"]
    encoding = ImageEncoding.from_meta(image.meta)
    write_image(probe_folder(output / "images") / f"{name}.png", image.numpy(), encoding)
    write_mask(probe_folder(output / "labels") / f"{name}.png", mask[0].numpy())


if __name__ == "__main__":
    main()
