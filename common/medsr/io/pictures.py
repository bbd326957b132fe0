"""Strict reading of PNG, JPEG, TIFF and BMP: bits from the header, palettes, orientation, and what Pillow hides.

Alone, Pillow reads 16-bit colour as 8 bits, 12-bit grey as a dark 16-bit image and the first of several pages, all
without a word. Here what cannot be read exactly is refused. What Pillow itself raises goes through:
:mod:`medsr.io.images`, which calls this module, makes one line of it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from medsr.errors import DataError
from medsr.io.image_encoding import ImageEncoding, ImageHeader, as_unit_range

__all__ = ["read_indices", "read_picture", "read_picture_header"]

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
# Modes of Pillow with 8 bits per channel or less, and what they are expanded to; transparency adds an "A".
_EXPANDED = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
# EXIF orientation: what brings the stored rows and columns upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES, _TIFF_RESOLUTION, _TIFF_SAMPLE_FORMAT = 258, 262, 277, 282, 339
_DPI_LIMIT = 1e6
# Primaries, transfer and gamma in a PNG file; programs that heed them show another brightness without.
_PNG_COLOUR, _PNG_COLOUR_LIMIT = (b"cHRM", b"cICP", b"gAMA", b"sRGB"), 32


def read_picture_header(path: Path) -> ImageHeader:
    """Read and judge the header of a picture without decoding its pixels.

    Args:
        path: a PNG, JPEG, TIFF or BMP file; the content decides which.

    Raises:
        DataError: for several pages, other colours than grey and RGB, more bits than can be kept, and a PNG file that
            is cut. Other exceptions, and warnings of Pillow, tell of a damaged or a too large file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (5, 3)).save(Path(folder) / "a.png")
        ...     read_picture_header(Path(folder) / "a.png").size
        (3, 5)
    """
    name = path.name
    notes: list[str] = []
    with path.open("rb") as file:
        chunks = _png_chunks(file, name)
        image = Image.open(file, formats=_FORMATS)
        pages = getattr(image, "n_frames", 1)
        if pages > 1:
            raise DataError(
                f"{name}: {pages} pages or frames in one file; save the one you want as its own file"
            )
        tags = dict(image.tag_v2) if image.format == "TIFF" else {}
        if chunks:
            _, _, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
            bits = 16 if depth == 16 else 8
            if bits == 16 and (colour != 0 or image.has_transparency_data):
                raise _too_deep(name)
        elif tags:
            bits = _tiff_bits(tags, image.mode, name)
        else:
            bits = 8
        if bits == 8 and image.mode not in _EXPANDED:
            raise DataError(f"{name}: {image.mode} colours are not supported; convert the image to RGB first")
        alpha = bits == 8 and image.has_transparency_data
        channels = 3 if _EXPANDED.get(image.mode) == "RGB" else 1
        if tags.get(_TIFF_SAMPLES, 1) > len(image.getbands()):
            notes.append("further channels of undeclared meaning were left out")
        if image.mode == "1":
            notes.append("the 1-bit image was expanded to 8-bit grey")
        if image.mode == "F":
            notes.append("the pixels are floating-point numbers; results are written with 16 bits")
        orientation = _orientation(image, chunks, notes)
        width, height = image.size
        # Without a resolution Pillow reports 1 for TIFF files.
        dpi = None if tags and _TIFF_RESOLUTION not in tags else _dpi(image.info.get("dpi"))
        if orientation >= 5:
            dpi = dpi and (dpi[1], dpi[0])
            # Pillow itself turns TIFF files, and tells their size accordingly.
            if image.format != "TIFF":
                width, height = height, width
        encoding = ImageEncoding(
            file_format=str(image.format),
            bits=bits,
            channels=channels,
            span=1.0 if image.mode == "F" else 2.0**bits - 1,
            icc_profile=image.info.get("icc_profile") or None,
            dpi=dpi,
            png_colour=tuple((name.decode(), chunks[name]) for name in _PNG_COLOUR if name in chunks),
        )
    return ImageHeader(path, (height, width), encoding, alpha, orientation, tuple(notes))


def _png_chunks(file: IO[bytes], name: str) -> dict[bytes, bytes]:
    """The header, EXIF and colour chunks of a PNG file, which must reach its end; empty for another format.

    Pillow does not tell the bit depth of colour, decodes the pixels before it finds an EXIF chunk behind them, and
    calls an image without pixels no image.
    """
    found: dict[bytes, bytes] = {}
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        kind = b""
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
            after = file.tell() + length + 4
            if after > end:
                raise DataError(f"{name}: truncated, the file ends inside a PNG chunk; copy it again")
            if kind in (b"IHDR", b"eXIf") or (kind in _PNG_COLOUR and length <= _PNG_COLOUR_LIMIT):
                found[kind] = file.read(length)
            file.seek(after)
        width, height = struct.unpack(">II", found[b"IHDR"][:8])
        if not width or not height:
            raise DataError(f"{name}: no pixels ({width} x {height})")
    file.seek(0)
    return found


def _tiff_bits(tags: Mapping[int, Any], mode: str, name: str) -> int:
    bits = tags.get(_TIFF_BITS, (1,))
    signed = 2 in tags.get(_TIFF_SAMPLE_FORMAT, (1,))
    if max(bits) <= 8 and not signed:
        return 8
    if signed or (mode != "F" and max(bits) > 16):
        raise DataError(
            f"{name}: signed or 32-bit integers; convert the image to unsigned 8 or 16 bits first"
        )
    if len(bits) > 1:
        raise _too_deep(name)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:
        # Pillow inverts such images when they have 8 bits, and not when they have more.
        raise DataError(f"{name}: {bits[0]}-bit TIFF with 0 as white; invert it and save it with 0 as black")
    return 16 if mode == "F" else int(bits[0])


def _too_deep(name: str) -> DataError:
    return DataError(
        f"{name}: more than 8 bits per channel in colour or with transparency would lose bits; save 8-bit colour, or "
        "one 16-bit grey image per channel"
    )


def _orientation(image: Image.Image, chunks: Mapping[bytes, bytes], notes: list[str]) -> int:
    try:
        if chunks:
            exif = Image.Exif()
            exif.load(chunks.get(b"eXIf", b""))
        else:
            exif = image.getexif()
        value = int(exif.get(_ORIENTATION, 1))
    except Exception:  # a damaged block of camera settings says nothing about the pixels
        notes.append("the EXIF block cannot be read and is ignored")
        return 1
    if value not in _UPRIGHT:
        return 1
    notes.append(f"EXIF orientation {value} was applied")
    return value


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(v) for v in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < _DPI_LIMIT and 0 < y < _DPI_LIMIT else None


def _upright(header: ImageHeader) -> Image.Image:
    """The image as it is to be looked at; Pillow turns TIFF itself."""
    with header.path.open("rb") as file:
        if header.encoding.file_format == "PNG":
            # The checksums of all chunks; decoding alone ignores them.
            Image.open(file, formats=_FORMATS).verify()
            file.seek(0)
        image = Image.open(file, formats=_FORMATS)
        image.load()
    turned = header.orientation > 1 and header.encoding.file_format != "TIFF"
    return image.transpose(_UPRIGHT[header.orientation]) if turned else image


def read_picture(header: ImageHeader) -> npt.NDArray[np.float32]:
    """Read the pixels of a picture, upright, alpha as the last channel.

    Args:
        header: what :func:`read_picture_header` found.

    Shape:
        ``(C, H, W)``, from 0 to 1.

    Raises:
        DataError: for numbers that are not finite or not in [0, 1]. Other exceptions tell of a damaged file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (5, 3), (255, 0, 51)).save(Path(folder) / "a.png")
        ...     read_picture(read_picture_header(Path(folder) / "a.png"))[:, 0, 0].round(3).tolist()
        [1.0, 0.0, 0.20000000298023224]
    """
    name, encoding = header.path.name, header.encoding
    image = _upright(header)
    if encoding.bits == 8:
        image = image.convert(_EXPANDED[image.mode] + "A" * header.has_alpha)
    pixels = np.asarray(image)
    if pixels.dtype.kind == "f":
        bad = pixels.size - int(np.count_nonzero(np.isfinite(pixels)))
        if bad:
            raise DataError(
                f"{name}: {bad} of {pixels.size} pixels are NaN or infinite; repair the image first"
            )
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0 or high > 1:
            raise DataError(
                f"{name}: floating-point pixels from {low:g} to {high:g}, only [0, 1] has a meaning; rescale them or "
                "save integers"
            )
    return as_unit_range(pixels, encoding.span)


def read_indices(header: ImageHeader) -> npt.NDArray[np.uint8] | None:
    """The places in its palette that a picture stores, upright; None without a palette.

    Args:
        header: what :func:`read_picture_header` found.

    Shape:
        ``(H, W)``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("P", (5, 3), 1).save(Path(folder) / "a.png")
        ...     int(read_indices(read_picture_header(Path(folder) / "a.png")).max())
        1
    """
    image = _upright(header)
    return np.asarray(image) if image.mode == "P" else None
