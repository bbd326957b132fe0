from __future__ import annotations

import numpy as np
import pytest
from medsr.errors import DataError
from medsr.io.dicom_images import DicomImage, RefusedImage, looks_like_dicom, read_images, read_pixels


def one(series, edit=None):
    """The first file of a series."""
    return series(edit, count=1) / "im_000.dcm"


def test_facts_of_a_file(series):
    (image,) = read_images(one(series), preamble=True)
    assert isinstance(image, DicomImage)
    assert (image.rows, image.columns, image.dtype) == (32, 40, np.uint16)
    assert (image.position, image.pixel_spacing, image.thickness) == ((-20.0, 10.0, 30.0), (1.25, 0.75), 5.0)
    assert (image.slope, image.intercept, image.padding, image.lossy) == (1.0, 0.0, None, False)


def test_pixels_are_rescaled(series, expected_law):
    def edit(index, ds):
        ds.RescaleSlope, ds.RescaleIntercept = 2, -5

    (image,) = read_images(one(series, edit), preamble=True)
    (pixels,) = read_pixels([image])
    np.testing.assert_array_equal(pixels, 2 * expected_law(40, 32, 1)[..., 0].T - 5)


def test_first_bytes(series, tmp_path):
    path = one(series)
    assert looks_like_dicom(path) is True
    bare = tmp_path / "bare"
    bare.write_bytes(path.read_bytes()[132:])
    assert looks_like_dicom(bare) is False
    bare.write_bytes(b"PNG" * 60)
    assert looks_like_dicom(bare) is None
    with pytest.raises(DataError, match="absent: cannot be read"):
        looks_like_dicom(tmp_path / "absent")


def test_what_cannot_be_used_keeps_its_reason_until_the_series_is_chosen(series):
    def edit(index, ds):
        ds.RescaleSlope = 0

    (found,) = read_images(one(series, edit), preamble=True)
    assert isinstance(found, RefusedImage)
    assert (found.series, str(found.reason)) == (
        "1.2.3.111111",
        "im_000.dcm: RescaleSlope is 0; the header is damaged",
    )
