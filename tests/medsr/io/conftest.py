"""Generators of small good and bad files. Every volume follows the voxel law value = 100 z + 3 y + x."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from medsr.errors import DataError
from medsr.io.image_encoding import LoadedImage
from medsr.io.images import read_image, read_image_header

ROWS, COLUMNS, SLICES = 32, 40, 12
ROW_SPACING, COLUMN_SPACING, STEP = 1.25, 0.75, 5.0
ORIGIN = np.array([-20.0, 10.0, 30.0])
MARKER = "ZZMARKER"
PHOTOGRAPH = (4 * np.arange(6 * 9, dtype=np.uint8)).reshape(6, 9)
PHOTOGRAPH = np.stack([PHOTOGRAPH, PHOTOGRAPH[::-1], PHOTOGRAPH[:, ::-1]], axis=-1)


def law(x: int, y: int, z: int) -> np.ndarray:
    i, j, k = np.meshgrid(np.arange(x), np.arange(y), np.arange(z), indexing="ij")
    return (100 * k + 3 * j + i).astype(np.int16)


def rotation(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def series_affine(frame: np.ndarray | None = None, *, origin=ORIGIN, step: float = STEP) -> np.ndarray:
    """Expected RAS+ affine; the columns of ``frame`` are row, column and normal direction (LPS)."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if frame is None else frame) @ np.diag([COLUMN_SPACING, ROW_SPACING, step])
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def slice_dataset(index: int, *, frame: np.ndarray | None = None, series: str = "1.2.3.111111"):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    frame = np.eye(3) if frame is None else frame
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = MRImageStorage
    ds.SOPInstanceUID = f"{series}.{index + 1}"
    ds.Modality = "MR"
    ds.SeriesInstanceUID = series
    ds.StudyInstanceUID = "1.2.3"
    ds.PatientName = f"{MARKER}^Name"
    ds.PatientID = MARKER
    ds.StudyDescription = ds.SeriesDescription = ds.InstitutionName = ds.PatientComments = MARKER
    ds.InstanceNumber = index + 1
    ds.ImagePositionPatient = [f"{v:.10g}" for v in ORIGIN + frame[:, 2] * STEP * index]
    ds.ImageOrientationPatient = [f"{v:.12g}" for v in (*frame[:, 0], *frame[:, 1])]
    ds.PixelSpacing = [ROW_SPACING, COLUMN_SPACING]
    ds.SliceThickness = STEP
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.Rows, ds.Columns = ROWS, COLUMNS
    ds.PixelData = law(COLUMNS, ROWS, SLICES + 1)[:, :, index].T.astype("<u2").tobytes()
    return ds


@pytest.fixture
def series(tmp_path):
    """Write a series; ``edit(index, dataset)`` changes a slice in place and drops it by returning False."""

    def build(edit=None, *, name="series", count=SLICES, frame=None, uid="1.2.3.111111", prefix="im") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for index in range(count):
            ds = slice_dataset(index, frame=frame, series=uid)
            if edit is not None and edit(index, ds) is False:
                continue
            ds.save_as(folder / f"{prefix}_{index:03d}.dcm", enforce_file_format=True)
        return folder

    return build


def frame_groups(index: int, frame: np.ndarray):
    """Functional groups of one frame: where it lies, and how its values are scaled."""
    from pydicom.dataset import Dataset

    groups, position, orientation, values = Dataset(), Dataset(), Dataset(), Dataset()
    position.ImagePositionPatient = [f"{v:.10g}" for v in ORIGIN + frame[:, 2] * STEP * index]
    orientation.ImageOrientationPatient = [f"{v:.12g}" for v in (*frame[:, 0], *frame[:, 1])]
    values.RescaleIntercept, values.RescaleSlope, values.RescaleType = "0", "2", "US"
    groups.PlanePositionSequence = [position]
    groups.PlaneOrientationSequence = [orientation]
    groups.PixelValueTransformationSequence = [values]
    return groups


@pytest.fixture
def enhanced(tmp_path):
    """Write an enhanced multi-frame object, every frame with a slope of 2; ``order`` is that of its frames."""
    from pydicom.dataset import Dataset
    from pydicom.uid import EnhancedMRImageStorage

    def build(edit=None, *, name="enhanced", order=range(SLICES), frame=None, file="im.dcm") -> Path:
        frame = np.eye(3) if frame is None else frame
        ds = slice_dataset(0, frame=frame)
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            delattr(ds, keyword)
        ds.SOPClassUID, ds.NumberOfFrames = EnhancedMRImageStorage, len(order)
        shared, measures, kind = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [ROW_SPACING, COLUMN_SPACING], STEP
        kind.FrameType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
        shared.PixelMeasuresSequence, shared.MRImageFrameTypeSequence = [measures], [kind]
        ds.SharedFunctionalGroupsSequence = [shared]
        ds.PerFrameFunctionalGroupsSequence = [frame_groups(index, frame) for index in order]
        volume = law(COLUMNS, ROWS, SLICES)[:, :, list(order)].T
        ds.PixelData = volume.astype("<u2").tobytes()
        if edit is not None:
            edit(ds)
        (tmp_path / name).mkdir(exist_ok=True)
        ds.save_as(tmp_path / name / file, enforce_file_format=True)
        return tmp_path / name

    return build


@pytest.fixture
def nifti(tmp_path):
    """Write a NIfTI file from an 8 x 9 x 10 volume; ``edit(header)`` changes raw header fields afterwards."""
    import nibabel as nib

    def build(
        edit=None, *, name="vol.nii.gz", array=None, affine=None, sform_code=1, qform_code=1, kind=None
    ) -> Path:
        array = law(8, 9, 10) if array is None else array
        affine = np.array(affine if affine is not None else np.diag([1.0, 2.0, 3.0, 1.0]), dtype=float)
        image = (kind or nib.Nifti1Image)(array, affine, dtype=array.dtype)
        image.set_qform(affine, code=qform_code)
        image.set_sform(affine, code=sform_code)
        data = bytearray(image.to_bytes())
        if edit is not None:
            size = image.header.structarr.dtype.itemsize
            header = type(image.header)(bytes(data[:size]), check=False)
            edit(header)
            data[:size] = header.binaryblock
        path = tmp_path / name
        path.write_bytes(gzip.compress(bytes(data), 1) if name.endswith(".gz") else bytes(data))
        return path

    return build


@pytest.fixture
def expected_law():
    return law


@pytest.fixture
def expected_affine():
    return series_affine


@pytest.fixture
def oblique():
    return rotation(0.3)


@pytest.fixture
def marker():
    return MARKER


@pytest.fixture
def refused():
    """The file is refused in one line, and already by its header unless told otherwise."""

    def check(path: Path, fragment: str, *, header: bool = True) -> str:
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

    return check


@pytest.fixture
def accepted():
    """The file is read as expected, and its header tells the same."""

    def check(path: Path, expected: np.ndarray, alpha: np.ndarray | None = None) -> LoadedImage:
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

    return check


@pytest.fixture
def photo(tmp_path, marker):
    """Write a DICOM photograph; ``edit(dataset)`` changes it in place, ``attributes`` are set before."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, OphthalmicPhotography8BitImageStorage

    def build(pixels=PHOTOGRAPH, edit=None, *, name="a.dcm", **attributes) -> Path:
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
