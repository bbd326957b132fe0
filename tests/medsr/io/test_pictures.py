"""PNG, JPEG, TIFF and BMP: read exactly, or refused in one line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from medsr.errors import DataError
from medsr.io.image_encoding import ImageEncoding
from medsr.io.images import read_image, read_image_header
from PIL import Image, ImageFile, ImageOps

ROWS, COLUMNS = 6, 9
GREY = (np.arange(ROWS * COLUMNS, dtype=np.uint8) * 4).reshape(ROWS, COLUMNS)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
ALPHA = np.where(GREY > 100, GREY, 0).astype(np.uint8)
DEEP = np.linspace(0, 65535, ROWS * COLUMNS).round().astype(np.uint16).reshape(ROWS, COLUMNS)


def planes(stored, top: float) -> np.ndarray:
    stored = np.asarray(stored)
    stored = stored[..., None] if stored.ndim == 2 else stored
    return np.moveaxis(stored, -1, 0).astype(np.float32) / np.float32(top)


def save(path: Path, pixels, **options) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, size, depth: int, colour: int, *, raw: bytes = b"", before=(), after=()) -> Path:
    """A PNG file from its parts: width and height, bit depth, colour type, and chunks around the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in before), chunk(b"IDAT", zlib.compress(raw))]
    parts += [*(chunk(*c) for c in after), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def tiff(path: Path, size, data: bytes, *, bits=(8,), photometric=1, sample_format=1, more=()) -> Path:
    """A TIFF file of one strip from its tags; one value of several bits is written behind the pixels."""
    width, height = size
    count, values = len(bits), struct.pack(f"<{len(bits)}H", *bits)
    entries = [
        (256, 4, 1, struct.pack("<I", width)),
        (257, 4, 1, struct.pack("<I", height)),
        (258, 3, count, struct.pack("<I", 8 + len(data)) if len(values) > 4 else values),
        (259, 3, 1, b"\1\0"),
        (262, 3, 1, bytes([photometric, 0])),
        (273, 4, 1, struct.pack("<I", 8)),
        (277, 3, 1, bytes([count, 0])),
        (278, 4, 1, struct.pack("<I", height)),
        (279, 4, 1, struct.pack("<I", len(data))),
        (339, 3, 1, bytes([sample_format, 0])),
        *((tag, 3, 1, bytes([value, 0])) for tag, value in more),
    ]
    table = b"".join(struct.pack("<HHI", t, k, n) + v.ljust(4, b"\0") for t, k, n, v in sorted(entries))
    directory = 8 + len(data) + len(values)
    path.write_bytes(
        b"II*\0"
        + struct.pack("<I", directory)
        + data
        + values
        + struct.pack("<H", len(entries))
        + table
        + b"\0\0\0\0"
    )
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "rgb"])
def test_eight_bits(tmp_path, suffix, pixels, accepted):
    image = accepted(save(tmp_path / f"a{suffix}", pixels), planes(pixels, 255))
    kind = {".png": "PNG", ".tif": "TIFF", ".bmp": "BMP"}[suffix]
    expected = ImageEncoding(kind, 8, 3 if pixels.ndim == 3 else 1, dpi=image.encoding.dpi)
    assert (image.encoding, image.notes) == (expected, ())


def test_jpeg_is_what_its_decoder_says(tmp_path, accepted):
    for pixels in (GREY, RGB):
        path = save(tmp_path / "a.jpg", pixels, quality=90, dpi=(300, 300))
        with Image.open(path) as picture:
            image = accepted(path, planes(picture, 255))
        assert (image.encoding.file_format, image.encoding.dpi) == ("JPEG", (300, 300))


def test_compressed_tiff(tmp_path, accepted):
    for compression in ("tiff_lzw", "tiff_adobe_deflate"):
        for pixels, top in ((RGB, 255), (DEEP, 65535)):
            accepted(save(tmp_path / "a.tif", pixels, compression=compression), planes(pixels, top))
    path = save(tmp_path / "b.tif", RGB, compression="jpeg", quality=95)
    with Image.open(path) as picture:
        accepted(path, planes(picture, 255))


@pytest.mark.parametrize("pixels", [DEEP, DEEP // 600, np.zeros_like(DEEP)], ids=["full", "dark", "black"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_never_guessed_from_the_values(tmp_path, suffix, pixels, accepted):
    image = accepted(save(tmp_path / f"a{suffix}", pixels), planes(pixels, 65535))
    assert (image.encoding.bits, image.encoding.span) == (16, 65535)


def test_big_endian_tiff(tmp_path, accepted):
    path = tmp_path / "a.tif"
    save(path, Image.frombytes("I;16B", (COLUMNS, ROWS), DEEP.astype(">u2").tobytes()))
    assert path.read_bytes()[:2] == b"MM"
    accepted(path, planes(DEEP, 65535))


def test_twelve_bit_tiff_is_not_dark(tmp_path, accepted):
    levels = np.array([[0, 1, 2048, 4095], [5, 6, 7, 8]])
    packed = bytes(
        b
        for x, y in levels.reshape(-1, 2)
        for b in (int(x) >> 4, (int(x) & 15) << 4 | int(y) >> 8, int(y) & 255)
    )
    image = accepted(tiff(tmp_path / "a.tif", (4, 2), packed, bits=(12,)), planes(levels, 4095))
    assert (image.encoding.bits, image.encoding.span) == (12, 4095)


def test_white_is_zero_in_eight_bits(tmp_path, accepted):
    path = tiff(tmp_path / "a.tif", (COLUMNS, ROWS), GREY.tobytes(), photometric=0)
    accepted(path, planes(255 - GREY, 255))


def test_palettes_are_expanded(tmp_path, accepted):
    palette = Image.fromarray((GREY % 3).astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 250, 0, 0, 0, 0, 7])
    colours = np.array([[10, 20, 30], [250, 0, 0], [0, 0, 7]])[GREY % 3]
    for suffix in (".png", ".tif", ".bmp"):
        accepted(save(tmp_path / f"a{suffix}", palette), planes(colours, 255))
    opacity = np.array([0, 128, 255])[GREY % 3]
    path = save(tmp_path / "b.png", palette, transparency=bytes([0, 128, 255]))
    accepted(path, planes(colours, 255), planes(opacity, 255))


def test_alpha_is_kept(tmp_path, accepted):
    for pixels, name in ((np.dstack([GREY, ALPHA]), "a.png"), (np.dstack([RGB, ALPHA]), "b.png")):
        accepted(save(tmp_path / name, pixels), planes(pixels[..., :-1], 255), planes(ALPHA, 255))
        path = save(tmp_path / name.replace("png", "tif"), pixels)
        accepted(path, planes(pixels[..., :-1], 255), planes(ALPHA, 255))


def test_a_transparent_colour_becomes_alpha(tmp_path, accepted):
    path = save(tmp_path / "a.png", GREY, transparency=8)
    accepted(path, planes(GREY, 255), planes(np.where(GREY == 8, 0, 255), 255))
    colour = tuple(int(v) for v in RGB[1, 2])
    path = save(tmp_path / "b.png", RGB, transparency=colour)
    opaque = np.where((colour == RGB).all(axis=-1), 0, 255)
    accepted(path, planes(RGB, 255), planes(opaque, 255))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_one_bit_becomes_eight(tmp_path, suffix, accepted):
    image = accepted(save(tmp_path / f"a{suffix}", GREY > 99), planes(GREY > 99, 1))
    assert image.encoding.bits == 8
    assert image.notes == ("the 1-bit image was expanded to 8-bit grey",)


def test_floating_point_tiff(tmp_path, refused, accepted):
    values = np.linspace(0, 1, GREY.size, dtype=np.float32).reshape(GREY.shape)
    image = accepted(save(tmp_path / "a.tif", values), values[None])
    assert (image.encoding.bits, image.encoding.span, len(image.notes)) == (16, 1, 1)
    for value, fragment in (
        (np.nan, "1 of 54 pixels are NaN"),
        (np.inf, "NaN or infinite"),
        (1.5, "to 1.5, only"),
    ):
        bad = values.copy()
        bad[1, 1] = value
        refused(save(tmp_path / "b.tif", bad), fragment, header=False)


def test_undeclared_channels_are_noted(tmp_path, accepted):
    data = np.dstack([RGB, GREY]).tobytes()
    path = tiff(tmp_path / "a.tif", (COLUMNS, ROWS), data, bits=(8,) * 4, photometric=2, more=[(338, 0)])
    assert accepted(path, planes(RGB, 255)).notes == ("further channels of undeclared meaning were left out",)


def test_profile_and_resolution(tmp_path):
    for suffix in (".png", ".tif", ".jpg"):
        path = save(tmp_path / f"a{suffix}", RGB, icc_profile=b"a profile", dpi=(300, 150))
        encoding = read_image(path).encoding
        assert encoding.icc_profile == b"a profile"
        assert encoding.dpi == pytest.approx((300, 150), abs=0.02)
        assert read_image(save(tmp_path / f"b{suffix}", RGB)).encoding.dpi is None
    for bad in ((0, 0), (1e9, 1e9)):
        assert read_image(save(tmp_path / "a.tif", RGB, dpi=bad)).encoding.dpi is None


# --- EXIF orientation -------------------------------------------------------------------------------------


def exif(value: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = value
    return block


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize(
    "options", [{"format": "PNG"}, {"format": "TIFF"}, {"format": "JPEG", "quality": 90}]
)
def test_images_are_read_upright(tmp_path, value, options, accepted):
    path = save(tmp_path / "a", RGB, exif=exif(value), dpi=(300, 150), **options)
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
    assert upright.size == ((COLUMNS, ROWS) if value < 5 else (ROWS, COLUMNS))
    image = accepted(path, planes(upright, 255))
    assert image.notes == ((f"EXIF orientation {value} was applied",) if value > 1 else ())
    assert read_image_header(path).orientation == value
    # The resolution turns with the image.
    expected = (300, 150) if value < 5 else (150, 300)
    assert image.encoding.dpi == pytest.approx(expected, abs=0.02)


def test_orientation_of_deep_grey_and_behind_the_pixels(tmp_path, accepted):
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP)
    block = exif(6).tobytes()[6:]
    for place in ("before", "after"):
        path = png(tmp_path / "a.png", (COLUMNS, ROWS), 16, 0, raw=raw, **{place: [(b"eXIf", block)]})
        accepted(path, planes(np.rot90(DEEP, -1), 65535))


def test_broken_exif_does_not_stop_an_image(tmp_path, accepted):
    raw = b"".join(b"\0" + row.tobytes() for row in GREY)
    path = png(tmp_path / "a.png", (COLUMNS, ROWS), 8, 0, raw=raw, before=[(b"eXIf", b"ZZMARKER")])
    assert accepted(path, planes(GREY, 255)).notes == ("the EXIF block cannot be read and is ignored",)
    path = save(tmp_path / "b.png", GREY, exif=exif(9))
    assert accepted(path, planes(GREY, 255)).notes == ()


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_zero_size(tmp_path, size, refused):
    refused(png(tmp_path / "a.png", size, 8, 0), rf"no pixels \({size[0]} x {size[1]}\)")


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk(tmp_path, suffix, refused):
    path = save(tmp_path / f"a{suffix}", Image.fromarray(RGB).convert("CMYK"))
    refused(path, "CMYK colours are not supported; convert the image to RGB")


def test_several_pages(tmp_path, refused):
    pages = {"save_all": True, "append_images": [Image.fromarray(255 - GREY)] * 2}
    refused(save(tmp_path / "a.tif", GREY, **pages), "3 pages or frames in one file")
    refused(save(tmp_path / "a.png", GREY, **pages), "3 pages or frames in one file")
    # Two photographs in one JPEG file, as some cameras write them.
    refused(save(tmp_path / "a.jpg", GREY, format="MPO", **pages), "3 pages or frames in one file")


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (4, 2), (6, 4)], ids=["rgb", "grey-alpha", "rgba"])
def test_deep_colour_png_would_lose_bits(tmp_path, colour, samples, refused):
    raw = b"".join(b"\0" + bytes(range(8 * samples)) for _ in range(3))
    refused(png(tmp_path / "a.png", (4, 3), 16, colour, raw=raw), "more than 8 bits per channel")


def test_deep_grey_with_a_transparent_level(tmp_path, refused):
    path = png(tmp_path / "a.png", (4, 3), 16, 0, raw=(b"\0" + bytes(8)) * 3, before=[(b"tRNS", b"\0\1")])
    refused(path, "more than 8 bits per channel")


@pytest.mark.parametrize(
    ("bits", "options", "fragment"),
    [
        ((16, 16, 16), {"photometric": 2}, "more than 8 bits per channel"),
        ((16, 16, 16, 16), {"photometric": 2, "more": [(338, 2)]}, "more than 8 bits per channel"),
        ((16,), {"photometric": 0}, "16-bit TIFF with 0 as white"),
        ((16,), {"sample_format": 2}, "signed or 32-bit integers"),
        ((8,), {"sample_format": 2}, "signed or 32-bit integers"),
        ((32,), {}, "signed or 32-bit integers"),
        ((8, 8, 8), {"photometric": 8}, "LAB colours"),
        ((32, 32, 32), {"photometric": 2, "sample_format": 3}, "unusual pixel type"),
    ],
)
def test_tiff_that_cannot_be_read_exactly(tmp_path, bits, options, fragment, refused):
    refused(tiff(tmp_path / "a.tif", (4, 3), bytes(12 * sum(bits) // 8), bits=bits, **options), fragment)


CUTS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("BMP", {}),
]


@pytest.mark.parametrize(("kind", "options"), CUTS, ids=[f"{k}{len(o)}" for k, o in CUTS])
def test_a_cut_at_any_byte_is_noticed(tmp_path, kind, options, monkeypatch):
    buffer = io.BytesIO()
    # Eight columns: nothing but padding would be missing at the end of a BMP file of nine.
    Image.fromarray(RGB[:, :8]).save(buffer, kind, **options)
    data = buffer.getvalue()
    # Other libraries set this for the whole process.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "a"
    for end in [*range(1, len(data), 13), *range(len(data) - 14, len(data))]:
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match=r"truncated|not a PNG"):
            read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path, refused):
    path = save(tmp_path / "a.png", RGB)
    data = path.read_bytes()
    place = data.index(b"IDAT") + 20
    path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    refused(path, "truncated or damaged", header=False)


@pytest.mark.parametrize("kept", [9, 12, 15, 20])
def test_a_png_that_ends_inside_its_first_bytes_is_called_truncated(tmp_path, kept, refused):
    path = save(tmp_path / "a.png", RGB)
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "truncated, the file ends inside a PNG chunk")
