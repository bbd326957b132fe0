"""Checks of inputs, output folder and weights before the first voxel is read."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

from torch import nn

from medsr.engines.runner import one_line_errors
from medsr.engines.weight_files import check_weights
from medsr.errors import DataError, MedsrError, OutputError
from medsr.geometry import refinement_ratio, rescaled_size, slice_axis
from medsr.handlers.case_output import RunReport
from medsr.io.cases import find_cases, inspect_case
from medsr.io.images import find_images, read_image_header
from medsr.io.nifti import VolumeHeader, refuse_beyond_memory
from medsr.io.stereo import find_stereo_cases
from medsr.io.writing import probe_folder
from medsr.settings import as_number
from medsr.transforms.stereo import refuse_unequal_views

__all__ = ["images", "pairs", "volumes"]

_COMPRESSION = 10
"""How much smaller than its voxels a result may be on the disk: of a skull-stripped scan most is one value."""

_log = logging.getLogger(__name__)

_Finder = Callable[[str | Sequence[str]], list[dict[str, str]]]
"""Lists the data items behind files and folders."""


@one_line_errors
def volumes(
    dataset_dir: str | Sequence[str],
    output_dir: str | Path,
    *,
    find: _Finder | None = None,
    force: bool = False,
    series_uid: str | None = None,
    follow_links: bool | None = None,
    spacing_mm: float | None = None,
    thin_volumes: int = 0,
    time_series: bool = True,
    weights: str | Path | None = None,
    network: nn.Module | None = None,
    report: RunReport | None = None,
) -> list[dict[str, str]]:
    """List the cases of a run on volumes in slices, after a check of output folder, weights and all headers.

    Only if no case is usable does the run end here; a bad one fails when its turn comes, and the others go on. Like
    all that a config's ``run`` calls, this ends the process, with one line on stderr.

    Args:
        dataset_dir: input file or folder, or a list.
        output_dir: folder of the results; created with the first of them.
        find: lists the cases behind ``dataset_dir``; default :func:`~medsr.io.cases.find_cases`.
        force: accept near-isotropic inputs.
        series_uid: which series of a DICOM folder that holds several, see :class:`~medsr.io.loading.LoadVolumed`.
        follow_links: read volumes behind links that leave their folder, see :func:`~medsr.io.cases.list_folder`.
        spacing_mm: slice spacing of the results; default the in-plane spacing.
        thin_volumes: float32 volumes on thin slices that a case leaves behind; the disk must have room for them.
        time_series: accept volumes with a time axis.
        weights: plain state dict that must fit the network.
        network: see ``weights``.
        report: of the run; cases that an earlier run has finished are then passed over, see
            :meth:`~medsr.handlers.case_output.RunReport.pending`.

    Returns:
        data items of the cases that are to be done; a bad one has the key ``error``.
    """
    if spacing_mm is not None:
        spacing_mm = as_number("target_spacing_mm", spacing_mm, above=0)

    def inspect(case: Mapping[str, str]) -> int:
        header = inspect_case(case["image"], series_uid=series_uid, follow_links=follow_links)
        if not time_series and prod(header.shape[3:]) > 1:
            raise DataError(f"{header.path.name}: {header.shape[3]} volumes in one file; split it first")
        results = thin_volumes * _thin_bytes(header, force=force, spacing_mm=spacing_mm)
        refuse_beyond_memory(f"{header.path.name} on thin slices", results)
        return results

    return _checked(
        dataset_dir,
        output_dir,
        find=find or partial(find_cases, follow_links=follow_links),
        inspect=inspect,
        weights=weights,
        network=network,
        report=report,
    )


@one_line_errors
def images(
    dataset_dir: str | Sequence[str],
    output_dir: str | Path,
    *,
    find: _Finder = find_images,
    weights: str | Path | None = None,
    network: nn.Module | None = None,
    report: RunReport | None = None,
) -> list[dict[str, str]]:
    """:func:`volumes` for 2D images, which must be readable and, for a network of one channel, grey."""
    grey = getattr(network, "in_channels", None) == 1
    return _checked(
        dataset_dir,
        output_dir,
        find=find,
        inspect=partial(_inspect_image, grey=grey),
        weights=weights,
        network=network,
        report=report,
    )


@one_line_errors
def pairs(
    dataset_dir: str | Sequence[str],
    output_dir: str | Path,
    *,
    weights: str | Path | None = None,
    network: nn.Module | None = None,
    report: RunReport | None = None,
) -> list[dict[str, str]]:
    """:func:`volumes` for stereo pairs: both views must be there, readable, and of one size and colour."""
    return _checked(
        dataset_dir,
        output_dir,
        find=find_stereo_cases,
        inspect=_inspect_pair,
        weights=weights,
        network=network,
        report=report,
    )


def _checked(
    dataset_dir: str | Sequence[str],
    output_dir: str | Path,
    *,
    find: _Finder,
    inspect: Callable[[Mapping[str, str]], int],
    weights: str | Path | None,
    network: nn.Module | None,
    report: RunReport | None,
) -> list[dict[str, str]]:
    """What all kinds of cases have in common; ``inspect`` tells how many bytes the results of one need, or 0."""
    if not dataset_dir:
        raise DataError("no input: set --dataset_dir to files or folders as the bundle's docs/README.md says")
    if not str(output_dir):
        # It would be the current folder.
        raise OutputError("no output: set --output_dir to the folder for the results")
    cases = find(dataset_dir)
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
    reasons: list[MedsrError] = []
    checked: list[dict[str, str]] = []
    needed = 0
    for case in pending:
        try:
            if "error" in case:
                # What is not among the inputs was found among the results.
                raise (DataError if case in cases else OutputError)(case["error"])
            needed += inspect(case)
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


def _inspect_image(case: Mapping[str, str], *, grey: bool) -> int:
    header = read_image_header(case["image"])
    if grey and header.channels > 1:
        raise DataError(
            f"{header.path.name}: a colour image, and this network is for grey ones; use weights for colour, or "
            "convert the image to grey"
        )
    return 0


def _inspect_pair(case: Mapping[str, str]) -> int:
    left, right = (read_image_header(case.get(key, case["image"])) for key in ("image", "image_right"))
    refuse_unequal_views(left.path.name, (left.channels, *left.size), (right.channels, *right.size))
    return 0


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
