"""Single-image networks beside bicubic interpolation: size, work, time, memory, and quality on Set5 at x4.

    python -m benchmarks.quality.sisr [SET5_FOLDER] [--report docs/results-images.md] [--out FOLDER]

Everything is measured in one run: the networks are those of the bundles with their shipped weights, all get the same
images, and their times are taken in turns. ``--out`` gets the rows, and a picture of baby and butterfly; it must lie
outside of this repository, because the images belong to others.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from medsr import catalog
from medsr.engines.runner import one_line_errors
from medsr.errors import SettingError, WeightsError
from medsr.export import bundle_network
from medsr.inferers.precision import native_bfloat16
from medsr.inferers.tiles import TileInferer
from medsr.io.images import find_images, read_image
from medsr.io.writing import probe_folder, write_figure, write_json
from medsr.metrics.image import SET5_X4, luma, mean_score, round_to_8_bits
from medsr.networks.layout import channels_last
from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize, modcrop
from torch import Tensor, nn

from benchmarks.measure import ROOT, giga_multiplications, interleaved, peak_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = 4
BICUBIC = "bicubic"
BUNDLES: dict[str, tuple[str, list[str]]] = {
    "VDSR": ("image_vdsr_superres", []),
    "SRResNet": ("image_srgan_superres", ["fidelity.json"]),
    "SRGAN": ("image_srgan_superres", []),
    "FMEN": ("image_fmen_superres", []),
    "SE-GAN": ("retina_segan_superres", ["segan.json"]),
}
"""Bundle and overlays of each method; SRResNet is SRGAN before it met the discriminator."""
TIMED = "baby"
"""Image on which time and memory are taken, if it is there; else the first."""

INSETS = {"baby": (0.395, 0.32, 0.19), "butterfly": (0.45, 0.75, 0.3)}
"""Centre of the detail, as shares of height and width, and its side, as a share of the shorter one."""

DEGRADATION = "MATLAB-style antialiased bicubic of the RGB image, rounded to 8 bits after rows and columns"

HEAD = """# Results of the single-image networks

Written by `python -m benchmarks.quality.sisr`. Images: {names}; x{scale}, seen in no training.
Low resolution: {degradation}.
PSNR and SSIM: `{protocol}`, means over the images. On luma alone, as the tables of the literature have it,
bicubic reads {literature} here; published for Set5 is 28.42 dB / 0.8104.
Time: median of {rounds} rounds in turns, {threads} thread(s) of {machine}, torch {torch}, for the image {timed}, and
per megapixel of the result. Memory: peak above what network and image take, for the same image.
GMAC: for 256 x 256 pixels in.
The networks run through the inferer of the bundles; this machine is faster with bfloat16: {bfloat16}.
`precision` is what the inferer chose for that image; times include the trial by which it does.
Parameters are those of what runs: neither a discriminator nor the training form of FMEN is counted. SE-GAN learnt
from fundus photographs. A GAN trades decibels for texture: its PSNR does not rank it. `SRGAN` is SRResNet trained
on for some minutes with L1 + 0.005 times a relativistic average adversarial loss, without the paper's feature loss.
The trainings of what is shipped were not equally long; after equal minutes the networks are compared in
`results-equal-minutes.md`.

"""

PRECISION_HEAD = """
## What bfloat16 changes

The results in bfloat16, whether the inferer would choose it or not, beside those in float32: difference of 255 grey
levels before they are rounded to whole ones, mean and largest of all images, and change of the mean PSNR.

"""

Restore = Callable[[Tensor], Tensor]


def main() -> None:
    """Print the table; write page, rows and picture if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("MEDSR_DATA", "../shared/data"))
    parser.add_argument("folder", metavar="SET5_FOLDER", type=Path, nargs="?", default=data / "sisr" / "Set5")
    parser.add_argument("--report", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    one_line_errors(compare)(**vars(parser.parse_args()))


def compare(folder: Path, *, report: Path | None, out: Path | None, rounds: int = 9) -> list[dict[str, Any]]:
    """Measure all methods on the images of a folder.

    Raises:
        DataError: if there are no images.
        SettingError: if ``out`` lies in this repository.
    """
    if out is not None and out.resolve().is_relative_to(ROOT):
        raise SettingError(f"{out}: the images belong to others; choose a folder outside of the repository")
    sharp = {case["case"]: read_sharp(case["image"]) for case in find_images(str(folder))}
    low = {name: BicubicDownsample(SCALE, rounding="between")(image) for name, image in sharp.items()}
    networks, missing = shipped_networks()
    methods = {name: restorer(network) for name, network in {BICUBIC: None, **networks}.items()}
    results = {
        method: {name: restore(image) for name, image in low.items()} for method, restore in methods.items()
    }
    timed = TIMED if TIMED in low else next(iter(low))
    height, width = low[timed].shape[-2:]
    times = interleaved(
        {method: _bound(restore, low[timed]) for method, restore in methods.items()},
        rounds,
        clock=time.perf_counter,
    )
    rows = []
    for method in (BICUBIC, *BUNDLES):
        row: dict[str, Any] = {"method": method, "bundle": BUNDLES.get(method, (None,))[0]}
        rows.append(row)
        if method in missing:
            row["missing"] = missing[method]
            continue
        seconds = float(np.median(times[method]))
        row |= {
            "input": [width, height],
            "output": [SCALE * width, SCALE * height],
            "seconds": round(seconds, 5),
            "seconds_per_megapixel": round(seconds / (SCALE**2 * width * height / 1e6), 4),
            "peak_mib": peak_of("benchmarks.quality.sisr:measured", method, height, width),
            **scores(results[method], sharp),
        }
        if method in networks:
            row |= {**_size(networks[method]), "precision": used_precision(networks[method], low[timed])}
            row |= bfloat16_changes(networks[method], low, sharp)
    text = _page(rows, sharp, rounds=rounds, timed=timed)
    print(text)
    if report is not None:
        report.write_text(text, encoding="utf-8")
    if out is not None:
        write_json(probe_folder(out) / "sisr.json", {"degradation": DEGRADATION, "rows": rows})
        shown = [name for name in INSETS if name in sharp]
        if shown:
            write_figure(out / "sisr.png", picture(shown, sharp, results))
    return rows


def shipped_networks() -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Networks of the bundles that are there, and why the others are not."""
    found, missing = {}, {}
    there = {bundle.name for bundle in catalog.list_bundles()}
    for method, (name, _) in BUNDLES.items():
        if name not in there:
            missing[method] = f"there is no bundle {name}"
            continue
        try:
            found[method] = shipped(method)
        except WeightsError as error:
            missing[method] = str(error)
    return found, missing


def shipped(method: str) -> nn.Module:
    """Network of a method with its shipped weights."""
    return shipped_by(*BUNDLES[method])


def shipped_by(bundle: str, overlays: Sequence[str]) -> nn.Module:
    """Network of a bundle and overlays with its shipped weights."""
    root = catalog.bundle_root(bundle)
    return channels_last(bundle_network(root, [root / "configs" / overlay for overlay in overlays])[0])


def restorer(network: nn.Module | None) -> Restore:
    """Function from a coarse image ``(3, H, W)`` to a fine one, with the network or by interpolation."""
    if network is None:
        return lambda image: bicubic_resize(image, (SCALE * image.shape[-2], SCALE * image.shape[-1]))
    infer = TileInferer()
    return lambda image: infer(image[None], network)[0]


def used_precision(network: nn.Module, image: Tensor) -> str:
    """Precision that the inferer of the bundles chooses for a coarse image ``(3, H, W)``."""
    infer = TileInferer()
    infer(image[None], network)
    return str(infer.facts["precision"])


@torch.inference_mode()
def bfloat16_changes(
    network: nn.Module, low: Mapping[str, Tensor], sharp: Mapping[str, Tensor]
) -> dict[str, float]:
    """What the results lose in bfloat16 instead of float32; the inferer would not run every network in it."""
    exact, coarse = {}, {}
    for name, image in low.items():
        exact[name] = network(image[None])[0]
        with torch.autocast(image.device.type, dtype=torch.bfloat16):
            coarse[name] = network(image[None])[0].float()
    grey = [255 * (coarse[name] - exact[name]).abs() for name in low]
    return {
        "bfloat16_mean_grey_levels": round(float(np.mean([float(one.mean()) for one in grey])), 4),
        "bfloat16_largest_grey_levels": round(max(float(one.max()) for one in grey), 3),
        "bfloat16_psnr_db": round(scores(coarse, sharp)["psnr_db"] - scores(exact, sharp)["psnr_db"], 4),
    }


def measured(method: str, height: int, width: int) -> Callable[[], object]:
    """What is measured in a process of its own: a method, warmed up on a small image."""
    restore = restorer(None if method == BICUBIC else shipped(method))
    restore(torch.rand(3, 16, 16))
    return _bound(restore, torch.rand(3, height, width))


def scores(results: Mapping[str, Tensor], sharp: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means over the images, and the protocol."""
    found = [SET5_X4.score(results[name], image) for name, image in sharp.items()]
    return {
        "psnr_db": round(mean_score(score["psnr_db"] for score in found).mean, 4),
        "ssim": round(mean_score(score["ssim"] for score in found).mean, 5),
        "protocol": SET5_X4.identifier,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown; what was not measured says why."""
    titles = (
        "method",
        "input",
        "output",
        "parameters",
        "GMAC",
        "precision",
        "s",
        "s/Mpx",
        "peak MiB",
        "PSNR Y, dB",
        "SSIM Y",
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        if "missing" in row:
            cells = [row["method"], f"not measured: {row['missing']}", *[""] * (len(titles) - 2)]
        else:
            cells = [
                row["method"],
                *(" x ".join(map(str, row[side])) for side in ("input", "output")),
                f"{row['parameters']:,}" if "parameters" in row else "-",
                f"{row['gmac']:.1f}" if "gmac" in row else "-",
                row.get("precision", "-"),
                f"{row['seconds']:.3f}",
                f"{row['seconds_per_megapixel']:.2f}",
                "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                f"{row['psnr_db']:.2f}",
                f"{row['ssim']:.4f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def precision_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What bfloat16 changes, in Markdown."""
    lines = ["| network | mean, grey levels | largest, grey levels | PSNR Y, dB |", "|---|---|---|---|"]
    lines += [
        f"| {row['method']} | {row['bfloat16_mean_grey_levels']:.2f} | {row['bfloat16_largest_grey_levels']:.1f} "
        f"| {row['bfloat16_psnr_db']:+.3f} |"
        for row in rows
        if "bfloat16_psnr_db" in row
    ]
    return "\n".join(lines)


def picture(
    names: Sequence[str], sharp: Mapping[str, Tensor], results: Mapping[str, Mapping[str, Tensor]]
) -> Figure:
    """Truth and results side by side, a row for each image, and below each the same detail."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = {"truth": sharp, **results}
    figure = Figure(figsize=(2.6 * len(columns), 5.6 * len(names)), facecolor="white", layout="constrained")
    axes = figure.subplots(2 * len(names), len(columns), squeeze=False)
    for number, name in enumerate(names):
        height, width = sharp[name].shape[-2:]
        row, column, share = INSETS[name]
        side = int(share * min(height, width))
        top, left = int(row * height) - side // 2, int(column * width) - side // 2
        for place, (method, images) in enumerate(columns.items()):
            whole, detail = axes[2 * number, place], axes[2 * number + 1, place]
            pixels = round_to_8_bits(images[name]).permute(1, 2, 0).numpy()
            for axis, values in ((whole, pixels), (detail, pixels[top : top + side, left : left + side])):
                axis.set_axis_off()
                axis.imshow(values, vmin=0, vmax=1, interpolation="nearest")
            frame = Rectangle((left, top), side, side, fill=False, edgecolor="#56B4E9", linewidth=1)
            whole.add_patch(frame)
            score = SET5_X4.score(images[name], sharp[name])
            title = method if images is sharp else f"{method}: {score['psnr_db']:.2f} dB"
            whole.set_title(title, fontsize=10)
    return figure


def literature_bicubic(sharp: Mapping[str, Tensor]) -> tuple[float, float]:
    """PSNR and SSIM of bicubic on the 8-bit luma alone, which the literature reports: says whether all is as there."""
    truth = {name: round_to_8_bits(luma(image.double())) for name, image in sharp.items()}
    results = {
        name: bicubic_resize(BicubicDownsample(SCALE)(image), (image.shape[-2], image.shape[-1]))
        for name, image in truth.items()
    }
    found = scores(results, truth)
    return found["psnr_db"], found["ssim"]


def read_sharp(path: str) -> Tensor:
    """An image as ``(3, H, W)``, its sides multiples of the scale."""
    return modcrop(torch.from_numpy(read_image(path).values), SCALE).expand(3, -1, -1)


def _bound(restore: Restore, image: Tensor) -> Callable[[], object]:
    return lambda: restore(image)


def _size(network: nn.Module) -> dict[str, Any]:
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "gmac": round(giga_multiplications(network, 1, 3, 256, 256), 2),
    }


def _page(rows: Sequence[Mapping[str, Any]], sharp: Mapping[str, Tensor], *, rounds: int, timed: str) -> str:
    head = HEAD.format(
        names=", ".join(sharp),
        scale=SCALE,
        degradation=DEGRADATION,
        protocol=SET5_X4.identifier,
        literature="{:.2f} dB / {:.4f}".format(*literature_bicubic(sharp)),
        rounds=rounds,
        threads=torch.get_num_threads(),
        machine=platform.processor() or platform.machine(),
        torch=torch.__version__,
        timed=timed,
        bfloat16="yes" if native_bfloat16("cpu") else "no",
    )
    return f"{head}{table(rows)}\n{PRECISION_HEAD}{precision_table(rows)}\n"


if __name__ == "__main__":
    main()
