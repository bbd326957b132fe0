"""What a config's ``run`` calls around an engine: checks before anything is loaded, and an honest exit status."""

from __future__ import annotations

import copy
import logging
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from medsr import catalog
from medsr.errors import DataError, MedsrError, OutputError, WeightsError
from medsr.geometry import slice_axis
from medsr.handlers.case_output import CaseOutput
from medsr.io.cases import find_cases, inspect_case
from medsr.io.images import find_images, read_image_header
from medsr.io.stereo import find_stereo_cases
from medsr.io.writing import probe_folder
from medsr.transforms.stereo import refuse_unequal_views

__all__ = [
    "check_settings",
    "check_weights",
    "load_weights",
    "named_networks",
    "one_line_errors",
    "preflight",
    "preflight_images",
    "preflight_pairs",
]

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
def check_settings() -> None:
    """Refuse a misspelt setting on the command line, which MONAI would accept in silence.

    The first step of every ``run``: from here on a program that was started from the command line reports any
    error of this project in one line, and a SIGTERM, as a job scheduler sends it, cleans up like Ctrl-C.
    """
    _behave_as_program()
    catalog.check_overrides()


def _behave_as_program() -> None:
    by_monai = bool(catalog.overrides_in(sys.argv)[0])
    if by_monai:
        sys.excepthook = _in_one_line
    if (
        by_monai or Path(sys.argv[0]).stem == "medsr"
    ) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """MONAI wraps the error of a component into others, one per level of the config."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("medsr: interrupted\n")
        raise SystemExit(128 + signal.SIGINT)
    found: MedsrError | None = None
    current: BaseException | None = error
    while current is not None:
        found = current if isinstance(current, MedsrError) else found
        current = current.__cause__ or current.__context__
    if found is None:
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(f"medsr: error: {' '.join(str(found).split())}\n")
    raise SystemExit(found.exit_code)


def _stop(number: int, frame: FrameType | None) -> None:
    # As an exception, so that unfinished files are removed on the way out.
    raise SystemExit(128 + number)


@one_line_errors
def preflight(
    dataset_dir: str | Sequence[str],
    output_dir: str | Path,
    *,
    weights: str | Path | None = None,
    network: nn.Module | None = None,
    force: bool = False,
    output: CaseOutput | None = None,
    find: Callable[..., list[dict[str, str]]] = find_cases,
    inspect: Callable[[Mapping[str, str]], Any] | None = None,
) -> int:
    """Check output folder, weights and the headers of all inputs before the first voxel is read.

    Bad cases are logged here already, in milliseconds; they are left out later and the others go on. Only if no
    case is usable does the run end here.

    Args:
        dataset_dir: input file or folder, or a list.
        output_dir: folder of the results; created if missing.
        weights: plain state dict that must fit the network.
        network: see ``weights``.
        force: accept near-isotropic inputs.
        output: the writer of the results; results of an earlier run are then refused unless it may replace them.
        find: lists the cases behind ``dataset_dir``.
        inspect: reads the headers of a case and raises what is wrong with them; default that of volumes in slices.

    Returns:
        the number of usable cases.
    """
    if not dataset_dir:
        raise DataError("no input: set --dataset_dir to a file, a folder of files or a DICOM series folder")
    if not str(output_dir):
        # It would be the current folder.
        raise OutputError("no output: set --output_dir to the folder for the results")
    cases = find(dataset_dir)
    _refuse_same_folder([dataset_dir] if isinstance(dataset_dir, (str, Path)) else dataset_dir, output_dir)
    probe_folder(output_dir)
    if output is not None:
        output.refuse_existing([case["case"] for case in cases])
    if weights is not None and network is not None:
        check_weights(weights, network)
    reasons = []
    for case in cases:
        try:
            inspect(case) if inspect else _inspect_slices(case["image"], force=force)
        except MedsrError as error:
            reasons.append(error)
    if len(reasons) == len(cases):
        if len(reasons) > 1:
            for error in reasons:
                _log.error("%s", error)
            raise DataError(f"none of the {len(cases)} cases can be used; the first reason: {reasons[0]}")
        raise reasons[0]
    return len(cases) - len(reasons)


def _refuse_same_folder(inputs: Sequence[str | Path], output_dir: str | Path) -> None:
    """Refuse to write results among the inputs: the next run would take them for inputs."""
    output = Path(output_dir).expanduser().absolute()
    for one in inputs:
        if Path(one).is_dir() and output.is_dir() and output.samefile(one):
            raise OutputError(
                f"{output.name}: the results would lie among the inputs, and be inputs of the next run; "
                "set another output folder"
            )


def preflight_images(dataset_dir: str | Sequence[str], output_dir: str | Path, **checks: Any) -> int:
    """:func:`preflight` for 2D images; its other checks are taken by name."""
    return preflight(dataset_dir, output_dir, find=find_images, inspect=_inspect_image, **checks)


def preflight_pairs(dataset_dir: str | Sequence[str], output_dir: str | Path, **checks: Any) -> int:
    """:func:`preflight` for stereo pairs: both views must be there, readable, and of one size and colour."""
    return preflight(dataset_dir, output_dir, find=find_stereo_cases, inspect=_inspect_pair, **checks)


def _inspect_image(case: Mapping[str, str]) -> None:
    read_image_header(case["image"])


def _inspect_pair(case: Mapping[str, str]) -> None:
    if "error" in case:
        raise DataError(case["error"])
    left, right = (read_image_header(case.get(key, case["image"])) for key in ("image", "image_right"))
    refuse_unequal_views(left.path.name, (left.channels, *left.size), (right.channels, *right.size))


def _inspect_slices(path: str, *, force: bool) -> None:
    slice_axis(inspect_case(path).affine, force=force, name=Path(path).name)


@one_line_errors
def check_weights(path: str | Path, network: nn.Module) -> None:
    """Say in one line why a weight file cannot be used: missing, damaged, or made for another network.

    A digest in ``SHA256SUMS`` beside the file is compared: one flipped bit loads without a complaint.
    """
    if not str(path):
        raise WeightsError("no weights: set --weights to a file that was trained for this network")
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"{file.name}: no such weight file; set --weights or reinstall the bundle")
    if file.parent.name == "models":
        catalog.verify_weights(file.parent.parent, f"models/{file.name}")
    elif (file.parent / "SHA256SUMS").exists() and file.name in (
        file.parent / "SHA256SUMS"
    ).read_text().split():
        catalog.verify_weights(file.parent, file.name)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{file.name}: damaged or not a plain state dict ({type(error).__name__})"
        ) from None
    wanted = network.state_dict()
    if (
        not isinstance(state, dict)
        or set(state) != set(wanted)
        or not all(map(torch.is_tensor, state.values()))
    ):
        raise WeightsError(f"{file.name}: made for another network; check --weights, scale and widths")
    wrong = [key for key in wanted if state[key].shape != wanted[key].shape]
    if wrong:
        raise WeightsError(
            f"{file.name}: '{wrong[0]}' has shape {tuple(state[wrong[0]].shape)}, this network needs "
            f"{tuple(wanted[wrong[0]].shape)}; check scale and widths"
        )


@one_line_errors
def load_weights(path: str | Path, network: nn.Module) -> nn.Module:
    """Check a weight file, load it, and return the network."""
    check_weights(path, network)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


@one_line_errors
def named_networks(network: nn.Module, weights: Mapping[str, str | Path]) -> dict[str, nn.Module]:
    """Copies of a network with the weights of several trainings.

    Raises:
        WeightsError: if a file does not fit.

    Example:
        >>> named_networks(nn.Linear(1, 1), {})
        {}
    """
    return {name: load_weights(path, copy.deepcopy(network)).eval() for name, path in weights.items()}
