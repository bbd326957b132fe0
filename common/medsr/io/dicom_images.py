"""DICOM images one by one: the facts of a file that geometry needs, and its rescaled pixels, with pydicom alone.

A file holds one image, or, as enhanced multi-frame objects do, many with a place for each (PS3.3 C.7.6.16). Only the
tags of the list below are ever parsed, so no patient data can reach a message, a note or an output.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError
from medsr.io.dicom_pixels import DEFLATED, PIXEL_TAGS, refuse_without_decoder, stored_values, transfer_syntax

__all__ = [
    "DicomImage",
    "RefusedImage",
    "looks_like_dicom",
    "read_images",
    "read_pixels",
]

_TAGS = [
    *PIXEL_TAGS,
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "Modality",
    "ImageType",
]
_FUNCTIONAL_GROUPS = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]

_INFLATED_LIMIT = 512 * 2**20


@dataclass(frozen=True)
class DicomImage:
    """The facts of one image that geometry and decoding need; lengths in mm, positions in LPS.

    Example:
        >>> sorted(DicomImage.__dataclass_fields__)[:4]
        ['between', 'bits_allocated', 'bits_stored', 'columns']
    """

    path: Path
    frame: int
    frames: int
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
    def name(self) -> str:
        """What messages call it: the file, and the frame of a file that holds several, counted from 1."""
        return f"{self.path.name}, frame {self.frame + 1}" if self.frames > 1 else self.path.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored values, in the byte order of this machine."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


class RefusedImage(NamedTuple):
    """A file that is not read, and why: what it has to do with is only known once the series is chosen.

    Example:
        >>> RefusedImage("1.2.3", DataError("a.dcm: damaged")).reason.exit_code
        2
    """

    series: str
    reason: DataError


def looks_like_dicom(path: Path) -> bool | None:
    """Judge a file by its first bytes.

    Returns:
        True with the DICM mark, False for a data set without preamble, None for anything else.

    Raises:
        DataError: if the file cannot be read.

    Example:
        >>> looks_like_dicom(Path(__file__)) is None
        True
    """
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

    tags: list[Any] = [*_TAGS, *(["PixelData"] if pixels else _FUNCTIONAL_GROUPS)]
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if DEFLATED in file.read(2048):
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
        raise DataError(f"{path.name}: deflated content is above {_INFLATED_LIMIT // 2**20} MiB for one file")


def read_images(path: Path, preamble: bool) -> list[DicomImage | RefusedImage]:
    """Read the facts of the images of one file, or why it cannot be used.

    Args:
        path: a file that looks like DICOM.
        preamble: what :func:`looks_like_dicom` said of it.

    Returns:
        Nothing for a DICOM object that is not an image.

    Raises:
        DataError: if the file is damaged, and if it cannot be used and names no series.

    Example:
        >>> read_images(Path(__file__), preamble=True)
        Traceback (most recent call last):
        medsr.errors.DataError: ...
    """
    dataset, stopped = _dataset(path, preamble, pixels=False)
    try:
        with warnings.catch_warnings():  # Sequences are parsed when they are looked into.
            warnings.simplefilter("ignore")
            return [*_facts(path, dataset, preamble, stopped)]
    except DataError as error:
        reason = error
    except Exception as error:
        reason = DataError(f"{path.name}: damaged DICOM header ({type(error).__name__}); copy it again")
    series = _text(dataset, "SeriesInstanceUID")
    if not series:
        raise reason
    return [RefusedImage(series, reason)]


def _facts(path: Path, dataset: Any, preamble: bool, stopped: int) -> list[DicomImage]:
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
            return []
        if not sop_class and not preamble:
            return []
        # Scanners keep protocols and raw data in classes of their own.
        if sop_class and sop_class.is_private and stopped >= path.stat().st_size:
            return []
        raise DataError(f"{name}: Rows or Columns is missing; the file is damaged or cut")
    frames = _frames(dataset, name)
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
    if rows < 1 or columns < 1:
        raise DataError(f"{name}: no pixels ({rows} rows, {columns} columns)")
    secondary = {"SECONDARY"} if "Secondary Capture" in sop_class.name else set()
    images = []
    for index, macros in enumerate(frames):
        label = f"{name}, frame {index + 1}" if len(frames) > 1 else name
        slope = _number(macros.values, "RescaleSlope", name=label)
        if slope == 0:
            raise DataError(f"{label}: RescaleSlope is 0; the header is damaged")
        images.append(
            DicomImage(
                path=path,
                frame=index,
                frames=len(frames),
                series=_text(dataset, "SeriesInstanceUID"),
                rows=int(rows),
                columns=int(columns),
                bits_allocated=allocated,
                bits_stored=stored,
                signed=bool(dataset.get("PixelRepresentation")),
                photometric=photometric,
                position=_numbers(macros.position, "ImagePositionPatient", name=label, count=3),
                orientation=_numbers(macros.orientation, "ImageOrientationPatient", name=label, count=6),
                pixel_spacing=_numbers(macros.measures, "PixelSpacing", name=label, count=2),
                thickness=_number(macros.measures, "SliceThickness", name=label),
                between=_number(macros.measures, "SpacingBetweenSlices", name=label),
                slope=1.0 if slope is None else slope,
                intercept=_number(macros.values, "RescaleIntercept", name=label) or 0.0,
                lossy=_text(dataset, "LossyImageCompression") == "01",
                padding=_padding(dataset),
                modality=_text(dataset, "Modality"),
                kind=frozenset(macros.kind.split("\\")) | secondary,
            )
        )
    _refuse_unreadable_pixels(images[0], dataset, stopped)
    return images


class _Macros(NamedTuple):
    """Data sets that hold the facts of a frame: its functional groups, or the whole file."""

    position: Any
    orientation: Any
    measures: Any
    values: Any
    kind: str


def _frames(dataset: Any, name: str) -> list[_Macros]:
    """Where the facts of each frame stand. A group of a frame goes before that which all frames share."""
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

    count = int(_number(dataset, "NumberOfFrames", name=name) or 1)
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        if count > 1 or "Enhanced" in UID(_text(dataset, "SOPClassUID")).name:
            raise DataError(
                f"{name}: multi-frame image without a place for each frame; convert it to NIfTI with dcm2niix"
            )
        return [_Macros(dataset, dataset, dataset, dataset, _text(dataset, "ImageType"))]
    if len(groups) != count or not groups:
        raise DataError(
            f"{name}: multi-frame image that describes {len(groups)} of {count} frames; copy it again"
        )
    shared = dataset.get("SharedFunctionalGroupsSequence") or [Dataset()]

    def macro(frame: Any, *keywords: str) -> Any:
        found = (source.get(keyword) for source in (frame, shared[0]) for keyword in keywords)
        return next((items[0] for items in found if items), Dataset())

    return [
        _Macros(
            macro(frame, "PlanePositionSequence"),
            macro(frame, "PlaneOrientationSequence"),
            macro(frame, "PixelMeasuresSequence"),
            macro(frame, "PixelValueTransformationSequence"),
            _text(macro(frame, "MRImageFrameTypeSequence", "CTImageFrameTypeSequence"), "FrameType")
            or _text(dataset, "ImageType"),
        )
        for frame in groups
    ]


def _refuse_unreadable_pixels(image: DicomImage, dataset: Any, stopped: int) -> None:
    name, syntax = image.path.name, transfer_syntax(dataset)
    try:
        encapsulated = syntax.is_compressed and not syntax.is_deflated
    except ValueError:
        raise DataError(f"{name}: unknown transfer syntax {syntax}; convert the series") from None
    if encapsulated:
        refuse_without_decoder(name, syntax, "the series")
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


def _refuse_short(image: DicomImage, found: int) -> None:
    expected = image.frames * image.rows * image.columns * image.bits_allocated // 8
    if found < expected:
        raise DataError(
            f"{image.path.name}: truncated, {max(found, 0)} bytes of pixel data instead of {expected}; copy "
            "it again"
        )


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


# --- Pixels --------------------------------------------------------------------------------------------------


def read_pixels(images: Iterable[DicomImage]) -> Iterator[npt.NDArray[np.float32]]:
    """Read the rescaled values of images one after the other, NaN where there is padding.

    MONOCHROME1 is turned so that larger is brighter. Neighbouring images of one file are decoded together.

    Args:
        images: any number of them.

    Shape:
        ``(rows, columns)`` each.

    Raises:
        DataError: if the pixel data are cut or cannot be decoded.

    Example:
        >>> list(read_pixels([]))
        []
    """
    path, stored = None, np.empty(0)
    for image in images:
        if image.path != path:
            path, stored = image.path, _stored(image)
        yield _rescaled(image, stored[image.frame])


def _stored(image: DicomImage) -> npt.NDArray[Any]:
    """What the file of an image holds, (frames, rows, columns)."""
    name = image.path.name
    dataset, _ = _dataset(image.path, bool(looks_like_dicom(image.path)), pixels=True)
    syntax = transfer_syntax(dataset)
    if "PixelData" not in dataset:
        raise DataError(f"{name}: no pixel data; the file is damaged or cut")
    shape = (image.frames, image.rows, image.columns)
    try:
        if syntax.is_compressed and not syntax.is_deflated:
            # pydicom checks the number of decoded bytes and raises when a frame is cut.
            return np.asarray(dataset.pixel_array).reshape(shape)
        order = "<" if syntax.is_little_endian else ">"
        data = dataset.get_item("PixelData").value
        _refuse_short(image, len(data))
        if order == ">" and image.bits_allocated == 8:
            raise DataError(f"{name}: 8-bit big-endian pixels are not supported; convert the series")
        kind = image.dtype.newbyteorder(order)
        return np.frombuffer(data, dtype=kind, count=int(np.prod(shape))).reshape(shape)
    except DataError:
        raise
    except Exception as error:  # decoders raise many kinds
        raise DataError(f"{name}: pixel data cannot be decoded ({type(error).__name__})") from None


def _rescaled(image: DicomImage, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    padding = _between(stored, image.padding)
    values = stored_values(stored, image.bits_stored, signed=image.signed)
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
