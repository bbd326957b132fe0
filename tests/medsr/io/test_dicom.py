from __future__ import annotations

import shutil

import numpy as np
import pytest
from medsr.errors import DataError, GeometryError, MedsrError, SettingError
from medsr.io import dicom
from medsr.io import dicom_images as module
from medsr.io.dicom import is_dicom_series, read_series, read_series_header
from medsr.io.dicom_images import looks_like_dicom

OTHER = "1.2.3.222222"
ROWS, COLUMNS = 32, 40


def refused(folder, fragment, kind=GeometryError, *, header=True, **options):
    with pytest.raises(kind, match=fragment) as caught:
        read_series(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) not in message
    assert "1.2.3." not in message
    assert caught.value.exit_code == 2
    if header:
        with pytest.raises(kind, match=fragment):
            read_series_header(folder, **options)
    else:
        read_series_header(folder, **options)
    return message


def accepted(folder, array, affine, **options):
    got, header = read_series(folder, **options)
    assert got.dtype == np.float32
    assert header.shape == got.shape
    np.testing.assert_array_equal(got, array)
    np.testing.assert_allclose(header.affine, affine, atol=1e-6)
    quick = read_series_header(folder, **options)
    assert quick.notes == header.notes
    np.testing.assert_array_equal(quick.affine, header.affine)
    return header


@pytest.fixture
def volume(expected_law):
    return expected_law(40, 32, 12)


def test_reads_voxels_and_affine(series, volume, expected_affine):
    folder = series()
    header = accepted(folder, volume, expected_affine())
    assert (header.path, header.notes, header.slice_thickness_mm) == (folder, (), 5.0)
    assert (header.dtype, header.sform_code, header.qform_code) == (np.uint16, 1, 1)


def test_order_comes_from_positions(series, volume, expected_affine):
    def edit(index, ds):
        ds.InstanceNumber = 12 - index

    folder = series(edit)
    for index, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{(index * 5) % 12:02d}")
    accepted(folder, volume, expected_affine())


@pytest.mark.parametrize(
    "axes",
    [((0, 1, 0), (0, 0, -1)), ((1, 0, 0), (0, 0, -1)), ((1, 0, 0), (0, -1, 0))],
    ids=["sagittal", "coronal", "flipped"],
)
def test_other_planes(series, volume, expected_affine, axes):
    frame = np.column_stack([*axes, np.cross(*axes)]).astype(float)
    accepted(series(frame=frame), volume, expected_affine(frame))


def test_oblique(series, volume, expected_affine, oblique):
    accepted(series(frame=oblique), volume, expected_affine(oblique))


def test_numbers_longer_than_the_standard_allows(series, volume, expected_affine, oblique):
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    def edit(index, ds):
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient"):
            text = "\\".join(f"{float(v):+.22f}" for v in ds[keyword].value).encode()
            text += b" " * (len(text) % 2)
            ds[keyword] = RawDataElement(Tag(keyword), "DS", len(text), text, 0, False, True)

    accepted(series(edit, frame=oblique), volume, expected_affine(oblique))


# --- Geometry ---------------------------------------------------------------------------------------------


def test_missing_slice(series):
    message = refused(series(lambda i, ds: i != 5), "gap after slice index 4: 10 mm instead of 5 mm")
    assert "1 slice" in message


@pytest.mark.parametrize("offset", [1.0, 0.06])
def test_displaced_slice(series, offset):
    def edit(index, ds):
        if index == 5:
            ds.ImagePositionPatient = [-20, 10, 55 + offset]

    refused(series(edit), "irregular spacing after slice index 4")


def test_slice_displaced_in_its_plane(series):
    def edit(index, ds):
        if index == 5:
            ds.ImagePositionPatient = [-19, 10, 55]

    refused(series(edit), "slice index 5 .*displaced in its plane by 1 mm")


def test_small_jitter_is_accepted(series, volume, expected_affine):
    def edit(index, ds):
        if 0 < index < 11:
            ds.ImagePositionPatient = [-20, 10, 30 + 5 * index + 1e-3 * (-1) ** index]

    accepted(series(edit), volume, expected_affine())


def test_two_spacings(series):
    def edit(index, ds):
        if index > 7:
            ds.ImagePositionPatient = [-20, 10, 65 + 3 * (index - 7)]

    refused(series(edit), "irregular spacing after slice index 7: 3 mm")


def test_gantry_tilt(series):
    def edit(index, ds):
        ds.ImagePositionPatient = [-20, 10 + 1.5 * index, 30 + 5 * index]

    refused(series(edit), "tilted gantry.*1.5 mm")


def test_two_series(series, volume, expected_affine):
    folder = series()
    series(uid=OTHER, prefix="other", count=7)
    message = refused(
        folder, "2 series in one folder.*set series_uid to the end.*put each into a folder of its own"
    )
    assert "...111111: 12 images" in message
    assert "...222222: 7 images" in message
    accepted(folder, volume, expected_affine(), series_uid="1.2.3.111111")
    accepted(folder, volume[:, :, :7], expected_affine(), series_uid="222222")
    # A command line makes numbers of digits.
    accepted(folder, volume[:, :, :7], expected_affine(), series_uid=222222)
    refused(folder, "0 of 2 series end in", DataError, series_uid="333333")
    with pytest.raises(
        SettingError, match=r"series_uid was read as the number 3\.2222; give more of the UID"
    ):
        read_series(folder, series_uid=3.2222)


def colour(index, ds):
    ds.PhotometricInterpretation, ds.SamplesPerPixel, ds.PlanarConfiguration = "RGB", 3, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = bytes(32 * 40 * 3)


def test_what_cannot_be_read_of_another_series_does_not_count(series, volume, expected_affine):
    folder = series()
    series(colour, uid=OTHER, prefix="aaa", count=2)
    # Which of the two is meant is the first question.
    assert "...222222: 2 images" in refused(folder, "2 series in one folder.*set series_uid")
    accepted(folder, volume, expected_affine(), series_uid="111111")
    refused(folder, "aaa_000.dcm: RGB image", DataError, series_uid="222222")


def test_what_cannot_be_read_of_no_series_may_be_a_slice(series):
    folder = series()

    def edit(index, ds):
        colour(index, ds)
        del ds.SeriesInstanceUID

    series(edit, prefix="aaa", count=1)
    refused(folder, "aaa_000.dcm: RGB image", DataError, series_uid="111111")


def test_localiser_of_the_same_series(series):
    folder = series()

    def edit(index, ds):
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    series(edit, count=1, prefix="aaa")
    refused(folder, r"1 of 13 images have another orientation \(first aaa_000.dcm\)")


def test_other_matrix_size_and_pixel_spacing(series):
    def size(index, ds):
        if index == 4:
            ds.Rows, ds.PixelData = 31, ds.PixelData[: 31 * 40 * 2]

    refused(series(size, name="size"), "1 of 12 images have another matrix size")

    def spacing(index, ds):
        if index == 4:
            ds.PixelSpacing = [1.25, 0.76]

    refused(series(spacing, name="spacing"), "another PixelSpacing")


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_missing_geometry(series, keyword):
    def edit(index, ds):
        if index > 2:
            del ds[keyword]

    refused(series(edit), f"{keyword} is missing in 9 of 12 images \\(first im_003.dcm\\)")


def test_impossible_geometry(series):
    def zero(index, ds):
        ds.PixelSpacing = [1, 0]

    refused(series(zero, name="zero"), "PixelSpacing must be positive")

    def skew(index, ds):
        ds.ImageOrientationPatient = [1, 0, 0, 0.5, 1, 0]

    refused(series(skew, name="skew"), "perpendicular unit vectors")

    def short(index, ds):
        ds.ImagePositionPatient = [1, 2]

    refused(series(short, name="short"), "ImagePositionPatient must hold 3", DataError)


def test_single_slice(series, volume, expected_affine):
    refused(series(count=1, name="one"), "single slice")
    accepted(series(count=2, name="two"), volume[:, :, :2], expected_affine())


def test_identical_copies_are_dropped(series, volume, expected_affine):
    folder = series()
    shutil.copy(folder / "im_005.dcm", folder / "copy.dcm")

    def renamed(index, ds):
        ds.SOPInstanceUID = "1.2.3.4.5"
        return index == 3

    series(renamed, prefix="again", count=4)
    header = accepted(folder, volume, expected_affine())
    assert header.notes == ("2 identical copies of slices were dropped",)


def test_different_images_at_one_position(series):
    folder = series()

    def edit(index, ds):
        ds.PixelData = bytes(len(ds.PixelData))
        return index == 3

    series(edit, prefix="other", count=4)
    refused(folder, "two different images at one position, slice index 3")
    shutil.copy(folder / "im_005.dcm", folder / "copy.dcm")
    refused(folder, "two different images at one position, slice index 3")


def test_two_phases(series):
    folder = series()

    def edit(index, ds):
        ds.PixelData = np.full((32, 40), index, "<u2").tobytes()

    series(edit, prefix="phase")
    refused(folder, "12 positions occur 2 times.*phases")
    # Of the second phase some slices were not exported: nobody should remove one by one.
    for path in sorted(folder.glob("phase*"))[:2]:
        path.unlink()
    refused(folder, "10 of 12 positions occur more than once.*split the series first")


def test_mosaics_are_not_taken_for_slices(series):
    def edit(index, ds):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]

    refused(series(edit), "a mosaic of many slices in one image; convert it to NIfTI", DataError)


def test_thickness_is_not_spacing(series):
    def gap(index, ds):
        ds.SliceThickness = 3

    header = read_series_header(series(gap, name="gap"))
    assert header.slice_thickness_mm == 3
    assert header.notes == ("slices are 3 mm thick every 5 mm: gap of 2 mm",)

    def overlap(index, ds):
        ds.SliceThickness = 10

    assert "overlap of 5 mm" in read_series_header(series(overlap, name="overlap")).notes[0]

    def varying(index, ds):
        ds.SliceThickness = 5 + (index == 3)

    header = read_series_header(series(varying, name="varying"))
    assert header.slice_thickness_mm == 5
    assert "varies from 5 to 6 mm" in header.notes[0]

    def missing(index, ds):
        del ds.SliceThickness

    header = read_series_header(series(missing, name="missing"))
    assert header.slice_thickness_mm is None
    assert header.notes == ("SliceThickness is missing",)


def test_positions_win_over_spacing_between_slices(series, volume, expected_affine):
    def edit(index, ds):
        ds.SpacingBetweenSlices = 7

    header = accepted(series(edit), volume, expected_affine())
    assert "SpacingBetweenSlices 7 mm differs from the positions' 5 mm" in header.notes[0]


# --- Values -----------------------------------------------------------------------------------------------


def test_rescale_of_every_slice(series, volume, expected_affine):
    def edit(index, ds):
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 * (index + 1), -index

    expected = volume * (0.5 * np.arange(1, 13)) - np.arange(12)
    accepted(series(edit), expected.astype(np.float32), expected_affine())

    def zero(index, ds):
        ds.RescaleSlope = 0

    refused(series(zero, name="zero"), "RescaleSlope is 0", DataError)


def test_monochrome1_is_inverted_over_its_stored_range(series, volume, expected_affine):
    def edit(index, ds):
        ds.PhotometricInterpretation = "MONOCHROME1"

    header = accepted(series(edit), 4095 - volume, expected_affine())
    assert "MONOCHROME1" in header.notes[0]

    def signed(index, ds):
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.PixelRepresentation = 1

    accepted(series(signed, name="signed"), -1 - volume, expected_affine())

    def mixed(index, ds):
        if index == 2:
            ds.PhotometricInterpretation = "MONOCHROME1"

    refused(series(mixed, name="mixed"), "another pixel type")


def test_bits_above_the_stored_ones_are_ignored(series, volume, expected_affine):
    def edit(index, ds):
        ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") | 0xA000).tobytes()

    accepted(series(edit), volume, expected_affine())


def test_signed_values(series, volume, expected_affine):
    def edit(index, ds):
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 1, 16, 15
        ds.PixelData = (np.frombuffer(ds.PixelData, "<i2") - 2000).astype("<i2").tobytes()

    accepted(series(edit), volume.astype(np.float32) - 2000, expected_affine())


@pytest.mark.parametrize(("bits", "kind"), [(8, "<u1"), (32, "<u4")])
def test_other_depths(series, volume, expected_affine, bits, kind):
    def edit(index, ds):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
        ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") % 251).astype(kind).tobytes()

    accepted(series(edit), volume % 251, expected_affine())


def test_constant_series(series):
    def edit(index, ds):
        ds.PixelData = bytes(len(ds.PixelData))

    folder = series(edit)
    refused(folder, "constant image", DataError, header=False)
    assert read_series(folder, allow_constant=True)[0].max() == 0


def test_lossy_source_and_padding_are_noted(series):
    def edit(index, ds):
        ds.LossyImageCompression = "01"
        ds.add_new("PixelPaddingValue", "US", 0)

    notes = read_series_header(series(edit)).notes
    assert any("with loss" in note for note in notes)
    assert any("PixelPaddingValue" in note for note in notes)


@pytest.mark.parametrize(
    ("value", "kind", "signed", "photometric"),
    [
        (4000, "US", 0, "MONOCHROME2"),
        # Outside the bits that count.
        (63536, "US", 0, "MONOCHROME2"),
        (-2000, "SS", 1, "MONOCHROME2"),
        # The same bytes, told to be unsigned.
        (63536, "US", 1, "MONOCHROME2"),
        # Air is bright there before it is inverted, and so is padding of 0 afterwards.
        (0, "US", 0, "MONOCHROME1"),
    ],
)
def test_padding_becomes_the_lowest_of_the_other_values(series, value, kind, signed, photometric):
    stored = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 100

    def edit(index, ds):
        pixels = stored + 10 * index
        ds.PixelRepresentation, ds.PhotometricInterpretation = signed, photometric
        ds.add_new("PixelPaddingValue", kind, value)
        pixels[:3] = value
        ds.PixelData = pixels.astype("<u2").tobytes()

    def without(index, ds):
        edit(index, ds)
        del ds.PixelPaddingValue

    found, _ = read_series(series(edit))
    plain, _ = read_series(series(without, name="plain"))
    assert (found[:, :3] == plain[:, 3:].min()).all()
    np.testing.assert_array_equal(found[:, 3:], plain[:, 3:])
    assert not (plain[:, :3] == plain[:, 3:].min()).any()


def test_a_range_of_padding_and_zeros_that_are_background_already(series):
    def edit(index, ds):
        pixels = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 10
        pixels[:3] = 0, *[3] * (COLUMNS - 1)
        ds.add_new("PixelPaddingValue", "US", 5)
        ds.add_new("PixelPaddingRangeLimit", "US", 0)
        ds.PixelData = pixels.astype("<u2").tobytes()

    found, _ = read_series(series(edit))
    assert (found[:, :3] == 0).all()
    assert (found[:, 3:] > 100).all()


def test_a_series_of_padding_alone_is_constant(series):
    def edit(index, ds):
        ds.add_new("PixelPaddingValue", "US", 7)
        ds.PixelData = np.full((ROWS, COLUMNS), 7, "<u2").tobytes()

    refused(series(edit), "constant image", DataError, header=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"Modality": "CT"}, "Modality is CT, not MR"),
        ({"Modality": "Jane Doe"}, "Modality is unknown, not MR"),
        ({"ImageType": ["DERIVED", "PRIMARY", "ADC"]}, "12 of 12 images are marked DERIVED"),
        ({"ImageType": ["ORIGINAL", "SECONDARY"]}, "12 of 12 images are marked SECONDARY"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "12 of 12 images are marked SECONDARY"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M"]}, None),
    ],
)
def test_what_is_no_acquired_mr_image_is_noted(series, changes, expected):
    def edit(index, ds):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, value in changes.items():
                setattr(ds, name, value)

    notes = read_series_header(series(edit)).notes
    assert [expected in note for note in notes] == ([True] if expected else [])


# --- Encodings and files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax", ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian"]
)
def test_native_transfer_syntaxes(series, volume, expected_affine, syntax):
    from pydicom import uid

    def edit(index, ds):
        ds.file_meta.TransferSyntaxUID = getattr(uid, syntax)
        if "Big" in syntax:
            ds["PixelData"].VR = "OW"
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()

    accepted(series(edit), volume, expected_affine())


def test_run_length_encoding(series, volume, expected_affine):
    from pydicom.uid import RLELossless

    def edit(index, ds):
        ds.compress(RLELossless, generate_instance_uid=False)

    folder = series(edit)
    accepted(folder, volume, expected_affine())
    path = folder / "im_003.dcm"
    path.write_bytes(path.read_bytes()[:-700])
    refused(folder, "im_003.dcm", DataError, header=False)


def test_missing_decoder_names_the_transfer_syntax(series):
    from pydicom.encaps import encapsulate
    from pydicom.uid import MPEG2MPML

    def edit(index, ds):
        ds.file_meta.TransferSyntaxUID = MPEG2MPML
        ds.PixelData = encapsulate([b"1234"])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True

    with pytest.raises(DataError, match="no decoder for the transfer syntax MPEG2"):
        read_series_header(series(edit))


def test_an_unknown_transfer_syntax_is_named(series):
    folder = series()
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    with pytest.raises(DataError, match=r"unknown transfer syntax 1\.2\.840\.10008\.1\.2\.9"):
        read_series_header(folder)


@pytest.mark.parametrize("implicit", [True, False])
def test_without_preamble(series, volume, expected_affine, tmp_path, implicit):
    import pydicom

    folder = series()
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        del ds.file_meta, ds.preamble
        ds.save_as(bare / path.name, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert is_dicom_series(bare)
    accepted(bare, volume, expected_affine())


def test_junk_is_skipped_and_counted(series, volume, expected_affine):
    folder = series()
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "DICOMDIR").write_bytes(b"x")
    (folder / "readme.txt").write_text("hello" * 100)
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "sub").mkdir()
    header = accepted(folder, volume, expected_affine())
    assert header.notes == ("4 files that are not DICOM were skipped",)


def test_files_that_are_plainly_others_are_not_opened(series, volume, expected_affine, tmp_path, monkeypatch):
    """On a network share each would cost a round trip."""
    folder, pictures = series(), tmp_path / "pictures"
    pictures.mkdir()
    for place in (folder, pictures):
        for name in ("a.png", "b.JPG", "c.nii.gz", "d.json"):
            (place / name).write_bytes(b"x" * 200)
    opened = []
    monkeypatch.setattr(dicom, "looks_like_dicom", lambda path: opened.append(path) or looks_like_dicom(path))
    assert not is_dicom_series(pictures)
    assert opened == []
    header = accepted(folder, volume, expected_affine())
    assert header.notes == ("4 files that are not DICOM were skipped",)


def test_objects_that_are_not_images_are_skipped(series, volume, expected_affine):
    from pydicom.uid import BasicTextSRStorage

    folder = series()

    def report(index, ds):
        ds.SOPClassUID = BasicTextSRStorage
        ds.SeriesInstanceUID = OTHER
        for keyword in ("Rows", "Columns", "PixelData", "ImagePositionPatient"):
            del ds[keyword]

    series(report, count=1, prefix="report")
    header = accepted(folder, volume, expected_affine())
    assert header.notes == ("1 DICOM files that are not images were skipped",)


@pytest.mark.parametrize("sop_class", ["1.3.12.2.1107.5.9.1", "1.3.46.670589.11.0.0.12.4"])
def test_private_objects_without_pixels_are_skipped(series, volume, expected_affine, sop_class):
    folder = series()

    def private(index, ds):
        ds.SOPClassUID = sop_class
        for keyword in ("Rows", "Columns", "PixelData"):
            del ds[keyword]

    series(private, count=1, prefix="private")
    header = accepted(folder, volume, expected_affine())
    assert header.notes == ("1 DICOM files that are not images were skipped",)

    def with_pixels(index, ds):
        ds.SOPClassUID = sop_class
        del ds["Rows"]

    series(with_pixels, count=1, prefix="private")
    refused(folder, "private_000.dcm: Rows or Columns is missing", DataError)


def test_no_images(tmp_path):
    refused(tmp_path / "none", "no such folder", DataError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no DICOM image", DataError)
    (tmp_path / "empty" / "a.txt").write_text("x")
    refused(tmp_path / "empty", r"no DICOM image in this folder \(1 other", DataError)
    refused(tmp_path / "empty" / "a.txt", "not a folder", DataError)


def test_truncated_pixels(series):
    folder = series()
    path = folder / "im_007.dcm"
    path.write_bytes(path.read_bytes()[:-512])
    refused(folder, "im_007.dcm: truncated, 2048 bytes of pixel data instead of 2560", DataError)


def test_pixel_data_shorter_than_declared_by_the_image(series):
    def edit(index, ds):
        if index == 2:
            ds.PixelData = ds.PixelData[:-100]

    refused(series(edit), "im_002.dcm: truncated, 2460 bytes", DataError)


@pytest.mark.parametrize("size", [140, 300, 600, 800, 1000])
@pytest.mark.parametrize("index", [5, 11])
def test_files_cut_inside_the_header(series, size, index):
    # The last slice matters most: without it there is no gap to notice.
    folder = series()
    path = folder / f"im_{index:03d}.dcm"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, path.name, DataError)


def test_deflated_bomb_and_damage(series, monkeypatch):
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    def edit(index, ds):
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    folder = series(edit)
    path = folder / "im_003.dcm"
    data = path.read_bytes()
    path.write_bytes(data[:-300])
    refused(folder, "im_003.dcm", DataError)
    path.write_bytes(data)
    monkeypatch.setattr(module, "_INFLATED_LIMIT", 1000)
    refused(folder, "deflated content is above", DataError)


# --- Several frames in one file -----------------------------------------------------------------------------


def test_frames_without_a_place_are_refused(series):
    def edit(index, ds):
        ds.NumberOfFrames = 12
        ds.PixelData = ds.PixelData * 12

    refused(series(edit, count=1), "im_000.dcm: multi-frame image without a place for each frame", DataError)

    def enhanced(index, ds):
        ds.PerFrameFunctionalGroupsSequence = []

    refused(series(enhanced, count=1, name="empty"), "describes 0 of 1 frames", DataError)


@pytest.mark.parametrize(
    "order", [range(12), [7, 2, 11, 0, 9, 4, 1, 10, 3, 8, 5, 6]], ids=["sorted", "shuffled"]
)
def test_enhanced_object(enhanced, volume, expected_affine, oblique, order):
    header = accepted(enhanced(order=order, frame=oblique), 2 * volume, expected_affine(oblique))
    assert (header.notes, header.slice_thickness_mm, header.dtype) == ((), 5.0, np.uint16)


def test_enhanced_objects_of_one_series_are_one_volume(enhanced, volume, expected_affine):
    enhanced(order=range(1, 12, 2), file="odd.dcm")
    accepted(enhanced(order=range(0, 12, 2), file="even.dcm"), 2 * volume, expected_affine())


def test_groups_of_a_frame_go_before_the_shared_ones(enhanced, volume, expected_affine):
    from pydicom.dataset import Dataset

    def edit(ds):
        shared = ds.SharedFunctionalGroupsSequence[0]
        shared.PlaneOrientationSequence = ds.PerFrameFunctionalGroupsSequence[0].PlaneOrientationSequence
        shared.PixelValueTransformationSequence = [Dataset()]
        shared.PixelValueTransformationSequence[0].RescaleSlope = "7"
        for groups in ds.PerFrameFunctionalGroupsSequence:
            del groups.PlaneOrientationSequence
            groups.PixelMeasuresSequence = [Dataset()]
            groups.PixelMeasuresSequence[0].PixelSpacing = [1.25, 0.75]
            groups.PixelMeasuresSequence[0].SliceThickness = 4

    header = accepted(enhanced(edit), 2 * volume, expected_affine())
    assert header.slice_thickness_mm == 4


def test_frames_are_judged_like_files(enhanced):
    refused(enhanced(name="gap", order=[0, 1, 2, 4, 5, 6]), "gap after slice index 2")

    def phases(ds):
        groups = ds.PerFrameFunctionalGroupsSequence
        for index in range(6):
            groups[index + 6].PlanePositionSequence = groups[index].PlanePositionSequence

    refused(enhanced(phases, name="phases"), "the same 6 positions occur 2 times")

    def localiser(ds):
        orientation = ds.PerFrameFunctionalGroupsSequence[3].PlaneOrientationSequence[0]
        orientation.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    refused(enhanced(localiser, name="other"), r"1 of 12 images .*orientation \(first im.dcm, frame 4\)")

    def lost(ds):
        del ds.PerFrameFunctionalGroupsSequence[5].PlanePositionSequence

    refused(enhanced(lost, name="lost"), r"ImagePositionPatient is missing .*first im.dcm, frame 6")


def test_damaged_enhanced_objects(enhanced):
    def short(ds):
        ds.PixelData = ds.PixelData[: -2 * COLUMNS]

    refused(enhanced(short, name="short"), "im.dcm: truncated", DataError)

    def fewer(ds):
        del ds.PerFrameFunctionalGroupsSequence[3]

    refused(enhanced(fewer, name="fewer"), "describes 11 of 12 frames", DataError)

    def still(ds):
        ds.PerFrameFunctionalGroupsSequence[3].PixelValueTransformationSequence[0].RescaleSlope = "0"

    refused(enhanced(still, name="slope"), "im.dcm, frame 4: RescaleSlope is 0", DataError)


def test_enhanced_object_in_other_transfer_syntaxes(enhanced, volume, expected_affine):
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

    def rle(ds):
        ds.compress(RLELossless)

    accepted(enhanced(rle, name="rle"), 2 * volume, expected_affine())
    for syntax in (ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):

        def edit(ds, syntax=syntax):
            ds.file_meta.TransferSyntaxUID = syntax

        accepted(enhanced(edit, name=syntax.name), 2 * volume, expected_affine())


def test_frame_types_are_noted(enhanced):
    from pydicom.dataset import Dataset

    def edit(ds):
        for groups in ds.PerFrameFunctionalGroupsSequence[:4]:
            groups.MRImageFrameTypeSequence = [Dataset()]
            groups.MRImageFrameTypeSequence[0].FrameType = ["DERIVED", "PRIMARY", "M", "NONE"]

    notes = read_series_header(enhanced(edit)).notes
    assert notes == ("4 of 12 images are marked DERIVED: not as the scanner acquired them",)


def test_colour_and_unsupported_layouts(series):
    refused(series(colour, name="colour"), "RGB image", DataError)

    def palette(index, ds):
        ds.PhotometricInterpretation = "PALETTE COLOR"

    refused(series(palette, name="palette"), "PALETTE COLOR image", DataError)

    def high(index, ds):
        ds.HighBit = 15

    refused(series(high, name="high"), "pixel layout", DataError)


def test_modality_table(series):
    from pydicom.dataset import Dataset

    def edit(index, ds):
        ds.ModalityLUTSequence = [Dataset()]

    refused(series(edit), "Modality LUT", DataError)


def test_link_out_of_the_folder(series, volume, expected_affine, tmp_path):
    folder = series()
    outside = tmp_path / "outside.dcm"
    (folder / "im_003.dcm").rename(outside)
    (folder / "im_003.dcm").symlink_to(outside)
    refused(folder, "leaves the folder.* instead$", DataError)
    refused(folder, "leaves the folder.* or set follow_links to true$", DataError, follow_links=False)
    accepted(folder, volume, expected_affine(), follow_links=True)
    outside.unlink()
    for follow in (False, True):
        refused(folder, "im_003.dcm: a link to a file that is not there", DataError, follow_links=follow)


def test_memory_is_checked_before_allocation(series, monkeypatch):
    from medsr.io import nifti

    folder = series()
    monkeypatch.setattr(nifti, "SIZE_LIMIT", 1000)
    refused(folder, "the limit is", DataError)


def test_probe(series, tmp_path, nifti):
    assert is_dicom_series(series())
    assert not is_dicom_series(tmp_path / "none")
    assert not is_dicom_series(nifti())
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(nifti(name="a.nii"), other)
    assert not is_dicom_series(other)


def test_no_patient_data_in_messages_and_notes(series, marker):
    def edit(index, ds):
        ds.SliceThickness = 3 + (index == 0)
        ds.SpacingBetweenSlices = 7

    folder = series(edit)
    shutil.copy(folder / "im_003.dcm", folder / "copy.dcm")
    header = read_series(folder)[1]
    assert len(header.notes) >= 3
    assert marker not in repr(header)

    def broken(index, ds):
        from pydicom.dataelem import RawDataElement
        from pydicom.tag import Tag

        text = marker.encode()
        ds["PixelSpacing"] = RawDataElement(Tag("PixelSpacing"), "DS", len(text), text, 0, False, True)

    folders = [
        series(broken, name="broken"),
        series(lambda i, ds: i != 4, name="gap"),
        series(count=1, name="one"),
    ]

    def photometric(index, ds):
        ds.PhotometricInterpretation = marker

    folders.append(series(photometric, name="photometric"))
    for folder in folders:
        with pytest.raises(MedsrError) as caught:
            read_series(folder)
        assert marker not in str(caught.value)
