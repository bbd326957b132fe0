"""From what a user names to a list of cases, and the choice between the NIfTI and the DICOM reader."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError
from medsr.io.dicom import is_dicom_series, read_series, read_series_header, series_files
from medsr.io.links import refuse_leaving_link
from medsr.io.nifti import VolumeHeader, read_nifti, read_nifti_header, sidecar_path
from medsr.settings import as_flag

__all__ = [
    "case_name",
    "collect_cases",
    "find_cases",
    "find_labelled_cases",
    "input_digest",
    "inspect_case",
    "list_folder",
    "mark_twins",
    "read_case",
    "refuse_marked",
    "sidecar_digest",
    "warn_once",
]

_log = logging.getLogger(__name__)

_SUFFIXES = (".nii.gz", ".nii")
_UNREAD = (".hdr", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".mnc")
"""Endings of volumes that are not read: a folder that holds them says so, others may hold anything."""

_NAME_LIMIT = 100
# Of a file name in UTF-8: file systems allow 255, and the ending of a result and the mark of an unfinished one come.
_BYTE_LIMIT = 160
_SAMPLE = 65_536
_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{i}" for kind in ("com", "lpt") for i in range(1, 10))}

PathLike = str | os.PathLike[str]


def find_cases(
    source: PathLike | Sequence[PathLike], *, follow_links: bool | None = None
) -> list[dict[str, str]]:
    """List the images behind a path as data items ``{"image": absolute path, "case": name}``.

    Outputs are named after the case, so two inputs of one name would overwrite each other: see :func:`mark_twins`.
    Sub-folders are searched one level deep; hidden files are ignored.

    Args:
        source: a NIfTI file, a folder of them, a DICOM series folder, a folder of such folders, or a list of
            these.
        follow_links: see :func:`list_folder`.

    Raises:
        DataError: if there is no image, a link leaves its folder, or an image is given twice.

    Example:
        >>> find_cases("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such file or folder
    """
    if follow_links is not None:
        follow_links = as_flag("follow_links", follow_links)
    return collect_cases(source, partial(_expand, follow_links=follow_links))


def collect_cases(
    source: PathLike | Sequence[PathLike],
    expand: Callable[[Path], list[Path]],
    *,
    suffixes: Sequence[str] = _SUFFIXES,
) -> list[dict[str, str]]:
    """Make data items ``{"image": absolute path, "case": name}`` of what ``expand`` finds behind the sources.

    Args:
        source: a path or a list of paths.
        expand: gives the inputs that one path names.
        suffixes: file name endings that are no part of a case name.

    Raises:
        DataError: if the list is empty or an input is given twice.

    Example:
        >>> [item["case"] for item in collect_cases(["a.nii", "b.nii.gz"], lambda path: [path])]
        ['a', 'b']
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise DataError("the list of inputs is empty; give a file or a folder")
    paths = [found for item in sources for found in expand(Path(item).expanduser())]
    items = [{"image": str(path.absolute()), "case": case_name(path, suffixes=suffixes)} for path in paths]
    return mark_twins(items)


def mark_twins(items: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Mark inputs of one case name, which would overwrite each other's results.

    Twins get the key ``error`` and, as their case, the name of their file, with its folders as far as they tell the
    twins apart: they fail, and the others go on. Where cases find their partners by name, :func:`refuse_marked` ends
    the run; a training, which writes nothing by these names, takes both.

    Args:
        items: with the keys ``image`` and ``case``.

    Returns:
        the items in their order.

    Raises:
        DataError: if one input is given twice.

    Example:
        >>> twins = [{"image": f"/data/{name}.png", "case": "a_b"} for name in ("a b", "a_b")]
        >>> for item in mark_twins(twins):
        ...     print(item["case"], "|", item["error"])
        a b.png | a b.png and a_b.png have the same case name a_b; rename one of them
        a_b.png | a b.png and a_b.png have the same case name a_b; rename one of them
    """
    by_name: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        # Case-insensitive file systems would let a.nii and A.nii share one output.
        by_name.setdefault(unicodedata.normalize("NFC", item["case"].casefold()), []).append(index)
    found = list(items)
    for twins in by_name.values():
        for index in twins[1:]:
            first, second = _told_apart(items[twins[0]]["image"], items[index]["image"])
            reason = (
                f"{first} and {second} have the same case name {items[index]['case']}; rename one of them"
            )
            for twin, name in ((twins[0], first), (index, second)):
                if "error" not in found[twin]:
                    found[twin] = {**items[twin], "case": name, "error": reason}
    return found


def refuse_marked(items: Sequence[dict[str, str]]) -> Sequence[dict[str, str]]:
    """Pass the items on if none of them is known to be bad.

    Raises:
        DataError: the first reason, see :func:`mark_twins`.

    Example:
        >>> refuse_marked([{"image": "a.png", "case": "a"}])
        [{'image': 'a.png', 'case': 'a'}]
    """
    for item in items:
        if "error" in item:
            raise DataError(item["error"])
    return items


def _told_apart(first: PathLike, second: PathLike) -> list[str]:
    """Names of two files, with as many of their folders as it takes."""
    one, other = (Path(path).absolute() for path in (first, second))
    if one == other:
        raise DataError(f"{one.name}: given twice")
    depth = next(n for n in range(1, len(one.parts) + 1) if one.parts[-n:] != other.parts[-n:])
    return [Path(*path.parts[-depth:]).as_posix() for path in (one, other)]


def list_folder(
    folder: Path, wanted: Callable[[Path], bool], *, follow_links: bool | None = None
) -> list[Path]:
    """List the wanted entries of a folder by name, without hidden ones and without links that leave it.

    Args:
        folder: the folder; what lies in its sub-folders is not listed.
        wanted: whether an entry is an input.
        follow_links: list links that leave the folder, too; see :func:`~medsr.io.links.refuse_leaving_link`.

    Raises:
        DataError: if the folder cannot be read or a wanted entry is a link to somewhere else.

    Example:
        >>> list_folder(Path("no-such-folder"), Path.is_file)
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: cannot be read (No such file or directory)
    """
    name = folder.name or folder.resolve().name
    try:
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
        found = [child for child in children if wanted(child)]
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
    for child in found:
        if not child.exists():
            # A link to nowhere leads out of nothing: its case fails with that reason.
            continue
        refuse_leaving_link(child, follow_links=follow_links, instead="name the file itself instead")
    return found


def find_labelled_cases(
    folder: PathLike, leave_out: Sequence[str] = (), *, optional: Sequence[str] = ()
) -> list[dict[str, str]]:
    """List the cases of a folder with ``images/`` and ``labels/``, which hold files of equal names.

    Args:
        folder: the folder of both.
        leave_out: names of cases that are kept for validation or test.
        optional: further sub-folders with files of these names; one that does not exist is not used.

    Returns:
        items ``{"image": path, "label": path, "case": name}``, and a path for every further sub-folder.

    Raises:
        DataError: if a folder or a partner is missing, a name to leave out is unknown, or no case is left.

    Example:
        >>> find_labelled_cases("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no folder 'images' in it; a labelled folder holds images/ and labels/
    """
    root = Path(folder).expanduser()
    for part in ("images", "labels"):
        if not (root / part).is_dir():
            raise DataError(
                f"{root.name}: no folder '{part}' in it; a labelled folder holds images/ and labels/"
            )
    parts = ["images", "labels", *(part for part in optional if (root / part).is_dir())]
    images, *others = (
        {item["case"]: item["image"] for item in refuse_marked(find_cases(root / part))} for part in parts
    )
    for part, paths in zip(parts[1:], others, strict=True):
        alone = sorted(set(images) ^ set(paths))
        if alone:
            where = part if alone[0] in images else "images"
            raise DataError(f"{root.name}: {alone[0]} has no partner in {where}/; names must be equal")
    unknown = sorted(set(leave_out) - set(images))
    if unknown:
        raise DataError(f"{root.name}: {unknown[0]} is to be left out, but there is no such case")
    items = [
        {
            "image": path,
            "label": others[0][case],
            "case": case,
            **{part: paths[case] for part, paths in zip(parts[2:], others[1:], strict=True)},
        }
        for case, path in images.items()
        if case not in leave_out
    ]
    if not items:
        raise DataError(f"{root.name}: no case is left after {len(leave_out)} were left out")
    return items


def case_name(path: PathLike, *, suffixes: Sequence[str] = _SUFFIXES) -> str:
    """Name of a case, safe as a file name everywhere: letters, digits, ``._-``, no leading dot, at most 100 characters.

    Letters of any script stay, as NFC: of names in Greek or Chinese nothing would be left that tells them apart. What a
    file system or a shell cannot take becomes an underscore, as do spaces and invisible characters.

    Args:
        path: the file or folder.
        suffixes: file name endings that are no part of the name, the longer of two first.

    Example:
        >>> case_name("/data/T1 weighted.nii.gz"), case_name("眼底 1.nii")
        ('T1_weighted', '眼底_1')
    """
    path = Path(path)
    name = _name(path)
    suffix = _suffix(path, suffixes)
    if suffix:
        name = name[: -len(suffix)]
    name = "".join(char if _is_safe(char) else " " for char in unicodedata.normalize("NFC", name))
    name = re.sub(" +", "_", name).lstrip(".")[:_NAME_LIMIT]
    name = name.encode()[:_BYTE_LIMIT].decode(errors="ignore").rstrip(".") or "case"
    return f"_{name}"[:_NAME_LIMIT] if name.split(".")[0].casefold() in _DEVICES else name


def inspect_case(
    path: PathLike, *, series_uid: str | None = None, follow_links: bool | None = None
) -> VolumeHeader:
    """Read and judge the header of a case: a NIfTI file or a DICOM series folder.

    Args:
        path: the file or folder.
        series_uid: as in :func:`~medsr.io.dicom.read_series_header`; a NIfTI file has none.
        follow_links: the same.

    Raises:
        DataError: as :func:`~medsr.io.nifti.read_nifti_header` and
            :func:`~medsr.io.dicom.read_series_header`.

    Example:
        >>> inspect_case("none.nii").shape
        Traceback (most recent call last):
        medsr.errors.DataError: none.nii: no such file
    """
    path = Path(path)
    if path.is_dir():
        return read_series_header(path, series_uid=series_uid, follow_links=follow_links)
    return read_nifti_header(path)


def read_case(
    path: PathLike,
    *,
    allow_constant: bool = False,
    series_uid: str | None = None,
    follow_links: bool | None = None,
) -> tuple[npt.NDArray[np.float32], VolumeHeader]:
    """Read a case whole: a NIfTI file or a DICOM series folder.

    Args:
        path: the file or folder.
        allow_constant: accept an image whose voxels are all equal, for example an empty label map.
        series_uid: as in :func:`~medsr.io.dicom.read_series_header`; a NIfTI file has none.
        follow_links: the same.

    Shape:
        - Output: ``(X, Y, Z)`` or ``(X, Y, Z, T)``.

    Raises:
        DataError: as :func:`~medsr.io.nifti.read_nifti` and :func:`~medsr.io.dicom.read_series`.

    Example:
        >>> read_case("none.nii")
        Traceback (most recent call last):
        medsr.errors.DataError: none.nii: no such file
    """
    path = Path(path)
    if path.is_dir():
        return read_series(
            path, series_uid=series_uid, follow_links=follow_links, allow_constant=allow_constant
        )
    return read_nifti(path, allow_constant=allow_constant)


def _is_safe(char: str) -> bool:
    if char.isascii():
        return char.isalnum() or char in "._-"
    # All but control and format characters, halves of characters, unassigned ones, and spaces.
    return unicodedata.category(char)[0] not in "CZ"


def _suffix(path: Path, suffixes: Sequence[str] = _SUFFIXES) -> str:
    return next((s for s in suffixes if path.name.lower().endswith(s)), "")


def _is_series(folder: Path, *, unreadable: bool) -> bool:
    """Whether a folder is a DICOM series, or the given answer if it cannot be read."""
    try:
        return is_dicom_series(folder)
    except (OSError, DataError):
        return unreadable


def _name(path: Path) -> str:
    return path.name if path.name not in ("", "..") else path.resolve().name


def _expand(path: Path, *, follow_links: bool | None) -> list[Path]:
    """The images that one path names."""
    name = _name(path)
    try:
        path.stat()
    except FileNotFoundError:
        raise DataError(f"{name}: no such file or folder") from None
    except OSError as error:
        raise DataError(f"{name[:_NAME_LIMIT]}: cannot be read ({error.strerror})") from None
    if not path.is_dir():
        if _suffix(path, (".hdr", ".img")):
            raise DataError(f"{name}: part of a .hdr/.img pair; convert it to a single .nii file first")
        if not _suffix(path):
            raise DataError(f"{name}: not a NIfTI file; a DICOM series is given by its folder")
        return [path]
    # A broken link and a folder that cannot be looked into are cases: they fail with their reason, and others go on.
    found = list_folder(
        path,
        lambda child: _is_series(child, unreadable=True) if child.is_dir() else bool(_suffix(child)),
        follow_links=follow_links,
    )
    _tell_what_is_left_out(path, found)
    if _is_series(path, unreadable=not found):
        if found:
            raise DataError(
                f"{name}: holds DICOM images beside other cases ({found[0].name}); give one of them"
            )
        return [path]
    if not found:
        raise DataError(f"{name}: no .nii or .nii.gz file and no DICOM series in this folder")
    return found


def _tell_what_is_left_out(folder: Path, found: Sequence[Path]) -> None:
    """Volumes of other formats, and folders inside that hold volumes: nobody should miss them silently."""
    name = _name(folder)
    unread, deeper = [], []
    # What is a case is not left out, and the files of a series need not be listed again.
    for child in sorted(set(folder.iterdir()) - set(found)):
        if child.name.startswith("."):
            continue
        if _suffix(child, _UNREAD) and child.is_file():
            unread.append(child.name)
        with contextlib.suppress(OSError, DataError):
            # Results of ours may lie among the inputs.
            if child.is_symlink() or not child.is_dir() or (child / "report.json").exists():
                continue
            if any(_suffix(inner) or is_dicom_series(inner) for inner in child.iterdir()):
                deeper.append(child.name)
    if unread:
        warn_once(f"{name}: {len(unread)} volumes are left out, {unread[0]} first; convert them to NIfTI")
    if deeper:
        warn_once(
            f"{name}: {len(deeper)} folders with NIfTI files or DICOM series inside are left out, {deeper[0]} first; "
            "run them by name"
        )


@lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """Warn in the log, and not again in this process: a run lists its folder several times.

    Example:
        >>> warn_once("scans: 1 volumes are left out, a.mgz first; convert them to NIfTI")
    """
    _log.warning("%s", text)


def input_digest(item: Mapping[str, str]) -> str:
    """What tells the files of a case from others of the same names, wherever they lie and whenever they were copied.

    A file is known by its size and its bytes at the beginning, in the middle and at the end: to read all of it would
    take as long as to load it. What cannot be read counts as nothing; who loads it will say so.

    Args:
        item: paths of files and folders, by any key, and the ``case``.

    Example:
        >>> input_digest({"case": "a", "image": "none.nii.gz"})
        'e3b0c44298fc1c14'
    """
    digest = hashlib.sha256()
    for path in (Path(value) for key, value in sorted(item.items()) if key != "case"):
        with contextlib.suppress(OSError):
            for file in series_files(path) if path.is_dir() else [path]:
                digest.update(_sample(file))
    return digest.hexdigest()[:16]


def sidecar_digest(item: Mapping[str, str]) -> str:
    """The same for the sidecars of the NIfTI files of a case, which may hold their slice thickness.

    Args:
        item: as for :func:`input_digest`.

    Example:
        >>> sidecar_digest({"case": "a", "image": "none.nii.gz"})
        'e3b0c44298fc1c14'
    """
    paths = [Path(value) for key, value in sorted(item.items()) if key != "case" and _suffix(Path(value))]
    return hashlib.sha256(b"".join(_sample(sidecar_path(path)) for path in paths)).hexdigest()[:16]


def _sample(file: Path) -> bytes:
    with contextlib.suppress(OSError), file.open("rb") as content:
        size = file.stat().st_size
        found = f"{file.name} {size} ".encode(errors="surrogateescape")
        for place in (0, size // 2, size - _SAMPLE):
            content.seek(max(0, place))
            found += content.read(_SAMPLE)
        return found
    return b""
