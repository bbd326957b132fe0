"""What all DICOM pixels are decoded by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from medsr.errors import DataError
from medsr.io.dicom_pixels import refuse_without_decoder, stored_values, transfer_syntax
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)


@given(
    bits=st.integers(1, 16), signed=st.booleans(), above=st.integers(0, 2**16 - 1), seed=st.integers(0, 99)
)
def test_bits_above_the_stored_ones_do_not_count(bits, signed, above, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    values = np.random.default_rng(seed).integers(low, high, 50)
    words = (values & (2**bits - 1)) | (above & ~(2**bits - 1))
    np.testing.assert_array_equal(stored_values(words.astype(np.uint16), bits, signed=signed), values)


def test_wide_integers_stay_exact():
    words = np.array([2**32 - 1, 2**31], dtype=np.uint32)
    assert stored_values(words, 32, signed=False).tolist() == [2**32 - 1, 2**31]
    assert stored_values(words.view(np.int32), 32, signed=True).tolist() == [-1, -(2**31)]


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_preamble_leaves_the_syntax_open(implicit):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.set_original_encoding(implicit, True)
    assert transfer_syntax(dataset) == (ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    assert transfer_syntax(dataset) == ExplicitVRBigEndian


def test_only_what_cannot_be_decoded_is_refused():
    for syntax in (
        *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian),
        *(DeflatedExplicitVRLittleEndian, RLELossless),
    ):
        refuse_without_decoder("a.dcm", syntax, "the series")
    with pytest.raises(DataError, match=r"^a\.dcm: no decoder for .* or convert the series$"):
        refuse_without_decoder("a.dcm", MPEG2MPML, "the series")
