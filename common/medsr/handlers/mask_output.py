"""How the classes of a frame are written and described: an index for programs, an overlay for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsr.handlers.image_output import image_facts, pair_facts, write_result
from medsr.handlers.qc_frame import area_shares, class_overlay
from medsr.handlers.qc_image import plain
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image

__all__ = ["frame_facts", "segmented_pair_facts", "write_frame_result"]

_INDEX, _COLOUR = ImageEncoding("PNG", 8, 1), ImageEncoding("PNG", 8, 3)


def write_frame_result(path: Path, image: Any, item: Mapping[str, Any]) -> None:
    """Write a result of a segmented frame: class indices as grey levels, an overlay in colour, or an enlarged view.

    Class indices 0, 1, 2, ... are the grey levels of an 8-bit PNG: almost black to the eye, exact to every program.
    The same mask under the key ``overlay`` is drawn over the input. An image in floating-point numbers is written as
    by :func:`~medsr.handlers.image_output.write_result`.

    Args:
        path: target.
        image: ``(1, H, W)`` class indices as integers up to 255, or ``(C, H, W)`` in [0, 1].
        item: the postprocessed item that holds it; ``image`` is the input with the metadata of its reader.

    Raises:
        OutputError: if a value is not finite or the file cannot be written whole.
    """
    values = plain(image)
    if values.is_floating_point():
        write_result(path, image, item)
    elif image is item.get("overlay"):
        write_image(path, class_overlay(item["image"], values).numpy(), _COLOUR)
    else:
        write_image(path, (values / 255).numpy(), _INDEX)


def frame_facts(item: Mapping[str, Any], *, classes: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a segmented frame and the share of it that each class covers, for the report.

    Args:
        item: the postprocessed item; ``pred`` holds the class indices.
        classes: names in order of the index, or what has them as keys.
    """
    return {**image_facts(item), "area_share": area_shares(item["pred"], classes)}


def segmented_pair_facts(
    item: Mapping[str, Any], *, classes: Sequence[str] | Mapping[str, Any]
) -> dict[str, Any]:
    """What :func:`~medsr.handlers.image_output.pair_facts` says of an enlarged pair, and the area shares of its views.

    Args:
        item: the postprocessed item; ``superres`` is the pair, ``seg_left`` and ``seg_right`` hold the class indices.
        classes: names in order of the index, or what has them as keys.
    """
    shares = {f"area_share_{side}": area_shares(item[f"seg_{side}"], classes) for side in ("left", "right")}
    return {**pair_facts({**item, "pred": item["superres"]}), **shares}
