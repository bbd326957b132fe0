"""Weights of another origin: read strictly and safely, and turned into those for grey images or another scale."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsr.errors import WeightsError

__all__ = ["as_grey", "at_scale", "load_checkpoint", "read_state", "rename_tensors"]

_HOLDERS = ("params_ema", "params", "state_dict", "model")
"""Keys under which training code keeps the state dict, the average of the weights first."""


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The plain state dict that a file of ours holds: tensors by name, and nothing else.

    Raises:
        WeightsError: if the file is missing, cannot be read safely or holds anything else.

    Example:
        >>> read_state("none.pt")
        Traceback (most recent call last):
        medsr.errors.WeightsError: none.pt: no such weight file; give the path of one
    """
    found = _read(Path(file))
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{Path(file).name}: not a plain state dict; save network.state_dict()")
    return {str(name): value for name, value in found.items()}


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
        medsr.errors.WeightsError: none.pth: no such weight file; give the path of one
    """
    found = _read(file)
    for key in _HOLDERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise WeightsError(f"{file.name}: holds no state dict, all tensors are missing")
    strange = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(f"{file.name}: '{strange[0]}' is no tensor: not {kind}")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _read(file: Path) -> Any:
    if file.is_dir():
        raise WeightsError(f"{file.name}: a folder; give the path of a weight file in it")
    if not file.is_file():
        raise WeightsError(f"{file.name}: no such weight file; give the path of one")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{file.name}: cannot be read ({error.strerror})") from None
    except Exception as error:
        raise WeightsError(f"{file.name}: damaged or not plain weights ({type(error).__name__})") from None


def as_grey(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network from colour images to colour images for the same network of grey ones.

    What reads three channels gets the sum of its weights, what writes them their mean: the grey result is the mean of
    the three that the colour network gives of three equal channels. Tensors of other shapes stay as they are.

    Args:
        state: tensors of the colour network by name.
        wanted: tensors of the grey network, whose shapes count.

    Example:
        >>> colour = {"head": torch.ones(4, 3, 1, 1), "tail": torch.ones(6, 4, 1, 1)}
        >>> grey = {"head": torch.zeros(4, 1, 1, 1), "tail": torch.zeros(2, 4, 1, 1)}
        >>> {name: (tuple(one.shape), one.max().item()) for name, one in as_grey(colour, grey).items()}
        {'head': ((4, 1, 1, 1), 3.0), 'tail': ((2, 4, 1, 1), 1.0)}
    """
    found = dict(state)
    for name, tensor in state.items():
        shape = wanted[name].shape if name in wanted else tensor.shape
        if tensor.ndim < 1 or tensor.ndim != len(shape):
            continue
        if tensor.ndim > 1 and tensor.shape[1] == 3 and shape == (tensor.shape[0], 1, *tensor.shape[2:]):
            found[name] = tensor.sum(1, keepdim=True)
        elif tensor.shape == (3 * shape[0], *shape[1:]):
            found[name] = tensor.unflatten(0, (3, -1)).mean(0)
    return found


def at_scale(tensor: Tensor, shape: Sequence[int], scale: int) -> Tensor:
    """Weight or bias in front of a pixel shuffle for another scale, where one scale is a multiple of the other.

    A larger result is the smaller one with every pixel repeated, a smaller one the mean of the larger: a better start
    than any new last layer. For all other scales the tensor stays as it is.

    Args:
        tensor: ``(channels * old**2, ...)``.
        shape: shape that is wanted, ``(channels * scale**2, ...)``.
        scale: the new one.

    Example:
        >>> at_scale(torch.tensor([1.0, 3.0, 5.0, 7.0]), (1,), 1)
        tensor([4.])
        >>> at_scale(torch.tensor([1.0]), (4,), 2)
        tensor([1., 1., 1., 1.])
    """
    channels = shape[0] // scale**2
    old = math.isqrt(tensor.shape[0] // channels)
    if tensor.shape[1:] != tuple(shape[1:]) or tensor.shape[0] != channels * old**2:
        return tensor
    pixels = tensor.unflatten(0, (channels, old, old))
    if scale % old == 0:
        times = scale // old
        return pixels.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(0, 2)
    if old % scale == 0:
        side = old // scale
        return pixels.unflatten(2, (scale, side)).unflatten(1, (scale, side)).mean((2, 4)).flatten(0, 2)
    return tensor


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
