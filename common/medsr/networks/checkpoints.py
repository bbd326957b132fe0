"""Reading weights that others have published, strictly and safely."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsr.errors import WeightsError

__all__ = ["load_checkpoint", "rename_tensors"]

_HOLDERS = ("params_ema", "params", "state_dict", "model")
"""Keys under which training code keeps the state dict, the average of the weights first."""


def load_checkpoint(file: Path, *, kind: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their names, without the prefix of a data-parallel wrapper.

    Args:
        file: a state dict, or a dict that holds it as ``params_ema``, ``params``, ``state_dict`` or ``model``.
        kind: what the file should be, for the message.

    Raises:
        WeightsError: if the file cannot be read safely or holds anything but tensors.

    Example:
        >>> load_checkpoint(Path("none.pth"), kind="a checkpoint")
        Traceback (most recent call last):
        medsr.errors.WeightsError: none.pth: cannot be read as plain weights (FileNotFoundError)
    """
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"{file.name}: cannot be read as plain weights ({type(error).__name__})") from None
    for key in _HOLDERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise WeightsError(f"{file.name}: holds no state dict, all tensors are missing")
    strange = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(f"{file.name}: '{strange[0]}' is no tensor: not {kind}")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def rename_tensors(
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    targets: Mapping[str, Tensor],
    *,
    file: Path,
    kind: str,
) -> OrderedDict[str, Tensor]:
    """Give published tensors our names; each must be known, of the right shape, and there.

    Args:
        state: tensors of the file.
        names: their names to ours.
        targets: our tensors, whose shapes and types count.
        file: for the messages.
        kind: what the file should be, for the messages.

    Raises:
        WeightsError: if a tensor is missing, unknown or of another shape.

    Example:
        >>> weight = torch.ones(2)
        >>> list(rename_tensors({"a": weight}, {"a": "b"}, {"b": weight}, file=Path("x"), kind="it"))
        ['b']
    """
    converted: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in state.items():
        ours = names.get(name)
        if ours is None:
            raise WeightsError(f"{file.name}: unexpected tensor '{name}': not {kind}")
        if targets[ours].shape != value.shape:
            raise WeightsError(
                f"{file.name}: tensor '{name}' has shape {tuple(value.shape)}, expected {tuple(targets[ours].shape)}"
            )
        converted[ours] = value.to(targets[ours].dtype)
    missing = [name for name, ours in names.items() if ours not in converted]
    if missing:
        raise WeightsError(f"{file.name}: {len(missing)} tensors are missing, the first is '{missing[0]}'")
    return converted
