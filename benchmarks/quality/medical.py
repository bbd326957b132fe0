"""Single-image networks on medical images, before and after they were trained on such images.

    python -m benchmarks.quality.medical [--data FOLDER] [--report docs/results-medical.md]

The images are the unseen ones of :mod:`benchmarks.quality.medical_folder`, made small in the run. A network for colour
gets each of them as three equal channels, as its bundle does, and the mean of its result counts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsr.engines.image_comparison import DEGRADATION, ImageComparison, image_table
from medsr.engines.runner import one_line_errors
from medsr.io.images import find_images
from medsr.metrics.image import ImageProtocol

from benchmarks.data import add_data
from benchmarks.quality import medical_folder
from benchmarks.quality.sisr import shipped_by

SCALE = 4
PROTOCOL = ImageProtocol(channel="y", border=SCALE)
METHODS: dict[str, tuple[str, list[str]]] = {
    "VDSR": ("image_vdsr_superres", []),
    "VDSR, medical": ("image_vdsr_superres", ["medical.json"]),
    "SRResNet": ("image_srgan_superres", ["fidelity.json"]),
    "SRResNet, medical": ("image_srgan_superres", ["medical.json"]),
    "FMEN": ("image_fmen_superres", []),
    "FMEN, medical": ("image_fmen_superres", ["medical.json"]),
}
"""Bundle and overlays of each method."""

HEAD = """# Results on medical images

Written by `python -m benchmarks.quality.medical`. Grey images, x{scale}. None of the eyes, scenes and volumes was
seen in training. They are few, and show nothing clinical. Degradation: {degradation}.
`all` is the mean over the images, most of which are slices of MRI.

`medical` is the network for grey images that was trained on from the other weights on images of the three kinds, for as
many minutes as the others; the weights without this word learnt from photographs, and get the image as three equal
channels.
"""


def main() -> None:
    """Print the page, and write it if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--report", type=Path, default=None)
    one_line_errors(compare)(**vars(parser.parse_args()))


def compare(*, data: Path, report: Path | None) -> list[dict[str, Any]]:
    """Measure all methods on the test images."""
    with tempfile.TemporaryDirectory() as folder:
        medical_folder.write_part("test", Path(folder), data)
        networks = {name: shipped_by(*found) for name, found in METHODS.items()}
        rows = ImageComparison(find_images(folder), networks, scale=SCALE, protocols=[PROTOCOL]).run()
    text = page(rows)
    print(text)
    if report is not None:
        report.write_text(text, encoding="utf-8")
    return rows


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a page."""
    return f"{HEAD.format(scale=SCALE, degradation=DEGRADATION)}\n{image_table(rows)}\n"


if __name__ == "__main__":
    main()
