"""Small steps of a training run that a config names: seeds, the list of training volumes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from medsr.errors import DataError
from medsr.io.cases import find_cases
from medsr.io.dicom import is_dicom_series

__all__ = ["seed_everything", "training_items"]


def seed_everything(seed: int) -> int:
    """Seed Python, NumPy and PyTorch, and return the seed for the record.

    Runs are equal on one thread; the number of threads changes sums in the last bits. ``monai.utils.set_determinism``
    was considered: it also forbids the fast convolution kernels.

    Example:
        >>> seed_everything(0)
        0
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - MONAI's random transforms draw from the legacy generator
    torch.manual_seed(seed)
    return seed


def training_items(
    folder: str | Path, patterns: Sequence[str] = ("**/*.nii", "**/*.nii.gz")
) -> list[dict[str, str]]:
    """List the volumes of a training folder as ``{"image": path}``: files by pattern, DICOM series by folder.

    Unlike cases of an inference, several volumes may share a file name.

    Args:
        folder: folder with the volumes, or one file.
        patterns: file patterns below it, or names of sub-folders that are DICOM series.

    Raises:
        DataError: if a pattern matches nothing: a misspelt name must not shrink the training set in silence.
    """
    root = Path(folder).expanduser()
    if root.is_file() or is_dicom_series(root):
        return [{"image": item["image"], "weight": 1.0} for item in find_cases(root)]
    if not root.is_dir():
        raise DataError(f"{root.name or folder}: no such training folder; set --dataset_dir")
    weights = patterns if isinstance(patterns, Mapping) else dict.fromkeys(patterns, 1.0)
    found: dict[str, float] = {}
    unmatched = []
    for pattern, weight in weights.items():
        matches = sorted(p for p in root.glob(pattern) if p.is_file() or is_dicom_series(p))
        found.update(dict.fromkeys((str(p.absolute()) for p in matches), float(weight)))
        if not matches:
            unmatched.append(pattern)
    if not found or (unmatched and not any("*" in p for p in unmatched)):
        raise DataError(f"{root.name}: no volume matches '{unmatched[0]}'")
    return [{"image": path, "weight": weight} for path, weight in found.items()]
