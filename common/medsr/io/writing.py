"""Writing that leaves a whole, verified file or none.

With a full disk ITK and SimpleITK report success on a truncated file, and a killed process leaves a partial
file under the final name. Here every file is written under a temporary name in the same folder, brought to
the disk, re-read where that is possible, and only then renamed.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import secrets
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medsr.errors import OutputError
from medsr.geometry import validate_affine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["atomic_path", "earlier_path", "probe_folder", "write_figure", "write_json", "write_nifti"]

_AXIS_LIMIT = 32767
_STALE_SECONDS = 24 * 3600.0

PathLike = str | os.PathLike[str]


def probe_folder(folder: PathLike, *, create: bool = True) -> Path:
    """Make sure that a folder can be written to, before hours of computing depend on it.

    Temporary files of ours that a killed run left there more than a day ago are removed.

    Args:
        folder: output folder.
        create: create it with its parents if it is missing. If not, it is tried whether that would be possible, and a
            run that is refused after all leaves nothing behind.

    Raises:
        OutputError: if it cannot be created, is not a folder or is not writable.

    Example:
        >>> probe_folder(".").is_dir()
        True
    """
    folder = Path(folder)
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        place = next(one for one in (folder, *folder.absolute().parents) if _is_there(one))
        probe = place / _temporary_name("probe")
        try:
            probe.write_bytes(b"medsr")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{_name(folder)}: cannot write to this folder ({_reason(error)}); choose another"
        ) from None
    for stale in folder.glob(".medsr-*.tmp*"):
        # Another run may be removing the same file.
        with contextlib.suppress(OSError):
            if stale.is_file() and time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                stale.unlink()
    return folder


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Give a temporary path to write to; it takes the final name only if the block ends without an exception.

    The temporary file lies in the same folder, because a rename is atomic only within one file system, and
    keeps the suffix, because writers choose the format by it. It is removed on every exception, Ctrl-C
    included.

    Args:
        path: the final file; an existing one is replaced whole.

    Raises:
        OutputError: if the file cannot be written, for example because the disk is full.

    Example:
        >>> with atomic_path("no-such-folder/a.txt") as temporary:
        ...     temporary.suffix
        Traceback (most recent call last):
        medsr.errors.OutputError: no-such-folder: no such folder; create it first
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise OutputError(f"{_name(final.parent)}: no such folder; create it first")
    temporary = final.with_name(_temporary_name(final.name))
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
        _sync_folder(final.parent)
    except OSError as error:
        raise OutputError(f"{final.name}: cannot be written ({_reason(error)}); nothing was saved") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_nifti(
    path: PathLike,
    array: npt.ArrayLike,
    *,
    affine: npt.ArrayLike,
    sform_code: int = 1,
    qform_code: int = 1,
    dtype: npt.DTypeLike = np.float32,
    step: float | None = None,
    step_unit: str = "unknown",
) -> Path:
    """Write a volume as NIfTI, read every voxel back, and only then give the file its name.

    sform and qform are both written, with the same matrix: readers differ in which of them they believe.
    The bytes depend only on the arguments, so that two equal runs give equal files.

    Args:
        path: target ending in ``.nii`` or ``.nii.gz``.
        array: the voxels; integer types are rounded to nearest.
        affine: voxel-to-world matrix, RAS+, in mm.
        sform_code: NIfTI code of the sform; 0 is raised to 1.
        qform_code: NIfTI code of the qform; 0 is raised to 1.
        dtype: type of the stored voxels.
        step: distance of the volumes of a 4D image, such as the repetition time.
        step_unit: its unit, as in :class:`~medsr.io.nifti.VolumeHeader`.

    Shape:
        - Input: ``(X, Y, Z)`` or ``(X, Y, Z, T)``.

    Raises:
        OutputError: if a voxel is not finite or outside the range of ``dtype``, or the file cannot be written
            whole.
        GeometryError: if the affine is not finite, singular or sheared.

    Example:
        >>> write_nifti("a.nii", np.full((2, 2, 2), np.nan), affine=np.eye(4))
        Traceback (most recent call last):
        medsr.errors.OutputError: a.nii: 8 of 8 voxels are NaN or infinite; nothing was saved
    """
    import nibabel as nib

    final = Path(path)
    name = final.name
    zipped = name.lower().endswith(".nii.gz")
    if not zipped and not name.lower().endswith(".nii"):
        raise OutputError(f"{name}: a volume is written as .nii or .nii.gz")
    matrix = validate_affine(affine, name=name)
    data = _stored(name, np.asarray(array), np.dtype(dtype))
    try:
        image = nib.Nifti1Image(data, matrix, dtype=data.dtype)
        image.set_sform(matrix, code=max(1, int(sform_code)))
        image.set_qform(matrix, code=max(1, int(qform_code)))
        image.header.set_xyzt_units(xyz="mm", t=step_unit)
        if step is not None:
            image.header.set_zooms((*image.header.get_zooms()[:3], float(step)))
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise OutputError(f"{name}: NIfTI cannot hold this volume ({error})") from None
    with atomic_path(final) as temporary:
        with temporary.open("wb") as raw:
            if zipped:
                # No name and no time in the gzip header: the bytes are reproducible and tell nothing.
                with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0) as stream:
                    image.to_stream(stream)
            else:
                image.to_stream(raw)
        _verify(temporary, name, data, matrix, zipped=zipped)
    return final


def write_json(path: PathLike, content: Any) -> Path:
    """Write an object as JSON, whole or not at all; its folder is created if it is missing.

    NaN and infinity are refused, because JSON has no such numbers and strict parsers stop at them.

    Raises:
        OutputError: if the object cannot be expressed in JSON or the file cannot be written.

    Example:
        >>> write_json("a.json", {"psnr": float("inf")})
        Traceback (most recent call last):
        medsr.errors.OutputError: a.json: not expressible in JSON (ValueError); nothing was saved
    """
    final = Path(path)
    try:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(
            f"{final.name}: not expressible in JSON ({type(error).__name__}); nothing was saved"
        ) from None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{_name(final.parent)}: cannot be created ({_reason(error)})") from None
    with atomic_path(final) as temporary:
        # A file name that is not UTF-8 holds lone surrogates; JSON has escapes for them.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return final


def write_figure(path: PathLike, figure: Figure, *, dpi: int = 120) -> Path:
    """Write a matplotlib figure as PNG, whole or not at all.

    Args:
        path: target ending in ``.png``.
        figure: a ``matplotlib.figure.Figure``.
        dpi: dots per inch.

    Raises:
        OutputError: if the name is not that of a PNG or the file cannot be written.

    Example:
        >>> write_figure("a.jpg", None)
        Traceback (most recent call last):
        medsr.errors.OutputError: a.jpg: a figure is written as .png
    """
    final = Path(path)
    if final.suffix.lower() != ".png":
        raise OutputError(f"{final.name}: a figure is written as .png")
    with atomic_path(final) as temporary, warnings.catch_warnings():
        # The name of a case may be in a script that no font here has; boxes in a title are no reason to worry.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=dpi)
    return final


def earlier_path(path: PathLike, number: int) -> Path:
    """Where the file of an earlier run is kept beside the one that takes its name.

    Args:
        path: the file.
        number: of the run, from 1.

    Example:
        >>> earlier_path("runs/model.pt", 1).name, earlier_path("runs/model.pt", 2).name
        ('model_earlier.pt', 'model_earlier_2.pt')
    """
    path = Path(path)
    return path.with_stem(f"{path.stem}_earlier" + (f"_{number}" if number > 1 else ""))


def _temporary_name(name: str) -> str:
    # The random part keeps two threads of one process apart.
    return f".medsr-{os.getpid()}-{secrets.token_hex(4)}.tmp.{name}"


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name


def _is_there(path: Path) -> bool:
    """Whether there is anything, a link to nothing included; what no name can be is an error."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _reason(error: OSError) -> str:
    # strerror, unlike str(error), does not hold the path.
    return error.strerror or type(error).__name__


def _sync_folder(folder: Path) -> None:
    # Windows cannot open a folder; there the rename is durable without it.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _stored(name: str, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The voxels in the type of the file, or the reason why they do not fit into it."""
    if array.ndim not in (3, 4) or array.size == 0:
        raise OutputError(f"{name}: a volume has 3 or 4 axes and at least one voxel, got shape {array.shape}")
    if max(array.shape) > _AXIS_LIMIT:
        raise OutputError(f"{name}: NIfTI-1 holds at most {_AXIS_LIMIT} voxels per axis, got {array.shape}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if dtype == np.bool_:
        dtype = np.dtype(np.uint8)
    if array.dtype.kind not in "iuf" or dtype.kind not in "iuf":
        raise OutputError(f"{name}: voxels must be real numbers, got {array.dtype} to be stored as {dtype}")
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise OutputError(f"{name}: {bad} of {array.size} voxels are NaN or infinite; nothing was saved")
    if dtype.kind in "iu":
        array = np.rint(array) if array.dtype.kind == "f" else array
        limits: Any = np.iinfo(dtype)
    else:
        limits = np.finfo(dtype)
    low, high = array.min(), array.max()
    if low < limits.min or high > limits.max:
        raise OutputError(
            f"{name}: values from {low:g} to {high:g} do not fit into {dtype}; nothing was saved"
        )
    return np.asarray(array.astype(dtype, copy=False))


def _verify(
    temporary: Path, name: str, data: npt.NDArray[Any], affine: npt.NDArray[np.float64], *, zipped: bool
) -> None:
    """Read the file to its end, gzip checksum included, and compare it with what was meant."""
    import nibabel as nib

    try:
        with gzip.open(temporary, "rb") if zipped else temporary.open("rb") as stream:
            header = nib.Nifti1Header.from_fileobj(stream)
            same = header.get_data_shape() == data.shape and header.get_data_dtype() == data.dtype
            # sform is stored in float32.
            same = same and np.allclose(header.get_sform(), affine, rtol=1e-6, atol=1e-4)
            same = same and _same_voxels(stream, data, int(header.get_data_offset()))
    except (OSError, EOFError, ValueError, zlib.error, nib.spatialimages.HeaderDataError) as error:
        raise OutputError(
            f"{name}: damaged while it was written ({type(error).__name__}); nothing was saved"
        ) from None
    if not same:
        raise OutputError(f"{name}: read back different from what was written; nothing was saved")


def _same_voxels(stream: IO[bytes], data: npt.NDArray[Any], offset: int) -> bool:
    stream.seek(offset)
    slabs = data.reshape((*data.shape[:2], -1), order="F")
    for index in range(slabs.shape[2]):
        expected = slabs[:, :, index].tobytes(order="F")
        if stream.read(len(expected)) != expected:
            return False
    return stream.read(1) == b""
