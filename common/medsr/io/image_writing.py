"""Writing of photographs that leaves a whole, verified file with the bit depth of the input, or none."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin, TiffImagePlugin

from medsr.errors import OutputError
from medsr.io.image_encoding import ImageEncoding
from medsr.io.writing import atomic_path

__all__ = ["write_image"]

# Rows that are converted at a time: a result of hundreds of megapixels is not to be held in float32 twice.
_ROWS = 256
_TIFF_COMPRESSION, _TIFF_OFFSETS, _TIFF_COUNTS = 259, 273, 279

PathLike = str | os.PathLike[str]


def write_image(
    path: PathLike,
    values: npt.ArrayLike,
    encoding: ImageEncoding,
    *,
    alpha: npt.ArrayLike | None = None,
) -> Path:
    """Write an image as PNG or TIFF, read every pixel back, and only then give the file its name.

    Values are clipped to [0, 1] and rounded to the nearest level, halves to even. Resolution and colour profile of
    the encoding are written, the profile only with as many channels as it was made for; so is what a PNG file said of
    its colours otherwise (gamma, primaries), to PNG. EXIF and text are not:
    they may hold patient data. ``monai.data.PILWriter`` was considered: it truncates instead of rounding, turns NaN
    into a grey level, drops profile and resolution, and writes in place.

    Args:
        path: target ending in ``.png``, ``.tif`` or ``.tiff``, which decides the format.
        values: the pixels; one channel is written as grey, three as RGB.
        encoding: that of the input, see :meth:`~medsr.io.image_encoding.ImageEncoding.magnified`; up to 8 bits are
            written as 8, more as 16.
        alpha: opacity in [0, 1].

    Shape:
        - values: ``(C, H, W)`` with C = 1 or 3;
        - alpha: ``(1, H, W)``.

    Raises:
        OutputError: if a value is not finite, the format cannot hold the image without losing bits, or the file
            cannot be written whole.

    Example:
        >>> write_image("a.png", np.full((1, 2, 2), np.nan), ImageEncoding("PNG", 8, 1))
        Traceback (most recent call last):
        medsr.errors.OutputError: a.png: 4 of 4 values are NaN or infinite; nothing was saved
    """
    final = Path(path)
    name, suffix = final.name, final.suffix.lower()
    if suffix not in (".png", ".tif", ".tiff"):
        raise OutputError(f"{name}: an image is written as .png, .tif or .tiff")
    planes = [np.asarray(values)] if alpha is None else [np.asarray(values), np.asarray(alpha)]
    _refuse_shapes(name, planes, encoding)
    pixels = _levels(name, planes, np.dtype(np.uint8 if encoding.bits <= 8 else np.uint16))
    extras: dict[str, Any] = {}
    if encoding.dpi is not None:
        extras["dpi"] = encoding.dpi
    if len(planes[0]) == encoding.channels:
        extras |= _colour(encoding, is_png=suffix == ".png")
    with atomic_path(final) as temporary:
        try:
            Image.fromarray(pixels).save(temporary, format="PNG" if suffix == ".png" else "TIFF", **extras)
        except (ValueError, OverflowError, struct.error) as error:
            raise OutputError(
                f"{name}: {suffix[1:].upper()} cannot hold this image ({type(error).__name__}); nothing was saved"
            ) from None
        _verify(temporary, name, pixels)
    return final


def _colour(encoding: ImageEncoding, *, is_png: bool) -> dict[str, Any]:
    """What is to be written of the meaning of the colours."""
    found: dict[str, Any] = {}
    if encoding.icc_profile:
        found["icc_profile"] = encoding.icc_profile
    if encoding.png_colour and is_png:
        found["pnginfo"] = PngImagePlugin.PngInfo()
        for name, content in encoding.png_colour:
            found["pnginfo"].add(name.encode(), content)
    return found


def _refuse_shapes(name: str, planes: list[npt.NDArray[Any]], encoding: ImageEncoding) -> None:
    shape = planes[0].shape
    if len(shape) != 3 or shape[0] not in (1, 3) or 0 in shape:
        raise OutputError(f"{name}: an image has shape (1 or 3, rows, columns), got {shape}")
    if len(planes) == 2 and planes[1].shape != (1, *shape[1:]):
        raise OutputError(f"{name}: alpha has shape {planes[1].shape}, expected {(1, *shape[1:])}")
    if any(plane.dtype.kind != "f" for plane in planes):
        raise OutputError(f"{name}: values must be floating-point numbers in [0, 1], got {planes[0].dtype}")
    if encoding.bits > 8 and (shape[0] == 3 or len(planes) == 2):
        raise OutputError(f"{name}: {encoding.bits} bits are written only for grey without alpha")


def _levels(name: str, planes: list[npt.NDArray[Any]], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The stored levels, ``(H, W)`` or ``(H, W, C)``."""
    rows, columns = planes[0].shape[1:]
    pixels = np.empty((rows, columns, sum(len(plane) for plane in planes)), dtype=dtype)
    bad = 0
    for start in range(0, rows, _ROWS):
        block = np.concatenate([plane[:, start : start + _ROWS] for plane in planes], dtype=np.float32)
        bad += block.size - int(np.count_nonzero(np.isfinite(block)))
        if not bad:
            levels = np.rint(block.clip(0, 1) * np.float32(np.iinfo(dtype).max))
            pixels[start : start + _ROWS] = np.moveaxis(levels, 0, -1)
    if bad:
        raise OutputError(f"{name}: {bad} of {pixels.size} values are NaN or infinite; nothing was saved")
    return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels


def _verify(temporary: Path, name: str, pixels: npt.NDArray[Any]) -> None:
    """Read the file to its end and compare it with what was meant."""
    try:
        same = _same_tiff(temporary, pixels) if temporary.suffix != ".png" else _same_png(temporary, pixels)
    except Exception as error:  # Pillow raises many kinds
        raise OutputError(
            f"{name}: damaged while it was written ({type(error).__name__}); nothing was saved"
        ) from None
    if not same:
        raise OutputError(f"{name}: read back different from what was written; nothing was saved")


def _same_png(temporary: Path, pixels: npt.NDArray[Any]) -> bool:
    # Not Image.open: a result may have more pixels than its limit for files of unknown origin.
    with temporary.open("rb") as file:
        PngImagePlugin.PngImageFile(file).verify()
        file.seek(0)
        image = PngImagePlugin.PngImageFile(file)
        image.load()
    height, width = pixels.shape[:2]
    return image.size == (width, height) and all(
        np.array_equal(
            np.asarray(image.crop((0, start, width, min(start + _ROWS, height)))),
            pixels[start : start + _ROWS],
        )
        for start in range(0, height, _ROWS)
    )


def _same_tiff(temporary: Path, pixels: npt.NDArray[Any]) -> bool:
    # Pillow would refuse to decode a large result, but uncompressed strips are the pixels themselves.
    with temporary.open("rb") as file:
        image = TiffImagePlugin.TiffImageFile(file)
        tags = image.tag_v2
        if tags.get(_TIFF_COMPRESSION, 1) != 1 or image.size != pixels.shape[1::-1]:
            return False
        expected = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
        done = 0
        for offset, count in zip(tags[_TIFF_OFFSETS], tags[_TIFF_COUNTS], strict=True):
            file.seek(offset)
            if file.read(count) != expected[done : done + count].tobytes():
                return False
            done += count
    return done == len(expected)
