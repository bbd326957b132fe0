"""What is known of a photograph beside its pixels: how a file stored them, so that results are stored the same way."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ImageEncoding", "ImageHeader", "LoadedImage", "as_unit_range"]


@dataclass(frozen=True)
class ImageEncoding:
    """How the pixels of a file were encoded, so that a result can be written the same way.

    A value ``v`` in [0, 1] stands for ``offset + span * v``: the grey level of the file or, for DICOM, the value
    after RescaleSlope and RescaleIntercept. 0 and 1 are the ends of the range that the stored bits can express,
    never those of the values that occur, so that equal greys of two images stay equal.

    Args:
        file_format: ``PNG``, ``JPEG``, ``TIFF``, ``BMP`` or ``DICOM``.
        bits: bits per sample that carry information; up to 8 are written as 8, more as 16.
        channels: 1 for grey, 3 for RGB.
        offset: value of the darkest stored level.
        span: distance from the darkest to the brightest stored level.
        photometric: PhotometricInterpretation of a DICOM image; in ``MONOCHROME1`` 0 is to be displayed white.
        icc_profile: the embedded colour profile.
        dpi: pixels per inch along x and y.
        png_colour: what a PNG file says of its colours without a profile: names and contents of such chunks.

    Example:
        >>> ImageEncoding("TIFF", 16, 1, span=65535.0, dpi=(72.0, 72.0)).magnified(4).dpi
        (288.0, 288.0)
    """

    file_format: str
    bits: int
    channels: int
    offset: float = 0.0
    span: float = 255.0
    photometric: str = ""
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    png_colour: tuple[tuple[str, bytes], ...] = ()

    def magnified(self, scale: float) -> ImageEncoding:
        """The encoding of an image with ``scale`` times as many pixels per inch."""
        dpi = None if self.dpi is None else (self.dpi[0] * scale, self.dpi[1] * scale)
        return dataclasses.replace(self, dpi=dpi)

    def to_meta(self) -> dict[str, str | int | float]:
        """The fields as text and numbers, which survive the collate function of a loader."""
        dpi = self.dpi or (0.0, 0.0)
        return {
            "encoding_format": self.file_format,
            "encoding_bits": self.bits,
            "encoding_channels": self.channels,
            "encoding_offset": self.offset,
            "encoding_span": self.span,
            "encoding_photometric": self.photometric,
            "encoding_icc_profile": base64.b64encode(self.icc_profile or b"").decode("ascii"),
            "encoding_dpi_x": dpi[0],
            "encoding_dpi_y": dpi[1],
            "encoding_png_colour": " ".join(f"{name}:{content.hex()}" for name, content in self.png_colour),
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> ImageEncoding:
        """The encoding that :meth:`to_meta` has put into metadata."""
        dpi = (float(meta["encoding_dpi_x"]), float(meta["encoding_dpi_y"]))
        chunks = (chunk.split(":") for chunk in str(meta["encoding_png_colour"]).split())
        return cls(
            file_format=str(meta["encoding_format"]),
            bits=int(meta["encoding_bits"]),
            channels=int(meta["encoding_channels"]),
            offset=float(meta["encoding_offset"]),
            span=float(meta["encoding_span"]),
            photometric=str(meta["encoding_photometric"]),
            icc_profile=base64.b64decode(meta["encoding_icc_profile"]) or None,
            dpi=dpi if dpi[0] else None,
            png_colour=tuple((name, bytes.fromhex(content)) for name, content in chunks),
        )


@dataclass(frozen=True)
class ImageHeader:
    """What is known of an image before its pixels are decoded.

    Args:
        path: the file.
        size: rows and columns, upright.
        encoding: how the pixels are stored.
        has_alpha: whether there is an alpha channel or a transparent colour.
        orientation: EXIF orientation of the stored pixels, 1 to 8; what is read is upright.
        notes: warnings for the run report; they hold no patient data.

    Example:
        >>> ImageHeader(Path("a.png"), (480, 640), ImageEncoding("PNG", 8, 3)).channels
        3
    """

    path: Path
    size: tuple[int, int]
    encoding: ImageEncoding
    has_alpha: bool = False
    orientation: int = 1
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels without alpha: 1 for grey, 3 for RGB."""
        return self.encoding.channels

    @property
    def bits(self) -> int:
        """Bits per sample."""
        return self.encoding.bits


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """The pixels of an image, and how to get back to its file.

    Args:
        values: ``(C, H, W)`` float32 in [0, 1] with C = 1 or 3.
        alpha: ``(1, H, W)`` float32 in [0, 1], or None.
        encoding: how the pixels were stored.
        notes: warnings for the run report; they hold no patient data.

    Example:
        >>> LoadedImage(np.zeros((1, 4, 5), np.float32), None, ImageEncoding("PNG", 8, 1)).values.shape
        (1, 4, 5)
    """

    values: npt.NDArray[np.float32]
    alpha: npt.NDArray[np.float32] | None
    encoding: ImageEncoding
    notes: tuple[str, ...] = ()


def as_unit_range(stored: npt.NDArray[Any], top: float) -> npt.NDArray[np.float32]:
    """Levels from 0 to ``top`` as numbers from 0 to 1, channels first.

    Args:
        stored: the levels.
        top: the brightest level that can be stored, not the brightest that occurs.

    Shape:
        ``(H, W)`` or ``(H, W, C)`` to ``(C, H, W)``, contiguous.

    Example:
        >>> as_unit_range(np.array([[0, 51, 255]]), 255).tolist()
        [[[0.0, 0.20000000298023224, 1.0]]]
    """
    planes = stored[None] if stored.ndim == 2 else np.moveaxis(stored, -1, 0)
    return np.divide(planes, np.float32(top), dtype=np.float32, order="C")
