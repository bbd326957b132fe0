"""Small steps of a training run that a config names: seeds, the lists of training data, initial weights, processes."""

from __future__ import annotations

import inspect
import logging
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ReferenceResolver
from monai.data import CacheDataset
from torch import Tensor, nn

from medsr.engines.runner import one_line_errors
from medsr.errors import DataError, SettingError, WeightsError
from medsr.io.cases import find_cases, refuse_marked
from medsr.io.dicom import is_dicom_series
from medsr.io.stereo import find_stereo_cases
from medsr.networks.checkpoints import as_grey, at_scale, read_state
from medsr.settings import as_number

_log = logging.getLogger(__name__)

__all__ = [
    "CachedDataset",
    "blur_widths",
    "distributed",
    "end_process_group",
    "pair_items",
    "rank",
    "resolved_config",
    "seed_everything",
    "start_from",
    "start_process_group",
    "training_items",
    "with_prior",
]


class CachedDataset(CacheDataset):
    """MONAI's ``CacheDataset``, filled without a thread.

    There a damaged file ends the program while the thread is at the next one, and every second time Python aborted
    (status 134) on the way out, after the line that says which file it was.

    Args:
        data: items.
        transform: what is deterministic of it is done once for each item.
        **settings: as there; nothing for the threads.

    Example:
        >>> CachedDataset([1, 2], lambda number: 2 * number, progress=False)[1]
        4
    """

    def _fill_cache(self, indices: Sequence[int] | None = None) -> list[Any]:
        return [
            self._load_cache_item(index) for index in (range(self.cache_num) if indices is None else indices)
        ]


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


def resolved_config() -> Mapping[str, Any]:
    """What MONAI has made of the config so far, by id; to be called in an expression of that config.

    The mapping grows while the config is resolved. When a trainer calls its handlers, it holds all settings that the
    trainer was made of by reference; a value that stands inside a component is not among them. A list of settings in
    each config would miss the next one.

    Raises:
        SettingError: if it is not called by a config.

    Example:
        >>> resolved_config()
        Traceback (most recent call last):
        medsr.errors.SettingError: resolved_config() belongs into an expression of a config
    """
    caller = inspect.currentframe()
    names = caller.f_back.f_globals if caller and caller.f_back else {}
    # MONAI replaces a reference in an expression by a look-up in this mapping.
    if ReferenceResolver._vars not in names:
        raise SettingError("resolved_config() belongs into an expression of a config")
    found: Mapping[str, Any] = names[ReferenceResolver._vars]
    return found


def training_items(
    folder: str | Path, patterns: Sequence[str] | Mapping[str, float] = ("**/*.nii", "**/*.nii.gz")
) -> list[dict[str, str | float]]:
    """List the volumes of a training folder by path and weight: files by pattern, DICOM series by folder.

    Unlike cases of an inference, several volumes may share a file name.

    Args:
        folder: folder with the volumes, or one file.
        patterns: file patterns below it, or names of sub-folders that are DICOM series; or a mapping of these to the
            weights of their volumes, where the last pattern that matches a volume counts. Default weight: 1.

    Returns:
        items ``{"image": path, "weight": how often it is drawn, relative to the others}``.

    Raises:
        DataError: if the folder is not there, nothing matches, or a name without a wildcard does not: a misspelt name
            must not shrink the training set in silence.

    Example:
        >>> training_items("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such training folder; set --dataset_dir
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
    misspelt = [pattern for pattern in unmatched if "*" not in pattern]
    if misspelt or not found:
        raise DataError(f"{root.name}: no volume matches '{(misspelt or unmatched)[0]}'")
    return [{"image": path, "weight": weight} for path, weight in found.items()]


@one_line_errors
def pair_items(sources: str | Path | Sequence[str | Path], key: str = "label") -> list[dict[str, str]]:
    """List the stereo pairs of a training folder as ``{key: left, f"{key}_right": right}``.

    Single images lack the right view; :class:`~medsr.transforms.stereo.JoinViewsd` takes them for both. Several
    folders may hold pairs of one name, unlike the cases of an inference.

    Args:
        sources: a folder as :func:`medsr.io.stereo.find_stereo_cases` takes it, or a list of such.
        key: where the left view goes.

    Raises:
        DataError: if there is no image, or a view has no partner: the training set must not shrink in silence.

    Example:
        >>> pair_items("no-such-folder")
        Traceback (most recent call last):
        SystemExit: 2
    """
    if not sources:
        raise DataError("no training pairs: set --dataset_dir to a folder of pairs, or a list of folders")
    folders = [sources] if isinstance(sources, (str, Path)) else sources
    found = refuse_marked([item for folder in folders for item in find_stereo_cases(folder)])
    names = {"image": key, "image_right": f"{key}_right"}
    return [{names[name]: item[name] for name in names if name in item} for item in found]


@one_line_errors
def blur_widths(largest: float) -> tuple[float, float]:
    """Range of the standard deviations, in pixels, with which a training blurs its crops.

    Args:
        largest: 0 for none.

    Raises:
        SettingError: if it is negative.

    Example:
        >>> blur_widths(1.5)
        (0.0, 1.5)
    """
    widest = as_number("blur", largest)
    if widest < 0:
        raise SettingError(f"blur must be >= 0, got {widest:g}")
    return 0.0, widest


@one_line_errors
def start_from(path: str | Path | None, network: nn.Module, prior: str | Path | None = None) -> nn.Module:
    """Load the initial weights, if any, before the average of the weights or other processes copy the network.

    Tensors of another head may be absent. A handler would load them when training starts: too late for the average,
    which would begin at random weights. A prior that comes with weights of its own is finished: it is kept as it is,
    so that it stays a good estimate by itself and can be adapted to a scan by itself. A network with labels may
    start from one without: until it is trained it treats the image as that one did, and ignores the labels. A network
    for grey images may start from weights for colour where it says so (``grey_from_colour``), see
    :func:`~medsr.networks.checkpoints.as_grey`. Tensors that a network names in ``subpixel_tensors`` are turned into
    those of its scale (:func:`~medsr.networks.checkpoints.at_scale`); what it names in ``task_tensors`` starts anew
    where the weights are of another scale yet, or of other classes.

    Args:
        path: plain state dict; None leaves the network as it is.
        network: gets the weights, and is returned.
        prior: plain state dict of ``network.prior``, or of :class:`~medsr.networks.plane_fusion.JoinedPlanes`, which
            brings ``network.fusion`` too; what it brings is then not trained.

    Raises:
        WeightsError: if a file cannot be read safely or does not fit.

    Example:
        >>> start_from(None, nn.Linear(2, 1)).in_features
        2
    """
    if path:
        _fill(network, read_state(path), Path(path).name)
    if prior:
        name = Path(prior).name
        if getattr(network, "prior", None) is None:
            raise WeightsError(f"{name}: this network has no prior; remove --prior_weights")
        state = read_state(prior)
        if any(key.startswith("fusion.") for key in state):
            if getattr(network, "fusion", None) is None:
                raise WeightsError(f"{name}: this network does not join planes; remove --prior_weights")
            _fill(network.fusion, _below("fusion.", state), name)
            network.fusion.requires_grad_(False)
            state = _below("prior.", state)
        _fill(network.prior, state, name)
        network.prior.requires_grad_(False)
    return network


def with_prior(network: nn.Module, prior: nn.Module) -> nn.Module:
    """Put a prior that is trained by itself in its place, so that the complete network is what is saved.

    Example:
        >>> network, prior = nn.Module(), nn.Linear(1, 1)
        >>> with_prior(network, prior).prior is prior
        True
    """
    network.prior = prior
    return network


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _fill(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    own = network.state_dict()
    unknown = [key for key in state if key not in own]
    if unknown:
        raise WeightsError(f"{name}: unknown tensor '{unknown[0]}'; made for another network")
    # What the weights become is for this network, whatever they were trained for.
    told = tuple(getattr(network, "told_tensors", ()))
    state = {key: tensor for key, tensor in state.items() if key not in told}
    if getattr(network, "label_classes", 0):
        state = {key: _with_zeros(tensor, own[key].shape) for key, tensor in state.items()}
    if getattr(network, "grey_from_colour", False) and network.in_channels == 1:
        state = as_grey(state, own)
    for key in getattr(network, "subpixel_tensors", ()):
        if key in state and state[key].shape != own[key].shape:
            state = {**state, key: at_scale(state[key], own[key].shape, network.scale)}
    wrong = [key for key in state if state[key].shape != own[key].shape]
    of_task = tuple(getattr(network, "task_tensors", ()))
    if wrong and all(key in of_task for key in wrong):
        state = {key: tensor for key, tensor in state.items() if key not in wrong}
    elif wrong:
        raise WeightsError(
            f"{name}: '{wrong[0]}' has another shape than in this network; check scale and widths"
        )
    network.load_state_dict(state, strict=False)
    _log.info("%s: %d tensors keep their initial values", name, len(own) - len(told) - len(state))


def _with_zeros(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Add zeros behind the axis that is longer in ``shape``: the channels of labels follow those of the image."""
    longer = [axis for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=False)) if new > old]
    if tensor.ndim != len(shape) or len(longer) != 1:
        return tensor
    size = list(tensor.shape)
    size[longer[0]] = shape[longer[0]] - tensor.shape[longer[0]]
    return torch.cat([tensor, tensor.new_zeros(size)], dim=longer[0])


def rank() -> int:
    """Rank of this process, 0 without ``torchrun``.

    Example:
        >>> rank()
        0
    """
    return int(os.environ.get("RANK", "0"))


def start_process_group() -> torch.device:
    """Join the processes that ``torchrun`` started and return this one's device: NCCL on GPUs, gloo on the CPU."""
    on_gpu = torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        told_by = sys.excepthook
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        # PyTorch's own keeps what is written until the hook before it returns, which ours does not.
        sys.excepthook = told_by
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local)
    return torch.device(f"cuda:{local}" if on_gpu else "cpu")


def end_process_group() -> None:
    """Leave the group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def distributed(
    network: nn.Module, device: torch.device, *, unused: bool = False, buffers: bool = True
) -> nn.Module:
    """Wrap a module so that gradients are averaged over the processes; alone, or without any, it stays as it is.

    Args:
        network: the module.
        device: of this process.
        unused: some parameters get no gradient, because the loss leaves out what they are for.
        buffers: those of the first process are given to all before each step.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> distributed(layer, torch.device("cpu")) is layer
        True
    """
    trained = any(parameter.requires_grad for parameter in network.parameters())
    if not trained or not torch.distributed.is_initialized():
        return network
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        network, device_ids=devices, find_unused_parameters=unused, broadcast_buffers=buffers
    )
