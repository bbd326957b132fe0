"""Strict reading of a DICOM series of single-frame images, with pydicom alone.

The usual readers load a series with a missing slice, a duplicate, two phases or a tilted gantry as if it were
a regular volume, with a wrong spacing and no error. Here the geometry comes from the positions, every slice
is compared with the grid, and what does not fit is named. Only the tags of the list below are ever parsed, so
no patient data can reach a message, a note or an output.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, GeometryError, SettingError
from medsr.geometry import FloatArray, validate_affine
from medsr.io.links import refuse_leaving_link
from medsr.io.nifti import VolumeHeader, refuse_constant, refuse_oversize

__all__ = ["is_dicom_series", "read_series", "read_series_header", "series_files"]

_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "LossyImageCompression",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "Modality",
    "ImageType",
    "PerFrameFunctionalGroupsSequence",
]
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_INFLATED_LIMIT = 512 * 2**20
_SAME_DEPTH_MM = 0.01


@dataclass(frozen=True)
class _Image:
    """The facts of one file that geometry and decoding need."""

    path: Path
    series: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    thickness: float | None
    between: float | None
    slope: float
    intercept: float
    lossy: bool
    padding: tuple[int, int] | None
    modality: str
    kind: frozenset[str]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


class _Refused(NamedTuple):
    """A file that is not read, and why: what it has to do with is only known once the series is chosen."""

    series: str
    reason: DataError


def is_dicom_series(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds at least one file that looks like a DICOM image, judged by its first bytes.

    Example:
        >>> is_dicom_series("no-such-folder")
        False
    """
    folder = Path(folder)
    return folder.is_dir() and next(series_files(folder), None) is not None


def series_files(folder: Path) -> Iterator[Path]:
    """Files of a folder that look like DICOM, sorted, without hidden ones and the index of a disc."""
    for path in sorted(folder.iterdir()):
        if _may_be_slice(path) and _looks_like_dicom(path) is not None:
            yield path


def _may_be_slice(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.upper() != "DICOMDIR" and path.is_file()


def read_series_header(
    folder: str | os.PathLike[str], *, series_uid: str | None = None, follow_links: bool | None = None
) -> VolumeHeader:
    """Read and judge the headers of a DICOM series.

    Pixels are read only where two images share a position, to tell a copy from another image.

    Args:
        folder: folder with the files of one series; sub-folders are not searched.
        series_uid: which series, when the folder holds several: its SeriesInstanceUID or the end of it.
        follow_links: read files behind links that leave the folder, see :func:`~medsr.io.links.refuse_leaving_link`.

    Raises:
        SettingError: if ``series_uid`` was read as a number with a fraction.
        DataError: if there is no image, or one is damaged, in colour, multi-frame or has no decoder here.
        GeometryError: if positions are missing, repeated, irregular or sheared, or the images differ in grid.

    Example:
        >>> read_series_header("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such folder
    """
    return _survey(Path(folder), series_uid, follow_links=follow_links)[1]


def read_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    follow_links: bool | None = None,
    allow_constant: bool = False,
) -> tuple[npt.NDArray[np.float32], VolumeHeader]:
    """Read a DICOM series as one float32 volume with the rescale of every slice applied.

    Slices are ordered by position, never by InstanceNumber. MONOCHROME1 is turned so that larger is brighter.

    Args:
        folder: folder with the files of one series.
        series_uid: as in :func:`read_series_header`.
        follow_links: the same.
        allow_constant: accept an image whose voxels are all equal.

    Shape:
        - Output: ``(X, Y, Z)`` = (columns, rows, slices), in Fortran order.

    Raises:
        DataError: as :func:`read_series_header`, and if pixel data are truncated, undecodable or constant.
        GeometryError: as :func:`read_series_header`.

    Example:
        >>> read_series("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such folder
    """
    folder = Path(folder)
    images, header = _survey(folder, series_uid, follow_links=follow_links)
    stack = np.empty((len(images), images[0].rows, images[0].columns), dtype=np.float32)
    for index, image in enumerate(images):
        stack[index] = _pixels(image)
    padding = np.isnan(stack)
    if padding.any():
        # A value that means nothing, often the lowest or highest there is, would decide about the intensity scale.
        stack[padding] = 0 if padding.all() else stack[~padding].min()
    array = stack.transpose(2, 1, 0)
    if not np.isfinite(array).all():
        raise DataError(
            f"{_name(folder)}: the rescaled voxels are not finite; check RescaleSlope and RescaleIntercept"
        )
    if not allow_constant:
        refuse_constant(_name(folder), array)
    return array, header


def _survey(
    folder: Path, series_uid: str | None, *, follow_links: bool | None
) -> tuple[list[_Image], VolumeHeader]:
    name = _name(folder)
    found, notes = _scan(folder, follow_links=follow_links)
    images = _one_series(found, series_uid, name)
    images = _in_order(_same_grid(images, name), name, notes)
    affine = _affine(images, name)
    _refuse_irregular(images, affine, name)
    validate_affine(affine, name=name)
    refuse_oversize(name, 4 * images[0].rows * images[0].columns * len(images))
    thickness = _thickness(images, float(np.linalg.norm(affine[:3, 2])), notes)
    if images[0].photometric == "MONOCHROME1":
        notes.append("MONOCHROME1 was inverted over its stored range: larger is brighter")
    if any(image.lossy for image in images):
        notes.append("the source was compressed with loss")
    if any(image.padding for image in images):
        notes.append("PixelPaddingValue is set: voxels that hold it become background")
    _note_origin(images, notes)
    header = VolumeHeader(
        path=folder,
        shape=(images[0].columns, images[0].rows, len(images)),
        affine=affine,
        dtype=images[0].dtype,
        slice_thickness_mm=thickness,
        notes=tuple(notes),
    )
    return images, header


def _note_origin(images: list[_Image], notes: list[str]) -> None:
    """What else than an acquired MR image the series may be; only codes are quoted, never free text."""
    for modality in sorted({image.modality for image in images} - {"MR", ""}):
        notes.append(f"Modality is {modality if re.fullmatch('[A-Z]{2,6}', modality) else 'unknown'}, not MR")
    for word in ("DERIVED", "SECONDARY"):
        count = sum(word in image.kind for image in images)
        if count:
            notes.append(
                f"{count} of {len(images)} images are marked {word}: not as the scanner acquired them"
            )


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name


# --- Files --------------------------------------------------------------------------------------------------


def _scan(folder: Path, *, follow_links: bool | None) -> tuple[list[_Image | _Refused], list[str]]:
    name = _name(folder)
    if not folder.exists():
        raise DataError(f"{name}: no such folder")
    if not folder.is_dir():
        raise DataError(f"{name}: not a folder; a DICOM series is given by its folder")
    images: list[_Image | _Refused] = []
    skipped = others = 0
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
    for path in paths:
        if path.is_dir():
            continue
        if path.is_symlink() and not path.exists() and not path.name.startswith("."):
            # It may be a slice that was not fetched.
            raise DataError(f"{path.name}: a link to a file that is not there")
        if not _may_be_slice(path):
            skipped += 1
            continue
        refuse_leaving_link(path, follow_links=follow_links, instead="put a copy there instead")
        preamble = _looks_like_dicom(path)
        if preamble is None:
            skipped += 1
            continue
        image = _image(path, preamble)
        if image is None:
            others += 1
        else:
            images.append(image)
    if not images:
        raise DataError(f"{name}: no DICOM image in this folder ({skipped + others} other files)")
    notes = [f"{skipped} files that are not DICOM were skipped"] if skipped else []
    if others:
        notes.append(f"{others} DICOM files that are not images were skipped")
    return images, notes


def _looks_like_dicom(path: Path) -> bool | None:
    """True with the DICM mark, False for a data set without preamble, None for anything else."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from None
    if head[128:132] == b"DICM":
        return True
    # Without preamble a file starts with an element of group 2 or 8, little endian, element number below 256.
    if len(head) == 132 and head[:2] in (b"\x02\x00", b"\x08\x00") and head[3] == 0:
        return False
    return None


def _dataset(path: Path, preamble: bool, *, pixels: bool) -> tuple[Any, int]:
    """The listed tags of a file, and where parsing stopped."""
    import pydicom

    tags: list[Any] = [*_TAGS, "PixelData"] if pixels else list(_TAGS)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if _DEFLATED in file.read(2048):
                _refuse_bomb(path)
            file.seek(0)
            dataset = pydicom.dcmread(
                file, stop_before_pixels=not pixels, specific_tags=tags, force=not preamble
            )
            return dataset, file.tell()
    except DataError:
        raise
    except Exception as error:  # pydicom raises many kinds, and their texts may quote tag values
        raise DataError(f"{path.name}: damaged DICOM file ({type(error).__name__}); copy it again") from None


def _refuse_bomb(path: Path) -> None:
    """Inflate a deflated file in bounded pieces, because pydicom inflates it whole even for its header."""
    with path.open("rb") as file:
        file.seek(140)  # value of the group length: preamble, mark, tag, type and length come before it
        file.seek(144 + struct.unpack("<I", file.read(4))[0])
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        total, data = 0, file.read(2**20)
        while data and total <= _INFLATED_LIMIT:
            total += len(inflater.decompress(data, 2**24))
            data = inflater.unconsumed_tail or file.read(2**20)
    if total > _INFLATED_LIMIT:
        raise DataError(
            f"{path.name}: deflated content is above {_INFLATED_LIMIT // 2**20} MiB for one slice"
        )


def _image(path: Path, preamble: bool) -> _Image | _Refused | None:
    """The facts of one file; None for a DICOM object that is not an image."""
    dataset, stopped = _dataset(path, preamble, pixels=False)
    try:
        return _facts(path, dataset, preamble, stopped)
    except DataError as error:
        reason = error
    except Exception as error:
        reason = DataError(f"{path.name}: damaged DICOM header ({type(error).__name__}); copy it again")
    series = _text(dataset, "SeriesInstanceUID")
    if not series:
        raise reason
    return _Refused(series, reason)


def _facts(path: Path, dataset: Any, preamble: bool, stopped: int) -> _Image | None:
    from pydicom.uid import UID

    name = path.name
    sop_class = UID(_text(dataset, "SOPClassUID"))
    rows, columns = dataset.get("Rows"), dataset.get("Columns")
    if rows is None or columns is None:
        if (
            sop_class
            and not sop_class.is_private
            and sop_class.name != sop_class
            and "Image" not in sop_class.name
        ):
            return None
        if not sop_class and not preamble:
            return None
        # Scanners keep protocols and raw data in classes of their own.
        if sop_class and sop_class.is_private and stopped >= path.stat().st_size:
            return None
        raise DataError(f"{name}: Rows or Columns is missing; the file is damaged or cut")
    frames = _number(dataset, "NumberOfFrames", name=name)
    if "PerFrameFunctionalGroupsSequence" in dataset or (frames or 1) > 1 or "Enhanced" in sop_class.name:
        raise DataError(
            f"{name}: multi-frame (enhanced) DICOM is not supported yet; convert it to NIfTI with dcm2niix"
        )
    if "MOSAIC" in _text(dataset, "ImageType"):
        raise DataError(f"{name}: a mosaic of many slices in one image; convert it to NIfTI with dcm2niix")
    photometric = _text(dataset, "PhotometricInterpretation")
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        kind = (
            photometric
            if photometric in ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422")
            else "not a grey-scale"
        )
        raise DataError(
            f"{name}: {kind} image ({samples} samples per pixel); only MONOCHROME1 and 2 are read"
        )
    if "ModalityLUTSequence" in dataset:
        raise DataError(
            f"{name}: values are defined by a Modality LUT, which is not supported; convert it first"
        )
    allocated, stored = int(dataset.get("BitsAllocated") or 0), int(dataset.get("BitsStored") or 0)
    high = int(dataset.get("HighBit") if dataset.get("HighBit") is not None else stored - 1)
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1:
        raise DataError(
            f"{name}: unsupported pixel layout (allocated {allocated}, stored {stored}, high bit {high})"
        )
    slope = _number(dataset, "RescaleSlope", name=name)
    intercept = _number(dataset, "RescaleIntercept", name=name)
    image = _Image(
        path=path,
        series=_text(dataset, "SeriesInstanceUID"),
        rows=int(rows),
        columns=int(columns),
        bits_allocated=allocated,
        bits_stored=stored,
        signed=bool(dataset.get("PixelRepresentation")),
        photometric=photometric,
        position=_numbers(dataset, "ImagePositionPatient", name=name, count=3),
        orientation=_numbers(dataset, "ImageOrientationPatient", name=name, count=6),
        pixel_spacing=_numbers(dataset, "PixelSpacing", name=name, count=2),
        thickness=_number(dataset, "SliceThickness", name=name),
        between=_number(dataset, "SpacingBetweenSlices", name=name),
        slope=1.0 if slope is None else slope,
        intercept=intercept or 0.0,
        lossy=_text(dataset, "LossyImageCompression") == "01",
        padding=_padding(dataset),
        modality=_text(dataset, "Modality"),
        kind=frozenset(_text(dataset, "ImageType").split("\\"))
        | ({"SECONDARY"} if "Secondary Capture" in sop_class.name else set()),
    )
    if image.rows < 1 or image.columns < 1:
        raise DataError(f"{name}: no pixels ({image.rows} rows, {image.columns} columns)")
    if image.slope == 0:
        raise DataError(f"{name}: RescaleSlope is 0; the header is damaged")
    _refuse_unreadable_pixels(image, dataset, stopped)
    return image


def _refuse_unreadable_pixels(image: _Image, dataset: Any, stopped: int) -> None:
    from pydicom.pixels import get_decoder

    name, syntax = image.path.name, _syntax(dataset)
    try:
        encapsulated = syntax.is_compressed and not syntax.is_deflated
    except ValueError:
        raise DataError(f"{name}: unknown transfer syntax {syntax}; convert the series") from None
    if encapsulated:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise DataError(
                f"{name}: no decoder for the transfer syntax {syntax.name} ({syntax}); install pylibjpeg, "
                "python-gdcm or convert the series"
            )
        return
    if syntax.is_deflated:
        return  # The stop position is that of the inflated copy; the pixels are measured when they are read.
    with image.path.open("rb") as file:
        file.seek(stopped)
        element = file.read(12)
    order = "<" if syntax.is_little_endian else ">"
    if len(element) < 8 or struct.unpack(f"{order}HH", element[:4]) != (0x7FE0, 0x0010):
        raise DataError(f"{name}: no pixel data; the file is damaged or cut")
    start = 8 if syntax.is_implicit_VR else 12
    declared = struct.unpack(f"{order}I", element[start - 4 : start].rjust(4, b"\0"))[0]
    _refuse_short(image, min(declared, image.path.stat().st_size - stopped - start))


def _refuse_short(image: _Image, found: int) -> None:
    expected = image.rows * image.columns * image.bits_allocated // 8
    if found < expected:
        raise DataError(
            f"{image.path.name}: truncated, {max(found, 0)} bytes of pixel data instead of {expected}; copy "
            "it again"
        )


def _syntax(dataset: Any) -> Any:
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        syntax = ImplicitVRLittleEndian if dataset.original_encoding[0] else ExplicitVRLittleEndian
    return syntax


def _text(dataset: Any, keyword: str) -> str:
    """A short text value from its raw bytes: no validation, hence no warning that would quote it."""
    value = dataset.get_item(keyword).value if keyword in dataset else None
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    elif value is not None and not isinstance(value, str):
        value = "\\".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return (value or "").strip(" \0")


def _numbers(dataset: Any, keyword: str, *, name: str, count: int = 1) -> tuple[float, ...] | None:
    """A DS or IS value from its raw bytes, also when longer than the standard allows; None if absent."""
    text = _text(dataset, keyword)
    if not text:
        return None
    try:
        values = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        raise DataError(f"{name}: {keyword} is not a number; the header is damaged") from None
    if len(values) < count or not np.isfinite(values).all():
        raise DataError(f"{name}: {keyword} must hold {count} finite numbers; the header is damaged")
    return values[:count]


def _padding(dataset: Any) -> tuple[int, int] | None:
    """Lowest and highest stored value that means padding, or None."""
    signed = bool(dataset.get("PixelRepresentation"))
    ends = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        element = dataset.get_item(keyword) if keyword in dataset else None
        value = None if element is None else element.value
        if isinstance(value, bytes):
            # Whether it is signed is a matter of the pixels, and often told wrongly.
            order = "little" if element.is_little_endian else "big"
            value = int.from_bytes(value, order, signed=signed) if value else None
        if value is not None:
            ends.append(int(value))
    return (min(ends), max(ends)) if ends else None


def _number(dataset: Any, keyword: str, *, name: str) -> float | None:
    values = _numbers(dataset, keyword, name=name)
    return None if values is None else values[0]


# --- Geometry -----------------------------------------------------------------------------------------------


def _one_series(images: Sequence[_Image | _Refused], series_uid: str | None, name: str) -> list[_Image]:
    counts = Counter(image.series for image in images)
    if series_uid is not None:
        # A command line makes numbers of digits; one with a dot loses its last zeros.
        if isinstance(series_uid, float):
            raise SettingError(f"series_uid was read as the number {series_uid}; give more of the UID")
        series_uid = str(series_uid)
        matching = [uid for uid in counts if uid.endswith(series_uid)]
        if len(matching) != 1:
            raise DataError(
                f"{name}: {len(matching)} of {len(counts)} series end in {series_uid[-6:]}; {_list(counts)}"
            )
        images = [image for image in images if image.series == matching[0]]
    elif len(counts) > 1:
        raise GeometryError(
            f"{name}: {len(counts)} series in one folder ({_list(counts)}); "
            "set series_uid to the end of one's UID, or put each into a folder of its own"
        )
    for image in images:
        if isinstance(image, _Refused):
            raise image.reason
    return [image for image in images if isinstance(image, _Image)]


def _list(counts: Counter[str]) -> str:
    shown = [f"...{uid[-6:]}: {count} images" for uid, count in sorted(counts.items())[:6]]
    return ", ".join(shown) + (", ..." if len(counts) > 6 else "")


def _same_grid(images: list[_Image], name: str) -> list[_Image]:
    if len(images) < 2:
        raise GeometryError(f"{name}: a single slice; a volume with at least 2 slices is needed")
    for keyword, attribute in (
        ("ImagePositionPatient", "position"),
        ("ImageOrientationPatient", "orientation"),
        ("PixelSpacing", "pixel_spacing"),
    ):
        missing = [image.path.name for image in images if getattr(image, attribute) is None]
        if missing:
            raise GeometryError(
                f"{name}: {keyword} is missing in {len(missing)} of {len(images)} images (first "
                f"{missing[0]}); "
                "export the series with its geometry"
            )
    _refuse_mixed(images, name, "matrix size", lambda a, b: (a.rows, a.columns) == (b.rows, b.columns))
    _refuse_mixed(
        images, name, "PixelSpacing", lambda a, b: np.allclose(a.pixel_spacing, b.pixel_spacing, 1e-4, 0)
    )
    _refuse_mixed(
        images, name, "orientation", lambda a, b: np.allclose(a.orientation, b.orientation, rtol=0, atol=1e-4)
    )
    _refuse_mixed(
        images,
        name,
        "pixel type",
        lambda a, b: (a.dtype, a.bits_stored, a.photometric) == (b.dtype, b.bits_stored, b.photometric),
    )
    if min(images[0].pixel_spacing or (0,)) <= 0:
        raise GeometryError(f"{name}: PixelSpacing must be positive, got {images[0].pixel_spacing}")
    row, column = _directions(images[0])
    if abs(row @ row - 1) > 2e-3 or abs(column @ column - 1) > 2e-3 or abs(row @ column) > 1e-3:
        raise GeometryError(f"{name}: ImageOrientationPatient does not hold two perpendicular unit vectors")
    if min(images[0].rows, images[0].columns) < 2:
        raise GeometryError(
            f"{name}: images of {images[0].rows} rows and {images[0].columns} columns are not a volume"
        )
    return images


def _refuse_mixed(images: list[_Image], name: str, what: str, same: Callable[[_Image, _Image], bool]) -> None:
    odd = [image for image in images if not same(images[0], image)]
    if not odd:
        return
    if 2 * len(odd) > len(images):  # The first image is the odd one.
        odd = [image for image in images if same(images[0], image)]
    raise GeometryError(
        f"{name}: {len(odd)} of {len(images)} images have another {what} (first {odd[0].path.name}); "
        "remove the localiser or split the series"
    )


def _directions(image: _Image) -> tuple[FloatArray, FloatArray]:
    """Directions of increasing column and row index, in patient coordinates (LPS)."""
    orientation = np.asarray(image.orientation, dtype=np.float64)
    return orientation[:3], orientation[3:]


def _depths(images: list[_Image]) -> FloatArray:
    """Positions along the normal, in mm."""
    normal = np.cross(*_directions(images[0]))
    normal /= np.linalg.norm(normal)
    return np.asarray([np.dot(image.position or (), normal) for image in images], dtype=np.float64)


def _is_copy(first: _Image, other: _Image) -> bool:
    return np.allclose(first.position, other.position, rtol=0, atol=_SAME_DEPTH_MM) and np.array_equal(
        _pixels(first), _pixels(other), equal_nan=True
    )


def _in_order(images: list[_Image], name: str, notes: list[str]) -> list[_Image]:
    """Images sorted along the normal, without copies of the same image."""
    depths = _depths(images)
    order = np.argsort(depths, kind="stable")
    groups: list[list[_Image]] = []
    last = -np.inf
    for index in order:
        if depths[index] - last < _SAME_DEPTH_MM:
            groups[-1].append(images[index])
        else:
            groups.append([images[index]])
        last = depths[index]
    kept, dropped = [], 0
    for index, group in enumerate(groups):
        first = group[0]
        for other in group[1:]:
            # The comparison reads pixels, but only of images that claim the same place.
            if _is_copy(first, other):
                dropped += 1
                continue
            sizes = {len(g) for g in groups}
            if len(sizes) == 1 and len(groups) > 1:
                raise GeometryError(
                    f"{name}: the same {len(groups)} positions occur {len(group)} times with different "
                    "pixels "
                    "(temporal phases, echoes or b-values); split the series first"
                )
            several = sum(not all(_is_copy(g[0], one) for one in g[1:]) for g in groups)
            if several > 1:
                raise GeometryError(
                    f"{name}: {several} of {len(groups)} positions occur more than once, with different pixels "
                    "(temporal phases, echoes or b-values, some incomplete); split the series first"
                )
            raise GeometryError(
                f"{name}: two different images at one position, slice index {index} ({first.path.name}, "
                f"{other.path.name}); remove one"
            )
        kept.append(first)
    if dropped:
        notes.append(f"{dropped} identical copies of slices were dropped")
    if len(kept) < 2:
        raise GeometryError(f"{name}: a single slice; a volume with at least 2 slices is needed")
    return kept


def _affine(images: list[_Image], name: str) -> FloatArray:
    """Voxel-to-world matrix, RAS+; its slice column is the mean step from the first to the last slice."""
    first, last = (np.asarray(images[i].position, dtype=np.float64) for i in (0, -1))
    row, column = _directions(images[0])
    between_rows, between_columns = images[0].pixel_spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0] = row / np.linalg.norm(row) * between_columns
    affine[:3, 1] = column / np.linalg.norm(column) * between_rows
    affine[:3, 2] = (last - first) / (len(images) - 1)
    affine[:3, 3] = first
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _refuse_irregular(images: list[_Image], affine: FloatArray, name: str) -> None:
    steps = np.diff(_depths(images))
    # The lower median is a spacing that occurs, also for two steps of which one is a gap.
    spacing = float(np.sort(steps)[(len(steps) - 1) // 2])
    tolerance = max(0.01 * spacing, 0.01)
    wrong = np.flatnonzero(np.abs(steps - spacing) > tolerance)
    if len(wrong):
        index = int(wrong[0])
        times = round(float(steps[index]) / spacing)
        if times >= 2 and abs(steps[index] - times * spacing) <= times * tolerance:
            raise GeometryError(
                f"{name}: gap after slice index {index}: {steps[index]:.4g} mm instead of {spacing:.4g} mm, "
                f"{times - 1} slice(s) missing ({len(wrong)} gaps in all); export the series again"
            )
        raise GeometryError(
            f"{name}: irregular spacing after slice index {index}: {steps[index]:.4g} mm instead of "
            f"{spacing:.4g} mm "
            f"({len(wrong)} of {len(steps)} steps); resample to a regular grid first"
        )
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    step = affine[:3, 2]
    shift = float(np.linalg.norm(step - normal * (step @ normal)))
    if shift > 1e-3 * spacing:
        raise GeometryError(
            f"{name}: tilted gantry, each slice is shifted in its plane by {shift:.4g} mm (slice spacing "
            f"{spacing:.4g} mm); resample to a rectangular grid first"
        )
    flip = np.array([-1.0, -1.0, 1.0])
    positions = np.array([image.position for image in images]) * flip
    aside = positions - (positions[0] + np.arange(len(images))[:, None] * step)
    aside -= (aside @ normal)[:, None] * normal
    distances = np.linalg.norm(aside, axis=1)
    if distances.max() > tolerance:
        index = int(distances.argmax())
        raise GeometryError(
            f"{name}: slice index {index} ({images[index].path.name}) is displaced in its plane by "
            f"{distances[index]:.4g} mm; resample to a regular grid first"
        )


def _thickness(images: list[_Image], spacing: float, notes: list[str]) -> float | None:
    between = [image.between for image in images if image.between]
    if between and abs(abs(between[0]) - spacing) > 0.01 * spacing:
        notes.append(
            f"SpacingBetweenSlices {abs(between[0]):.4g} mm differs from the positions' {spacing:.4g} mm; "
            "the positions are used"
        )
    values = [image.thickness for image in images if image.thickness is not None and image.thickness > 0]
    if not values:
        notes.append("SliceThickness is missing")
        return None
    thickness = float(np.median(values))
    if len(values) < len(images) or max(values) - min(values) > 0.01 * thickness:
        notes.append(
            f"SliceThickness varies from {min(values):.4g} to {max(values):.4g} mm or is missing in some "
            "slices"
        )
    if abs(thickness - spacing) > 0.01 * spacing:
        word = "gap" if thickness < spacing else "overlap"
        notes.append(
            f"slices are {thickness:.4g} mm thick every {spacing:.4g} mm: {word} of "
            f"{abs(spacing - thickness):.4g} mm"
        )
    return thickness


# --- Pixels -------------------------------------------------------------------------------------------------


def _pixels(image: _Image) -> npt.NDArray[np.float32]:
    """Rescaled values of one slice, (rows, columns); NaN where there is padding."""
    dataset, _ = _dataset(image.path, bool(_looks_like_dicom(image.path)), pixels=True)
    syntax = _syntax(dataset)
    if "PixelData" not in dataset:
        raise DataError(f"{image.path.name}: no pixel data; the file is damaged or cut")
    try:
        if syntax.is_compressed and not syntax.is_deflated:
            # pydicom checks the number of decoded bytes and raises when a frame is cut.
            stored = dataset.pixel_array
        else:
            order = "<" if syntax.is_little_endian else ">"
            data = dataset.get_item("PixelData").value
            _refuse_short(image, len(data))
            if order == ">" and image.bits_allocated == 8:
                raise DataError(
                    f"{image.path.name}: 8-bit big-endian pixels are not supported; convert the series"
                )
            stored = np.frombuffer(
                data, dtype=image.dtype.newbyteorder(order), count=image.rows * image.columns
            )
        stored = np.asarray(stored).reshape(image.rows, image.columns)
    except DataError:
        raise
    except Exception as error:  # decoders raise many kinds
        raise DataError(f"{image.path.name}: pixel data cannot be decoded ({type(error).__name__})") from None
    padding = _between(stored, image.padding)
    values = stored.astype(np.int64 if image.bits_allocated == 32 else np.int32)
    # Some scanners keep overlays in the bits above BitsStored.
    values &= (1 << image.bits_stored) - 1
    if image.signed:
        half = 1 << (image.bits_stored - 1)
        values = (values ^ half) - half
    padding |= _between(values, image.padding)
    if image.photometric == "MONOCHROME1":
        values = (-1 if image.signed else (1 << image.bits_stored) - 1) - values
    result = values.astype(np.float32)
    if image.slope != 1:
        result *= np.float32(image.slope)
    if image.intercept != 0:
        result += np.float32(image.intercept)
    # Zero is background already, and what most scanners fill the corners of MR images with.
    result[padding & (result != 0)] = np.nan
    return result


def _between(values: npt.NDArray[Any], ends: tuple[int, int] | None) -> npt.NDArray[np.bool_]:
    if ends is None:
        return np.zeros(values.shape, dtype=bool)
    return np.asarray((values >= ends[0]) & (values <= ends[1]))
