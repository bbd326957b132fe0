"""How a super-resolved 2D image is written and described: with the encoding of its input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.transforms.bicubic import bicubic_resize

__all__ = ["image_facts", "pair_facts", "write_result"]

_UNCERTAINTY = ImageEncoding("PNG", 16, 1, span=1.0)
"""65535 stands for a standard deviation of 1, the whole intensity range."""


def write_result(path: Path, image: Any, item: Mapping[str, Any]) -> None:
    """Write a result of an item: the image as its input was encoded, the uncertainty in 16 bits of grey.

    Bit depth, colour profile and alpha channel (enlarged by bicubic interpolation) are those of the input; a
    resolution in dots per inch is multiplied by the scale.

    Args:
        path: target.
        image: ``(C, H, W)`` in [0, 1].
        item: the postprocessed item that holds it; ``image`` is the input with the metadata of its reader.

    Raises:
        OutputError: if a value is not finite or the file cannot be written whole.
    """
    values = _plain(image)
    if any(image is one for key, one in item.items() if key.startswith("uncertainty")):
        write_image(path, values.numpy(), _UNCERTAINTY)
        return
    source = item["image"]
    encoding = ImageEncoding.from_meta(source.meta).magnified(values.shape[-1] / source.shape[-1])
    alpha = item.get("image_alpha")
    enlarged = None
    if alpha is not None:
        size = (values.shape[-2], values.shape[-1])
        enlarged = bicubic_resize(_plain(alpha).float(), size).clamp(0, 1).numpy()
    write_image(path, values.numpy(), encoding, alpha=enlarged)


def image_facts(item: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes (rows, columns) and bit depth of a processed image, for the report."""
    source, pred = item["image"], item["pred"]
    encoding = ImageEncoding.from_meta(source.meta)
    return {
        "input_size": [int(n) for n in np.asarray(source.shape[1:])],
        "output_size": [int(n) for n in np.asarray(pred.shape[1:])],
        "bits": encoding.bits,
        "channels": encoding.channels,
    }


def pair_facts(item: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`image_facts` of both views alike, and how their rows lie to each other, for the report.

    ``row_offset_px`` was removed, ``row_residual_px`` is left, ``disparity_px`` is the median; all in pixels of the
    input. The last two are missing where the views have too little in common, see
    :class:`~medsr.transforms.stereo.AlignRowsd`.
    """
    meta = item["image"].meta
    keys = ("row_offset_px", "row_residual_px", "row_patches", "disparity_px")
    facts = {**image_facts(item), **{key: round(float(meta[key]), 2) for key in keys if key in meta}}
    # Rows without a counterpart were cut off.
    facts["input_size"][0] += abs(round(facts.get("row_offset_px", 0)))
    return facts


def _plain(image: Any) -> Tensor:
    values: Tensor = image.as_tensor() if hasattr(image, "as_tensor") else image
    # A large result stays in half precision until it is rounded.
    return values.detach().cpu()
