"""Sharpen a stereo pair, in seconds, without a download.

The pair that ships inside scikit-image is the truth; the bundle's command gets a quarter of its pixels along each axis.
It shows a motorcycle, which no endoscope has seen: the pairs of endoscopes are in ``docs/results-stereo.md``.
"""

from __future__ import annotations

import warnings

import numpy as np
from bundle_command import ROOT, print_files, print_scores, run_bundle

OUTPUT = ROOT / "demo"
CASE = "motorcycle_small"
VIEWS = ("left", "right")
RESULTS = (*(f"{CASE}_{view}_superres.png" for view in VIEWS), f"{CASE}_qc.png")
SCALE = 4


def main() -> None:
    """Make both views small, run the bundle, compare with bicubic interpolation."""
    import torch
    from medsr.io.image_encoding import ImageEncoding
    from medsr.io.image_writing import write_image
    from medsr.io.images import read_image
    from medsr.io.writing import probe_folder
    from medsr.metrics.image import ImageProtocol
    from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize, modcrop

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from skimage.data import stereo_motorcycle

        photographs = stereo_motorcycle()[:2]
    truth = [modcrop(torch.from_numpy(np.float32(p) / 255).permute(2, 0, 1), SCALE) for p in photographs]
    small = [BicubicDownsample(SCALE, rounding="end")(view) for view in truth]
    folder = probe_folder(OUTPUT / "input_stereo")
    for view, values in zip(VIEWS, small, strict=True):
        write_image(folder / f"{CASE}_{view}.png", values.numpy(), ImageEncoding("PNG", 8, 3))
    print(f"input: {folder / f'{CASE}_*.png'}: 2 x {small[0].shape[2]} x {small[0].shape[1]} pixels")

    out = probe_folder(OUTPUT / "stereo")
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    seconds = run_bundle("endoscopy_segsrnet_superres", folder, out)

    protocol = ImageProtocol()
    size = (truth[0].shape[1], truth[0].shape[2])
    results = {
        "bicubic interpolation": [bicubic_resize(view, size).clamp(0, 1) for view in small],
        "bundle": [read_image(out / name).values for name in RESULTS[:2]],
    }
    print(f"\nagainst the pair, {protocol.identifier}, mean of both views ({seconds:.0f} s in all):")
    print_scores(protocol, results, truth)
    print_files(out, RESULTS)


if __name__ == "__main__":
    main()
