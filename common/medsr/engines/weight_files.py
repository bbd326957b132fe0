"""Weight files that fit a network: checked and loaded, or refused with one line that tells what is wrong."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from medsr import catalog
from medsr.engines.runner import one_line_errors
from medsr.errors import SettingError, WeightsError
from medsr.networks.checkpoints import read_state

__all__ = ["check_weights", "compared_weights", "load_weights", "named_networks"]

_log = logging.getLogger(__name__)

_METHODS = {"bicubic", "lanczos", "perfect thick mask", "sharp"}
"""Names that the tables of evaluations have for what is no network."""


@one_line_errors
def check_weights(path: str | Path | None, network: nn.Module) -> None:
    """Say in one line why a weight file cannot be used: missing, damaged, or made for another network.

    A digest in ``SHA256SUMS`` beside the file is compared: one flipped bit loads without a complaint. Tensors that a
    network names in ``told_tensors`` say what weights were trained for where their shapes do not, such as the scale:
    they must be equal. Files without them are taken at the word of the settings, with a warning.

    Args:
        path: plain state dict.
        network: what it is to fill, tensor by tensor.
    """
    _fitting_state(path, network)


@one_line_errors
def load_weights(path: str | Path, network: nn.Module) -> nn.Module:
    """Check a weight file as :func:`check_weights` does, load it, and return the network."""
    network.load_state_dict(_fitting_state(path, network))
    return network


def _fitting_state(path: str | Path | None, network: nn.Module) -> dict[str, Tensor]:
    if path is None or not str(path):
        raise WeightsError("no weights: set --weights to a file that was trained for this network")
    if not isinstance(path, (str, Path)):
        raise SettingError(f"weights must be a path, got {path!r}")
    file = Path(path)
    if not file.is_file():
        # The last folder tells the sets of a bundle apart, of which some are only for users to train.
        named = "/".join(file.parts[-2:])
        found = "a folder, no weight file" if file.is_dir() else "no such weight file"
        raise WeightsError(f"{named}: {found}; give the path of one")
    if file.parent.name == "models":
        catalog.verify_weights(file.parent.parent, f"models/{file.name}")
    elif (file.parent / "SHA256SUMS").exists() and file.name in catalog.listed_digests(file.parent):
        catalog.verify_weights(file.parent, file.name)
    state, wanted = read_state(file), network.state_dict()
    told = tuple(getattr(network, "told_tensors", ()))
    for key in told:
        if key not in state:
            _log.warning("%s does not tell its %s: taken for %s", file.name, _word(key), wanted[key].item())
            state[key] = wanted[key]
    if set(state) != set(wanted):
        raise WeightsError(
            f"{file.name}: made for another network; give the settings of its training (see train_record.json beside "
            "it, if there is one), such as scale, width or patch_size, or its overlay"
        )
    wrong = [key for key in wanted if state[key].shape != wanted[key].shape]
    if wrong:
        raise WeightsError(
            f"{file.name}: '{wrong[0]}' has shape {tuple(state[wrong[0]].shape)}, this network needs "
            f"{tuple(wanted[wrong[0]].shape)}; give the settings of its training, such as scale and width"
        )
    for key in told:
        if not torch.equal(state[key], wanted[key].to(state[key])):
            raise WeightsError(
                f"{file.name}: trained for {_word(key)} {state[key].item()}, and this network has "
                f"{wanted[key].item()}; give the settings of its training, or weights for this {_word(key)}"
            )
    return state


def _word(key: str) -> str:
    """What a tensor tells of, as a setting is called."""
    return key.removeprefix("trained_")


@one_line_errors
def named_networks(network: nn.Module, weights: Mapping[str, str | Path]) -> dict[str, nn.Module]:
    """Copies of a network with the weights of several trainings.

    Raises:
        WeightsError: if a file does not fit.
        SettingError: for a name that a table has for something else.

    Example:
        >>> named_networks(nn.Linear(1, 1), {})
        {}
    """
    taken = sorted(_METHODS & weights.keys())
    if taken:
        raise SettingError(
            f"'{taken[0]}' is the name of what networks are compared with; choose another name"
        )
    return {name: load_weights(path, copy.deepcopy(network)).eval() for name, path in weights.items()}


@one_line_errors
def compared_weights(weights: str | Path, others: Mapping[str, str | Path]) -> dict[str, str | Path]:
    """Weights of a bundle, called ``network`` in tables, before those that they are compared with.

    Raises:
        SettingError: if others have that name.

    Example:
        >>> compared_weights("models/model.pt", {"longer": "runs/train/model.pt"})
        {'network': 'models/model.pt', 'longer': 'runs/train/model.pt'}
    """
    if "network" in others:
        raise SettingError("compare: 'network' is the name of weights; choose another name")
    return {"network": weights, **others}
