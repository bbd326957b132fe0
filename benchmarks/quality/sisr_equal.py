"""Single-image networks after equal minutes on equal images, each from nothing by the ``train.json`` of its bundle.

    python -m benchmarks.quality.sisr_equal OUT [--minutes 15] [--data FOLDER] [--report docs/results-equal-minutes.md]

The shipped weights of ``benchmarks.quality.sisr`` were trained for as long as each network needed; here all have the
same photographs, minutes, seed and one thread, and the settings that their configs have by default. A training that is
in OUT already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsr import catalog
from medsr.engines.runner import one_line_errors
from medsr.export import bundle_network
from medsr.io.images import find_images
from medsr.io.writing import write_json
from medsr.metrics.image import SET5_X4
from medsr.networks.layout import channels_last
from medsr.transforms.bicubic import BicubicDownsample
from torch import nn

from benchmarks.commands import run_once
from benchmarks.data import add_data
from benchmarks.quality.sisr import BICUBIC, DEGRADATION, SCALE, read_sharp, restorer, scores

METHODS: dict[str, tuple[str, list[str]]] = {
    "VDSR": ("image_vdsr_superres", []),
    "SRResNet": ("image_srgan_superres", ["fidelity.json"]),
    "FMEN": ("image_fmen_superres", []),
}
"""Bundle, and overlays of its inference."""

PHOTOGRAPHS = ("sisr/BSDS500/train", "sisr/T91")
TEST = "sisr/Set5"

HEAD = """# Results of the single-image networks after equal minutes

Written by `python -m benchmarks.quality.sisr_equal OUT --minutes {minutes:g}`. Each network was trained from nothing
for {minutes:g} minutes of the clock on one thread, with other work beside, on BSDS500 train and T91,
by the `train.json` of its bundle as it is. The seed is {seed}.
Set5, x{scale}, was looked at once, at the end.
Low resolution: {degradation}.
PSNR and SSIM: `{protocol}`, means over the images.
`crops`: how many, and their side, in an iteration; `seen`: megapixels of them in the whole training.
What is shipped was trained for longer, and not for equally long: `results-images.md`.

"""


def main() -> None:
    """Train what is missing, print the page, and write it if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    add_data(parser)
    parser.add_argument("--report", type=Path, default=None)
    one_line_errors(compare)(**vars(parser.parse_args()))


def compare(
    output: Path, *, minutes: float, seed: int, data: Path, report: Path | None
) -> list[dict[str, Any]]:
    """Train all methods and measure them on the same images."""
    output = output.resolve()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = {
        "dataset_dir": [str(data / folder) for folder in PHOTOGRAPHS],
        "minutes": minutes,
        "seed": seed,
    }
    for method, (bundle, _) in METHODS.items():
        run_once(bundle, ["train.json"], settings, output=output / method, environment=environment)
    sharp = {case["case"]: read_sharp(case["image"]) for case in find_images(str(data / TEST))}
    low = {name: BicubicDownsample(SCALE, rounding="between")(image) for name, image in sharp.items()}
    rows = []
    for method in (BICUBIC, *METHODS):
        restore = restorer(None if method == BICUBIC else trained(method, output))
        found = scores({name: restore(image) for name, image in low.items()}, sharp)
        rows.append({"method": method, **(training(output / method) if method in METHODS else {}), **found})
    write_json(output / "sisr_equal.json", {"minutes": minutes, "seed": seed, "rows": rows})
    text = page(rows, minutes=minutes, seed=seed)
    print(text)
    if report is not None:
        report.write_text(text, encoding="utf-8")
    return rows


def trained(method: str, output: Path) -> nn.Module:
    """Network of a method with the weights that were trained here."""
    bundle, overlays = METHODS[method]
    root = catalog.bundle_root(bundle)
    configs = [root / "configs" / overlay for overlay in overlays]
    return channels_last(bundle_network(root, configs, weights=str(output / method / "model.pt"))[0])


def training(folder: Path) -> dict[str, Any]:
    """What the record of a training says."""
    record = json.loads((folder / "train_record.json").read_text(encoding="utf-8"))
    settings = record["settings"]
    crops = record["iterations"] * settings["batch_size"] * settings["crop_size"] ** 2
    return {
        "minutes": record["minutes"],
        "iterations": record["iterations"],
        "crops": f"{settings['batch_size']} of {settings['crop_size']}",
        "seen_megapixels": round(crops / 1e6),
        "precision": record["precision"],
    }


def page(rows: Sequence[Mapping[str, Any]], *, minutes: float, seed: int) -> str:
    """The rows in Markdown."""
    titles = ("method", "minutes", "iterations", "crops", "seen, Mpx", "precision", "PSNR Y, dB", "SSIM Y")
    keys = ("minutes", "iterations", "crops", "seen_megapixels", "precision")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [str(row.get(key, "-")) for key in keys]
        lines.append(
            "| " + " | ".join([row["method"], *cells, f"{row['psnr_db']:.2f}", f"{row['ssim']:.4f}"]) + " |"
        )
    head = HEAD.format(
        minutes=minutes, seed=seed, scale=SCALE, degradation=DEGRADATION, protocol=SET5_X4.identifier
    )
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
