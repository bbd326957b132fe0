from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from medsr.errors import DataError
from medsr.io.cases import refuse_marked
from medsr.io.images import ImageEncoding, find_images, read_image, read_image_header
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


def refused(path, fragment: str, *, header: bool = True) -> str:
    """The file is refused in one line, and already by its header unless told otherwise."""
    with pytest.raises(DataError, match=fragment) as caught:
        read_image(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path.name}: ")
    assert str(path.parent) not in message
    if header:
        with pytest.raises(DataError, match=fragment):
            read_image_header(path)
    else:
        read_image_header(path)
    return message


def accepted(path, expected: np.ndarray, alpha: np.ndarray | None = None):
    image, header = read_image(path), read_image_header(path)
    assert image.values.dtype == np.float32
    assert image.values.flags.c_contiguous
    np.testing.assert_array_equal(image.values, expected)
    assert (image.alpha is None) == (alpha is None)
    if alpha is not None:
        np.testing.assert_array_equal(image.alpha, alpha)
    assert (header.size, header.channels) == (image.values.shape[1:], len(image.values))
    assert (header.encoding, header.notes) == (image.encoding, image.notes)
    assert header.has_alpha == (alpha is not None)
    return image


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


# --- Pictures that are read exactly -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "rgb"])
def test_eight_bits(tmp_path, suffix, pixels):
    image = accepted(save(tmp_path / f"a{suffix}", pixels), planes(pixels, 255))
    kind = {".png": "PNG", ".tif": "TIFF", ".bmp": "BMP"}[suffix]
    expected = ImageEncoding(kind, 8, 3 if pixels.ndim == 3 else 1, dpi=image.encoding.dpi)
    assert (image.encoding, image.notes) == (expected, ())


def test_jpeg_is_what_its_decoder_says(tmp_path):
    for pixels in (GREY, RGB):
        path = save(tmp_path / "a.jpg", pixels, quality=90, dpi=(300, 300))
        with Image.open(path) as picture:
            image = accepted(path, planes(picture, 255))
        assert (image.encoding.file_format, image.encoding.dpi) == ("JPEG", (300, 300))


def test_compressed_tiff(tmp_path):
    for compression in ("tiff_lzw", "tiff_adobe_deflate"):
        for pixels, top in ((RGB, 255), (DEEP, 65535)):
            accepted(save(tmp_path / "a.tif", pixels, compression=compression), planes(pixels, top))
    path = save(tmp_path / "b.tif", RGB, compression="jpeg", quality=95)
    with Image.open(path) as picture:
        accepted(path, planes(picture, 255))


@pytest.mark.parametrize("pixels", [DEEP, DEEP // 600, np.zeros_like(DEEP)], ids=["full", "dark", "black"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_never_guessed_from_the_values(tmp_path, suffix, pixels):
    image = accepted(save(tmp_path / f"a{suffix}", pixels), planes(pixels, 65535))
    assert (image.encoding.bits, image.encoding.span) == (16, 65535)


def test_big_endian_tiff(tmp_path):
    path = tmp_path / "a.tif"
    save(path, Image.frombytes("I;16B", (COLUMNS, ROWS), DEEP.astype(">u2").tobytes()))
    assert path.read_bytes()[:2] == b"MM"
    accepted(path, planes(DEEP, 65535))


def test_twelve_bit_tiff_is_not_dark(tmp_path):
    levels = np.array([[0, 1, 2048, 4095], [5, 6, 7, 8]])
    packed = bytes(
        b
        for x, y in levels.reshape(-1, 2)
        for b in (int(x) >> 4, (int(x) & 15) << 4 | int(y) >> 8, int(y) & 255)
    )
    image = accepted(tiff(tmp_path / "a.tif", (4, 2), packed, bits=(12,)), planes(levels, 4095))
    assert (image.encoding.bits, image.encoding.span) == (12, 4095)


def test_white_is_zero_in_eight_bits(tmp_path):
    path = tiff(tmp_path / "a.tif", (COLUMNS, ROWS), GREY.tobytes(), photometric=0)
    accepted(path, planes(255 - GREY, 255))


def test_palettes_are_expanded(tmp_path):
    palette = Image.fromarray((GREY % 3).astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 250, 0, 0, 0, 0, 7])
    colours = np.array([[10, 20, 30], [250, 0, 0], [0, 0, 7]])[GREY % 3]
    for suffix in (".png", ".tif", ".bmp"):
        accepted(save(tmp_path / f"a{suffix}", palette), planes(colours, 255))
    opacity = np.array([0, 128, 255])[GREY % 3]
    path = save(tmp_path / "b.png", palette, transparency=bytes([0, 128, 255]))
    accepted(path, planes(colours, 255), planes(opacity, 255))


def test_alpha_is_kept(tmp_path):
    for pixels, name in ((np.dstack([GREY, ALPHA]), "a.png"), (np.dstack([RGB, ALPHA]), "b.png")):
        accepted(save(tmp_path / name, pixels), planes(pixels[..., :-1], 255), planes(ALPHA, 255))
        path = save(tmp_path / name.replace("png", "tif"), pixels)
        accepted(path, planes(pixels[..., :-1], 255), planes(ALPHA, 255))


def test_a_transparent_colour_becomes_alpha(tmp_path):
    path = save(tmp_path / "a.png", GREY, transparency=8)
    accepted(path, planes(GREY, 255), planes(np.where(GREY == 8, 0, 255), 255))
    colour = tuple(int(v) for v in RGB[1, 2])
    path = save(tmp_path / "b.png", RGB, transparency=colour)
    opaque = np.where((colour == RGB).all(axis=-1), 0, 255)
    accepted(path, planes(RGB, 255), planes(opaque, 255))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_one_bit_becomes_eight(tmp_path, suffix):
    image = accepted(save(tmp_path / f"a{suffix}", GREY > 99), planes(GREY > 99, 1))
    assert image.encoding.bits == 8
    assert image.notes == ("the 1-bit image was expanded to 8-bit grey",)


def test_floating_point_tiff(tmp_path):
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


def test_undeclared_channels_are_noted(tmp_path):
    data = np.dstack([RGB, GREY]).tobytes()
    path = tiff(tmp_path / "a.tif", (COLUMNS, ROWS), data, bits=(8,) * 4, photometric=2, more=[(338, 0)])
    assert accepted(path, planes(RGB, 255)).notes == ("further channels of undeclared meaning were left out",)


def test_content_decides_the_format(tmp_path):
    path = save(tmp_path / "a.jpg", RGB, format="PNG")
    assert accepted(path, planes(RGB, 255)).encoding.file_format == "PNG"


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
def test_images_are_read_upright(tmp_path, value, options):
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


def test_orientation_of_deep_grey_and_behind_the_pixels(tmp_path):
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP)
    block = exif(6).tobytes()[6:]
    for place in ("before", "after"):
        path = png(tmp_path / "a.png", (COLUMNS, ROWS), 16, 0, raw=raw, **{place: [(b"eXIf", block)]})
        accepted(path, planes(np.rot90(DEEP, -1), 65535))


def test_broken_exif_does_not_stop_an_image(tmp_path):
    raw = b"".join(b"\0" + row.tobytes() for row in GREY)
    path = png(tmp_path / "a.png", (COLUMNS, ROWS), 8, 0, raw=raw, before=[(b"eXIf", b"ZZMARKER")])
    assert accepted(path, planes(GREY, 255)).notes == ("the EXIF block cannot be read and is ignored",)
    path = save(tmp_path / "b.png", GREY, exif=exif(9))
    assert accepted(path, planes(GREY, 255)).notes == ()


# --- Pictures that are refused ----------------------------------------------------------------------------


def test_no_image(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "not a file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty file")
    (tmp_path / "text.png").write_text("a report on ZZMARKER" * 20)
    assert "ZZMARKER" not in refused(tmp_path / "text.png", "not a PNG, JPEG, TIFF, BMP or DICOM image")
    refused(save(tmp_path / "a.gif", GREY), "not a PNG, JPEG")


def test_locked_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", GREY)

    def locked(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", locked)
    refused(path, "cannot be read .Permission denied")


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_zero_size(tmp_path, size):
    refused(png(tmp_path / "a.png", size, 8, 0), rf"no pixels \({size[0]} x {size[1]}\)")


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", Image.fromarray(RGB).convert("CMYK"))
    refused(path, "CMYK colours are not supported; convert the image to RGB")


def test_several_pages(tmp_path):
    pages = {"save_all": True, "append_images": [Image.fromarray(255 - GREY)] * 2}
    refused(save(tmp_path / "a.tif", GREY, **pages), "3 pages or frames in one file")
    refused(save(tmp_path / "a.png", GREY, **pages), "3 pages or frames in one file")
    # Two photographs in one JPEG file, as some cameras write them.
    refused(save(tmp_path / "a.jpg", GREY, format="MPO", **pages), "3 pages or frames in one file")


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (4, 2), (6, 4)], ids=["rgb", "grey-alpha", "rgba"])
def test_deep_colour_png_would_lose_bits(tmp_path, colour, samples):
    raw = b"".join(b"\0" + bytes(range(8 * samples)) for _ in range(3))
    refused(png(tmp_path / "a.png", (4, 3), 16, colour, raw=raw), "more than 8 bits per channel")


def test_deep_grey_with_a_transparent_level(tmp_path):
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
def test_tiff_that_cannot_be_read_exactly(tmp_path, bits, options, fragment):
    refused(tiff(tmp_path / "a.tif", (4, 3), bytes(12 * sum(bits) // 8), bits=bits, **options), fragment)


@pytest.mark.parametrize("limit", [ROWS * COLUMNS - 1, ROWS * COLUMNS // 2 - 1], ids=["warning", "error"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_decompression_bombs(tmp_path, monkeypatch, limit, suffix):
    path = save(tmp_path / f"a{suffix}", RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    refused(path, f"^a.{suffix[1:]}: 54 pixels, more than the {limit} up to which .*; cut it into parts$")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    read_image(path)


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


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path):
    path = save(tmp_path / "a.png", RGB)
    data = path.read_bytes()
    place = data.index(b"IDAT") + 20
    path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    refused(path, "truncated or damaged", header=False)


def test_headers_are_read_without_decoding(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"a{suffix}", RGB) for suffix in (".png", ".jpg", ".tif", ".bmp")]

    def decoded(self):
        raise AssertionError

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    assert {read_image_header(path).size for path in paths} == {(ROWS, COLUMNS)}


# --- DICOM ------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path, marker):
    """Write a DICOM photograph; ``edit(dataset)`` changes it in place, ``attributes`` are set before."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, OphthalmicPhotography8BitImageStorage

    def build(pixels=RGB, edit=None, *, name="a.dcm", **attributes) -> Path:
        pixels = np.asarray(pixels)
        bits = 8 * pixels.dtype.itemsize
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = OphthalmicPhotography8BitImageStorage, "1.2.3.4"
        ds.PatientName, ds.PatientID, ds.StudyDescription = f"{marker}^Name", marker, marker
        ds.Rows, ds.Columns = pixels.shape[:2]
        ds.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
        ds.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
        if pixels.ndim == 3:
            ds.PlanarConfiguration = 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)
        if edit is not None:
            edit(ds)
        ds.save_as(tmp_path / name, enforce_file_format=True)
        return tmp_path / name

    return build


def test_dicom_eight_bits(photo, marker):
    image = accepted(photo(ICCProfile=b"profile!"), planes(RGB, 255))
    assert image.encoding == ImageEncoding("DICOM", 8, 3, photometric="RGB", icc_profile=b"profile!")
    assert marker not in repr(image)
    image = accepted(photo(GREY, LossyImageCompression="01", name="no-suffix"), planes(GREY, 255))
    assert image.encoding == ImageEncoding("DICOM", 8, 1, photometric="MONOCHROME2")
    assert image.notes == ("the source was compressed with loss",)


def test_dicom_planes_one_after_the_other(photo):
    def edit(ds):
        ds.PlanarConfiguration, ds.PixelData = 1, RGB.transpose(2, 0, 1).tobytes()

    accepted(photo(edit=edit), planes(RGB, 255))


def test_dicom_by_its_stored_bits(photo):
    levels = np.array([[0, 1, 2048, 4095], [5, 6, 7, 8]], dtype=np.uint16)
    # Bits above BitsStored may hold an overlay.
    image = accepted(photo(levels | 0x8000, BitsStored=12, HighBit=11), planes(levels, 4095))
    assert (image.encoding.bits, image.encoding.offset, image.encoding.span) == (12, 0, 4095)
    accepted(photo(DEEP), planes(DEEP, 65535))


def test_dicom_signed_and_rescaled(photo):
    levels = np.array([[-2048, -1, 0, 2047]], dtype=np.int16)
    path = photo(levels, BitsStored=12, HighBit=11, RescaleSlope="0.5", RescaleIntercept="10")
    encoding = accepted(path, planes(levels + 2048, 4095)).encoding
    back = encoding.offset + encoding.span * read_image(path).values[0].astype(np.float64)
    np.testing.assert_allclose(back, levels * 0.5 + 10, atol=1e-3)


def test_monochrome1_is_kept_as_stored(photo):
    image = accepted(photo(GREY, PhotometricInterpretation="MONOCHROME1"), planes(GREY, 255))
    assert image.encoding.photometric == "MONOCHROME1"
    assert image.notes == ("MONOCHROME1: values are kept as stored, 0 is to be displayed white",)


def test_dicom_ybr_becomes_rgb(photo):
    smooth = np.stack(np.meshgrid(np.arange(60, 140, 10), np.arange(60, 120, 10)), axis=-1)
    smooth = np.dstack([smooth, np.full(smooth.shape[:2], 90)]).astype(np.uint8)
    ybr = np.asarray(Image.fromarray(smooth).convert("YCbCr"))

    def half(ds):
        pairs = ybr.reshape(6, 4, 2, 3)
        shared = pairs[:, :, 0, 1:]
        ds.PixelData = np.concatenate([pairs[..., 0], shared], axis=-1).tobytes()

    whole = read_image(photo(ybr, PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_allclose(whole.values, planes(smooth, 255), atol=4 / 255)
    subsampled = read_image(photo(ybr, half, PhotometricInterpretation="YBR_FULL_422"))
    np.testing.assert_allclose(subsampled.values, planes(smooth, 255), atol=20 / 255)
    np.testing.assert_allclose(subsampled.values[:, :, ::2], planes(smooth, 255)[:, :, ::2], atol=4 / 255)


def test_dicom_compressed(photo):
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

    def encoded(syntax, **options):
        def edit(ds):
            buffer = io.BytesIO()
            Image.fromarray(RGB).save(buffer, **options)
            ds.PixelData = encapsulate([buffer.getvalue()])
            ds["PixelData"].VR = "OB"
            ds["PixelData"].is_undefined_length = True
            ds.file_meta.TransferSyntaxUID = syntax

        return edit

    path = photo(edit=encoded(JPEG2000Lossless, format="JPEG2000"), PhotometricInterpretation="YBR_RCT")
    accepted(path, planes(RGB, 255))
    options = {"format": "JPEG", "quality": 95, "subsampling": 0}
    path = photo(edit=encoded(JPEGBaseline8Bit, **options), PhotometricInterpretation="YBR_FULL_422")
    np.testing.assert_allclose(read_image(path).values, planes(RGB, 255), atol=30 / 255)
    path = photo(edit=lambda ds: ds.compress(RLELossless, generate_instance_uid=False))
    accepted(path, planes(RGB, 255))


PALETTE = np.array([[0, 100, 255], [10, 20, 30], [250, 0, 7], [9, 9, 9]])


def set_palette(ds, depth: int, entries: int = len(PALETTE)) -> None:
    table = PALETTE.astype(np.uint8) if depth == 8 else (PALETTE * 257).astype(np.uint16)
    for name, column in zip(("Red", "Green", "Blue"), table.T, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [entries, 0, depth])
        setattr(ds, f"{name}PaletteColorLookupTableData", column.tobytes())


@pytest.mark.parametrize("depth", [8, 16])
def test_dicom_palette_is_expanded(photo, depth):
    indices = np.tile(np.array([0, 1, 2, 3, 9, 1], dtype=np.uint16), (2, 1))
    # Indices above the last entry take the last one.
    expected = planes(PALETTE[np.minimum(indices, 3)], 255)
    indices[:, 4] = 300
    path = photo(indices, lambda ds: set_palette(ds, depth), PhotometricInterpretation="PALETTE COLOR")
    image = read_image(path)
    np.testing.assert_allclose(image.values, expected, atol=1e-6)
    assert (image.encoding.channels, image.encoding.bits) == (3, 8)
    assert len(image.notes) == (0 if depth == 8 else 1)


def test_dicom_palette_that_does_not_fit(photo):
    path = photo(GREY, lambda ds: set_palette(ds, 8, entries=300), PhotometricInterpretation="PALETTE COLOR")
    refused(path, "palette of 300 colours of 8 bits", header=False)
    path = photo(GREY, PhotometricInterpretation="PALETTE COLOR")
    refused(path, "truncated or damaged")


@pytest.mark.parametrize(
    ("attributes", "fragment"),
    [
        ({"NumberOfFrames": 3}, r"multi-frame DICOM \(3 frames\)"),
        ({"PhotometricInterpretation": "CMYK"}, "unknown PhotometricInterpretation"),
        ({"PhotometricInterpretation": "MONOCHROME2"}, "unsupported pixel layout for MONOCHROME2 .3 samples"),
        ({"BitsStored": 7}, "unsupported pixel layout"),
        ({"HighBit": 6}, "unsupported pixel layout"),
        ({"PixelRepresentation": 1}, "unsupported pixel layout for RGB .*signed"),
        ({"Rows": 0}, "no pixels .0 rows, 9 columns"),
        ({"ModalityLUTSequence": []}, "Modality LUT"),
    ],
)
def test_dicom_that_is_refused(photo, marker, attributes, fragment):
    assert marker not in refused(photo(**attributes), fragment)


@pytest.mark.parametrize("slope", ["0", "1e308"])
def test_dicom_with_a_useless_rescale(photo, slope):
    refused(photo(DEEP, RescaleSlope=slope), "RescaleSlope or RescaleIntercept is not usable")


def test_dicom_without_image_or_decoder(photo, tmp_path, marker):
    from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLSLossless

    def drop(*keywords):
        def edit(ds):
            for keyword in keywords:
                delattr(ds, keyword)

        return edit

    refused(photo(edit=drop("Rows", "PixelData")), "no image in this DICOM file")
    refused(photo(edit=drop("PixelData")), "no pixel data", header=False)
    (tmp_path / "text.dcm").write_text(marker * 40)
    assert marker not in refused(tmp_path / "text.dcm", "no image in this DICOM file|truncated or damaged")
    path = photo(edit=lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))
    refused(path, "deflated DICOM is not supported")
    from pydicom.encaps import encapsulate

    def undecodable(ds):
        ds.file_meta.TransferSyntaxUID = JPEGLSLossless
        ds.PixelData = encapsulate([b"1234"])
        ds["PixelData"].is_undefined_length = True

    refused(photo(edit=undecodable), "no decoder for the transfer syntax JPEG-LS")


def test_dicom_cut_short(photo, marker):
    path = photo()
    data = path.read_bytes()
    for end in (len(data) - 1, len(data) - RGB.nbytes // 2, 200, 133):
        path.write_bytes(data[:end])
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert "\n" not in str(caught.value)
        assert marker not in str(caught.value)


def test_dicom_without_preamble(photo):
    path = photo(GREY)
    data = path.read_bytes()
    # The file meta group is left out as well: what remains starts with the SOP class.
    path.write_bytes(data[data.index(b"\x08\x00\x16\x00UI") :])
    accepted(path, planes(GREY, 255))


def test_dicom_bomb(photo, monkeypatch):
    path = photo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 53)
    refused(path, "54 pixels, more than the 53 up to which")


@pytest.mark.parametrize("kept", [9, 12, 15, 20])
def test_a_png_that_ends_inside_its_first_bytes_is_called_truncated(tmp_path, kept):
    path = save(tmp_path / "a.png", RGB)
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "truncated, the file ends inside a PNG chunk")


# --- Encoding ---------------------------------------------------------------------------------------------


def test_encoding_survives_as_metadata():
    full = ImageEncoding("DICOM", 12, 1, -5.5, 0.1, "MONOCHROME1", b"\0\xff\n", (72.5, 300.0))
    colours = ImageEncoding("PNG", 8, 3, png_colour=(("cHRM", bytes(32)), ("gAMA", b"\0\1\x86\xa0")))
    for encoding in (full, colours, ImageEncoding("PNG", 8, 3)):
        meta = encoding.to_meta()
        assert all(isinstance(value, (str, int, float)) for value in meta.values())
        assert ImageEncoding.from_meta(meta) == encoding


def test_a_magnified_image_has_more_pixels_per_inch():
    encoding = ImageEncoding("JPEG", 8, 3, icc_profile=b"p", dpi=(100.0, 50.0))
    assert encoding.magnified(4) == dataclasses.replace(encoding, dpi=(400.0, 200.0))
    plain = ImageEncoding("PNG", 8, 3)
    assert plain.magnified(4) == plain


# --- Listing ----------------------------------------------------------------------------------------------


def listing_refused(source, fragment):
    with pytest.raises(DataError, match=fragment) as caught:
        refuse_marked(find_images(source))
    assert "\n" not in str(caught.value)


def names(source):
    return [item["case"] for item in find_images(source)]


def test_images_of_a_folder(photo, tmp_path, monkeypatch):
    for name in ("b 2.PNG", "a.v1.jpeg", "c.tif", "d.bmp", ".hidden.png"):
        save(tmp_path / name, RGB)
    photo(name="IM000001")
    photo(name="z.dcm").rename(tmp_path / "DICOMDIR")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "e_superres.png", RGB)
    assert names(tmp_path) == ["IM000001", "a.v1", "b_2", "c", "d"]
    path = tmp_path / "b 2.PNG"
    assert find_images(path) == [{"image": str(path), "case": "b_2"}]
    assert names([tmp_path / "c.tif", str(tmp_path / "out")]) == ["c", "e_superres"]
    monkeypatch.chdir(tmp_path)
    assert find_images("c.tif")[0]["image"] == str(tmp_path / "c.tif")


def test_nothing_to_list(tmp_path):
    listing_refused([], "list of inputs is empty")
    listing_refused(tmp_path / "none", "no such file or folder")
    listing_refused(
        tmp_path, "no PNG, JPEG, TIFF, BMP or DICOM file in this folder; sub-folders are not searched"
    )
    (tmp_path / "a.nii.gz").touch()
    listing_refused(tmp_path / "a.nii.gz", "not a PNG, JPEG, TIFF, BMP or DICOM file")


def test_one_name_for_two_images(tmp_path):
    save(tmp_path / "a.png", RGB)
    save(tmp_path / "A.jpg", RGB)
    listing_refused(tmp_path, "A.jpg and a.png have the same case name a; rename one")
    save(tmp_path / "a.tif", RGB)
    save(tmp_path / "b.png", RGB)
    found = find_images(tmp_path)
    assert [(item["case"], "error" in item) for item in found] == [
        ("A.jpg", True),
        ("a.png", True),
        ("a.tif", True),
        ("b", False),
    ]


def test_links_that_leave_the_folder(tmp_path):
    path = save(tmp_path / "a.png", RGB)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "b.png").symlink_to(path)
    listing_refused(inner, "leaves the folder inner; name the file itself instead$")
    assert names(inner / "b.png") == ["b"]


def test_pictures_that_are_not_read_are_named_once(tmp_path, caplog):
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    for name in ("second.webp", "First.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [item["case"] for item in find_images(tmp_path)] == ["good"]
    find_images(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2 pictures are left out, First.HEIC first" in line


def test_a_broken_link_and_a_file_that_cannot_be_opened_are_cases_that_fail_alone(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("ok.png", "other.jfif", "third.JPE"):
        Image.fromarray(RGB).save(folder / name, "PNG" if name == "ok.png" else "JPEG")
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    (folder / "notes").write_text("locked")
    (folder / "gone").symlink_to(folder / "nowhere.txt")
    (folder / "unfetched.png").symlink_to(tmp_path / "annex" / "nowhere.png")
    real = Path.open

    def locked(self, *args, **settings):
        if self.name == "notes":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **settings)

    monkeypatch.setattr(Path, "open", locked)
    assert [item["case"] for item in find_images(folder)] == [
        *("lost", "notes", "ok", "other", "third", "unfetched")
    ]
    refused(folder / "lost.png", "a link to a file that is not there")
    refused(folder / "notes", r"cannot be read \(Permission denied\)")
    assert read_image(folder / "other.jfif").encoding.file_format == "JPEG"
