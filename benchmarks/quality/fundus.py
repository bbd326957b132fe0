"""Fundus super-resolution beside interpolation and other networks: PSNR, SSIM, and agreement on vessels.

    python -m benchmarks.quality.fundus [OUTPUT] [--scales 4] [--report docs/results-fundus.md] [--data FOLDER]

The bundle's own commands do the work. Vessels are a second judge: in photographs of DRIVE, whose vessels were drawn by
hand, a ridge filter looks for them in the sharp image, in the interpolated and in the super-resolved one, and each is
compared with the drawing. The filter has no weights and its settings are fixed: nothing can be fitted to a method.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from medsr.engines.image_comparison import DEGRADATION, ImageComparison, image_table
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.images import find_images, read_image
from medsr.io.writing import probe_folder, write_json
from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize, modcrop
from medsr.transforms.field_of_view import field_of_view
from PIL import Image
from scipy.stats import rankdata
from skimage.filters import sato

from benchmarks.commands import run_config
from benchmarks.data import add_data
from benchmarks.quality.fundus_folder import write_part
from benchmarks.quality.sisr import shipped_by

BUNDLE = "retina_segan_superres"
NATURAL, NATURAL_BUNDLE, NATURAL_SCALE = "FMEN of photographs", "image_fmen_superres", 4
"""What a network for fundus photographs must beat, and the scale that it has weights for."""
ENSEMBLE = "network, ensemble"
"""The shipped weights with the setting of this name: eight flips and turns, at eight times the time."""
GENERATOR, GENERATOR_OVERLAY = "SE generator", "segan.json"
"""The network that the publication describes."""
GAN, GAN_OVERLAY, GAN_SCALE = "GAN", "gan.json", 4
"""The weights that went on against a discriminator, and the scale that they are for."""
OVERLAYS: dict[int, list[str]] = {4: [], 8: ["x8.json"], 16: ["x16.json"]}
ENLARGED = 1024
VESSEL_WIDTHS = (1.0, 1.5, 2.0, 3.0)
"""Standard deviations of the ridge filter in pixels of DRIVE, whose vessels are 2 to 10 pixels wide."""
UNSURE = 8
"""Pixels at the rim of the field of view that are left out: the filter sees the rim as a vessel."""

HEAD = """# Results on fundus photographs

Written by `python -m benchmarks.quality.fundus`. No image here was seen in training; CHASE_DB1 and DRIVE are cameras
that training did not see either. Photographs with more pixels than optical detail were reduced first
(`benchmarks/quality/fundus_folder.py`). Degradation: {degradation}.
`network` is the shipped weights, `{ensemble}` the same with `--ensemble True`, which takes eight times the time;
`{generator}` is those of the overlay `{overlay}`, and `{gan}`, at x{scale}, those of `{gan_overlay}`:
`network`, trained on against a discriminator, which trades decibels for texture. Settings were chosen on photographs
21 to 24 of DRIVE, which are neither trained on nor reported: the camera of DRIVE is new to the weights, not to the
choices. `{natural}`, at x{scale}, is `{bundle}`, which has seen no fundus, and more photographs of other
things than `network`.

The first pair of columns decides: red, green and blue inside the field of view.
"""

VESSELS = """## Vessels of DRIVE

A ridge filter (Sato, green channel, widths {widths} pixels) against masks drawn by hand, {count} photographs, means.
AUC: chance that a vessel pixel has a stronger response than another pixel of the field of view. Dice: with as many
pixels as the mask has. `sharp` is the photograph before it was made small: what can be reached.
"""


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/fundus"))
    parser.add_argument("--scales", type=int, nargs="*", default=list(OVERLAYS), choices=list(OVERLAYS))
    add_data(parser)
    parser.add_argument("--report", type=Path, help="also write the tables as Markdown")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    images = write_part("test", output, arguments.data)
    text = [
        HEAD.format(
            degradation=DEGRADATION,
            ensemble=ENSEMBLE,
            generator=GENERATOR,
            overlay=GENERATOR_OVERLAY,
            gan=GAN,
            gan_overlay=GAN_OVERLAY,
            natural=NATURAL,
            bundle=NATURAL_BUNDLE,
            scale=NATURAL_SCALE,
        )
    ]
    for enlarge_to in (None, ENLARGED):
        for scale in arguments.scales:
            text += [
                f"## {_title(scale, enlarge_to)}\n",
                fidelity(images, output, scale, enlarge_to),
                "",
            ]
    rows = [row for scale in arguments.scales for row in vessels(arguments.data, output, scale)]
    write_json(output / "vessels.json", {"rows": rows})
    count = len({row["case"] for row in rows})
    text += [
        VESSELS.format(widths=", ".join(f"{w:g}" for w in VESSEL_WIDTHS), count=count),
        vessel_table(rows),
        "",
    ]
    print("\n".join(text))
    if arguments.report:
        arguments.report.write_text("\n".join(text))


def _title(scale: int, enlarge_to: int | None) -> str:
    if enlarge_to is None:
        return f"x{scale}, native size"
    return f"x{scale}, enlarged to {enlarge_to} first (the earlier study's protocol; comparable with nothing else)"


def fidelity(images: Path, output: Path, scale: int, enlarge_to: int | None) -> str:
    """Table of one scale and protocol."""
    target = output / (f"x{scale}" if enlarge_to is None else f"x{scale}_enlarged")
    run_config(
        BUNDLE,
        ["inference.json", *OVERLAYS[scale], "evaluate.json"],
        {"dataset_dir": images, "enlarge_to": enlarge_to},
        output=target,
    )
    rows = json.loads((target / "images.json").read_text(encoding="utf-8"))["rows"]
    if enlarge_to is None:
        rows += others(images, scale)
    return image_table(rows)


def others(images: Path, scale: int) -> list[dict[str, Any]]:
    """Rows of the ensemble, and of the networks that the shipped weights must beat, in the protocols of the bundle."""
    ensemble = {ENSEMBLE: shipped_by(BUNDLE, OVERLAYS[scale])}
    networks = {GENERATOR: shipped_by(BUNDLE, [*OVERLAYS[scale], GENERATOR_OVERLAY])}
    if scale == GAN_SCALE:
        networks[GAN] = shipped_by(BUNDLE, [GAN_OVERLAY])
    if scale == NATURAL_SCALE:
        networks[NATURAL] = shipped_by(NATURAL_BUNDLE, [])
    rows = ImageComparison(find_images(images), ensemble, scale=scale, inferer={"ensemble": True}).run()
    rows += ImageComparison(find_images(images), networks, scale=scale).run()
    return [row for row in rows if row["method"] in {**ensemble, **networks}]


def vessels(data: Path, output: Path, scale: int) -> list[dict[str, Any]]:
    """Restore what was made small by the bundle's command, find vessels, compare with the masks."""
    drive = data.resolve() / "retina" / "drive"
    numbers = range(33, 41)
    small = probe_folder(output / f"x{scale}_small")
    sharp = {n: _sharp(drive / "images" / f"{n}_training.tif", scale) for n in numbers}
    for number, image in sharp.items():
        low = BicubicDownsample(scale, rounding="end")(image)
        write_image(small / f"{number}.png", low.numpy(), ImageEncoding("PNG", 8, 3))
    overlays = {"network": OVERLAYS[scale]} | ({GAN: [GAN_OVERLAY]} if scale == GAN_SCALE else {})
    for method, names in overlays.items():
        run_config(
            BUNDLE,
            ["inference.json", *names],
            {"dataset_dir": small, "figure": False},
            output=output / f"x{scale}_vessels_{method}",
        )
    rows = []
    for number, image in sharp.items():
        height, width = image.shape[-2:]
        with Image.open(drive / "1st_manual" / f"{number}_manual1.gif") as opened:
            manual = np.asarray(opened.convert("L"))[:height, :width] > 127
        inside = field_of_view(image.numpy(), erosion=UNSURE)
        low = torch.from_numpy(read_image(small / f"{number}.png").values)
        candidates = {
            "sharp": image.numpy(),
            "bicubic": bicubic_resize(low, (height, width)).clamp(0, 1).numpy(),
            **{
                method: read_image(output / f"x{scale}_vessels_{method}" / f"{number}_superres.png").values
                for method in overlays
            },
        }
        for method, values in candidates.items():
            scores = vessel_agreement(values, manual, inside)
            rows.append({"case": str(number), "scale": scale, "method": method, **scores})
    return rows


def _sharp(path: Path, scale: int) -> torch.Tensor:
    return modcrop(torch.from_numpy(read_image(path).values), scale)


def vessel_agreement(image: np.ndarray, manual: np.ndarray, inside: np.ndarray) -> dict[str, float]:
    """AUC and Dice of a ridge filter's response to the green channel with a mask, inside the field of view."""
    response = sato(image[1].astype(np.float64), sigmas=VESSEL_WIDTHS, black_ridges=True)[inside]
    truth = manual[inside]
    positives = int(truth.sum())
    ranks = rankdata(response)
    auc = (ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (truth.size - positives))
    strongest = np.zeros_like(truth)
    strongest[np.argsort(response, kind="stable")[-positives:]] = True
    return {"auc": float(auc), "dice": float((strongest & truth).sum() / positives)}


def vessel_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the photographs."""
    lines = ["| scale | method | AUC | Dice |", "|---|---|---|---|"]
    for scale in dict.fromkeys(row["scale"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [row for row in rows if (row["scale"], row["method"]) == (scale, method)]
            if found:
                auc, dice = (np.mean([row[key] for row in found]) for key in ("auc", "dice"))
                lines.append(f"| x{scale} | {method} | {auc:.4f} | {dice:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
