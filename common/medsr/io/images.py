"""Strict reading of photographs: PNG, JPEG, TIFF, BMP and single-frame DICOM, exact or with one line why not.

Pillow is used for the decoding (:mod:`medsr.io.pictures`), and pydicom for DICOM (:mod:`medsr.io.dicom_photographs`).
Super-resolution tools guess the bit depth from the largest value; here it comes from the header. Nothing but pixels,
the meaning of their colours and resolution is taken from a file, so no patient data can reach an output.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from medsr.errors import DataError
from medsr.io.cases import collect_cases, list_folder, warn_once
from medsr.io.dicom_photographs import read_photograph, read_photograph_header
from medsr.io.dicom_pixels import DEFLATED
from medsr.io.image_encoding import ImageHeader, LoadedImage
from medsr.io.nifti import refuse_oversize
from medsr.io.pictures import read_indices, read_picture, read_picture_header

__all__ = [
    "IMAGE_SUFFIXES",
    "find_images",
    "read_image",
    "read_image_header",
    "read_palette_indices",
]

_UNREAD = (".webp", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".tga")
"""Endings of pictures that are not read: a folder that holds them says so, others may hold anything."""

IMAGE_SUFFIXES = (".png", ".jpeg", ".jpg", ".jpe", ".jfif", ".tiff", ".tif", ".bmp", ".dcm")
"""Endings of the images that are read; a DICOM file needs none."""

_KINDS = "PNG, JPEG, TIFF, BMP or DICOM"

PathLike = str | os.PathLike[str]


def find_images(source: PathLike | Sequence[PathLike]) -> list[dict[str, str]]:
    """List the photographs behind a path as data items ``{"image": absolute path, "case": name}``.

    Files are known by their ending, DICOM files also by their mark. Pictures of other formats are left out with a
    warning, other files without one. Sub-folders are not searched, because they may hold masks, or the results of an
    earlier run; hidden files are ignored. Images of one name are marked, see :func:`medsr.io.cases.mark_twins`.

    Args:
        source: a PNG, JPEG, TIFF, BMP or DICOM file, a folder of them, or a list of these.

    Raises:
        DataError: if there is no image, a link leaves its folder, or an image is given twice.

    Example:
        >>> find_images("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such file or folder
    """
    return collect_cases(source, _expand, suffixes=IMAGE_SUFFIXES)


def read_image_header(path: PathLike) -> ImageHeader:
    """Read and judge the header of an image without decoding its pixels.

    It is cheap enough to run over a whole folder before the first network is loaded. A file that passes can only
    fail later by damage inside its pixel data, or because floating-point pixels are not in [0, 1].

    Args:
        path: a PNG, JPEG, TIFF, BMP or DICOM file; the content decides which, not the ending.

    Raises:
        DataError: if the file is missing, empty, damaged or no image; has several pages or frames, more pixels
            than Pillow's limit, CMYK or other colours than RGB, more than 8 bits in colour or with transparency,
            or signed or 32-bit integers; or is a DICOM image without decoder here.

    Example:
        >>> read_image_header("none.png")
        Traceback (most recent call last):
        medsr.errors.DataError: none.png: no such file
    """
    path = Path(path)
    dicom = _is_dicom(path)
    with _one_line_faults(path.name):
        header = read_photograph_header(path) if dicom else read_picture_header(path)
    # Pillow has refused pictures already.
    _refuse_bomb(path.name, math.prod(header.size))
    return header


def read_image(path: PathLike) -> LoadedImage:
    """Read an image whole, as float32 in [0, 1] over the range of its bits.

    Grey of 16 bits is read exactly, 12-bit TIFF and DICOM by their stored bits. Palettes are expanded to RGB, 1-bit
    images to 8-bit grey, YBR of DICOM is converted to RGB by pydicom. The EXIF orientation is applied.
    Floating-point TIFF is read if all values are in [0, 1]; no range is guessed for it. ``MONOCHROME1`` is kept as
    stored, and noted: only a display inverts it.

    Args:
        path: a PNG, JPEG, TIFF, BMP or DICOM file.

    Raises:
        DataError: as :func:`read_image_header`, and if the pixel data are truncated, damaged, not finite or, as
            floating-point numbers, not in [0, 1].

    Example:
        >>> read_image("none.png")
        Traceback (most recent call last):
        medsr.errors.DataError: none.png: no such file
    """
    header = read_image_header(path)
    name = header.path.name
    refuse_oversize(name, 4 * math.prod(header.size) * (header.channels + header.has_alpha))
    with _one_line_faults(name):
        dicom = header.encoding.file_format == "DICOM"
        pixels = read_photograph(header) if dicom else read_picture(header)
    return LoadedImage(
        values=pixels[: header.channels],
        alpha=pixels[header.channels :] if header.has_alpha else None,
        encoding=header.encoding,
        notes=header.notes,
    )


def read_palette_indices(path: PathLike) -> npt.NDArray[np.uint8] | None:
    """The places in its palette that an image stores, turned as :func:`read_image` turns it; None without a palette.

    Args:
        path: a file, as for :func:`read_image`.

    Shape:
        ``(H, W)``.

    Raises:
        DataError: as :func:`read_image`.

    Example:
        >>> read_palette_indices("none.png")
        Traceback (most recent call last):
        medsr.errors.DataError: none.png: no such file
    """
    header = read_image_header(path)
    if header.encoding.file_format == "DICOM":
        return None
    with _one_line_faults(header.path.name):
        return read_indices(header)


def _expand(path: Path) -> list[Path]:
    """The images that one path names."""
    name = path.name or path.resolve().name
    if not path.exists():
        raise DataError(f"{name}: no such file or folder")
    if not path.is_dir():
        if not _looks_like_image(path):
            raise DataError(f"{name}: not a {_KINDS} file")
        return [path]
    found = list_folder(path, _looks_like_image)
    unread = sorted(child.name for child in path.iterdir() if child.name.lower().endswith(_UNREAD))
    if unread:
        warn_once(
            f"{name}: {len(unread)} pictures are left out, {unread[0]} first; convert them, {_KINDS} files are read"
        )
    if not found:
        raise DataError(f"{name}: no {_KINDS} file in this folder; sub-folders are not searched")
    return found


def _looks_like_image(path: Path) -> bool:
    named = path.name.lower().endswith(IMAGE_SUFFIXES)
    if path.is_symlink() and not path.exists():
        return named
    if not path.is_file() or path.name.upper() == "DICOMDIR":
        return False
    try:
        return named or _head(path)[128:132] == b"DICM"
    except DataError:
        # It may be an image: who reads it will say why that is not possible, and others go on.
        return True


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(2048)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from None


def _is_dicom(path: Path) -> bool:
    """Whether this existing, non-empty file is to be read by pydicom."""
    name = path.name
    if not path.exists():
        why = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise DataError(f"{name}: {why}")
    if not path.is_file():
        raise DataError(f"{name}: not a file")
    head = _head(path)
    if not head:
        raise DataError(f"{name}: empty file")
    if head[128:132] != b"DICM" and path.suffix.lower() != ".dcm":
        return False
    if DEFLATED in head:
        raise DataError(f"{name}: deflated DICOM is not supported; convert it to an uncompressed file")
    return True


@contextmanager
def _one_line_faults(name: str) -> Iterator[None]:
    """Turn what Pillow and pydicom raise for a damaged file into one line; their own texts may quote the file."""
    # Other code of the process may have told Pillow to fill up truncated files with grey.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        _refuse_bomb(name, int(re.findall(r"\d+", str(error))[0]))
    except UnidentifiedImageError:
        raise DataError(f"{name}: not a {_KINDS} image, or one of an unusual pixel type or damaged") from None
    except Exception as error:  # both raise many kinds
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{name}: cannot be read ({error.strerror})") from None
        raise DataError(
            f"{name}: truncated or damaged image ({type(error).__name__}); copy or export it again"
        ) from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _refuse_bomb(name: str, pixels: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise DataError(
            f"{name}: {pixels} pixels, more than the {limit} up to which files are trusted not to be decompression "
            "bombs; cut it into parts"
        ) from None
