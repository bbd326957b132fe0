"""Turn the stereo pairs of the data folder into truth with matching rows, for training and for tests.

    python -m benchmarks.quality.stereo_folder OUTPUT [--data FOLDER]

Four folders are written. ``train/`` holds one endoscopic sequence and a few pairs of other things; ``single/`` holds
frames of one camera, for training as well; ``check/`` is what settings are chosen on; ``test/`` holds other scenes, one
of them endoscopic and of another camera.
Scenes are split, not frames: the ten frames of the sequence show one scene, and none of them may test what was learnt
from the others. Motorcycle is what the demo shows, and stays out of training.

Of the sequence the rows are brought to one height. Its detail is poorer from row to row than from column to column,
which is how it was published. Frames of EndoVis 2017 are interlaced: without every second row and reduced by 2 they are
sharp along both axes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.loading import LoadImageFiled
from medsr.io.writing import probe_folder
from medsr.transforms.stereo import AlignRowsd, EndoVis17Framed, JoinViewsd, SplitViewsd
from monai.data import MetaTensor
from torch import Tensor

from benchmarks.data import add_data
from benchmarks.reduced import reduced


class Pair(NamedTuple):
    """A left and a right view below ``stereo_endo/``, and the row in the right view minus that in the left one."""

    left: str
    right: str
    rows: int | str = 0


def generic(name: str, rows: int | str = 0) -> Pair:
    """A pair of no endoscope."""
    return Pair(f"generic/{name}_left.png", f"generic/{name}_right.png", rows)


TRAIN = {
    **{
        f"davinci-{n}": Pair(f"davinci_dcssr/scene_{n}/hr0.png", f"davinci_dcssr/scene_{n}/hr1.png", 7)
        for n in range(10)
    },
    **{f"middlebury-{name}": generic(f"middlebury_{name}") for name in ("Cloth3", "Wood2")},
    "flickr-0026": generic("flickr1024_0026", "estimate"),
}
"""Names and pairs; the group stands before the hyphen."""

CHECK = {f"middlebury-{name}": generic(f"middlebury_{name}") for name in ("Reindeer", "Cones")}
"""What settings are chosen on."""

TEST = {
    "scared-d1k1": Pair("scared_d1k1/left.png", "scared_d1k1/right.png"),
    "middlebury-motorcycle": generic("middlebury2014_motorcycle"),
    "kitti-000046": generic("kitti2015_000046_10"),
}

PARTS = {"train": TRAIN, "check": CHECK, "test": TEST}

FRAMED = "endovis17"
"""Folder of frames that have a border, and two fields of which one is taken."""

SINGLE = {
    "endovis17": ("instrument_seg/endovis17/images", 2.0),
    "cholec80": ("surgical_frames/cholec80_video01", 1.0),
}
"""Folders of single frames, below the data folder, and by what they are reduced."""


def main() -> None:
    """Write all folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    add_data(parser)
    arguments = parser.parse_args()
    for part in PARTS:
        write_pairs(part, arguments.output, arguments.data)
    folder = probe_folder(arguments.output / "single")
    for kind, (where, factor) in SINGLE.items():
        paths = sorted((arguments.data / where).glob("*.png"))
        for path in paths:
            write_frame(path, folder / f"{kind}-{path.stem}.png", factor)
        print(f"single {kind}: {len(paths)} images")


def write_pairs(part: str, output: Path, data: Path) -> Path:
    """Write the pairs of a part into a folder of its name, and return it."""
    folder = probe_folder(output / part)
    for name, pair in PARTS[part].items():
        found = write_pair(data / "stereo_endo", pair, folder / name)
        print(f"{part} {name}: {found}")
    return folder


def write_pair(source: Path, pair: Pair, target: Path) -> str:
    """Write both views as ``<target>_left.png`` and ``<target>_right.png``; return how their rows lie."""
    item: dict[Any, Any] = {"image": source / pair.left, "image_right": source / pair.right}
    transforms = (
        LoadImageFiled(("image", "image_right")),
        JoinViewsd(),
        AlignRowsd("image", pair.rows),
        SplitViewsd("image"),
    )
    for transform in transforms:
        item = transform(item)
    meta = item["image"].meta
    for side in ("left", "right"):
        write(target.with_name(f"{target.name}_{side}.png"), item[f"image_{side}"].as_tensor(), meta)
    keys = ("row_offset_px", "row_residual_px", "disparity_px")
    return ", ".join(f"{key} {float(meta[key]):.2f}" for key in keys if key in meta)


def write_frame(path: Path, target: Path, factor: float) -> None:
    """Write a frame of one camera, reduced."""
    image = read_frame(path)
    write(target, reduced(image.as_tensor(), factor), image.meta)


def read_frame(path: Path, channels: int | None = None) -> MetaTensor:
    """Read a photograph; frames of EndoVis 2017 without interlaced rows and border."""
    item = LoadImageFiled("image", channels=channels)({"image": path})
    if FRAMED in path.parts:
        item = EndoVis17Framed("image")(item)
    image: MetaTensor = item["image"]
    return image


def write(path: Path, values: Tensor, meta: Any) -> None:
    """Write an image as its source was encoded."""
    write_image(path, torch.as_tensor(values).numpy(), ImageEncoding.from_meta(meta))


if __name__ == "__main__":
    main()
