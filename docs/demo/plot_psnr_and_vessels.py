"""PSNR may rise while vessels vanish, because all pixels show noise and few pixels show vessels.

A photograph of the retina gets noise and is smoothed, more and more. PSNR counts the noise that leaves every pixel.
The filter that it likes best has taken a part of the thin vessels' contrast, and one that leaves hardly any of it
still beats the noisy image. A network trained for the smallest squared error smooths too, where it does not know.
"""

from __future__ import annotations

import numpy as np
import torch
from gallery import COLOURS, new_figure, panel, plot, save
from medsr.metrics.image import psnr
from medsr.transforms.bicubic import bicubic_resize
from medsr.transforms.field_of_view import field_of_view
from scipy.ndimage import binary_dilation, black_tophat, gaussian_filter
from skimage.data import retina

SIDE, NOISE, VIEW = 704, 0.04, (slice(150, 250), slice(260, 360))

photograph = torch.from_numpy(np.float32(retina()) / 255).permute(2, 0, 1)
colour = bicubic_resize(photograph, (SIDE, SIDE)).clamp(0, 1)
inside = field_of_view(colour, erosion=12).numpy()
truth = colour[1].numpy()  # green shows vessels best
noisy = truth + NOISE * np.random.default_rng(0).normal(size=truth.shape)

vessels = inside & (black_tophat(gaussian_filter(truth, 0.7), 7) > 0.05)
beside = inside & binary_dilation(vessels, iterations=5) & ~binary_dilation(vessels, iterations=2)
print(f"thin vessels: {100 * vessels[inside].mean():.1f} % of the field of view")


def contrast(image: np.ndarray) -> float:
    """How much darker thin vessels are than what lies beside them; a mean, so that noise cancels."""
    return float(image[beside].mean() - image[vessels].mean())


widths = np.arange(0, 6.01, 0.25)
results = [gaussian_filter(noisy, width) for width in widths]
quality = np.array([psnr(image[None], truth[None], mask=inside) for image in results])
left = np.array([100 * contrast(image) / contrast(truth) for image in results])
shown = [0, int(quality.argmax()), len(widths) - 1]

figure, (images, (upper, lower)) = new_figure(columns=4, below=2)
window = tuple(np.quantile(truth[VIEW], (0.001, 0.999)))
panel(images[0], truth[VIEW], "photograph", window=window)
for axes, k, name in zip(images[1:], shown, ("noisy", "best PSNR", "smoothed more"), strict=True):
    title = f"{name}: {quality[k]:.1f} dB,\n{left[k]:.0f} % of the vessels' contrast"
    panel(axes, results[k][VIEW], title, window=window)
    print(title.replace("\n", " "))
for axes, values, name, unit in (
    (upper, quality, "PSNR", "dB"),
    (lower, left, "contrast of thin vessels", "%"),
):
    axes.plot(widths, values, color=COLOURS[0])
    axes.plot(widths[shown], values[shown], "o", color=COLOURS[1], label="shown above")
    plot(axes, name, "standard deviation of the filter, pixels", unit)
lower.set_ylim(0, 105)
save(figure, "psnr_and_vessels.png")
