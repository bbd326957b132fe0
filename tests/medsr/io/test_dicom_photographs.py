"""DICOM photographs: read by their stored bits, or refused in one line."""

from __future__ import annotations

import io

import numpy as np
import pytest
from medsr.errors import DataError
from medsr.io.image_encoding import ImageEncoding
from medsr.io.images import read_image
from PIL import Image

ROWS, COLUMNS = 6, 9
GREY = (np.arange(ROWS * COLUMNS, dtype=np.uint8) * 4).reshape(ROWS, COLUMNS)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
DEEP = np.linspace(0, 65535, ROWS * COLUMNS).round().astype(np.uint16).reshape(ROWS, COLUMNS)


def planes(stored, top: float) -> np.ndarray:
    stored = np.asarray(stored)
    stored = stored[..., None] if stored.ndim == 2 else stored
    return np.moveaxis(stored, -1, 0).astype(np.float32) / np.float32(top)


def test_dicom_eight_bits(photo, marker, accepted):
    image = accepted(photo(ICCProfile=b"profile!"), planes(RGB, 255))
    assert image.encoding == ImageEncoding("DICOM", 8, 3, photometric="RGB", icc_profile=b"profile!")
    assert marker not in repr(image)
    image = accepted(photo(GREY, LossyImageCompression="01", name="no-suffix"), planes(GREY, 255))
    assert image.encoding == ImageEncoding("DICOM", 8, 1, photometric="MONOCHROME2")
    assert image.notes == ("the source was compressed with loss",)


def test_dicom_planes_one_after_the_other(photo, accepted):
    def edit(ds):
        ds.PlanarConfiguration, ds.PixelData = 1, RGB.transpose(2, 0, 1).tobytes()

    accepted(photo(edit=edit), planes(RGB, 255))


def test_dicom_by_its_stored_bits(photo, accepted):
    levels = np.array([[0, 1, 2048, 4095], [5, 6, 7, 8]], dtype=np.uint16)
    # Bits above BitsStored may hold an overlay.
    image = accepted(photo(levels | 0x8000, BitsStored=12, HighBit=11), planes(levels, 4095))
    assert (image.encoding.bits, image.encoding.offset, image.encoding.span) == (12, 0, 4095)
    accepted(photo(DEEP), planes(DEEP, 65535))


def test_dicom_signed_and_rescaled(photo, accepted):
    levels = np.array([[-2048, -1, 0, 2047]], dtype=np.int16)
    path = photo(levels, BitsStored=12, HighBit=11, RescaleSlope="0.5", RescaleIntercept="10")
    encoding = accepted(path, planes(levels + 2048, 4095)).encoding
    back = encoding.offset + encoding.span * read_image(path).values[0].astype(np.float64)
    np.testing.assert_allclose(back, levels * 0.5 + 10, atol=1e-3)


def test_monochrome1_is_kept_as_stored(photo, accepted):
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


def test_dicom_compressed(photo, accepted):
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


def test_dicom_palette_that_does_not_fit(photo, refused):
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
def test_dicom_that_is_refused(photo, marker, attributes, fragment, refused):
    assert marker not in refused(photo(**attributes), fragment)


@pytest.mark.parametrize("slope", ["0", "1e308"])
def test_dicom_with_a_useless_rescale(photo, slope, refused):
    refused(photo(DEEP, RescaleSlope=slope), "RescaleSlope or RescaleIntercept is not usable")


def test_dicom_without_image_or_decoder(photo, tmp_path, marker, refused):
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


def test_dicom_without_preamble(photo, accepted):
    path = photo(GREY)
    data = path.read_bytes()
    # The file meta group is left out as well: what remains starts with the SOP class.
    path.write_bytes(data[data.index(b"\x08\x00\x16\x00UI") :])
    accepted(path, planes(GREY, 255))


def test_dicom_bomb(photo, monkeypatch, refused):
    path = photo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 53)
    refused(path, "54 pixels, more than the 53 up to which")
