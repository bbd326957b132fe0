"""EndoVis 2017 as it is published, made into a labelled folder; and the folds in which it is commonly split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medsr.errors import DataError
from medsr.io.cases import refuse_marked
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.images import find_images
from medsr.io.loading import LoadImageFiled
from medsr.io.masks import write_mask
from medsr.io.writing import probe_folder
from medsr.transforms.frame_labels import LoadMaskd
from medsr.transforms.stereo import EndoVis17Framed

__all__ = ["ENDOVIS17_FOLDS", "ENDOVIS17_LABEL_MAPS", "ENDOVIS17_VIDEO_FOLDS", "prepare_endovis17"]

ENDOVIS17_FOLDS = (("d1", "d3"), ("d2", "d5"), ("d4", "d8"), ("d6", "d7"))
"""Videos that test each of the four folds in which most results on this data set are published."""

ENDOVIS17_VIDEO_FOLDS = tuple((f"d{number}",) for number in range(1, 11))
"""Ten folds of one video; the last two videos have masks only since those of the test set were released."""

_TYPES = (
    "bipolar_forceps",
    "prograsp_forceps",
    "large_needle_driver",
    "vessel_sealer",
    "grasping_retractor",
    "monopolar_curved_scissors",
    "other",
)
"""Instruments by their grey value in ``labels_types/``, from 1, as folders of masks are called after them."""

_OTHER = len(_TYPES)

ENDOVIS17_LABEL_MAPS = {
    "binary": {"background": [0], "instrument": [10, 20, 30]},
    "parts": {"background": [0], "shaft": [10], "wrist": [20], "clasper": [30]},
    "types": {"background": [0], **{name: [value] for value, name in enumerate(_TYPES, 1)}},
}
"""Label maps of the three tasks: the masks of the first two are in ``labels/``, those of types in ``labels_types/``."""

_VIDEO = re.compile(r"instrument_dataset_(\d+)")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class _Frame:
    """A frame, and the masks of its instruments with the grey value of their type."""

    case: str
    image: Path
    masks: tuple[tuple[Path, int], ...]


def prepare_endovis17(source: PathLike, output: PathLike) -> int:
    """Turn the training folders of EndoVis 2017 into one folder that ``find_labelled_frames`` reads.

    Written are ``images/``, the camera's 1280 x 1024 pixels of a frame of 1920 x 1080, as they are; ``labels/`` with
    the parts of robotic instruments by the grey values of the source, for the binary task as well; and
    ``labels_types/``. Where the masks of two instruments overlap, the folder whose name comes later counts.
    Instruments that are not the robot's have a type and no parts. Frames are called after their video,
    ``d1-frame000``, which makes the video their group.

    All names are checked before the first file is written. A run that was stopped goes on where it was: files
    are written whole, and a frame that has all three is not made again. The source is only read.

    Args:
        source: folder with ``instrument_dataset_1`` and so on, at any depth; those without ``ground_truth/`` have no
            masks and are left out.
        output: folder for the results; created if missing.

    Returns:
        the number of frames that were written.

    Raises:
        DataError: if there is no such folder, a folder of masks is of an unknown instrument, a mask is missing, a
            frame occurs twice or has another size.
        OutputError: if a file cannot be written whole.

    Example:
        >>> prepare_endovis17("no-such-folder", "prepared")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no instrument_dataset_<number> with ground_truth/ in it

    Reference:
        M. Allan et al., 2017 Robotic Instrument Segmentation Challenge, arXiv:1902.06426
    """
    frames = _frames(Path(source).expanduser())
    folders = [
        probe_folder(Path(output).expanduser() / part) for part in ("images", "labels", "labels_types")
    ]
    missing = [
        frame for frame in frames if not all((folder / f"{frame.case}.png").exists() for folder in folders)
    ]
    for frame in _with_progress(missing):
        _write(frame, *(folder / f"{frame.case}.png" for folder in folders))
    return len(missing)


def _frames(source: Path) -> list[_Frame]:
    name = source.name or source.resolve().name
    videos = [
        (int(match[1]), folder)
        for folder in sorted(source.glob("**/instrument_dataset_*"))
        if (match := _VIDEO.fullmatch(folder.name)) and (folder / "ground_truth").is_dir()
    ]
    if not videos:
        raise DataError(f"{name}: no instrument_dataset_<number> with ground_truth/ in it")
    frames = [frame for number, folder in sorted(videos) for frame in _frames_of(number, folder)]
    seen: set[str] = set()
    for frame in frames:
        if frame.case in seen:
            raise DataError(f"{name}: {frame.case} occurs twice; keep one copy of each instrument_dataset")
        seen.add(frame.case)
    return frames


def _frames_of(number: int, folder: Path) -> list[_Frame]:
    drawn = [
        (path, _type_of(path))
        for path in sorted((folder / "ground_truth").iterdir())
        if path.is_dir() and not path.name.startswith(".")
    ]
    if not drawn:
        raise DataError(f"{folder.name}: no folder of masks in ground_truth/")
    frames = []
    for item in refuse_marked(find_images(folder / "left_frames")):
        image = Path(item["image"])
        masks = tuple((path / image.name, kind) for path, kind in drawn)
        lost = [path for path, _ in masks if not path.is_file()]
        if lost:
            raise DataError(f"{folder.name}: no {image.name} in ground_truth/{lost[0].parent.name}/")
        frames.append(_Frame(f"d{number}-{item['case']}", image, masks))
    return frames


def _type_of(folder: Path) -> int:
    name = folder.name.lower()
    found = [value for value, kind in enumerate(_TYPES, 1) if kind in name]
    if not found:
        raise DataError(f"{folder.name}: masks of an unknown instrument; known are {', '.join(_TYPES)}")
    return found[0]


def _write(frame: _Frame, image: Path, parts: Path, types: Path) -> None:
    # No folder of masks is called "image": it is called after an instrument.
    item: dict[Any, Any] = {"image": frame.image, **{path.parent.name: path for path, _ in frame.masks}}
    masks = [key for key in item if key != "image"]
    transforms = (
        LoadImageFiled("image"),
        LoadMaskd(masks),
        EndoVis17Framed(("image", *masks), deinterlace=False, border=True),
    )
    try:
        for transform in transforms:
            item = transform(item)
    except DataError as error:
        # Frames of all videos have the same names.
        raise DataError(f"{frame.case}: {error}") from None
    of_parts, of_types = (torch.zeros(item["image"].shape[1:], dtype=torch.int32) for _ in range(2))
    for path, kind in frame.masks:
        mask = item[path.parent.name][0].as_tensor()
        of_types[mask > 0] = kind
        if kind != _OTHER:
            of_parts = torch.where(mask > 0, mask, of_parts)
    write_mask(types, of_types.numpy())
    write_mask(parts, of_parts.numpy())
    write_image(image, item["image"].numpy(), ImageEncoding.from_meta(item["image"].meta))


def _with_progress(frames: list[_Frame]) -> Iterable[_Frame]:
    from tqdm.auto import tqdm

    return tqdm(frames, desc="EndoVis 2017", unit="frame", leave=False)
