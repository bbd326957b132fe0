"""How a file stored its pixels survives metadata and enlargement."""

from __future__ import annotations

import dataclasses

import numpy as np
from medsr.io.image_encoding import ImageEncoding, as_unit_range


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


def test_levels_become_numbers_from_0_to_1_channels_first():
    stored = np.arange(24, dtype=np.uint16).reshape(2, 4, 3)
    found = as_unit_range(stored, 23)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.moveaxis(stored, -1, 0) / np.float32(23))
    assert as_unit_range(stored[..., 0], 23).shape == (1, 2, 4)
