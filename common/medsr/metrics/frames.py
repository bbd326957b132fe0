"""Overlap of class index masks, frame by frame, in the protocols under which instrument segmentation is reported.

One result has many numbers in this field, far apart: they differ in which classes of a frame are averaged, what a
frame without foreground is worth, and whether frames or classes are averaged first. Each has its own name here, and
:func:`summary` gives them all from one pass over the frames. The background is never a class, and pixels to be
ignored count neither in the prediction nor in the truth.

- ``iou_present``, ``dice_present``: mean over the classes in the truth of the frame; where the truth is empty, 1 if
  the prediction is empty too, else 0. TernausNet (doi:10.1101/275867) reports mean and standard deviation over all
  frames of all folds: hand the frames of all folds to one :func:`summary`. Two things that the protocol does not
  foresee have no score, because 1 would flatter: a frame in which nothing is found and pixels are ignored, and
  frames of which none has a class, neither in its truth nor in its prediction.
- ``challenge_iou``, ``challenge_dice``: the same, but frames without foreground in the truth are left out. EndoVis
  2017 challenge (arXiv 1902.06426), MF-TAPNet, and Ch_IoU of ISINet (arXiv 2007.05533). In a frame with foreground,
  neither family has a penalty for calling a class that is not there.
- ``isi_iou``: mean over the classes in the truth or in the prediction, so that a wrongly called class counts 0;
  frames without either are left out. ISI_IoU of ISINet.
- ``class_iou``: for each class, mean over the frames with that class in truth or prediction; ``mean_class_iou``: the
  mean of those. mc_IoU of ISINet. A class that never occurs is left out; some evaluators count it as 0.
- ``pooled_iou``: common pixels over united pixels, summed over all classes and frames.

``monai.metrics.MeanIoU`` and ``DiceMetric`` were considered: of one-hot batches, and leaving out empty classes, they
give ``challenge_iou`` and ``challenge_dice``; none of the others can be had from what they return.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, SettingError
from medsr.metrics.volume import as_array

__all__ = ["frame_scores", "over_folds", "summary"]

Mask: TypeAlias = Any
"""A NumPy array or a torch tensor."""

Scores: TypeAlias = dict[str, Any]

_PER_FRAME = ("iou_present", "dice_present", "challenge_iou", "challenge_dice", "isi_iou")
_OF_EMPTY_TOO = ("iou_present", "dice_present")
_OVER_FRAMES = (*_PER_FRAME, "mean_class_iou", "pooled_iou")


def frame_scores(pred: Mask, target: Mask, classes: Iterable[str], *, ignore: int = 255) -> Scores:
    """Scores of one frame, and the pixels of every class from which :func:`summary` derives the others.

    Args:
        pred: class index of every pixel.
        target: true class index of every pixel.
        classes: names in the order of the class indexes, background first; a label map will do.
        ignore: value of the truth that marks pixels to be ignored.

    Shape:
        - pred, target: ``(H, W)`` or ``(1, H, W)``.

    Returns:
        the scores of a single frame by name, see the head of this module; None where a protocol leaves the frame
        out, or it cannot be judged. ``classes`` holds for each class but the background the pixels in
        ``intersection``, ``pred`` and ``target``. JSON can hold it all.

    Raises:
        DataError: if the sizes differ, a value is no class index, or every pixel is to be ignored.
        SettingError: if there are not two classes or more.

    Example:
        >>> truth = np.array([[0, 1, 1, 255]])
        >>> scores = frame_scores(np.array([[0, 1, 2, 2]]), truth, ["background", "grasper", "scissors"])
        >>> scores["iou_present"], scores["isi_iou"], scores["classes"]["grasper"]
        (0.5, 0.25, {'intersection': 1, 'pred': 1, 'target': 2})
    """
    names = list(classes)
    if len(names) < 2:
        raise SettingError(f"classes must name the background and one class or more, got {names}")
    first, second = _plane("pred", pred), _plane("target", target)
    if first.shape != second.shape:
        raise DataError(
            f"prediction and truth differ in size, {first.shape} and {second.shape}; bring both to one grid"
        )
    judged = second != ignore
    if not judged.any():
        raise DataError("every pixel of the truth is to be ignored; leave this frame out")
    indexes = [
        _class_index(*one, len(names)) for one in (("pred", first[judged]), ("target", second[judged]))
    ]
    table = np.bincount(indexes[1] * len(names) + indexes[0], minlength=len(names) ** 2)
    table = table.reshape(len(names), len(names))
    common, called, true = (values.tolist() for values in (table.diagonal(), table.sum(0), table.sum(1)))
    counts = {
        name: {"intersection": common[k], "pred": called[k], "target": true[k]}
        for k, name in enumerate(names)
        if k
    }
    seen = [one for one in counts.values() if _occurs(one)]
    present = [one for one in seen if one["target"]]
    iou, dice = _mean(map(_iou, present)), _mean(map(_dice, present))
    # Where nothing is found, what is ignored may be all that there was to find; what is called in vain stays wrong.
    empty = float(not seen) if seen or judged.all() else None
    return {
        "iou_present": iou if present else empty,
        "dice_present": dice if present else empty,
        "challenge_iou": iou,
        "challenge_dice": dice,
        "isi_iou": _mean(map(_iou, seen)),
        "classes": counts,
    }


def summary(frames: Iterable[Mapping[str, Any]]) -> Scores:
    """All scores over many frames, whose order does not matter.

    Args:
        frames: what :func:`frame_scores` returns; more keys do no harm.

    Returns:
        number of ``frames``; the scores by name, see the head of this module, and for those that are means over
        frames also ``<name>_std_over_frames``, the standard deviation with denominator n; ``class_iou`` by class.
        None where no frame has the score.

    Raises:
        DataError: if there is no frame, or frames have other classes than the first.

    Example:
        >>> truth, classes = np.array([[0, 1, 1, 1]]), ["background", "instrument"]
        >>> frames = [frame_scores(pred, truth, classes) for pred in (truth, 0 * truth)]
        >>> found = summary(frames)
        >>> found["frames"], found["iou_present"], found["iou_present_std_over_frames"], found["class_iou"]
        (2, 0.5, 0.5, {'instrument': 0.5})
    """
    rows = list(frames)
    names = _common_names([row["classes"] for row in rows], "frame")
    found: Scores = {"frames": len(rows)}
    occurs = any(_occurs(counts) for row in rows for counts in row["classes"].values())
    for score in _PER_FRAME:
        values = _defined(row[score] for row in rows) if occurs or score not in _OF_EMPTY_TOO else []
        found[score] = _mean(values)
        found[f"{score}_std_over_frames"] = _std(values)
    seen = {name: [row["classes"][name] for row in rows if _occurs(row["classes"][name])] for name in names}
    class_iou = {name: _mean(map(_iou, counts)) for name, counts in seen.items()}
    found["mean_class_iou"] = _mean(_defined(class_iou.values()))
    every = [one for counts in seen.values() for one in counts]
    union = sum(map(_union, every))
    found["pooled_iou"] = sum(one["intersection"] for one in every) / union if union else None
    found["class_iou"] = class_iou
    return found


def over_folds(summaries: Iterable[Mapping[str, Any]]) -> Scores:
    """Mean and standard deviation over the folds of a cross-validation, every fold with the same weight.

    Args:
        summaries: what :func:`summary` returns for each fold.

    Returns:
        number of ``folds``; for every score its mean, and as ``<name>_std_over_folds`` the standard deviation with
        denominator n; ``class_iou`` by class. A fold without a score is left out of its mean; None where no fold
        has it.

    Raises:
        DataError: if there is no fold, or folds have other classes than the first.

    Example:
        >>> truth, classes = np.array([[0, 1, 1, 1]]), ["background", "instrument"]
        >>> folds = [summary([frame_scores(pred, truth, classes)]) for pred in (truth, 0 * truth)]
        >>> found = over_folds(folds)
        >>> found["folds"], found["challenge_iou"], found["challenge_iou_std_over_folds"]
        (2, 0.5, 0.5)
    """
    folds = list(summaries)
    names = _common_names([fold["class_iou"] for fold in folds], "fold")
    found: Scores = {"folds": len(folds)}
    for score in _OVER_FRAMES:
        values = _defined(fold[score] for fold in folds)
        found[score] = _mean(values)
        found[f"{score}_std_over_folds"] = _std(values)
    found["class_iou"] = {name: _mean(_defined(fold["class_iou"][name] for fold in folds)) for name in names}
    return found


def _plane(name: str, mask: Mask) -> npt.NDArray[Any]:
    array = as_array(mask)
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    if array.ndim != 2:
        raise DataError(f"{name}: a class index mask must be (H, W) or (1, H, W), got shape {array.shape}")
    return array


def _class_index(name: str, values: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
    wrong = ~np.isin(values, np.arange(classes))
    if wrong.any():
        raise DataError(
            f"{name}: {values[wrong][0]:g} is no class index of {classes} classes; map grey values to classes first"
        )
    return values.astype(np.int64)


def _common_names(maps: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    if not maps:
        raise DataError(f"there is no {what} to summarise")
    names = list(maps[0])
    other = next((list(one) for one in maps if list(one) != names), None)
    if other is not None:
        raise DataError(f"a {what} has the classes {other} where the first has {names}; summarise them apart")
    return names


def _occurs(counts: Mapping[str, int]) -> bool:
    return bool(counts["pred"] or counts["target"])


def _union(counts: Mapping[str, int]) -> int:
    return counts["pred"] + counts["target"] - counts["intersection"]


def _iou(counts: Mapping[str, int]) -> float:
    return counts["intersection"] / _union(counts)


def _dice(counts: Mapping[str, int]) -> float:
    return 2 * counts["intersection"] / (counts["pred"] + counts["target"])


def _defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None


def _std(values: Sequence[float]) -> float | None:
    return pstdev(values) if values else None
