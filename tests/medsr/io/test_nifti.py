from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from medsr.errors import DataError, GeometryError, MedsrError
from medsr.io import nifti as module
from medsr.io.nifti import read_nifti, read_nifti_header
from medsr.io.writing import write_nifti


def refused(path, fragment, kind=DataError, *, header=True):
    """Both readers refuse in one line that names the file; or only the full one."""
    with pytest.raises(kind, match=fragment) as caught:
        read_nifti(path)
    message = str(caught.value)
    assert Path(path).name in message
    assert str(Path(path).parent) not in message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    if header:
        with pytest.raises(kind, match=fragment):
            read_nifti_header(path)
    else:
        read_nifti_header(path)


@pytest.mark.parametrize("name", ["vol.nii", "vol.nii.gz", "two words é.nii.gz"])
def test_reads_voxels_and_affine(nifti, expected_law, name):
    path = nifti(name=name)
    array, header = read_nifti(path)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected_law(8, 9, 10))
    np.testing.assert_allclose(header.affine, np.diag([1, 2, 3, 1]))
    assert (header.path, header.shape, header.notes, header.slice_thickness_mm) == (
        path,
        (8, 9, 10),
        (),
        None,
    )
    assert (header.sform_code, header.qform_code) == (1, 1)
    quick = read_nifti_header(path)
    assert (quick.shape, quick.dtype, quick.affine.dtype) == ((8, 9, 10), np.int16, np.float64)


@pytest.mark.parametrize(
    ("pixdim", "units", "step"),
    [
        (2.5, 10, (2.5, "sec")),
        (720, 18, (720, "msec")),
        (1, 2, (1, "unknown")),
        (0, 10, None),
        (float("nan"), 10, None),
    ],
)
def test_the_distance_of_the_volumes_of_a_series(nifti, pixdim, units, step):
    def edit(header):
        header["pixdim"][4], header["xyzt_units"] = pixdim, units

    header = read_nifti_header(nifti(edit, array=np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5)))
    assert header.step == (step and step[0])
    assert step is None or header.step_unit == step[1]
    # A single volume has none, whatever stands there.
    assert read_nifti_header(nifti(edit)).step is None


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "u8", "f4", "f8", ">i2", ">f4"])
def test_reads_every_scalar_type(nifti, dtype):
    array = (np.arange(60).reshape(3, 4, 5) % 100).astype(dtype)

    class BigEndian(nib.Nifti1Image):
        def __init__(self, data, affine, dtype=None):
            super().__init__(data, affine, header=nib.Nifti1Header(endianness=">"), dtype=dtype)

    path = nifti(array=array, kind=BigEndian if dtype[0] == ">" else None)
    np.testing.assert_array_equal(read_nifti(path)[0], array.astype(np.float32))


def test_reads_nifti2(nifti, expected_law):
    path = nifti(kind=nib.Nifti2Image)
    np.testing.assert_array_equal(read_nifti(path)[0], expected_law(8, 9, 10))


def test_reads_four_axes(nifti):
    array = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    got, header = read_nifti(nifti(array=array))
    assert header.shape == (2, 3, 4, 5)
    np.testing.assert_array_equal(got, array)


def test_applies_slope_and_intercept(nifti, expected_law):
    def edit(header):
        header["scl_slope"], header["scl_inter"] = 0.5, -7

    np.testing.assert_array_equal(read_nifti(nifti(edit))[0], 0.5 * expected_law(8, 9, 10) - 7)


def test_reads_the_named_one_of_two_siblings(nifti, expected_law):
    zipped = nifti(name="x.nii.gz")
    plain = nifti(name="x.nii", array=np.asarray(expected_law(8, 9, 10) + 1000, dtype=np.int16))
    assert read_nifti(zipped)[0].max() + 1000 == read_nifti(plain)[0].max()


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("empty.nii", b"", "empty file"),
        ("empty.nii.gz", b"", "empty file"),
        ("text.nii", b"hello" * 200, "mark n\\+1"),
        ("short.nii", b"hello", "only 5 bytes"),
        ("text.nii.gz", b"hello" * 200, "not gzip-compressed; copy"),
        ("short.nii.gz", gzip.compress(b"hello", mtime=0), "only 5 bytes"),
        ("image.png", b"x", "expected .nii"),
    ],
)
def test_refuses_what_is_not_nifti(tmp_path, name, content, fragment):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, fragment)


def test_refuses_missing_files_and_folders(tmp_path):
    refused(tmp_path / "none.nii", "no such file")
    (tmp_path / "folder.nii").mkdir()
    refused(tmp_path / "folder.nii", "not a file")


def test_refuses_a_name_that_belies_the_content(nifti, tmp_path):
    shutil.copy(nifti(name="a.nii.gz"), tmp_path / "b.nii")
    refused(tmp_path / "b.nii", "rename it to b.nii.gz")
    shutil.copy(nifti(name="a.nii"), tmp_path / "c.nii.gz")
    refused(tmp_path / "c.nii.gz", "rename it to c.nii")


def test_header_extensions_are_skipped(nifti, expected_law):
    path = nifti(name="vol.nii")
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"ZZMARKER" * 20))
    other = path.with_name("other.nii")
    nib.save(image, other)
    array, header = read_nifti(other)
    np.testing.assert_array_equal(array, expected_law(8, 9, 10))
    assert "ZZMARKER" not in repr(header)
    data = bytearray(other.read_bytes())
    data[352:356] = b"\xff\xff\xff\x7f"
    other.write_bytes(data)
    np.testing.assert_array_equal(read_nifti(other)[0], array)


def test_refuses_the_header_of_a_pair(nifti):
    def edit(header):
        header["magic"] = b"ni1"

    refused(nifti(edit), "hdr/.img pair")


@pytest.mark.parametrize(
    ("shape", "fragment"),
    [((8, 9), "2D image"), ((8, 9, 1), "2D image"), ((1, 8, 9), "2D image"), ((2, 3, 4, 1, 3), "5 axes")],
)
def test_refuses_too_few_or_too_many_axes(nifti, shape, fragment):
    refused(nifti(array=np.arange(np.prod(shape), dtype=np.int16).reshape(shape)), fragment)


@pytest.mark.parametrize(("value", "fragment"), [(0, "no voxels"), (-3, "no voxels")])
def test_refuses_an_axis_without_voxels(nifti, value, fragment):
    def edit(header):
        header["dim"][2] = value

    refused(nifti(edit), fragment)


def test_refuses_complex_and_colour(nifti):
    refused(nifti(array=np.ones((3, 3, 3), np.complex64)), "complex")
    colour = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(nifti(array=colour), "RGB")


def test_refuses_unknown_voxel_type(nifti):
    def edit(header):
        header["datatype"] = 77

    refused(nifti(edit), "code 77")

    def bits(header):
        header["bitpix"] = 8

    refused(nifti(bits), "bitpix is 8")


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_refuses_impossible_voxel_sizes(nifti, value):
    def edit(header):
        header["pixdim"][2] = value

    refused(nifti(edit), "pixdim", GeometryError)


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ([np.nan, 0, 0, 0], "vol.nii.gz: sform: .*NaN"),
        ([0, 0, 0, 0], "singular"),
        ([1, 0.3, 0, 0], "not perpendicular"),
    ],
)
def test_refuses_a_broken_sform(nifti, row, fragment):
    def edit(header):
        header["srow_x"] = row

    refused(nifti(edit), fragment, GeometryError)


def test_refuses_a_broken_qform_without_sform(nifti):
    def edit(header):
        header["quatern_b"] = np.nan
        header["sform_code"] = 0

    refused(nifti(edit), "qform", GeometryError)


def test_refuses_units_other_than_millimetres(nifti):
    def edit(header):
        header["xyzt_units"] = 3

    refused(nifti(edit), "micron", GeometryError)


def test_a_code_beyond_the_standard_can_be_written_again(nifti, tmp_path):
    def edit(header):
        header["sform_code"] = header["qform_code"] = 7

    header = read_nifti_header(nifti(edit))
    assert (header.sform_code, header.qform_code) == (2, 2)
    codes = {"sform_code": header.sform_code, "qform_code": header.qform_code}
    write_nifti(tmp_path / "out.nii", np.zeros(header.shape), affine=header.affine, **codes)


def test_notes_that_sform_and_qform_differ(nifti):
    def edit(header):
        header["srow_x"] = [1, 0, 0, 25]

    header = read_nifti_header(nifti(edit))
    assert header.affine[0, 3] == 25
    assert len(header.notes) == 1
    assert "differ by up to 25 mm; sform is used" in header.notes[0]
    # A result has the matrix of the sform in both forms.
    assert header.qform_code == header.sform_code

    def slightly(header):
        header["srow_x"] = [1, 0, 0, 5e-4]

    assert read_nifti_header(nifti(slightly)).notes == ()

    def invalid(header):
        header["quatern_b"] = np.nan

    assert "qform is invalid" in read_nifti_header(nifti(invalid)).notes[0]


def test_uses_the_only_form_with_a_code(nifti):
    affine = np.diag([1.0, 2, 3, 1])
    affine[:3, 3] = 4, 5, 6
    for codes in ({"sform_code": 0, "qform_code": 2}, {"sform_code": 4, "qform_code": 0}):
        header = read_nifti_header(nifti(affine=affine, **codes))
        np.testing.assert_allclose(header.affine, affine, atol=1e-5)
        assert header.notes == ()
        assert (header.sform_code, header.qform_code) == tuple(codes.values())


def test_notes_voxel_sizes_that_the_affine_contradicts(nifti):
    def edit(header):
        header["srow_z"] = [0, 0, 5, 0]

    assert "differ from the affine" in read_nifti_header(nifti(edit, qform_code=0)).notes[0]


def test_falls_back_to_voxel_sizes_with_a_note(nifti):
    header = read_nifti_header(nifti(sform_code=0, qform_code=0))
    np.testing.assert_allclose(np.abs(np.diag(header.affine)), [1, 2, 3, 1])
    assert "both 0" in header.notes[0]


@pytest.mark.parametrize("name", ["vol.nii", "vol.nii.gz"])
def test_refuses_a_claim_that_the_file_cannot_hold(nifti, name):
    def edit(header):
        header["dim"][1:4] = 32000

    refused(nifti(edit, name=name), "cannot hold")


def test_refuses_more_than_the_limit_or_the_memory(nifti, monkeypatch):
    path = nifti()
    monkeypatch.setattr(module, "_free_memory", lambda: 1000)
    refused(path, "memory are free")
    monkeypatch.setattr(module, "SIZE_LIMIT", 500)
    refused(path, "the limit is")


@pytest.mark.parametrize("value", [np.nan, -5, 100, 1e30])
def test_refuses_an_impossible_offset(nifti, value):
    def edit(header):
        header["vox_offset"] = value

    refused(nifti(edit), "vox_offset")


@pytest.mark.parametrize(("name", "header"), [("vol.nii", True), ("vol.nii.gz", False)])
def test_refuses_an_offset_beyond_the_end(nifti, name, header):
    def edit(raw):
        raw["vox_offset"] = 8192

    refused(nifti(edit, name=name), "vox_offset 8192" if header else "truncated", header=header)


def test_refuses_a_truncated_plain_file(nifti):
    path = nifti(name="vol.nii")
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, "truncated")


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_refuses_a_truncated_gzip_file(nifti, keep):
    noise = np.random.default_rng(0).integers(0, 30000, (20, 20, 20)).astype(np.int16)
    path = nifti(array=noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, "truncated gzip", header=False)


def test_refuses_a_gzip_file_without_its_checksum(nifti):
    path = nifti()
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    refused(path, "truncated gzip", header=False)
    path.write_bytes(data[:-8] + bytes(4) + data[-4:])
    refused(path, "CRC", header=False)


def test_refuses_one_flipped_byte_in_gzip_data(nifti):
    noise = np.random.default_rng(0).integers(0, 30000, (20, 20, 20)).astype(np.int16)
    path = nifti(array=noise)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    refused(path, "gzip", header=False)


def test_refuses_endless_bytes_after_the_voxels(nifti, monkeypatch):
    path = nifti()
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(5000)))
    read_nifti(path)
    monkeypatch.setattr(module, "_TRAILING_LIMIT", 4000)
    refused(path, "follow the voxels", header=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_voxels_that_are_not_finite(nifti, value):
    array = np.ones((4, 5, 6), dtype=np.float32)
    array[0, 0, :3] = value
    refused(nifti(array=array), "3 of 120 voxels are NaN or infinite", header=False)


def test_refuses_values_beyond_float32(nifti):
    array = np.ones((4, 5, 6))
    array[1, 1, 1] = 1e300
    refused(nifti(array=array), "1 of 120", header=False)


def test_refuses_a_constant_image_unless_allowed(nifti):
    path = nifti(array=np.zeros((4, 5, 6), np.int16))
    refused(path, "constant image", header=False)
    assert read_nifti(path, allow_constant=True)[0].max() == 0


def test_takes_the_slice_thickness_from_the_sidecar(nifti):
    path = nifti()
    sidecar = path.with_name("vol.json")
    sidecar.write_text(json.dumps({"SliceThickness": 2.5, "SpacingBetweenSlices": 3, "PatientName": "X"}))
    header = read_nifti_header(path)
    assert header.slice_thickness_mm == 2.5
    assert header.notes == ()
    sidecar.write_text(json.dumps({"SliceThickness": "thin", "SpacingBetweenSlices": 7}))
    header = read_nifti_header(path)
    assert header.slice_thickness_mm is None
    assert "SpacingBetweenSlices 7 mm differs" in header.notes[0]
    assert "not a positive number" in header.notes[1]
    sidecar.write_text(json.dumps({"SliceThickness": 10**400, "SpacingBetweenSlices": 10**400}))
    assert "not a positive number" in read_nifti_header(path).notes[0]
    sidecar.write_text(json.dumps({"SliceThickness": 2.5}), encoding="utf-8-sig")
    assert read_nifti_header(path).slice_thickness_mm == 2.5
    for text in ("{", "[1]", "\udcff"):
        sidecar.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "sidecar cannot be read" in read_nifti_header(path).notes[0]


def test_header_text_reaches_no_message(nifti, marker):
    def edit(header):
        header["descrip"] = marker
        header["aux_file"] = marker
        header["db_name"] = marker
        header["pixdim"][1] = 0

    with pytest.raises(MedsrError) as caught:
        read_nifti(nifti(edit))
    assert marker not in str(caught.value)
