"""Strict reading of photographs: PNG, JPEG, TIFF, BMP and single-frame DICOM, exact or with one line why not.

Pillow is used for the decoding, and pydicom for DICOM. Alone, Pillow reads 16-bit colour as 8 bits, 12-bit grey
as a dark 16-bit image and the first of several pages, all without a word, and super-resolution tools guess the bit
depth from the largest value. Here the depth comes from the header, and what cannot be read exactly is refused.
Nothing but pixels, the meaning of their colours and resolution is taken from a file, so no patient data can reach an
output.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from medsr.errors import DataError
from medsr.io.cases import collect_cases, list_folder, warn_once
from medsr.io.dicom_images import DEFLATED, PIXEL_TAGS
from medsr.io.nifti import refuse_oversize

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageEncoding",
    "ImageHeader",
    "LoadedImage",
    "find_images",
    "read_image",
    "read_image_header",
    "read_palette_indices",
]

_UNREAD = (".webp", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".tga")
"""Endings of pictures that are not read: a folder that holds them says so, others may hold anything."""

IMAGE_SUFFIXES = (".png", ".jpeg", ".jpg", ".jpe", ".jfif", ".tiff", ".tif", ".bmp", ".dcm")
"""Endings of the images that are read; a DICOM file needs none."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_KINDS = "PNG, JPEG, TIFF, BMP or DICOM"

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

_DICOM_TAGS = [
    *PIXEL_TAGS,
    "PerFrameFunctionalGroupsSequence",
    "ICCProfile",
    *(
        f"{segmented}{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
]
_DICOM_GREY = ("MONOCHROME1", "MONOCHROME2")
# The decoders of JPEG 2000 undo YBR_ICT and YBR_RCT themselves, pydicom the others.
_DICOM_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

PathLike = str | os.PathLike[str]


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
        return _dicom_header(path) if dicom else _picture_header(path)


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
        pixels = _dicom_pixels(header) if header.encoding.file_format == "DICOM" else _picture_pixels(header)
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
        image = _upright(header)
    return np.asarray(image) if image.mode == "P" else None


# --- Files --------------------------------------------------------------------------------------------------


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


def _unit(stored: npt.NDArray[Any], top: float) -> npt.NDArray[np.float32]:
    """Levels ``(H, W)`` or ``(H, W, C)`` from 0 to ``top`` as ``(C, H, W)`` in [0, 1]."""
    planes = stored[None] if stored.ndim == 2 else np.moveaxis(stored, -1, 0)
    return np.divide(planes, np.float32(top), dtype=np.float32, order="C")


# --- Pictures -----------------------------------------------------------------------------------------------


def _picture_header(path: Path) -> ImageHeader:
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


def _picture_pixels(header: ImageHeader) -> npt.NDArray[np.float32]:
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
    return _unit(pixels, encoding.span)


# --- DICOM --------------------------------------------------------------------------------------------------


def _dataset(path: Path, *, pixels: bool) -> Any:
    """The listed tags of a file, with the transfer syntax that files without preamble leave open."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    tags: list[Any] = [*_DICOM_TAGS, "PixelData"] if pixels else list(_DICOM_TAGS)
    dataset = pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=tags, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def _dicom_header(path: Path) -> ImageHeader:
    name = path.name
    dataset = _dataset(path, pixels=False)
    if "Rows" not in dataset or "Columns" not in dataset:
        raise DataError(f"{name}: no image in this DICOM file, or it is cut")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows < 1 or columns < 1:
        raise DataError(f"{name}: no pixels ({rows} rows, {columns} columns)")
    _refuse_bomb(name, rows * columns)
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
    colour = photometric in _DICOM_COLOUR
    if not colour and photometric not in (*_DICOM_GREY, "PALETTE COLOR"):
        raise DataError(f"{name}: unknown PhotometricInterpretation; export the image as RGB or MONOCHROME2")
    _refuse_unknown_layout(name, dataset, photometric)
    _refuse_without_decoder(name, dataset.file_meta.TransferSyntaxUID)
    notes: list[str] = []
    bits, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation"))
    span, offset = 2.0**bits - 1, -(2.0 ** (bits - 1)) if signed else 0.0
    if photometric in _DICOM_GREY:
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
        channels=1 if photometric in _DICOM_GREY else 3,
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
    colour = photometric in _DICOM_COLOUR
    if (
        allocated not in (8, 16)
        or not 1 <= stored <= allocated
        or high != stored - 1
        or samples != (3 if colour else 1)
        or (colour and stored != 8)
        or (photometric not in _DICOM_GREY and signed)
    ):
        raise DataError(
            f"{name}: unsupported pixel layout for {photometric} ({samples} samples, allocated {allocated}, stored "
            f"{stored}, high bit {high}, {'signed' if signed else 'unsigned'}); convert it first"
        )


def _refuse_without_decoder(name: str, syntax: Any) -> None:
    from pydicom.pixels import get_decoder

    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise DataError(
            f"{name}: no decoder for the transfer syntax {syntax.name}; install pylibjpeg, python-gdcm or convert "
            "the image"
        )


def _dicom_pixels(header: ImageHeader) -> npt.NDArray[np.float32]:
    from pydicom.pixels import pixel_array

    name, encoding = header.path.name, header.encoding
    dataset = _dataset(header.path, pixels=True)
    if "PixelData" not in dataset:
        raise DataError(f"{name}: no pixel data; the file is damaged or cut")
    stored = pixel_array(dataset)
    if encoding.photometric == "PALETTE COLOR":
        return _unit(_colours(name, stored, dataset), encoding.span)
    if encoding.channels == 3:
        return _unit(stored, encoding.span)
    # Some cameras keep overlays in the bits above BitsStored. Flipping the sign bit moves the lowest value to 0.
    levels = stored.astype(np.int32) & ((1 << encoding.bits) - 1)
    if dataset.get("PixelRepresentation"):
        levels ^= 1 << (encoding.bits - 1)
    return _unit(levels, 2**encoding.bits - 1)


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
