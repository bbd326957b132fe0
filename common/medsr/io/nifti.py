"""Strict NIfTI reading: the named file, its whole content and its geometry, or one line that says why not.

Widespread readers accept truncated or corrupt ``.nii.gz`` files with half of the voxels wrong, open ``x.nii``
when asked for ``x.nii.gz``, and replace a broken affine by the voxel sizes. Here nibabel parses the header,
and the voxels are streamed to the end of the file so that the gzip checksum is always compared.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, GeometryError
from medsr.geometry import FloatArray, spacing_of, validate_affine

__all__ = [
    "SIZE_LIMIT",
    "VolumeHeader",
    "read_nifti",
    "read_nifti_header",
    "refuse_beyond_memory",
    "refuse_constant",
    "refuse_oversize",
    "sidecar_path",
]

SIZE_LIMIT = 64 * 2**30
"""Largest volume in bytes, as float32, that is read at all."""

_GZIP_RATIO = 1032  # Deflate cannot expand a byte into more than this.
_TRAILING_LIMIT = 2**24
_HEADER_BYTES = 540  # The size of a NIfTI-2 header, the larger of the two.
_SIDECAR_LIMIT = 2**24
_LAST_CODE, _ALIGNED = 5, 2  # Of what a matrix refers to.
_STEP_UNITS = {8: "sec", 16: "msec", 24: "usec", 32: "hz", 40: "ppm", 48: "rads"}


@dataclass(frozen=True, eq=False)
class VolumeHeader:
    """What is known of a volume before its voxels are read.

    Spacing is not a field of its own: it is in the affine, and two copies could disagree.

    Args:
        path: the file, or the folder of a DICOM series.
        shape: voxels along X, Y, Z and, for 4D images, along the fourth axis.
        affine: voxel-to-world matrix, RAS+, in mm, float64.
        dtype: type of the stored voxels; what is read is always float32.
        slice_thickness_mm: nominal slice thickness, or None when it is not recorded; not the slice spacing.
        sform_code: NIfTI code of the sform (1, scanner, for DICOM).
        qform_code: NIfTI code of the qform (1, scanner, for DICOM).
        notes: warnings for the run report; they hold no patient data.
        step: of a 4D image the distance of its volumes, such as the repetition time; None when it is not recorded.
        step_unit: NIfTI's name of its unit: ``sec``, ``msec``, ``usec``, ``hz``, ``ppm``, ``rads`` or ``unknown``.

    Example:
        >>> VolumeHeader(Path("a.nii"), (8, 9, 4), np.eye(4), np.dtype("int16")).shape
        (8, 9, 4)
    """

    path: Path
    shape: tuple[int, ...]
    affine: FloatArray
    dtype: np.dtype[Any]
    slice_thickness_mm: float | None = None
    sform_code: int = 1
    qform_code: int = 1
    notes: tuple[str, ...] = ()
    step: float | None = None
    step_unit: str = "unknown"


def read_nifti_header(path: str | os.PathLike[str]) -> VolumeHeader:
    """Read and judge the header of a NIfTI file without touching its voxels.

    It is cheap enough to run over a whole folder before the first network is loaded. A file that passes can
    only fail later by damage inside its voxel data.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file. Exactly this file is read, also when a sibling of the other kind
            exists.

    Raises:
        DataError: if the file is missing, not NIfTI, of an unsupported type, or cannot hold what its header
            claims.
        GeometryError: if voxel sizes or affine are missing, not finite, singular or sheared.

    Example:
        >>> read_nifti_header("none.nii.gz")
        Traceback (most recent call last):
        medsr.errors.DataError: none.nii.gz: no such file

    Reference:
        The NIfTI-1 data format, https://nifti.nimh.nih.gov/nifti-1
    """
    return _parse(Path(path))[0]


def read_nifti(
    path: str | os.PathLike[str], *, allow_constant: bool = False
) -> tuple[npt.NDArray[np.float32], VolumeHeader]:
    """Read a NIfTI file whole, as float32 with slope and intercept applied.

    float32 holds every 16-bit value exactly and needs half the memory of nibabel's default. NaN and infinite
    voxels are refused, not repaired: only the user knows whether they mean background or damage.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        allow_constant: accept an image whose voxels are all equal, for example an empty label map.

    Shape:
        - Output: ``(X, Y, Z)`` or ``(X, Y, Z, T)``, in Fortran order like the file.

    Raises:
        DataError: as :func:`read_nifti_header`, and if the voxel data are truncated, corrupt, not finite or
            constant.
        GeometryError: as :func:`read_nifti_header`.

    Example:
        >>> read_nifti("none.nii")
        Traceback (most recent call last):
        medsr.errors.DataError: none.nii: no such file
    """
    path = Path(path)
    header, offset, slope, intercept = _parse(path)
    refuse_oversize(path.name, 4 * int(np.prod(header.shape, dtype=object)))
    array = np.empty(header.shape, dtype=np.float32, order="F")
    slabs = array.reshape((*header.shape[:2], -1), order="F")
    slab_bytes = header.dtype.itemsize * header.shape[0] * header.shape[1]
    with _stream(path) as stream, np.errstate(over="ignore", invalid="ignore"):
        _skip(stream, offset, path.name)
        for index in range(slabs.shape[2]):
            raw = stream.read(slab_bytes)
            if len(raw) != slab_bytes:
                raise DataError(
                    f"{path.name}: truncated, the voxel data end in slab {index} of {slabs.shape[2]}; copy "
                    "it again"
                )
            slabs[:, :, index] = np.frombuffer(raw, dtype=header.dtype).reshape(header.shape[:2], order="F")
        # The gzip checksum is compared only when the end of the stream is reached.
        trailing = 0
        while chunk := stream.read(2**20):
            trailing += len(chunk)
            if trailing > _TRAILING_LIMIT:
                raise DataError(
                    f"{path.name}: more than {_TRAILING_LIMIT} bytes follow the voxels; wrong header?"
                )
        if slope != 1.0:
            array *= np.float32(slope)
        if intercept != 0.0:
            array += np.float32(intercept)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise DataError(
            f"{path.name}: {bad} of {array.size} voxels are NaN or infinite; repair the image first"
        )
    if not allow_constant:
        refuse_constant(path.name, array)
    return array, header


def refuse_constant(name: str, array: npt.NDArray[np.float32]) -> None:
    """Raise if all voxels have one value: no normalisation and no metric is defined for such an image.

    Raises:
        DataError: if minimum and maximum are equal.

    Example:
        >>> refuse_constant("a.nii", np.array([1.0, 2.0], dtype=np.float32))
    """
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise DataError(f"{name}: constant image, all {array.size} voxels are {low:g}; nothing to process")


def refuse_oversize(name: str, needed: int) -> None:
    """Raise before an allocation that cannot succeed and would get the process killed.

    Args:
        name: how the error message calls the image.
        needed: bytes of the float32 array.

    Raises:
        DataError: if that is above :data:`SIZE_LIMIT` or above the free memory.

    Example:
        >>> refuse_oversize("a.nii", 4096)
    """
    if needed > SIZE_LIMIT:
        raise DataError(
            f"{name}: needs {needed / 2**30:.1f} GiB as float32, the limit is {SIZE_LIMIT / 2**30:.0f} GiB; "
            "crop it, or check the header"
        )
    refuse_beyond_memory(name, needed)


def refuse_beyond_memory(name: str, needed: int) -> None:
    """Raise where arrays of so many bytes do not fit into the free memory; arguments as :func:`refuse_oversize`.

    Raises:
        DataError: if they do not.

    Example:
        >>> refuse_beyond_memory("a.nii", 4096)
    """
    free = _free_memory()
    if free is not None and needed > free:
        raise DataError(
            f"{name}: needs {needed / 2**30:.1f} GiB as float32, {free / 2**30:.1f} GiB of memory are free; "
            "crop it or use a larger machine"
        )


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _parse(path: Path) -> tuple[VolumeHeader, int, float, float]:
    """Header, offset of the voxels in bytes, slope and intercept."""
    import nibabel as nib

    name = path.name
    file_size = _sniff(path)
    with _stream(path) as stream:
        head = stream.read(_HEADER_BYTES)
    kind = _kind(head, name)
    # Without its checks nibabel keeps the raw fields, and without a stream it does not follow the extensions.
    raw = kind(head[: kind.sizeof_hdr], check=False)

    try:
        dtype = raw.get_data_dtype()
    except (KeyError, nib.spatialimages.HeaderDataError):
        raise DataError(f"{name}: unsupported voxel type (NIfTI code {int(raw['datatype'])})") from None
    if dtype.kind == "c":
        raise DataError(f"{name}: complex voxels; save magnitude (and phase) as real images first")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise DataError(
            f"{name}: voxel type {_type_name(raw)} is not supported; convert to a scalar type first"
        )
    if int(raw["bitpix"]) != 8 * dtype.itemsize:
        raise DataError(
            f"{name}: bitpix is {int(raw['bitpix'])}, {_type_name(raw)} has {8 * dtype.itemsize} bits"
        )

    shape = _shape(raw, name)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    offset = float(raw["vox_offset"])
    if not np.isfinite(offset) or offset < int(raw["sizeof_hdr"]) + 4 or offset > 2**40:
        raise DataError(f"{name}: vox_offset {offset:g} cannot be right; the header is damaged")
    _refuse_impossible(name, file_size, int(offset), size)
    refuse_oversize(name, size // dtype.itemsize * 4)

    try:
        slope, intercept = raw.get_slope_inter()
    except nib.spatialimages.HeaderDataError:
        raise DataError(
            f"{name}: scl_slope or scl_inter is not a finite number; repair the header first"
        ) from None

    notes: list[str] = []
    affine, forms_differ = _affine(raw, name, notes)
    thickness = _sidecar(path, affine, notes)
    step = float(raw["pixdim"][4]) if len(shape) == 4 else 0.0
    header = VolumeHeader(
        path=path,
        shape=shape,
        affine=affine,
        dtype=dtype,
        slice_thickness_mm=thickness,
        sform_code=_known_code(raw["sform_code"]),
        # Results have one matrix in both forms, and must not say of the sform's that it is what the qform was.
        qform_code=_known_code(raw["sform_code" if forms_differ else "qform_code"]),
        notes=tuple(notes),
        step=step if np.isfinite(step) and step > 0 else None,
        step_unit=_STEP_UNITS.get(int(raw["xyzt_units"]) & 0x38, "unknown"),
    )
    return (
        header,
        int(offset),
        1.0 if slope is None else float(slope),
        0.0 if slope is None else float(intercept),
    )


def _sniff(path: Path) -> int:
    """Size of the file in bytes, after its name was compared with its first bytes."""
    name = path.name
    lower = name.lower()
    if not lower.endswith((".nii", ".nii.gz")):
        raise DataError(f"{name}: not a NIfTI file name; expected .nii or .nii.gz")
    if not path.is_file():
        if path.is_symlink() and not path.exists():
            raise DataError(f"{name}: a link to a file that is not there")
        raise DataError(f"{name}: {'not a file' if path.exists() else 'no such file'}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
    if size == 0:
        raise DataError(f"{name}: empty file")
    zipped = magic[:2] == b"\x1f\x8b"
    if zipped and not lower.endswith(".gz"):
        raise DataError(f"{name}: is gzip-compressed but not named so; rename it to {name}.gz")
    if not zipped and lower.endswith(".gz"):
        plain = magic in (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
        advice = f"rename it to {name[:-3]}" if plain else "copy or convert it again"
        raise DataError(f"{name}: named .gz but is not gzip-compressed; {advice}")
    return size


@contextmanager
def _stream(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of the file; damage on the way becomes a DataError."""
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except EOFError:
        raise DataError(f"{path.name}: truncated gzip file; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path.name}: damaged gzip file (data or CRC do not match); copy it again") from None
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from None


def _skip(stream: IO[bytes], count: int, name: str) -> None:
    while count > 0:
        chunk = stream.read(min(count, 2**20))
        if not chunk:
            raise DataError(f"{name}: truncated, the file ends before its voxels start; copy it again")
        count -= len(chunk)


def _kind(head: bytes, name: str) -> Any:
    """The nibabel header class for these first bytes."""
    import nibabel as nib

    if len(head) < 348:
        raise DataError(f"{name}: not a NIfTI file, only {len(head)} bytes long")
    if head[344:348] == b"n+1\x00":
        return nib.Nifti1Header
    if head[4:8] == b"n+2\x00" and len(head) >= _HEADER_BYTES:
        return nib.Nifti2Header
    if head[344:348] == b"ni1\x00" or head[4:8] == b"ni2\x00":
        raise DataError(f"{name}: the header of a .hdr/.img pair; convert it to a single .nii file first")
    raise DataError(f"{name}: not a NIfTI file, the mark n+1 or n+2 is missing in its header")


def _type_name(raw: Any) -> str:
    from nibabel.nifti1 import data_type_codes

    return str(data_type_codes.label[int(raw["datatype"])])


def _shape(raw: Any, name: str) -> tuple[int, ...]:
    count = int(raw["dim"][0])
    if not 1 <= count <= 7:
        raise DataError(f"{name}: dim[0] is {count}; the header is damaged")
    shape = tuple(int(n) for n in raw.get_data_shape())
    text = " x ".join(map(str, shape))
    if any(n < 1 for n in shape):
        raise DataError(f"{name}: an axis has no voxels (shape {text})")
    if count > 4:
        raise DataError(
            f"{name}: {count} axes (shape {text}); only 3D and 4D images are read, split it first"
        )
    if count < 3 or min(shape[:3]) < 2:
        raise DataError(f"{name}: a 2D image (shape {text}); a volume with at least 2 slices is needed")
    return shape


def _refuse_impossible(name: str, file_size: int, offset: int, size: int) -> None:
    zipped = name.lower().endswith(".gz")
    room = file_size * _GZIP_RATIO if zipped else file_size
    if offset > room:
        raise DataError(f"{name}: vox_offset {offset} is beyond the end of the file ({file_size} bytes)")
    if offset + size > room:
        raise DataError(
            f"{name}: the header claims {offset + size} bytes, the file of {file_size} bytes cannot hold "
            "them; "
            "truncated, or a wrong header"
        )


def _known_code(code: Any) -> int:
    """A code of the standard; what lies beyond it counts as aligned to something."""
    return int(code) if int(code) <= _LAST_CODE else _ALIGNED


def _affine(raw: Any, name: str, notes: list[str]) -> tuple[FloatArray, bool]:
    """Voxel-to-world matrix, and whether the qform has another one."""
    differ = False
    unit = int(raw["xyzt_units"]) & 7
    if unit in (1, 3):
        raise GeometryError(
            f"{name}: spatial unit is {'metre' if unit == 1 else 'micron'}; convert the header to mm"
        )
    sizes = np.asarray(raw["pixdim"][1:4], dtype=np.float64)
    if not np.isfinite(sizes).all() or (sizes <= 0).any():
        raise GeometryError(
            f"{name}: voxel sizes (pixdim) are {', '.join(f'{v:g}' for v in sizes)}; "
            "all three must be positive, repair the header first"
        )
    sform_code, qform_code = int(raw["sform_code"]), int(raw["qform_code"])
    qform = _qform(raw) if qform_code > 0 else None
    if sform_code > 0:
        affine = validate_affine(raw.get_sform(), name=f"{name}: sform")
        if qform_code > 0:
            distance = np.inf if qform is None else _distance(affine, qform, raw.get_data_shape()[:3])
            if not distance <= 1e-3:
                by = (
                    "qform is invalid"
                    if qform is None
                    else f"sform and qform differ by up to {distance:.4g} mm"
                )
                notes.append(f"{by}; sform is used, programs that use the qform show the input elsewhere")
                differ = True
    elif qform_code > 0:
        if qform is None:
            raise GeometryError(
                f"{name}: the qform is not a rotation and there is no sform; repair the header first"
            )
        affine = validate_affine(qform, name=f"{name}: qform")
    else:
        affine = validate_affine(raw.get_base_affine(), name=name)
        notes.append(
            "sform and qform codes are both 0: voxel sizes are used, orientation and position are unknown"
        )
    spacing = spacing_of(affine)
    if np.abs(spacing - sizes).max() > 0.01 * sizes.min():
        notes.append(
            f"voxel sizes {_millimetres(sizes)} mm differ from the affine's {_millimetres(spacing)} mm"
        )
    return affine, differ


def _qform(raw: Any) -> FloatArray | None:
    from nibabel.spatialimages import HeaderDataError

    header = raw.copy()
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # The standard reads a missing handedness as 1.
    try:
        matrix = np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError, FloatingPointError):
        return None
    return matrix if np.isfinite(matrix).all() else None


def _distance(first: FloatArray, second: FloatArray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between the world positions that two affines give the corner voxels."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    voxels = np.vstack([corners, np.ones((1, corners.shape[1]))])
    return float(np.sqrt((((first - second) @ voxels)[:3] ** 2).sum(axis=0)).max())


def sidecar_path(path: str | Path) -> Path:
    """Where the BIDS sidecar of a NIfTI file lies, if it has one.

    Example:
        >>> sidecar_path("scans/a.nii.gz").name
        'a.json'
    """
    path = Path(path)
    stem = path.name[: -len(".nii.gz")] if path.name.lower().endswith(".gz") else path.name[: -len(".nii")]
    return path.with_name(f"{stem}.json")


def _sidecar(path: Path, affine: FloatArray, notes: list[str]) -> float | None:
    """Slice thickness from the BIDS sidecar ``<name>.json``; nothing else of it is kept."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return None
    try:
        if sidecar.stat().st_size > _SIDECAR_LIMIT:
            raise ValueError
        # Windows programs put a byte order mark before UTF-8.
        content = json.loads(sidecar.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise TypeError
    except (OSError, ValueError, TypeError, RecursionError):
        notes.append("the JSON sidecar cannot be read and is ignored")
        return None
    largest = float(spacing_of(affine).max())
    between = _positive(content.get("SpacingBetweenSlices"))
    if between is not None and abs(between - largest) > 0.01 * largest:
        notes.append(
            f"sidecar SpacingBetweenSlices {between:.4g} mm differs from the affine's {largest:.4g} mm"
        )
    thickness = _positive(content.get("SliceThickness"))
    if thickness is None and "SliceThickness" in content:
        notes.append("sidecar SliceThickness is not a positive number and is ignored")
    return thickness


def _positive(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # JSON has integers without end, which no float can hold.
    with suppress(OverflowError):
        return float(value) if 0 < float(value) < np.inf else None
    return None


def _millimetres(values: npt.ArrayLike) -> str:
    return " x ".join(f"{float(v):.4g}" for v in np.asarray(values).ravel())
