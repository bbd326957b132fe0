"""Single-image networks on medical images, before and after they were trained on such images.

    python -m benchmarks.quality.medical [--data FOLDER] [--report docs/results-medical.md]

The images are the unseen ones of :mod:`benchmarks.quality.medical_folder`, made small in the run. A network for colour
gets each of them as three equal channels, as its bundle does, and the mean of its result counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from medsr import catalog
from medsr.engines.runner import one_line_errors
from medsr.export import bundle_network
from medsr.inferers.image_superres import ImageSuperResInferer
from medsr.io.images import find_images, read_image
from medsr.metrics.image import ImageProtocol, mean_score
from medsr.networks.layout import channels_last
from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize, modcrop
from torch import Tensor

from benchmarks.quality import medical_folder

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

Written by `python -m benchmarks.quality.medical`. Grey images, x{scale}: {counts}. None of the
eyes, scenes and volumes was seen in training. They are few, and show nothing clinical. Low resolution: MATLAB-style
antialiased bicubic, rounded to 8 bits at the end. PSNR in dB and SSIM, means over the images; `all` is the mean over
the kinds. Protocol: `{protocol}`.

`medical` is the network for grey images that was trained on from the other weights on images of the three kinds, for as
many minutes as the others; the weights without this word learnt from photographs, and get the image as three equal
channels.

"""

Restore = Callable[[Tensor], Tensor]


def main() -> None:
    """Print the table, and write the page if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MEDSR_DATA", "../shared/data")))
    parser.add_argument("--report", type=Path, default=None)
    one_line_errors(compare)(**vars(parser.parse_args()))


def compare(*, data: Path, report: Path | None) -> list[dict[str, Any]]:
    """Measure all methods on the test images."""
    with tempfile.TemporaryDirectory() as folder:
        medical_folder.write_part("test", Path(folder), data)
        sharp = {case["case"]: _read(case["image"]) for case in find_images(folder)}
    degrade = BicubicDownsample(SCALE, rounding="end")
    low = {name: degrade(image) for name, image in sharp.items()}
    rows = []
    for method, restore in {"bicubic": _bicubic, **{name: restorer(name) for name in METHODS}}.items():
        found = {name: PROTOCOL.score(restore(image), sharp[name]) for name, image in low.items()}
        for kind, scores in _by_kind(found).items():
            means = {key: mean_score(score[key] for score in scores).mean for key in ("psnr_db", "ssim")}
            rows.append({"method": method, "kind": kind, "images": len(scores), **means})
            print(f"{method:18s} {kind:10s} {means['psnr_db']:.2f} dB {means['ssim']:.4f}")
    if report is not None:
        report.write_text(page(rows), encoding="utf-8")
    return rows


def restorer(method: str) -> Restore:
    """Function from a coarse grey image ``(1, H, W)`` to a fine one, with the network of a method."""
    name, overlays = METHODS[method]
    root = catalog.bundle_root(name)
    network = channels_last(bundle_network(root, [root / "configs" / overlay for overlay in overlays])[0])
    infer = ImageSuperResInferer()
    return lambda image: infer(image[None], network)[0]


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as a page, a column for each kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    counts = {row["kind"]: row["images"] for row in rows}
    head = HEAD.format(
        scale=SCALE,
        counts=", ".join(f"{counts[kind]} of {kind}" for kind in kinds),
        protocol=PROTOCOL.identifier,
    )
    lines = ["| method | " + " | ".join([*kinds, "all"]) + " |", "|---" * (len(kinds) + 2) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        means = [sum(row[key] for row in own) / len(own) for key in ("psnr_db", "ssim")]
        pairs = [*((row["psnr_db"], row["ssim"]) for row in own), tuple(means)]
        lines.append(f"| {method} | " + " | ".join(f"{psnr:.2f}, {ssim:.4f}" for psnr, ssim in pairs) + " |")
    return head + "\n".join(lines) + "\n"


def _by_kind(scores: Mapping[str, Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, score in scores.items():
        found.setdefault(name.partition("-")[0], []).append(score)
    return found


def _bicubic(image: Tensor) -> Tensor:
    return bicubic_resize(image, (SCALE * image.shape[-2], SCALE * image.shape[-1]))


def _read(path: str) -> Tensor:
    return modcrop(torch.from_numpy(read_image(path).values), SCALE)


if __name__ == "__main__":
    main()
