"""What slices and photographs of DICOM have in common: how their pixels are stored, and whether they can be decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError

__all__ = ["DEFLATED", "PIXEL_TAGS", "refuse_without_decoder", "stored_values", "transfer_syntax"]

PIXEL_TAGS = [
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
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "LossyImageCompression",
]
"""What the pixels of any DICOM image are decoded by."""

DEFLATED = b"1.2.840.10008.1.2.1.99"
"""The transfer syntax whose files are compressed as a whole."""


def transfer_syntax(dataset: Any) -> Any:
    """How a dataset is stored; files without preamble leave it open, and pydicom has found it.

    Args:
        dataset: as read by pydicom.

    Returns:
        a pydicom ``UID``.

    Example:
        >>> from pydicom.data import get_testdata_file
        >>> transfer_syntax(get_testdata_file("MR_small.dcm", read=True)).name
        'Explicit VR Little Endian'
    """
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        syntax = ImplicitVRLittleEndian if dataset.original_encoding[0] else ExplicitVRLittleEndian
    return syntax


def refuse_without_decoder(name: str, syntax: Any, what: str) -> None:
    """Refuse compressed pixels for which no decoder is installed, and uncompressed ones of an unknown kind.

    Args:
        name: of the file, for the message.
        syntax: what :func:`transfer_syntax` found.
        what: what to convert instead, for example ``"the image"``.

    Raises:
        DataError: if they cannot be decoded here.

    Example:
        >>> from pydicom.uid import MPEG2MPML
        >>> refuse_without_decoder("a.dcm", MPEG2MPML, "the image")
        Traceback (most recent call last):
        medsr.errors.DataError: a.dcm: no decoder for the transfer syntax MPEG2 Main Profile / Main Level \
(1.2.840.10008.1.2.4.100); install pylibjpeg, python-gdcm or convert the image
    """
    from pydicom.pixels import get_decoder

    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise DataError(
            f"{name}: no decoder for the transfer syntax {syntax.name} ({syntax}); install pylibjpeg, python-gdcm or "
            f"convert {what}"
        )


def stored_values(stored: npt.NDArray[Any], bits: int, *, signed: bool) -> npt.NDArray[Any]:
    """Values by the bits that are stored: some devices keep overlays in the bits above them.

    Args:
        stored: integers as they are allocated.
        bits: BitsStored.
        signed: PixelRepresentation.

    Shape:
        any, kept; int64 for 32 allocated bits, else int32.

    Example:
        >>> stored_values(np.array([0xF001, 0x0FFF], dtype=np.uint16), 12, signed=True).tolist()
        [1, -1]
    """
    values = stored.astype(np.int64 if stored.dtype.itemsize == 4 else np.int32)
    values &= (1 << bits) - 1
    if signed:
        half = 1 << (bits - 1)
        values = (values ^ half) - half
    return values
