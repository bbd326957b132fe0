"""Write the free photographs that lie inside scikit-image, scikit-learn and Matplotlib into a folder, for training.

    python -m benchmarks.quality.open_images OUTPUT [--without NAME ...]

Fundus photographs are smooth: a network that sees nothing else spends most of its training on noise. Edges of all kinds
teach it to sharpen first. All but one, which says so, are public domain, CC0 or CC BY.
What the demo of fundus photographs shows, scikit-image's retina, is never written; what else a training must not see is
left out by name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import skimage.data
import sklearn.datasets
import torch
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.images import read_image
from medsr.io.writing import probe_folder

from benchmarks.reduced import reduced

FOLDERS = {
    Path(skimage.data.__file__).parent: {
        "astronaut.png": "NASA, public domain",
        "brick.png": "CC0 textures",
        "camera.png": "L. Varshney, CC0",
        "cell.png": "A. Skikoff, CC0",
        "chelsea.png": "S. van der Walt, CC0",
        "coffee.png": "R. Michetti, CC0",
        "coins.png": "Brooklyn Museum, no known copyright restrictions",
        "grass.png": "CC0 textures",
        "gravel.png": "CC0 textures",
        "hubble_deep_field.jpg": "NASA, public domain",
        "ihc.png": "CMMI, no known copyright restrictions",
        "motorcycle_left.png": "D. Scharstein et al., Middlebury stereo 2014; terms not stated",
        "rocket.jpg": "SpaceX, CC0",
    },
    Path(sklearn.datasets.__file__).parent / "images": {
        "china.jpg": "danielbuechele, CC BY 2.0",
        "flower.jpg": "vultilion, CC BY 2.0",
    },
    Path(matplotlib.get_data_path()) / "sample_data": {"grace_hopper.jpg": "US Navy, public domain"},
}
"""Files and their sources, as the packages state them."""

REDUCTIONS = (1.0, 1.5)
SMALLEST = 200
"""Pixels of the shorter side below which an image is not written: crops would not fit."""


def main() -> None:
    """Write every image at each reduction, in colour."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    known = sorted(Path(name).stem for names in FOLDERS.values() for name in names)
    listed = f"of {', '.join(known)}"
    parser.add_argument("--without", nargs="*", default=[], choices=known, metavar="NAME", help=listed)
    arguments = parser.parse_args()
    folder = probe_folder(arguments.output)
    written = 0
    for source, names in FOLDERS.items():
        for name in names:
            if Path(name).stem in arguments.without:
                continue
            values = torch.from_numpy(read_image(source / name).values)
            colour = values.expand(3, -1, -1)
            for factor in REDUCTIONS:
                small = reduced(colour, factor)
                if min(small.shape[1:]) >= SMALLEST:
                    target = folder / f"open-{Path(name).stem}-{factor:g}.png"
                    write_image(target, small.numpy(), ImageEncoding("PNG", 8, 3))
                    written += 1
    print(f"{written} images in {folder}")


if __name__ == "__main__":
    main()
