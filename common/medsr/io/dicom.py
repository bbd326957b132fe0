"""Strict reading of a DICOM series as one volume.

The usual readers load a series with a missing slice, a duplicate, two phases or a tilted gantry as if it were
a regular volume, with a wrong spacing and no error. Here the geometry comes from the positions, every slice
is compared with the grid, and what does not fit is named.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, GeometryError, SettingError
from medsr.geometry import FloatArray, validate_affine
from medsr.io.dicom_images import DicomImage, RefusedImage, looks_like_dicom, read_images, read_pixels
from medsr.io.links import refuse_leaving_link
from medsr.io.nifti import VolumeHeader, refuse_constant, refuse_oversize

__all__ = ["is_dicom_series", "read_series", "read_series_header", "series_files"]

_SAME_DEPTH_MM = 0.01

_OTHER_FILES = (
    ".bmp",
    ".csv",
    ".gz",
    ".jpeg",
    ".jpg",
    ".json",
    ".nii",
    ".pdf",
    ".png",
    ".tif",
    ".tiff",
    ".zip",
)
"""Endings of files that are not opened to see whether they are DICOM: a folder beside a scan may hold thousands."""


def is_dicom_series(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds at least one file that looks like a DICOM image, judged by its first bytes.

    Example:
        >>> is_dicom_series("no-such-folder")
        False
    """
    folder = Path(folder)
    return folder.is_dir() and next(series_files(folder), None) is not None


def series_files(folder: Path) -> Iterator[Path]:
    """Files of a folder that look like DICOM, sorted, without hidden ones and the index of a disc."""
    for path in sorted(folder.iterdir()):
        if _may_be_slice(path) and looks_like_dicom(path) is not None:
            yield path


def _may_be_slice(path: Path) -> bool:
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    return path.suffix.lower() not in _OTHER_FILES and path.is_file()


def read_series_header(
    folder: str | os.PathLike[str], *, series_uid: str | None = None, follow_links: bool | None = None
) -> VolumeHeader:
    """Read and judge the headers of a DICOM series.

    Pixels are read only where two images share a position, to tell a copy from another image.

    Args:
        folder: folder with the files of one series; sub-folders are not searched.
        series_uid: which series, when the folder holds several: its SeriesInstanceUID or the end of it.
        follow_links: read files behind links that leave the folder, see :func:`~medsr.io.links.refuse_leaving_link`.

    Raises:
        SettingError: if ``series_uid`` was read as a number with a fraction.
        DataError: if there is no image, or one is damaged, in colour, of several frames without a place each, or
            has no decoder here.
        GeometryError: if positions are missing, repeated, irregular or sheared, or the images differ in grid.

    Example:
        >>> read_series_header("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such folder
    """
    return _survey(Path(folder), series_uid, follow_links=follow_links)[1]


def read_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    follow_links: bool | None = None,
    allow_constant: bool = False,
) -> tuple[npt.NDArray[np.float32], VolumeHeader]:
    """Read a DICOM series as one float32 volume with the rescale of every slice applied.

    Slices are ordered by position, never by InstanceNumber. MONOCHROME1 is turned so that larger is brighter.

    Args:
        folder: folder with the files of one series.
        series_uid: as in :func:`read_series_header`.
        follow_links: the same.
        allow_constant: accept an image whose voxels are all equal.

    Shape:
        - Output: ``(X, Y, Z)`` = (columns, rows, slices), in Fortran order.

    Raises:
        DataError: as :func:`read_series_header`, and if pixel data are truncated, undecodable or constant.
        GeometryError: as :func:`read_series_header`.

    Example:
        >>> read_series("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such folder
    """
    folder = Path(folder)
    images, header = _survey(folder, series_uid, follow_links=follow_links)
    stack = np.empty((len(images), images[0].rows, images[0].columns), dtype=np.float32)
    for index, pixels in enumerate(read_pixels(images)):
        stack[index] = pixels
    padding = np.isnan(stack)
    if padding.any():
        # A value that means nothing, often the lowest or highest there is, would decide about the intensity scale.
        stack[padding] = 0 if padding.all() else stack[~padding].min()
    array = stack.transpose(2, 1, 0)
    if not np.isfinite(array).all():
        raise DataError(
            f"{_name(folder)}: the rescaled voxels are not finite; check RescaleSlope and RescaleIntercept"
        )
    if not allow_constant:
        refuse_constant(_name(folder), array)
    return array, header


def _survey(
    folder: Path, series_uid: str | None, *, follow_links: bool | None
) -> tuple[list[DicomImage], VolumeHeader]:
    name = _name(folder)
    found, notes = _scan(folder, follow_links=follow_links)
    images = _one_series(found, series_uid, name)
    images = _in_order(_same_grid(images, name), name, notes)
    affine = _affine(images, name)
    _refuse_irregular(images, affine, name)
    validate_affine(affine, name=name)
    refuse_oversize(name, 4 * images[0].rows * images[0].columns * len(images))
    thickness = _thickness(images, float(np.linalg.norm(affine[:3, 2])), notes)
    if images[0].photometric == "MONOCHROME1":
        notes.append("MONOCHROME1 was inverted over its stored range: larger is brighter")
    if any(image.lossy for image in images):
        notes.append("the source was compressed with loss")
    if any(image.padding for image in images):
        notes.append("PixelPaddingValue is set: voxels that hold it become background")
    _note_origin(images, notes)
    header = VolumeHeader(
        path=folder,
        shape=(images[0].columns, images[0].rows, len(images)),
        affine=affine,
        dtype=images[0].dtype,
        slice_thickness_mm=thickness,
        notes=tuple(notes),
    )
    return images, header


def _note_origin(images: list[DicomImage], notes: list[str]) -> None:
    """What else than an acquired MR image the series may be; only codes are quoted, never free text."""
    for modality in sorted({image.modality for image in images} - {"MR", ""}):
        notes.append(f"Modality is {modality if re.fullmatch('[A-Z]{2,6}', modality) else 'unknown'}, not MR")
    for word in ("DERIVED", "SECONDARY"):
        count = sum(word in image.kind for image in images)
        if count:
            notes.append(
                f"{count} of {len(images)} images are marked {word}: not as the scanner acquired them"
            )


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name


# --- Files --------------------------------------------------------------------------------------------------


def _scan(folder: Path, *, follow_links: bool | None) -> tuple[list[DicomImage | RefusedImage], list[str]]:
    name = _name(folder)
    if not folder.exists():
        raise DataError(f"{name}: no such folder")
    if not folder.is_dir():
        raise DataError(f"{name}: not a folder; a DICOM series is given by its folder")
    images: list[DicomImage | RefusedImage] = []
    skipped = others = 0
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
    for path in paths:
        if path.is_dir():
            continue
        if path.is_symlink() and not path.exists() and not path.name.startswith("."):
            # It may be a slice that was not fetched.
            raise DataError(f"{path.name}: a link to a file that is not there")
        if not _may_be_slice(path):
            skipped += 1
            continue
        refuse_leaving_link(path, follow_links=follow_links, instead="put a copy there instead")
        preamble = looks_like_dicom(path)
        if preamble is None:
            skipped += 1
            continue
        found = read_images(path, preamble)
        others += not found
        images += found
    if not images:
        raise DataError(f"{name}: no DICOM image in this folder ({skipped + others} other files)")
    notes = [f"{skipped} files that are not DICOM were skipped"] if skipped else []
    if others:
        notes.append(f"{others} DICOM files that are not images were skipped")
    return images, notes


# --- Geometry -----------------------------------------------------------------------------------------------


def _one_series(
    images: Sequence[DicomImage | RefusedImage], series_uid: str | None, name: str
) -> list[DicomImage]:
    counts = Counter(image.series for image in images)
    if series_uid is not None:
        # A command line makes numbers of digits; one with a dot loses its last zeros.
        if isinstance(series_uid, float):
            raise SettingError(f"series_uid was read as the number {series_uid}; give more of the UID")
        series_uid = str(series_uid)
        matching = [uid for uid in counts if uid.endswith(series_uid)]
        if len(matching) != 1:
            raise DataError(
                f"{name}: {len(matching)} of {len(counts)} series end in {series_uid[-6:]}; {_list(counts)}"
            )
        images = [image for image in images if image.series == matching[0]]
    elif len(counts) > 1:
        raise GeometryError(
            f"{name}: {len(counts)} series in one folder ({_list(counts)}); "
            "set series_uid to the end of one's UID, or put each into a folder of its own"
        )
    for image in images:
        if isinstance(image, RefusedImage):
            raise image.reason
    return [image for image in images if isinstance(image, DicomImage)]


def _list(counts: Counter[str]) -> str:
    shown = [f"...{uid[-6:]}: {count} images" for uid, count in sorted(counts.items())[:6]]
    return ", ".join(shown) + (", ..." if len(counts) > 6 else "")


def _same_grid(images: list[DicomImage], name: str) -> list[DicomImage]:
    if len(images) < 2:
        raise GeometryError(f"{name}: a single slice; a volume with at least 2 slices is needed")
    for keyword, attribute in (
        ("ImagePositionPatient", "position"),
        ("ImageOrientationPatient", "orientation"),
        ("PixelSpacing", "pixel_spacing"),
    ):
        missing = [image.name for image in images if getattr(image, attribute) is None]
        if missing:
            raise GeometryError(
                f"{name}: {keyword} is missing in {len(missing)} of {len(images)} images (first "
                f"{missing[0]}); "
                "export the series with its geometry"
            )
    _refuse_mixed(images, name, "matrix size", lambda a, b: (a.rows, a.columns) == (b.rows, b.columns))
    _refuse_mixed(
        images, name, "PixelSpacing", lambda a, b: np.allclose(a.pixel_spacing, b.pixel_spacing, 1e-4, 0)
    )
    _refuse_mixed(
        images, name, "orientation", lambda a, b: np.allclose(a.orientation, b.orientation, rtol=0, atol=1e-4)
    )
    _refuse_mixed(
        images,
        name,
        "pixel type",
        lambda a, b: (a.dtype, a.bits_stored, a.photometric) == (b.dtype, b.bits_stored, b.photometric),
    )
    if min(images[0].pixel_spacing or (0,)) <= 0:
        raise GeometryError(f"{name}: PixelSpacing must be positive, got {images[0].pixel_spacing}")
    row, column = _directions(images[0])
    if abs(row @ row - 1) > 2e-3 or abs(column @ column - 1) > 2e-3 or abs(row @ column) > 1e-3:
        raise GeometryError(f"{name}: ImageOrientationPatient does not hold two perpendicular unit vectors")
    if min(images[0].rows, images[0].columns) < 2:
        raise GeometryError(
            f"{name}: images of {images[0].rows} rows and {images[0].columns} columns are not a volume"
        )
    return images


def _refuse_mixed(
    images: list[DicomImage], name: str, what: str, same: Callable[[DicomImage, DicomImage], bool]
) -> None:
    odd = [image for image in images if not same(images[0], image)]
    if not odd:
        return
    if 2 * len(odd) > len(images):  # The first image is the odd one.
        odd = [image for image in images if same(images[0], image)]
    raise GeometryError(
        f"{name}: {len(odd)} of {len(images)} images have another {what} (first {odd[0].name}); "
        "remove the localiser or split the series"
    )


def _directions(image: DicomImage) -> tuple[FloatArray, FloatArray]:
    """Directions of increasing column and row index, in patient coordinates (LPS)."""
    orientation = np.asarray(image.orientation, dtype=np.float64)
    return orientation[:3], orientation[3:]


def _depths(images: list[DicomImage]) -> FloatArray:
    """Positions along the normal, in mm."""
    normal = np.cross(*_directions(images[0]))
    normal /= np.linalg.norm(normal)
    return np.asarray([np.dot(image.position or (), normal) for image in images], dtype=np.float64)


def _is_copy(first: DicomImage, other: DicomImage) -> bool:
    if not np.allclose(first.position, other.position, rtol=0, atol=_SAME_DEPTH_MM):
        return False
    one, another = read_pixels([first, other])
    return np.array_equal(one, another, equal_nan=True)


def _in_order(images: list[DicomImage], name: str, notes: list[str]) -> list[DicomImage]:
    """Images sorted along the normal, without copies of the same image."""
    depths = _depths(images)
    order = np.argsort(depths, kind="stable")
    groups: list[list[DicomImage]] = []
    last = -np.inf
    for index in order:
        if depths[index] - last < _SAME_DEPTH_MM:
            groups[-1].append(images[index])
        else:
            groups.append([images[index]])
        last = depths[index]
    kept, dropped = [], 0
    for index, group in enumerate(groups):
        first = group[0]
        for other in group[1:]:
            # The comparison reads pixels, but only of images that claim the same place.
            if _is_copy(first, other):
                dropped += 1
                continue
            sizes = {len(g) for g in groups}
            if len(sizes) == 1 and len(groups) > 1:
                raise GeometryError(
                    f"{name}: the same {len(groups)} positions occur {len(group)} times with different "
                    "pixels "
                    "(temporal phases, echoes or b-values); split the series first"
                )
            several = sum(not all(_is_copy(g[0], one) for one in g[1:]) for g in groups)
            if several > 1:
                raise GeometryError(
                    f"{name}: {several} of {len(groups)} positions occur more than once, with different pixels "
                    "(temporal phases, echoes or b-values, some incomplete); split the series first"
                )
            raise GeometryError(
                f"{name}: two different images at one position, slice index {index} ({first.name}, "
                f"{other.name}); remove one"
            )
        kept.append(first)
    if dropped:
        notes.append(f"{dropped} identical copies of slices were dropped")
    if len(kept) < 2:
        raise GeometryError(f"{name}: a single slice; a volume with at least 2 slices is needed")
    return kept


def _affine(images: list[DicomImage], name: str) -> FloatArray:
    """Voxel-to-world matrix, RAS+; its slice column is the mean step from the first to the last slice."""
    first, last = (np.asarray(images[i].position, dtype=np.float64) for i in (0, -1))
    row, column = _directions(images[0])
    between_rows, between_columns = images[0].pixel_spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0] = row / np.linalg.norm(row) * between_columns
    affine[:3, 1] = column / np.linalg.norm(column) * between_rows
    affine[:3, 2] = (last - first) / (len(images) - 1)
    affine[:3, 3] = first
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _refuse_irregular(images: list[DicomImage], affine: FloatArray, name: str) -> None:
    steps = np.diff(_depths(images))
    # The lower median is a spacing that occurs, also for two steps of which one is a gap.
    spacing = float(np.sort(steps)[(len(steps) - 1) // 2])
    tolerance = max(0.01 * spacing, 0.01)
    wrong = np.flatnonzero(np.abs(steps - spacing) > tolerance)
    if len(wrong):
        index = int(wrong[0])
        times = round(float(steps[index]) / spacing)
        if times >= 2 and abs(steps[index] - times * spacing) <= times * tolerance:
            raise GeometryError(
                f"{name}: gap after slice index {index}: {steps[index]:.4g} mm instead of {spacing:.4g} mm, "
                f"{times - 1} slice(s) missing ({len(wrong)} gaps in all); export the series again"
            )
        raise GeometryError(
            f"{name}: irregular spacing after slice index {index}: {steps[index]:.4g} mm instead of "
            f"{spacing:.4g} mm "
            f"({len(wrong)} of {len(steps)} steps); resample to a regular grid first"
        )
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    step = affine[:3, 2]
    shift = float(np.linalg.norm(step - normal * (step @ normal)))
    if shift > 1e-3 * spacing:
        raise GeometryError(
            f"{name}: tilted gantry, each slice is shifted in its plane by {shift:.4g} mm (slice spacing "
            f"{spacing:.4g} mm); resample to a rectangular grid first"
        )
    flip = np.array([-1.0, -1.0, 1.0])
    positions = np.array([image.position for image in images]) * flip
    aside = positions - (positions[0] + np.arange(len(images))[:, None] * step)
    aside -= (aside @ normal)[:, None] * normal
    distances = np.linalg.norm(aside, axis=1)
    if distances.max() > tolerance:
        index = int(distances.argmax())
        raise GeometryError(
            f"{name}: slice index {index} ({images[index].name}) is displaced in its plane by "
            f"{distances[index]:.4g} mm; resample to a regular grid first"
        )


def _thickness(images: list[DicomImage], spacing: float, notes: list[str]) -> float | None:
    between = [image.between for image in images if image.between]
    if between and abs(abs(between[0]) - spacing) > 0.01 * spacing:
        notes.append(
            f"SpacingBetweenSlices {abs(between[0]):.4g} mm differs from the positions' {spacing:.4g} mm; "
            "the positions are used"
        )
    values = [image.thickness for image in images if image.thickness is not None and image.thickness > 0]
    if not values:
        notes.append("SliceThickness is missing")
        return None
    thickness = float(np.median(values))
    if len(values) < len(images) or max(values) - min(values) > 0.01 * thickness:
        notes.append(
            f"SliceThickness varies from {min(values):.4g} to {max(values):.4g} mm or is missing in some "
            "slices"
        )
    if abs(thickness - spacing) > 0.01 * spacing:
        word = "gap" if thickness < spacing else "overlap"
        notes.append(
            f"slices are {thickness:.4g} mm thick every {spacing:.4g} mm: {word} of "
            f"{abs(spacing - thickness):.4g} mm"
        )
    return thickness
