"""Stereo super-resolution against interpolation, and against itself without the other view: PSNR, SSIM, disparity.

    python -m benchmarks.quality.stereo [OUTPUT] [--scales 4 2] [--report docs/results-stereo.md] [--data FOLDER]

The bundle's own command does the work, on scenes that no training has seen.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from medsr.engines.image_comparison import DEGRADATION, image_table

from benchmarks.commands import run_config
from benchmarks.quality.stereo_folder import TEST, write_pairs

BUNDLE = "endoscopy_segsrnet_superres"
OVERLAYS: dict[int, list[str]] = {4: [], 2: ["x2.json"]}

HEAD = """# Results on stereo pairs

Written by `python -m benchmarks.quality.stereo`. {count} pairs, and one of them from an endoscope: they show what the
network does, and no more. No scene here was seen in training, and the endoscope (SCARED) is another than that of the
training pairs. Degradation: {degradation}. `network` is the shipped weights; `network, one view` the same, given each
view as both.

The first pair of columns decides: the mean of both views, red, green and blue, uncropped. The second leaves out 64
columns of the left view. The disparity error says whether the views still fit together.
"""


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/stereo"))
    parser.add_argument("--scales", type=int, nargs="*", default=list(OVERLAYS), choices=list(OVERLAYS))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MEDSR_DATA", "../shared/data")))
    parser.add_argument("--report", type=Path, help="also write the tables as Markdown")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    pairs = write_pairs("test", output, arguments.data)
    text = [HEAD.format(degradation=DEGRADATION, count=len(TEST))]
    for scale in arguments.scales:
        target = output / f"x{scale}"
        run_config(
            BUNDLE,
            ["inference.json", *OVERLAYS[scale], "evaluate.json"],
            {"dataset_dir": pairs},
            output=target,
        )
        rows = json.loads((target / "pairs.json").read_text())["rows"]
        text += [f"## x{scale}\n", image_table(rows, {"disparity_mae_px": "disparity error, px"}), ""]
    print("\n".join(text))
    if arguments.report:
        arguments.report.write_text("\n".join(text))


if __name__ == "__main__":
    main()
