"""Cross-validation of frame segmentation: folds of whole groups, trained and scored by a bundle's own configs."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from monai.utils import ensure_tuple

from medsr.engines.frame_comparison import frame_table
from medsr.engines.runner import one_line_errors
from medsr.errors import DataError, SettingError
from medsr.handlers.resume import STATE_FILE, content_of, differences, may_change
from medsr.io.cases import input_digest
from medsr.io.masks import find_labelled_frames, frames_of_groups, group_of, read_mask
from medsr.io.writing import probe_folder, write_json
from medsr.metrics.frames import over_folds, summary
from medsr.overrides import asked, nested_overrides, read_config, refuse_unmergeable
from medsr.settings import as_whole

__all__ = [
    "CrossValidation",
    "frame_items",
    "group_folds",
    "group_weights",
    "overlays_of_run",
    "refuse_unlabelled",
]

_log = logging.getLogger(__name__)

SCORES = "frames.json"
"""What ``evaluate.json`` writes."""


@one_line_errors
def frame_items(
    sources: str | Path | Sequence[str | Path],
    leave_out: Sequence[str] = (),
    *,
    groups: Sequence[str] | None = None,
    labels: str = "labels",
) -> list[dict[str, str]]:
    """List the labelled frames of one folder or of several.

    A group to leave out, or to take alone, may be in any of the folders: a folder of which nothing is left is passed
    over.

    Args:
        sources: a folder as :func:`medsr.io.masks.find_labelled_frames` takes it, or a list of such.
        leave_out: names of groups that are kept for validation or test.
        groups: names of the only groups to use; default all.
        labels: sub-folder of the masks.

    Returns:
        items ``{"case": name, "image": path, "label": path}``.

    Raises:
        DataError: if there is no folder, a folder is incomplete, a group does not exist, or no frame is left.

    Example:
        >>> frame_items("no-such-folder")
        Traceback (most recent call last):
        SystemExit: 2
    """
    if not sources:
        raise DataError(
            "no frames: set --dataset_dir to a folder with images/ and labels/, or a list of such"
        )
    folders = [sources] if isinstance(sources, (str, Path)) else sources
    if not isinstance(labels, str):
        raise SettingError(f"labels must be the name of a folder, got {labels!r}")
    items = [item for folder in folders for item in find_labelled_frames(folder, labels=labels)]
    return frames_of_groups(items, leave_out, groups=groups)


@one_line_errors
def refuse_unlabelled(
    items: Sequence[Mapping[str, str]], label_map: Mapping[str, Sequence[int]], ignore: Sequence[int] = ()
) -> list[Mapping[str, str]]:
    """Return the items, if there is anything to learn from them.

    Masks of 0 and 255 are the most usual ones, and 255 does not count unless a class says so: such a training would
    end without a complaint, and find nothing. Values that belong nowhere are left to
    :class:`~medsr.transforms.frame_labels.GreysToClassesd`, which names the file.

    Args:
        items: labelled frames, as of :func:`frame_items`.
        label_map: class name to the grey values of the file, the background first.
        ignore: grey values that do not count.

    Raises:
        DataError: if every mask holds nothing but background and values that do not count.

    Example:
        >>> refuse_unlabelled([], {"background": [0], "instrument": [255]})
        []
    """
    if not items or not label_map:
        return list(items)
    background, *classes = (set(ensure_tuple(values)) for values in label_map.values())
    # A value that is listed twice is refused by the transform.
    nothing = background | set(ensure_tuple(ignore)).difference(*classes)
    seen: set[int] = set()
    for item in items:
        seen.update(np.unique(read_mask(item["label"])).tolist())
        if seen - nothing:
            return list(items)
    raise DataError(
        f"nothing to learn: the {len(items)} masks hold no value but {', '.join(map(str, sorted(seen)))}, which is "
        f"background or in ignore {list(ensure_tuple(ignore))}; list the values of instruments in classes, and "
        "take them out of ignore"
    )


def group_weights(items: Sequence[Mapping[str, str]]) -> list[float]:
    """How often to draw each item so that all groups are drawn alike, for a ``WeightedRandomSampler``.

    Frames of one video are nearly the same: a video with many of them should not be most of what a network sees.

    Args:
        items: with the key ``case``, see :func:`frame_items`.

    Example:
        >>> group_weights([{"case": name} for name in ("a-1", "a-2", "b-1")])
        [0.5, 0.5, 1.0]
    """
    groups = [group_of(item["case"]) for item in items]
    sizes = Counter(groups)
    return [1 / sizes[group] for group in groups]


def group_folds(
    cases: Sequence[Mapping[str, str]], folds: int | Sequence[Sequence[str]] | None = None
) -> list[list[str]]:
    """Groups to leave out together, one list for each fold.

    ``monai.data.partition_dataset_classes`` and ``sklearn.model_selection.GroupKFold`` were considered: the first
    splits within a class, the second is no dependency of this project.

    Args:
        cases: items with the key ``case``.
        folds: the lists themselves; or how many there are to be, then the largest group left goes to the fold with
            the fewest frames; None leaves out each group alone.

    Raises:
        SettingError: for a group that does not exist or is left out twice, an empty fold, fewer than two folds, or
            more than there are groups.

    Example:
        >>> cases = [{"case": name} for name in ("a-1", "a-2", "b-1", "c-1")]
        >>> group_folds(cases, 2), group_folds(cases)
        ([['a'], ['b', 'c']], [['a'], ['b'], ['c']])
    """
    sizes = Counter(group_of(case["case"]) for case in cases)
    if folds is None:
        folds = len(sizes)
    if isinstance(folds, (int, float, str)):
        folds = as_whole("folds", folds)
        if not 2 <= folds <= len(sizes):
            raise SettingError(f"{folds} folds cannot be made of {len(sizes)} groups ({', '.join(sizes)})")
        found: list[list[str]] = [[] for _ in range(folds)]
        for group in sorted(sizes, key=lambda name: (-sizes[name], name)):
            min(found, key=lambda fold: sum(sizes[name] for name in fold)).append(group)
        return found
    found = [[str(group) for group in fold] for fold in folds]
    counts = Counter(group for fold in found for group in fold)
    unknown = [group for group in counts if group not in sizes]
    if unknown:
        raise SettingError(f"folds: there is no group '{unknown[0]}'; there are {', '.join(sizes)}")
    twice = [group for group, count in counts.items() if count > 1]
    if twice:
        raise SettingError(f"folds: '{twice[0]}' is left out twice; every group is scored once")
    if len(found) < 2 or not all(found):
        raise SettingError(f"folds must be two lists of groups or more, none of them empty, got {found}")
    return found


class CrossValidation:
    """Trains once for each fold without its groups, scores them, and averages over the folds.

    The work is done by configs of a bundle, in this process, one after the other. A fold lies in ``fold<n>/training``
    and ``fold<n>/scores``, which have these names only once they are complete: what was done is not done again, so
    that a run that was stopped goes on, within a training, too, with the same settings, frames and masks.
    ``cross_validation.json`` holds the scores of every fold, over all frames of all folds, and mean and standard
    deviation over the folds.

    ``monai.apps.CrossValidation`` was considered: it makes folds of items, not of groups, and leaves training,
    scoring and going on to the caller.

    Args:
        cases: the frames, see :func:`frame_items`.
        output: folder of the results.
        folds: see :func:`group_folds`.
        configs: folder of the configs.
        train: files in it that train; ``leave_out`` gets the groups of the fold, beside those that it has already.
        evaluate: files in it that score; ``groups`` gets them, ``weights`` the weights of the fold.
        common: settings of both.
        train_settings: further ones of the training.
        evaluate_settings: further ones of the scoring.

    Raises:
        SettingError: for impossible folds, and if the folder holds a run with other settings, frames or masks.

    Example:
        >>> cases = [{"case": "a-1"}, {"case": "b-1"}]
        >>> files = {"train": ["train.json"], "evaluate": ["inference.json", "evaluate.json"]}
        >>> CrossValidation(cases, "runs/folds", configs="configs", **files).folds
        [['a'], ['b']]
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, str]],
        output: str | Path,
        folds: int | Sequence[Sequence[str]] | None = None,
        *,
        configs: str | Path,
        train: Sequence[str],
        evaluate: Sequence[str],
        common: Mapping[str, Any] | None = None,
        train_settings: Mapping[str, Any] | None = None,
        evaluate_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.cases, self.folds, self.output = list(cases), group_folds(cases, folds), Path(output)
        self.configs, self.train, self.evaluate = Path(configs), list(train), list(evaluate)
        self.train_settings = {**(common or {}), **(train_settings or {})}
        self.evaluate_settings = {**(common or {}), **(evaluate_settings or {})}

    def run(self) -> dict[str, Any]:
        """Train and score what is missing; return the averages."""
        self._refuse_other_run()
        rows_of_folds = []
        for number, groups in enumerate(self.folds):
            fold = self.output / f"fold{number}"
            _log.info("fold %d of %d: without %s", number + 1, len(self.folds), ", ".join(groups))
            left_out = [*self.train_settings.get("leave_out", ()), *groups]
            settings = {**self.train_settings, "leave_out": left_out}
            if not (fold / "training" / "model.pt").is_file():
                # Scores of weights that are lost.
                shutil.rmtree(fold / "scores", ignore_errors=True)
            weights = self._step(fold / "training", "model.pt", self.train, settings)
            settings = {**self.evaluate_settings, "groups": groups, "weights": str(weights)}
            scores = self._step(fold / "scores", SCORES, self.evaluate, settings)
            rows_of_folds.append(_read(scores)["rows"])
        rows = [row for found in rows_of_folds for row in found]
        summaries = [summary(found) for found in rows_of_folds]
        result = {
            "folds": [
                {"groups": groups, **found} for groups, found in zip(self.folds, summaries, strict=True)
            ],
            "over_folds": over_folds(summaries),
            "over_frames": summary(rows),
        }
        write_json(self.output / "cross_validation.json", result)
        _log.info("\n%s", frame_table(rows))
        return result

    def _refuse_other_run(self) -> None:
        """Folds of other settings, frames or masks must not be averaged with these."""
        settings = {
            f"{step}::{key}": value
            for step, given in (("training", self.train_settings), ("scoring", self.evaluate_settings))
            for key, value in given.items()
            # Folds of unequal length are no average, even if each may go on.
            if not may_change(key) or key in ("iterations", "minutes")
        }
        own = json.loads(
            json.dumps(
                {
                    "settings": {
                        "folds": self.folds,
                        "configs of the training": self.train,
                        "configs of the scoring": self.evaluate,
                        **{
                            Path(file).name: content_of(str(self.configs / file))
                            for file in (*self.train, *self.evaluate)
                        },
                        **content_of(settings),
                    },
                    # A list: two folders may hold frames of one name.
                    "frames": [[case["case"], input_digest(case)] for case in self.cases],
                },
                default=str,
            )
        )
        path = probe_folder(self.output) / "settings.json"
        found = _read(path) if path.exists() else own
        changed = differences(found.get("settings", {}), own["settings"])
        if changed:
            raise SettingError(
                f"{self.output.name}: holds a cross-validation with {'; '.join(changed[:3])}; choose another output_dir"
            )
        if found.get("frames") != own["frames"]:
            then = found.get("frames", [])
            other = next((one for one in own["frames"] if one not in then), None)
            # Else some are gone, or were counted twice.
            first = f" ({other[0]} first)" if other else ""
            raise SettingError(
                f"{self.output.name}: holds a cross-validation of other frames or masks{first}; "
                "choose another output_dir"
            )
        write_json(path, own)

    def _step(self, folder: Path, result: str, files: Sequence[str], settings: Mapping[str, Any]) -> Path:
        """Run configs into a folder that has its name once it is complete, unless it is there; return the result."""
        if (folder / result).is_file():
            return folder / result
        part = folder.with_name(f"{folder.name}.part")
        if folder.exists():
            # It has lost its result.
            shutil.rmtree(folder)
        under_way = {"resume": True} if _is_whole(part / STATE_FILE) else {}
        if part.exists() and not under_way:
            shutil.rmtree(part)
        part.mkdir(parents=True, exist_ok=True)
        workflow = ConfigWorkflow(
            [str(self.configs / file) for file in files],
            logging_file=False,
            workflow_type=None,
            **{**settings, **under_way},
            output_dir=str(part),
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        part.rename(folder)
        return folder / result


@one_line_errors
def overlays_of_run(named: Sequence[str], configs: str | Path) -> list[str]:
    """Overlays of the trainings and scorings of a cross-validation: those named, and those that lie below it.

    The folds are runs of their own. An overlay that the cross-validation itself was given with, or a setting inside a
    component, would not reach them.

    Args:
        named: overlays by name.
        configs: folder of the configs.

    Raises:
        SettingError: for a setting inside a component, and an overlay that the scoring cannot be merged with.

    Example:
        >>> from medsr import catalog
        >>> overlays_of_run([], catalog.bundle_root("endoscopy_segsrnet_segmentation") / "configs")
        []
    """
    files, _ = asked()
    inside = Path(configs).resolve()
    # The first is the training itself.
    overlays = [file.resolve() for file in files[1:] if "cross_validation" not in read_config(file)]
    given = [file.name if file.parent == inside else str(file) for file in overlays]
    lost = [key for key in nested_overrides() if not key.startswith("cross_validation::")]
    if lost:
        raise SettingError(
            f"{lost[0]} would not reach the folds; put it into an overlay of your own, and name that"
        )
    found = [*given, *(name for name in named if name not in given)]
    # The scoring has no optimiser, for example; found out before the first training and not after it.
    refuse_unmergeable([inside / name for name in ("inference.json", *found, "evaluate.json")])
    return found


def _is_whole(state: Path) -> bool:
    """Whether a training can go on from its state; if not, it starts anew."""
    try:
        return isinstance(torch.load(state, map_location="cpu", weights_only=True), dict)
    except Exception:  # missing, cut off, or of another program
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise DataError(
            f"{path.name} in {path.parent.name}: damaged; remove it, or choose another output_dir"
        )
    return found
