"""Strict reading of single-frame DICOM photographs: grey, RGB, YBR and palettes, by their stored bits.

What pydicom itself raises goes through: :mod:`medsr.io.images`, which calls this module, makes one line of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError
from medsr.io.dicom_pixels import PIXEL_TAGS, refuse_without_decoder, stored_values, transfer_syntax
from medsr.io.image_encoding import ImageEncoding, ImageHeader, as_unit_range

__all__ = ["read_photograph", "read_photograph_header"]

_TAGS = [
    *PIXEL_TAGS,
    "PerFrameFunctionalGroupsSequence",
    "ICCProfile",
    *(
        f"{segmented}{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
]
_GREY = ("MONOCHROME1", "MONOCHROME2")
# The decoders of JPEG 2000 undo YBR_ICT and YBR_RCT themselves, pydicom the others.
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def _dataset(path: Path, *, pixels: bool) -> Any:
    """The listed tags of a file, with the transfer syntax that files without preamble leave open."""
    import pydicom

    tags: list[Any] = [*_TAGS, "PixelData"] if pixels else list(_TAGS)
    dataset = pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=tags, force=True)
    dataset.file_meta.TransferSyntaxUID = transfer_syntax(dataset)
    return dataset


def read_photograph_header(path: Path) -> ImageHeader:
    """Read and judge the header of a DICOM photograph without its pixels.

    Args:
        path: a DICOM file, with or without preamble.

    Raises:
        DataError: if it has no image, several frames, a Modality LUT, colours or a layout that are not known, or pixels
            that cannot be decoded here. Other exceptions tell of a damaged file.

    Example:
        >>> from pydicom.data import get_testdata_file
        >>> header = read_photograph_header(Path(get_testdata_file("examples_palette.dcm")))
        >>> header.size, header.channels
        ((350, 800), 3)
    """
    name = path.name
    dataset = _dataset(path, pixels=False)
    if "Rows" not in dataset or "Columns" not in dataset:
        raise DataError(f"{name}: no image in this DICOM file, or it is cut")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows < 1 or columns < 1:
        raise DataError(f"{name}: no pixels ({rows} rows, {columns} columns)")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1 or "PerFrameFunctionalGroupsSequence" in dataset:
        raise DataError(
            f"{name}: multi-frame DICOM ({frames} frames); save the frame you want as its own image"
        )
    if "ModalityLUTSequence" in dataset:
        raise DataError(
            f"{name}: values are defined by a Modality LUT, which is not supported; convert it first"
        )
    photometric = str(dataset.get("PhotometricInterpretation") or "").strip()
    colour = photometric in _COLOUR
    if not colour and photometric not in (*_GREY, "PALETTE COLOR"):
        raise DataError(f"{name}: unknown PhotometricInterpretation; export the image as RGB or MONOCHROME2")
    _refuse_unknown_layout(name, dataset, photometric)
    refuse_without_decoder(name, dataset.file_meta.TransferSyntaxUID, "the image")
    notes: list[str] = []
    bits, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation"))
    span, offset = 2.0**bits - 1, -(2.0 ** (bits - 1)) if signed else 0.0
    if photometric in _GREY:
        slope = 1.0 if dataset.get("RescaleSlope") is None else float(dataset.RescaleSlope)
        intercept = float(dataset.get("RescaleIntercept") or 0)
        span, offset = slope * span, slope * offset + intercept
        if not math.isfinite(span) or not math.isfinite(offset) or span == 0:
            raise DataError(f"{name}: RescaleSlope or RescaleIntercept is not usable; the header is damaged")
    elif photometric == "PALETTE COLOR":
        _, _, depth = dataset.RedPaletteColorLookupTableDescriptor
        bits, span = 8, 2.0**depth - 1
        if depth > 8:
            notes.append(f"the colours of the palette have {depth} bits; results are written with 8")
    if photometric == "MONOCHROME1":
        notes.append("MONOCHROME1: values are kept as stored, 0 is to be displayed white")
    if str(dataset.get("LossyImageCompression") or "").strip() == "01":
        notes.append("the source was compressed with loss")
    encoding = ImageEncoding(
        file_format="DICOM",
        bits=bits,
        channels=1 if photometric in _GREY else 3,
        offset=offset,
        span=span,
        photometric=photometric,
        icc_profile=dataset.get("ICCProfile") or None,
    )
    return ImageHeader(path, (rows, columns), encoding, notes=tuple(notes))


def _refuse_unknown_layout(name: str, dataset: Any, photometric: str) -> None:
    allocated, stored = int(dataset.get("BitsAllocated") or 0), int(dataset.get("BitsStored") or 0)
    high = int(dataset.get("HighBit", stored - 1))
    samples, signed = int(dataset.get("SamplesPerPixel") or 1), dataset.get("PixelRepresentation")
    colour = photometric in _COLOUR
    if (
        allocated not in (8, 16)
        or not 1 <= stored <= allocated
        or high != stored - 1
        or samples != (3 if colour else 1)
        or (colour and stored != 8)
        or (photometric not in _GREY and signed)
    ):
        raise DataError(
            f"{name}: unsupported pixel layout for {photometric} ({samples} samples, allocated {allocated}, stored "
            f"{stored}, high bit {high}, {'signed' if signed else 'unsigned'}); convert it first"
        )


def read_photograph(header: ImageHeader) -> npt.NDArray[np.float32]:
    """Read the pixels of a DICOM photograph by their stored bits; palettes are expanded, YBR becomes RGB.

    Args:
        header: what :func:`read_photograph_header` found.

    Shape:
        ``(C, H, W)``, from 0 to 1.

    Raises:
        DataError: if there are no pixels, or the palette does not fit. Other exceptions tell of a damaged file.

    Example:
        >>> from pydicom.data import get_testdata_file
        >>> read_photograph(read_photograph_header(Path(get_testdata_file("examples_palette.dcm")))).shape
        (3, 350, 800)
    """
    from pydicom.pixels import pixel_array

    name, encoding = header.path.name, header.encoding
    dataset = _dataset(header.path, pixels=True)
    if "PixelData" not in dataset:
        raise DataError(f"{name}: no pixel data; the file is damaged or cut")
    stored = pixel_array(dataset)
    if encoding.photometric == "PALETTE COLOR":
        return as_unit_range(_colours(name, stored, dataset), encoding.span)
    if encoding.channels == 3:
        return as_unit_range(stored, encoding.span)
    signed = bool(dataset.get("PixelRepresentation"))
    levels = stored_values(stored, encoding.bits, signed=signed)
    # The lowest value that can be stored is black.
    return as_unit_range(levels + (1 << (encoding.bits - 1)) * signed, 2**encoding.bits - 1)


def _colours(name: str, stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[Any]:
    """Palette indices expanded to RGB."""
    from pydicom.pixels import apply_color_lut

    entries, first, depth = dataset.RedPaletteColorLookupTableDescriptor
    entries = entries or 2**16
    # pydicom looks up in the type of the colours: indices that do not fit into it would start again at 0.
    if depth == 8 and entries > 256:
        raise DataError(f"{name}: palette of {entries} colours of 8 bits is not supported; convert it to RGB")
    colours = apply_color_lut(np.minimum(stored, first + entries - 1), dataset)[:, :, :3]
    if colours.max() > 2**depth - 1:
        raise DataError(f"{name}: palette with colours above {depth} bits; the header is damaged")
    return colours
