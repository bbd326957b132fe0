"""The two functions that MONAI Label imports by name; bundles never call them."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["make_grid", "save_image"]


def make_grid(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: it tiles the images of DeepEdit's training log."""
    raise NotImplementedError("make_grid needs torchvision: install the build that belongs to your torch")


def save_image(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: it writes debug images of 2D predictions."""
    raise NotImplementedError("save_image needs torchvision: install the build that belongs to your torch")
