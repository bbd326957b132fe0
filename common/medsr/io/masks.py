"""Masks of single frames: reading and writing their values exactly, and folders of frames with masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from monai.utils import ensure_tuple

from medsr.errors import DataError, OutputError
from medsr.io.cases import refuse_marked
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.images import find_images, read_image, read_image_header, read_palette_indices

__all__ = ["find_labelled_frames", "frames_of_groups", "group_of", "read_mask", "write_mask"]

_FORMATS = ("PNG", "TIFF", "BMP")

PathLike = str | os.PathLike[str]


def find_labelled_frames(
    folder: PathLike,
    leave_out: Sequence[str] = (),
    *,
    groups: Sequence[str] | None = None,
    labels: str = "labels",
) -> list[dict[str, str]]:
    """List the frames of a folder with ``images/`` and ``labels/``, which hold files of equal names.

    Frames of one video resemble each other, so that a split by frame would test what was learnt by heart: only whole
    groups are left out, see :func:`group_of`. The endings of image and mask may differ.
    :func:`medsr.io.cases.find_labelled_cases` was considered; it lists volumes, and leaves out single ones.

    Args:
        folder: the folder of both.
        leave_out: names of groups that are kept for validation or test.
        groups: names of the only groups to use; default all.
        labels: sub-folder of the masks, where the same frames have masks for several tasks.

    Returns:
        items ``{"case": name, "image": path, "label": path}``, by name.

    Raises:
        DataError: if a folder or a partner is missing, a group does not exist, or no frame is left.

    Example:
        >>> find_labelled_frames("no-such-folder")
        Traceback (most recent call last):
        medsr.errors.DataError: no-such-folder: no folder 'images' in it; it must hold images/ and labels/
    """
    root = Path(folder).expanduser()
    name = root.name or root.resolve().name
    for part in ("images", labels):
        if not (root / part).is_dir():
            raise DataError(f"{name}: no folder '{part}' in it; it must hold images/ and {labels}/")
    images, masks = (
        {item["case"]: item["image"] for item in refuse_marked(find_images(root / part))}
        for part in ("images", labels)
    )
    alone = sorted(set(images) ^ set(masks))
    if alone:
        where = labels if alone[0] in images else "images"
        more = f" (and {len(alone) - 1} more)" if alone[1:] else ""
        raise DataError(f"{name}: {alone[0]} has no partner in {where}/{more}; names must be equal")
    items = [{"case": case, "image": images[case], "label": masks[case]} for case in sorted(images)]
    try:
        return frames_of_groups(items, leave_out, groups=groups, where="")
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def frames_of_groups(
    items: Sequence[dict[str, str]],
    leave_out: Sequence[str] = (),
    *,
    groups: Sequence[str] | None = None,
    where: str = " in the folders",
) -> list[dict[str, str]]:
    """Keep the frames of some groups.

    Args:
        items: with the key ``case``.
        leave_out: names of groups that are not kept.
        groups: names of the only groups to use; default all.
        where: what a message says of the source.

    Raises:
        DataError: if a group does not exist, or no frame is left.

    Example:
        >>> frames_of_groups([{"case": "a-1"}, {"case": "b-1"}], ["a"])
        [{'case': 'b-1'}]
    """
    known = sorted({group_of(item["case"]) for item in items})
    # A command line makes numbers of digits.
    leave_out = [str(group) for group in ensure_tuple(leave_out)]
    wanted = known if groups is None else [str(group) for group in ensure_tuple(groups)]
    unknown = [group for group in (*wanted, *leave_out) if group not in known]
    if unknown:
        raise DataError(f"there is no group '{unknown[0]}'{where}; there are {', '.join(known)}")
    kept = set(wanted) - set(leave_out)
    found = [item for item in items if group_of(item["case"]) in kept]
    if not found:
        raise DataError(f"no frame is left of the groups {', '.join(known)}; leave out fewer")
    return found


def group_of(case: str) -> str:
    """The sequence, video or patient of a frame: what stands before the first hyphen of its name.

    Args:
        case: name of the frame.

    Example:
        >>> group_of("d1-frame000")
        'd1'
    """
    return case.partition("-")[0]


def read_mask(path: PathLike) -> npt.NDArray[np.int32]:
    """Read the values of a mask exactly as they are stored.

    Greys of fewer than 8 bits are expanded to 8, as their format means them: 1 bit gives 0 and 255. A palette gives
    its indices, not its colours. A grey mask that was saved as RGB is read by its equal channels. The ``PILReader`` of
    MONAI was considered: it takes the colours of three channels for three images, and JPEG for a mask.

    Args:
        path: a PNG, TIFF or BMP file.

    Shape:
        ``(H, W)``.

    Raises:
        DataError: as :func:`medsr.io.images.read_image`; and for JPEG, which blurs values, for DICOM, colours,
            transparency, or values that are no whole numbers.

    Example:
        >>> read_mask("none.png")
        Traceback (most recent call last):
        medsr.errors.DataError: none.png: no such file
    """
    path = Path(path)
    kind = read_image_header(path).encoding.file_format
    if kind not in _FORMATS:
        raise DataError(f"{path.name}: a mask cannot be {kind}; save it as PNG, which keeps every value")
    image = read_image(path)
    # Palettes are expanded to colours.
    indices = read_palette_indices(path) if len(image.values) == 3 else None
    if indices is not None:
        return indices.astype(np.int32)
    if image.alpha is not None and image.alpha.min() < 1:
        raise DataError(f"{path.name}: a mask with transparency is ambiguous; save it as plain grey values")
    if (image.values != image.values[:1]).any():
        raise DataError(f"{path.name}: a mask in colours; save its classes as grey values or as a palette")
    levels = image.values[0].astype(np.float64) * image.encoding.span
    whole = np.rint(levels)
    # float32 in [0, 1] gives back levels of 16 bits to 0.004.
    if np.abs(levels - whole).max() > 1e-2:
        raise DataError(f"{path.name}: a mask of values that are no whole numbers; save the class indices")
    return whole.astype(np.int32)


def write_mask(path: PathLike, values: npt.ArrayLike) -> Path:
    """Write a mask as 8-bit grey, read every value back, and only then give the file its name.

    Args:
        path: target ending in ``.png``, ``.tif`` or ``.tiff``.
        values: whole numbers from 0 to 255.

    Shape:
        - values: ``(H, W)``.

    Raises:
        OutputError: if a value is not a whole number from 0 to 255, or the file cannot be written whole.

    Example:
        >>> write_mask("a.png", [[0, 256]])
        Traceback (most recent call last):
        medsr.errors.OutputError: a.png: a mask holds whole numbers from 0 to 255, got int64 from 0 to 256
    """
    mask = np.asarray(values)
    if mask.dtype.kind not in "iu" or (mask.size and (mask.min() < 0 or mask.max() > 255)):
        found = f"{mask.dtype} from {mask.min()} to {mask.max()}"
        raise OutputError(f"{Path(path).name}: a mask holds whole numbers from 0 to 255, got {found}")
    levels = np.divide(mask[None], np.float32(255), dtype=np.float32)
    return write_image(path, levels, ImageEncoding("PNG", 8, 1))
