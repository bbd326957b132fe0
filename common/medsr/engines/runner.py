"""What a config's ``run`` calls around an engine: checks before anything is loaded, and an honest exit status."""

from __future__ import annotations

import copy
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from math import prod
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from medsr import catalog
from medsr.errors import DataError, MedsrError, OutputError, SettingError, WeightsError, first_of_ours
from medsr.geometry import refinement_ratio, rescaled_size, slice_axis
from medsr.handlers.case_output import RunReport
from medsr.io.cases import find_cases, inspect_case
from medsr.io.images import find_images, read_image_header
from medsr.io.nifti import VolumeHeader, refuse_beyond_memory
from medsr.io.stereo import find_stereo_cases
from medsr.io.writing import probe_folder
from medsr.networks.checkpoints import read_state
from medsr.overrides import check_overrides, overrides_in
from medsr.settings import as_number
from medsr.transforms.stereo import refuse_unequal_views

__all__ = [
    "check_settings",
    "check_weights",
    "compared_weights",
    "load_weights",
    "named_networks",
    "one_line_errors",
    "preflight",
    "preflight_images",
    "preflight_pairs",
]

_COMPRESSION = 10
"""How much smaller than its voxels a result may be on the disk: of a skull-stripped scan most is one value."""

_METHODS = {"bicubic", "lanczos", "perfect thick mask", "sharp"}
"""Names that the tables of evaluations have for what is no network."""

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def one_line_errors(function: _Function) -> _Function:
    """Turn the errors of this project into one line on stderr and an exit status.

    MONAI wraps an exception of a config expression into another with a long traceback; ``SystemExit`` passes.
    """

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MedsrError as error:
            sys.stderr.write(f"medsr: error: {' '.join(str(error).split())}\n")
            raise SystemExit(error.exit_code) from None

    return guarded  # type: ignore[return-value]


@one_line_errors
def check_settings(device: str | torch.device | None = None) -> None:
    """Refuse a misspelt setting, which MONAI would accept in silence, and a device that is not here.

    The first step of every ``run``: from here on a program that was started from the command line reports any
    error of this project in one line, and SIGTERM, as a job scheduler sends it, and SIGHUP, as a closed terminal does,
    clean up like Ctrl-C.

    Args:
        device: where the run is to compute; tried before anything is read.
    """
    _behave_as_program()
    check_overrides()
    if device is not None:
        _refuse_absent(device)


def _refuse_absent(device: str | torch.device) -> None:
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise SettingError(f"device must be cpu, cuda or cuda:<number>, got {device!r}") from None
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each kind of device raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingError(f"device {device} cannot be used here ({reason}); set device to cpu") from None


def _behave_as_program() -> None:
    by_monai = bool(overrides_in(sys.argv)[0])
    if by_monai:
        sys.excepthook = _in_one_line
    if (
        by_monai or Path(sys.argv[0]).stem == "medsr"
    ) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
        # A lost terminal; under nohup it is ignored, and stays so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, _stop)
        sys.unraisablehook = _stop_all_the_same


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """MONAI wraps the error of a component into others, one per level of the config."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("medsr: interrupted\n")
        raise SystemExit(128 + signal.SIGINT)
    found = first_of_ours(error)
    if found is None:
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(f"medsr: error: {' '.join(str(found).split())}\n")
    raise SystemExit(found.exit_code)


def _stop(number: int, frame: FrameType | None) -> None:
    # As an exception, so that unfinished files are removed on the way out.
    raise SystemExit(128 + number)


def _stop_all_the_same(unraisable: Any) -> None:
    """Raise a stop again that Python dropped, because it came in a callback of a weak reference or a ``__del__``."""
    lost = unraisable.exc_value
    if not isinstance(lost, (KeyboardInterrupt, SystemExit)) or not hasattr(signal, "setitimer"):
        sys.__unraisablehook__(unraisable)
        return

    def again(number: int, frame: FrameType | None) -> None:
        raise lost

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


@one_line_errors
def preflight(
    dataset_dir: str | Sequence[str],
    output_dir: str | Path,
    *,
    weights: str | Path | None = None,
    network: nn.Module | None = None,
    force: bool = False,
    series_uid: str | None = None,
    follow_links: bool | None = None,
    spacing_mm: float | None = None,
    thin_volumes: int = 0,
    time_series: bool = True,
    report: RunReport | None = None,
    find: Callable[..., list[dict[str, str]]] | None = None,
    inspect: Callable[[Mapping[str, str]], Any] | None = None,
) -> list[dict[str, str]]:
    """List the cases of a run, after a check of output folder, weights and all headers before the first voxel is read.

    Only if no case is usable does the run end here; a bad one fails when its turn comes, and the others go on. Like
    all that a config's ``run`` calls, this ends the process, with one line on stderr.

    Args:
        dataset_dir: input file or folder, or a list.
        output_dir: folder of the results; created with the first of them.
        weights: plain state dict that must fit the network.
        network: see ``weights``.
        force: accept near-isotropic inputs.
        series_uid: which series of a DICOM folder that holds several, see :class:`~medsr.io.loading.LoadVolumed`.
        follow_links: read volumes behind links that leave their folder, see :func:`~medsr.io.cases.list_folder`.
        spacing_mm: slice spacing of the results; default the in-plane spacing.
        thin_volumes: float32 volumes on thin slices that a case leaves behind; the disk must have room for them.
        time_series: accept volumes with a time axis.
        report: of the run; cases that an earlier run has finished are then passed over, see
            :meth:`~medsr.handlers.case_output.RunReport.pending`.
        find: lists the cases behind ``dataset_dir``; default volumes in slices.
        inspect: reads the headers of a case and raises what is wrong with them; default that of volumes in slices.

    Returns:
        data items of the cases that are to be done; a bad one has the key ``error``.
    """
    if not dataset_dir:
        raise DataError("no input: set --dataset_dir to files or folders as the bundle's docs/README.md says")
    if not str(output_dir):
        # It would be the current folder.
        raise OutputError("no output: set --output_dir to the folder for the results")
    cases = (find or partial(find_cases, follow_links=follow_links))(dataset_dir)
    _refuse_same_folder(
        [dataset_dir] if isinstance(dataset_dir, (str, Path)) else dataset_dir, cases, output_dir
    )
    probe_folder(output_dir, create=False)
    pending = cases if report is None else report.pending(cases)
    if len(pending) < len(cases):
        _log.info(
            "%d of %d cases are in %s already and stay as they are",
            len(cases) - len(pending),
            len(cases),
            Path(output_dir).name,
        )
    if network is not None:
        check_weights(weights, network)
    if spacing_mm is not None:
        spacing_mm = as_number("target_spacing_mm", spacing_mm, above=0)
    reasons: list[MedsrError] = []
    checked: list[dict[str, str]] = []
    needed = 0
    for case in pending:
        try:
            if "error" in case:
                # What is not among the inputs was found among the results.
                raise (DataError if case in cases else OutputError)(case["error"])
            if inspect:
                inspect(case)
            else:
                header = inspect_case(case["image"], series_uid=series_uid, follow_links=follow_links)
                if not time_series and prod(header.shape[3:]) > 1:
                    raise DataError(
                        f"{header.path.name}: {header.shape[3]} volumes in one file; split it first"
                    )
                results = thin_volumes * _thin_bytes(header, force=force, spacing_mm=spacing_mm)
                refuse_beyond_memory(f"{header.path.name} on thin slices", results)
                needed += results
            checked.append(case)
        except MedsrError as error:
            reasons.append(error)
            checked.append({**case, "error": str(error)})
    if cases and len(reasons) == len(cases):
        if len({str(error) for error in reasons}) > 1:
            for error in reasons:
                _log.error("%s", error)
            raise DataError(f"none of the {len(cases)} cases can be used; the first reason: {reasons[0]}")
        raise reasons[0]
    _refuse_full_disk(output_dir, needed)
    return checked


def _refuse_same_folder(
    inputs: Sequence[str | Path], cases: Sequence[Mapping[str, str]], output_dir: str | Path
) -> None:
    """Refuse to write results among the inputs: a later run could take them for inputs.

    A file that is named by itself may get its result beside it.
    """
    output = Path(output_dir).absolute()
    named = [Path(one).expanduser().absolute() for one in inputs]
    given = [folder for folder in named if folder.is_dir()]
    files = [Path(value) for case in cases for key, value in case.items() if key not in ("case", "error")]
    # A series is a folder itself.
    inside = {
        file if file.is_dir() else file.parent for file in files if any(map(file.is_relative_to, given))
    }
    if output.is_dir() and any(output.samefile(folder) for folder in {*given, *inside} if folder.is_dir()):
        raise OutputError(
            f"{output.name}: the results would lie among the inputs, where a later run could take them for "
            "inputs; set another output folder"
        )


def preflight_images(
    dataset_dir: str | Sequence[str],
    output_dir: str | Path,
    *,
    find: Callable[..., list[dict[str, str]]] = find_images,
    **checks: Any,
) -> list[dict[str, str]]:
    """:func:`preflight` for 2D images; its other checks are taken by name."""
    grey = getattr(checks.get("network"), "in_channels", None) == 1
    return preflight(dataset_dir, output_dir, find=find, inspect=partial(_inspect_image, grey=grey), **checks)


def preflight_pairs(
    dataset_dir: str | Sequence[str], output_dir: str | Path, **checks: Any
) -> list[dict[str, str]]:
    """:func:`preflight` for stereo pairs: both views must be there, readable, and of one size and colour."""
    return preflight(dataset_dir, output_dir, find=find_stereo_cases, inspect=_inspect_pair, **checks)


def _inspect_image(case: Mapping[str, str], *, grey: bool) -> None:
    header = read_image_header(case["image"])
    if grey and header.channels > 1:
        raise DataError(
            f"{header.path.name}: a colour image, and this network is for grey ones; use weights for colour, or "
            "convert the image to grey"
        )


def _inspect_pair(case: Mapping[str, str]) -> None:
    left, right = (read_image_header(case.get(key, case["image"])) for key in ("image", "image_right"))
    refuse_unequal_views(left.path.name, (left.channels, *left.size), (right.channels, *right.size))


def _thin_bytes(header: VolumeHeader, *, force: bool, spacing_mm: float | None) -> int:
    """Size of a float32 volume on thin slices, uncompressed."""
    axis = slice_axis(header.affine, force=force, name=header.path.name)
    size = list(header.shape)
    size[axis] = rescaled_size(size[axis], refinement_ratio(header.affine, spacing_mm, axis=axis))
    return 4 * prod(size)


def _refuse_full_disk(folder: str | Path, needed: int) -> None:
    """Refuse a run whose results cannot fit, before hours of computing; warn where that depends on the compression."""
    folder = Path(folder).absolute()
    free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.is_dir())).free
    if needed <= free:
        return
    line = f"{folder.name}: the results need up to {_amount(needed)}, the disk has {_amount(free)}"
    if needed > _COMPRESSION * free:
        raise OutputError(f"{line}; free some, or choose another output folder")
    _log.warning("%s: they fit only if they compress well", line)


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@one_line_errors
def check_weights(path: str | Path | None, network: nn.Module) -> None:
    """Say in one line why a weight file cannot be used: missing, damaged, or made for another network.

    A digest in ``SHA256SUMS`` beside the file is compared: one flipped bit loads without a complaint.

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
        raise WeightsError(f"{named}: no such weight file; give the path of one")
    if file.parent.name == "models":
        catalog.verify_weights(file.parent.parent, f"models/{file.name}")
    elif (file.parent / "SHA256SUMS").exists() and file.name in catalog.listed_digests(file.parent):
        catalog.verify_weights(file.parent, file.name)
    state, wanted = read_state(file), network.state_dict()
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
    return state


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
