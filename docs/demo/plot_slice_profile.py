"""A thick slice dilutes a small lesion, and where the slices happen to lie matters as much as their thickness.

A ball of 2 mm is put into a phantom and acquired in slices of growing thickness, without gaps. What is left of its
contrast depends on the thickness, on the place of the slices, which nobody chooses, and least on the slice profile.
Super-resolution gets no more than these slices: the share that is lost can be guessed again, not measured.
"""

from __future__ import annotations

import numpy as np
from gallery import COLOURS, new_figure, panel, plot, save
from medsr.phantoms import head, sphere
from medsr.transforms.slice_profile import acquisition_matrix, fwhm_in_voxels

VOXEL_MM, DIAMETER_MM, VIEW_MM = 0.5, 2.0, 9.0
LESION = (60, 48, 45)  # voxel in the middle of the lesion
REACH = 36  # thin slices that are used above and below it


def acquire(
    volume: np.ndarray, width_mm: float, *, profile: str = "slr", between: bool = False
) -> np.ndarray:
    """Thick slices along the last axis; the lesion lies in the middle of one, or between two."""
    size, ratio = volume.shape[-1], width_mm / VOXEL_MM
    count = 2 * int((size / ratio - 2) / 2) + 1  # odd: one slice is in the middle
    phase, fwhm = between * ratio / 2, fwhm_in_voxels(width_mm, VOXEL_MM)
    return volume @ acquisition_matrix(size, count, ratio=ratio, fwhm=fwhm, profile=profile, phase=phase).T


head_only, affine = head(96, spacing_mm=VOXEL_MM)
centre, radius = affine[:3, :3] @ LESION + affine[:3, 3], DIAMETER_MM / 2
ball = sphere(head_only.shape, affine=affine, centre_mm=centre, radius_mm=radius, supersample=(4, 4, 4))
used = slice(LESION[2] - REACH, LESION[2] + REACH + 1)
ball, volume = ball[..., used], (head_only * (1 - ball) + 980 * ball)[..., used]

figure, (images, (left, right)) = new_figure(columns=4, below=2)
for axes, width, between in zip(images, (0, 2, 4, 4), (False, False, False, True), strict=True):
    slices = acquire(volume, width, between=between) if width else volume
    half, high, move = (
        volume.shape[0] * VOXEL_MM / 2,
        slices.shape[-1] * (width or VOXEL_MM) / 2,
        between * width / 2,
    )
    where = "between two" if between else "inside one"
    title = f"slices of {width} mm,\nlesion {where}" if width else f"truth, {VOXEL_MM} mm"
    extent = (-half - centre[0], half - centre[0], -high + move, high + move)
    panel(axes, slices[:, LESION[1]].T[::-1], title, window=(0, 980), extent=extent)
    axes.set(xlim=(-VIEW_MM, VIEW_MM), ylim=(-VIEW_MM, VIEW_MM), xlabel=f"{2 * VIEW_MM:g} mm")

widths = np.arange(1.0, 6.01, 0.25)
for between, style, name in ((False, "-", "inside one slice"), (True, ":", "between two slices")):
    shares = [100 * acquire(ball, width, between=between).max() for width in widths]
    left.plot(widths, shares, style, color=COLOURS[0], label=name)
    print(f"{name}:", ", ".join(f"{shares[k]:.0f} % at {widths[k]:g} mm" for k in (4, 12, 20)))
for profile, style, colour in zip(("slr", "box", "gaussian"), ("-", "--", "-"), COLOURS, strict=True):
    shares = [100 * acquire(ball, width, profile=profile).max() for width in widths]
    right.plot(widths, shares, style, color=colour, label=profile)
for axes, title in ((left, "by the place of the slices"), (right, "by the slice profile, inside one slice")):
    plot(axes, title, "slice thickness, mm", "contrast left, %")
    axes.set_ylim(0, 105)
save(figure, "slice_profile.png")
