"""Sharpen a photograph of the retina, in a minute, without a download.

The photograph that ships inside scikit-image has more pixels than optical detail. It is halved first: that is the
truth. A quarter of that is what the bundle's command gets.
"""

from __future__ import annotations

import warnings

import numpy as np
from bundle_command import ROOT, print_files, print_scores, run_bundle

OUTPUT = ROOT / "demo"
CASE = "retina_small"
RESULTS = (f"{CASE}_superres.png", f"{CASE}_qc.png")
SCALE, SIDE = 4, 704


def main() -> None:
    """Make it small, run the bundle, compare with bicubic interpolation."""
    import torch
    from medsr.io.image_encoding import ImageEncoding
    from medsr.io.image_writing import write_image
    from medsr.io.images import read_image
    from medsr.io.writing import probe_folder
    from medsr.metrics.image import ImageProtocol
    from medsr.transforms.bicubic import BicubicDownsample, bicubic_resize
    from medsr.transforms.field_of_view import field_of_view

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from skimage.data import retina

        photograph = torch.from_numpy(np.float32(retina()) / 255).permute(2, 0, 1)
    truth = bicubic_resize(photograph, (SIDE, SIDE)).clamp(0, 1)
    small = BicubicDownsample(SCALE, rounding="end")(truth)
    folder = probe_folder(OUTPUT / "input_retina")
    write_image(folder / f"{CASE}.png", small.numpy(), ImageEncoding("PNG", 8, 3))
    print(f"input: {folder / f'{CASE}.png'}: {small.shape[2]} x {small.shape[1]} pixels")

    out = probe_folder(OUTPUT / "retina")
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    seconds = run_bundle("retina_segan_superres", folder, out)

    protocol, mask = ImageProtocol(mask="fov"), field_of_view(truth)
    results = {
        "bicubic interpolation": [bicubic_resize(small, (SIDE, SIDE)).clamp(0, 1)],
        "bundle": [read_image(out / RESULTS[0]).values],
    }
    print(f"\nagainst the photograph at {SIDE} pixels, {protocol.identifier} ({seconds:.0f} s in all):")
    print_scores(protocol, results, [truth], mask)
    print_files(out, RESULTS)


if __name__ == "__main__":
    main()
