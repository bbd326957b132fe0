"""Stereo pairs on disk, and the calibration of the cameras that took them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from medsr.errors import DataError
from medsr.io.cases import case_name, mark_twins, refuse_marked, warn_once
from medsr.io.images import IMAGE_SUFFIXES, find_images

__all__ = ["StereoCalibration", "find_stereo_cases", "find_stereo_pairs", "read_calibration"]

_FOLDERS = (("left", "right"), ("left_frames", "right_frames"))
_SIDE = re.compile(r"^(?:(?P<case>.*)[_-])?(?P<side>left|right)$", re.IGNORECASE)

PathLike = str | os.PathLike[str]
FloatArray = npt.NDArray[np.float64]

_NUMBER = r"[-+.\deE]+"
_MATRIX_YAML = re.compile(
    r"^(\w+):\s*!!opencv-matrix\s+rows:\s*(\d+)\s+cols:\s*(\d+)\s+dt:\s*\S+\s+data:\s*\[([^\]]*)\]",
    re.MULTILINE,
)
_MATRIX_XML = re.compile(
    r'<(\w+) type_id="opencv-matrix">\s*<rows>(\d+)</rows>\s*<cols>(\d+)</cols>\s*<dt>[^<]*</dt>\s*'
    r"<data>([^<]*)</data>"
)
_SCALAR = re.compile(rf"^(?:(\w+):\s*|<(\w+)>)({_NUMBER})(?:</\w+>)?\s*$", re.MULTILINE)
_ENDOVIS = re.compile(r"^\s*([\w-]+):\s*([^/\n]*)", re.MULTILINE)

# The names that OpenCV's samples and data sets give to these matrices.
_OPENCV = {
    "left": ("M1", "K1", "cameraMatrix1", "camera_matrix_1"),
    "right": ("M2", "K2", "cameraMatrix2", "camera_matrix_2"),
    "left_distortion": ("D1", "distCoeffs1", "dist_coeffs_1"),
    "right_distortion": ("D2", "distCoeffs2", "dist_coeffs_2"),
    "rotation": ("R",),
    "translation": ("T",),
}
_OPENCV_SIZE = (("image_width", "image_height"), ("width", "height"))


@dataclass(frozen=True, eq=False)
class StereoCalibration:
    """Two calibrated cameras: a point x of the left camera is ``rotation @ x + translation`` in the right one.

    Args:
        left: camera matrix of the left camera, in pixels, the centre of the first pixel at 0.
        right: that of the right camera.
        left_distortion: k1, k2, p1, p2, k3 of the left lens (Brown and Conrady, as in OpenCV).
        right_distortion: those of the right lens.
        rotation: from left to right.
        translation: from left to right, in any unit.
        size: rows and columns of the calibrated images; None if the file does not say.

    Shape:
        - left, right, rotation: ``(3, 3)``;
        - distortions: ``(5,)``; translation: ``(3,)``.

    Raises:
        DataError: if a matrix has another shape or numbers that are not finite, a focal length is not positive, the
            rotation is none, or the cameras stand at one place.

    Example:
        >>> camera = np.array([[1000.0, 0, 640], [0, 1000, 512], [0, 0, 1]])
        >>> still = np.zeros(5)
        >>> StereoCalibration(camera, camera, still, still, np.eye(3), np.array([-4.0, 0, 0])).size is None
        True
    """

    left: FloatArray
    right: FloatArray
    left_distortion: FloatArray
    right_distortion: FloatArray
    rotation: FloatArray
    translation: FloatArray
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        shapes = dict.fromkeys(("left", "right", "rotation"), (3, 3))
        shapes |= {"left_distortion": (5,), "right_distortion": (5,), "translation": (3,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value.shape != shape or not np.isfinite(value).all():
                raise DataError(
                    f"calibration: {name} must be finite numbers of shape {shape}, got {value.shape}"
                )
        if min(self.left[0, 0], self.left[1, 1], self.right[0, 0], self.right[1, 1]) <= 0:
            raise DataError("calibration: a focal length is not positive")
        if (
            np.abs(self.rotation @ self.rotation.T - np.eye(3)).max() > 1e-3
            or np.linalg.det(self.rotation) < 0
        ):
            raise DataError("calibration: the matrix from left to right is no rotation")
        if not self.translation.any():
            raise DataError("calibration: both cameras stand at one place; there is nothing to rectify")


def find_stereo_pairs(source: PathLike, right: PathLike | None = None) -> list[dict[str, str]]:
    """List the pairs behind a folder as data items ``{"image": left, "image_right": right, "case": name}``.

    Files are those that :func:`medsr.io.images.find_images` lists. A pair is known by its place or by its name:

    - two folders: files of one name, apart from the ending;
    - one folder with ``left`` and ``right`` (or ``left_frames`` and ``right_frames``): the same, inside these;
    - one folder with files ``<case>_left.png`` and ``<case>_right.png``. ``left.png`` alone is named after the folder.

    Args:
        source: the folder of pairs, or of left views.
        right: the folder of right views.

    Raises:
        DataError: if there is no pair, a view has no partner, or a file is neither left nor right.

    Example:
        >>> find_stereo_pairs("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such folder; a folder of stereo pairs is needed
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder.name}: no such folder; a folder of stereo pairs is needed")
    views = _view_folders(folder) if right is None else (find_images(folder), find_images(Path(right)))
    if views is None:
        left_views, right_views, twins = _sides(folder, refuse_marked(find_images(folder)))
        if twins:
            raise DataError(f"{folder.name}: {twins[0]['error']}")
        return _paired(left_views, right_views)
    return _paired(*(_by_case(refuse_marked(items)) for items in views))


def find_stereo_cases(source: PathLike | Sequence[PathLike]) -> list[dict[str, str]]:
    """List what is to be enlarged: pairs, images without a second view, and views that lost their partner.

    :func:`find_stereo_pairs` refuses a folder for one bad pair, as training needs it. Here every case gets its item,
    so that a run can go on with the others:

    - a pair: ``{"image": left, "image_right": right, "case": name}``, known by place or name as there;
    - an image that is named neither left nor right: ``{"image": path, "case": name}``;
    - a view whose partner is missing: ``{"image": path, "case": name, "error": what is missing}``; so are two left or
      two right views, and inputs of one case name, see :func:`~medsr.io.cases.mark_twins`.

    Args:
        source: an image, a folder, or a list of these; both views of a pair may be named one by one.

    Raises:
        DataError: if there is no image, or one is given twice.

    Example:
        >>> find_stereo_cases("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no such file or folder
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise DataError("the list of inputs is empty; give images or a folder")
    items: list[dict[str, str]] = []
    files: dict[Path, list[dict[str, str]]] = {}
    for path in (Path(one).expanduser() for one in sources):
        views = _view_folders(path)
        if views is not None:
            items += [item for found in views for item in found if "error" in item]
            items += _cases(*map(_by_case, views))
            continue
        for item in find_images(path):
            files.setdefault(Path(item["image"]).parent, []).append(item)
    for folder, found in files.items():
        alone = [item for item in found if "error" in item or _SIDE.match(item["case"]) is None]
        left, right, twins = _sides(folder, [item for item in found if item not in alone])
        items += [*_cases(left, right), *twins, *alone]
    return sorted(mark_twins(items), key=lambda item: item["case"])


def read_calibration(path: PathLike) -> StereoCalibration:
    """Read the calibration of a stereo camera: EndoVis' ``camera_calibration.txt``, or a file that OpenCV wrote.

    OpenCV itself is not needed. Its YAML, XML and JSON files must hold the matrices ``M1``, ``D1``, ``M2``, ``D2``,
    ``R`` and ``T``, as its samples call them; ``K1`` and ``cameraMatrix1``, ``distCoeffs1`` are known too. A rotation
    may be a vector. Distortion beyond k3 is refused.

    Args:
        path: the file; the content decides which format it is.

    Raises:
        DataError: if the file cannot be read, or an entry is missing or impossible.

    Example:
        >>> read_calibration("none.txt")
        Traceback (most recent call last):
        medsr.errors.DataError: none.txt: cannot be read (No such file or directory)
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path.name}: not a text file; EndoVis text or OpenCV YAML, XML or JSON is needed"
        ) from None
    try:
        return _endovis(text) if "Camera-0-F" in text else _opencv(text)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from None
    except (ValueError, IndexError, TypeError):
        raise DataError(f"{path.name}: an entry cannot be read; export the calibration again") from None


_Sides = tuple[dict[str, str], dict[str, str], list[dict[str, str]]]
"""Files of the left and of the right views by case, and cases with two of a side."""


def _by_case(items: Sequence[dict[str, str]]) -> dict[str, str]:
    return {item["case"]: item["image"] for item in items if "error" not in item}


def _view_folders(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]] | None:
    """Left and right views of the two folders inside, if they are there."""
    for names in _FOLDERS:
        there = [name for name in names if (folder / name).is_dir()]
        loose = sorted(child.name for child in folder.iterdir() if child.is_file()) if there else []
        if len(there) == 2:
            pictures = [name for name in loose if name.lower().endswith(IMAGE_SUFFIXES)]
            if pictures:
                warn_once(
                    f"{folder.name}: {len(pictures)} pictures beside {' and '.join(there)} are left out, {pictures[0]} "
                    "first"
                )
            return find_images(folder / there[0]), find_images(folder / there[1])
        if there:
            missing = f"there is a folder {there[0]}, but no {names[1 - names.index(there[0])]} beside it"
            if not loose:
                raise DataError(f"{folder.name}: {missing}")
            warn_once(f"{folder.name}: {missing}; its views are left out")
    return None


def _sides(folder: Path, items: Sequence[dict[str, str]]) -> _Sides:
    sides: dict[str, dict[str, str]] = {"left": {}, "right": {}}
    twins: dict[str, dict[str, str]] = {}
    for item in items:
        match = _SIDE.match(item["case"])
        if match is None:
            raise DataError(
                f"{folder.name}: {Path(item['image']).name} is neither left nor right; name it <case>_left or "
                "<case>_right, or use folders left/ and right/"
            )
        case, side = match["case"] or case_name(folder, suffixes=()), match["side"].lower()
        other = sides[side].setdefault(case, item["image"])
        if other != item["image"]:
            names = " and ".join(Path(path).name for path in (other, item["image"]))
            error = f"{case} has two {side} views, {names}; keep one of them"
            twins.setdefault(case, {"image": other, "case": case, "error": error})
    left, right = (
        {case: path for case, path in sides[side].items() if case not in twins} for side in ("left", "right")
    )
    return left, right, list(twins.values())


def _paired(left: dict[str, str], right: dict[str, str]) -> list[dict[str, str]]:
    items = _cases(left, right)
    alone = [item["error"] for item in items if "error" in item]
    if alone:
        more = f" (and {len(alone) - 1} more without a partner)" if alone[1:] else ""
        raise DataError(f"{alone[0]}{more}")
    return items


def _cases(left: dict[str, str], right: dict[str, str]) -> list[dict[str, str]]:
    """An item for every case, see :func:`find_stereo_cases`."""
    items = []
    for case in sorted({*left, *right}):
        if case in left and case in right:
            items.append({"image": left[case], "image_right": right[case], "case": case})
            continue
        missing = "right" if case in left else "left"
        path = left.get(case) or right[case]
        items.append({"image": path, "case": case, "error": f"{case}: there is no {missing} view"})
    return items


def _endovis(text: str) -> StereoCalibration:
    entries = {name: values.split() for name, values in _ENDOVIS.findall(text)}

    def numbers(name: str, count: int) -> FloatArray:
        if len(entries.get(name, ())) < count:
            raise DataError(f"{name} with {count} numbers is missing")
        return np.array([float(value) for value in entries[name][:count]])

    def camera(index: int) -> FloatArray:
        (fx, fy), (cx, cy) = numbers(f"Camera-{index}-F", 2), numbers(f"Camera-{index}-C", 2)
        skew = numbers(f"Camera-{index}-Alpha", 1)[0] if f"Camera-{index}-Alpha" in entries else 0.0
        return np.array([[fx, fx * skew, cx], [0, fy, cy], [0, 0, 1]])

    sized = "Width" in entries and "Height" in entries
    return StereoCalibration(
        camera(0),
        camera(1),
        numbers("Camera-0-K", 5),
        numbers("Camera-1-K", 5),
        _rotation(numbers("Extrinsic-Omega", 3)),
        numbers("Extrinsic-T", 3),
        (int(numbers("Height", 1)[0]), int(numbers("Width", 1)[0])) if sized else None,
    )


def _opencv(text: str) -> StereoCalibration:
    entries = _opencv_entries(text)

    def entry(what: str) -> FloatArray:
        for name in _OPENCV[what]:
            if name in entries:
                return entries[name]
        raise DataError(
            f"no entry {' or '.join(_OPENCV[what])}; EndoVis text or OpenCV YAML, XML or JSON is needed"
        )

    def distortion(what: str) -> FloatArray:
        found = entry(what).ravel()
        if found[5:].any():
            raise DataError(
                f"{_OPENCV[what][0]}: distortion beyond k3 is not supported; calibrate with five numbers"
            )
        return np.pad(found, (0, max(0, 5 - found.size)))[:5]

    rotation = entry("rotation")
    size = next(
        (
            (int(entries[h].item()), int(entries[w].item()))
            for w, h in _OPENCV_SIZE
            if w in entries and h in entries
        ),
        None,
    )
    return StereoCalibration(
        entry("left"),
        entry("right"),
        distortion("left_distortion"),
        distortion("right_distortion"),
        _rotation(rotation.ravel()) if rotation.size == 3 else rotation,
        entry("translation").ravel(),
        size,
    )


def _opencv_entries(text: str) -> dict[str, FloatArray]:
    """Matrices and numbers by name."""
    if text.lstrip().startswith("{"):
        return {
            name: _from_json(value) for name, value in json.loads(text).items() if not isinstance(value, str)
        }
    found = {}
    for pattern in (_MATRIX_YAML, _MATRIX_XML):
        for name, rows, columns, values in pattern.findall(text):
            numbers = [float(value) for value in re.split(r"[,\s]+", values.strip())]
            found[name] = np.array(numbers).reshape(int(rows), int(columns))
    for yaml, xml, value in _SCALAR.findall(text):
        found[yaml or xml] = np.array(float(value))
    return found


def _from_json(value: Any) -> FloatArray:
    if isinstance(value, dict):
        return np.array(value["data"], dtype=float).reshape(value["rows"], value["cols"])
    return np.array(value, dtype=float)


def _rotation(vector: FloatArray) -> FloatArray:
    """The rotation about a vector by its length (Rodrigues)."""
    return Rotation.from_rotvec(vector).as_matrix()
