"""Super-resolution of stereo video: frame after frame, in bounded memory, with one report for the whole clip."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import Tensor, nn
from tqdm.auto import tqdm

from medsr.engines.case_evaluator import CaseDataset, named, one_line
from medsr.errors import DataError, OutputError, SettingError
from medsr.handlers.case_output import RunReport
from medsr.inferers.stereo_superres import StereoSuperResInferer
from medsr.io.cases import input_digest
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.loading import LoadImageFiled
from medsr.io.stereo import find_stereo_cases
from medsr.io.video import VIDEO_FORMATS, VideoWriter, is_video, read_frames, read_video_header, write_video
from medsr.io.writing import probe_folder
from medsr.settings import as_flag, as_whole
from medsr.transforms.stereo import (
    FRAME_LAYOUTS,
    ROW_RESIDUAL_LIMIT_PX,
    JoinViewsd,
    SplitFramed,
    match_rows,
    shift_rows,
)

__all__ = ["RESULTS", "StereoVideo"]

_log = logging.getLogger(__name__)

RESULTS = ("auto", "png", *VIDEO_FORMATS)

_VIEWS = ("left", "right")

_ENOUGH, _LOOKED_AT = 5, 50
"""Frames whose rows are compared, and frames that are looked at until so many have something in common."""

_FACTS = ("mode", "tiles", "precision", "scale", "back_projection", "notice")
"""What the inferer says of a frame and holds for all of them."""

_LOWEST = ("data_consistency_left_db", "data_consistency_right_db")


class StereoVideo:
    """Super-resolves the frames of a stereo video one by one, in their order and with their times.

    The source is a video file, or a folder of frames: two folders ``left`` and ``right``, files named
    ``<frame>_left`` and ``<frame>_right``, or frames that hold both views. A folder is ordered by the numbers in the
    names. The result is ``left/<frame>.png`` and ``right/<frame>.png``, itself such a folder, or a video of both views
    side by side. A video, as each PNG, appears whole or not at all.

    In a folder a bad frame is named and left out, and the others go on; in a video their times stay. A video file that
    is damaged ends the run, because nobody knows what is missing. Each frame is written while the next one is computed;
    memory is that of these two, whatever the length.

    :class:`~medsr.engines.case_evaluator.CaseEvaluator` was considered: it runs a folder as well, and lists every case
    in the report, which it writes anew after each; a video has too many.

    Rows are compared in the first frames, and one shift holds for all: by frame, the video would tremble.

    Args:
        source: the video file or the folder.
        network: enlarges pairs, left before right.
        output_dir: folder of the results.
        inferer: runs the network; default :class:`~medsr.inferers.stereo_superres.StereoSuperResInferer`.
        layout: where frames that hold both views have them, ``side_by_side`` or ``top_bottom``.
        right_first: the right view is on the left, or on top.
        rows: row in the right view minus row in the left one, which is taken away; ``estimate`` measures it.
        result: ``png``, ``mkv`` (keeps every pixel), ``mp4`` (smaller), or ``auto``: png of a folder, mkv of a video.
        frame_rate: frames per second, a number or a fraction such as ``30000/1001``; for a folder that becomes a
            video. A video file has its own.
        resume: keep the PNG files that an interrupted run with the same weights and settings has left.
        overwrite: replace results of an earlier run.
        progress: show a progress bar with frames per second.
        device: where to compute.
        record: more for the report: ``settings``, ``config_files`` and ``weights`` of
            :class:`~medsr.handlers.case_output.RunReport`.

    Raises:
        SettingError: if a setting is unknown, or they contradict each other.

    Example:
        >>> StereoVideo("clip.mp4", nn.Identity(), "out", result="gif")
        Traceback (most recent call last):
        medsr.errors.SettingError: result must be one of auto, png, mkv, mp4, got 'gif'
    """

    def __init__(
        self,
        source: str | Path,
        network: nn.Module,
        output_dir: str | Path,
        *,
        inferer: Callable[..., Tensor] | None = None,
        layout: str = "side_by_side",
        right_first: bool = False,
        rows: int | str = 0,
        result: str = "auto",
        frame_rate: float | str | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
        device: torch.device | str = "cpu",
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if result not in RESULTS:
            raise SettingError(f"result must be one of {', '.join(RESULTS)}, got '{result}'")
        if layout not in FRAME_LAYOUTS:
            raise SettingError(f"layout must be one of {', '.join(FRAME_LAYOUTS)}, got '{layout}'")
        if isinstance(rows, str) and rows != "estimate":
            raise SettingError(f"row_shift must be a whole number or 'estimate', got '{rows}'")
        self.resume, self.overwrite = as_flag("resume", resume), as_flag("overwrite", overwrite)
        if self.resume and self.overwrite:
            raise SettingError("resume keeps what is there, overwrite replaces it; choose one of them")
        self.source, self.network, self.output_dir = source, network, Path(output_dir)
        self.inferer = StereoSuperResInferer() if inferer is None else inferer
        self.split = SplitFramed("image", layout, right_first=right_first)
        self.rows = rows if isinstance(rows, str) else as_whole("row_shift", rows)
        self.result, self.rate, self.progress = result, _rate(frame_rate), as_flag("progress", progress)
        self.device = torch.device(device)
        self.report = RunReport(self.output_dir, **(record or {}))
        self.report.conditions.device = str(self.device)

    def run(self) -> dict[str, Any]:
        """Super-resolve all frames, write the report, and return what it says of the clip.

        Raises:
            DataError: if the source cannot be read, or no frame of it can be used.
            OutputError: if results are there already, or cannot be written.
        """
        clip = self._clip()
        result = ("mkv" if clip.is_file else "png") if self.result == "auto" else self.result
        self._refuse(clip, result)
        probe_folder(self.output_dir)
        entry: dict[str, Any] = {
            "status": "unfinished",
            "reason": f"{clip.name}: interrupted",
            "input": clip.name,
            "input_digest": clip.digest,
        }
        replaces = self.overwrite and result == "png" and bool(_of_frames(self._earlier_report()))
        self.report.cases = {clip.name: entry}
        try:
            rows = self._compare_rows(clip, entry)
            self.report.write()
            self._frames(clip, result, rows=rows, entry=entry, replaces=replaces)
        except Exception as error:
            entry["reason"] = one_line(error)
            raise
        finally:
            self.report.write()
        return entry

    def finish(self) -> None:
        """End the process with a non-zero status if a frame was left out."""
        self.report.finish()

    def _clip(self) -> _Clip:
        if not isinstance(self.source, (str, Path)):
            raise DataError("several inputs: give one video file, or one folder of frames")
        if not str(self.source):
            raise DataError("no input: set --dataset_dir to a video file or a folder of frames")
        path = Path(self.source).expanduser()
        if path.is_dir():
            return _folder(path, self.split, self.rate)
        if not path.is_file() or not is_video(path):
            raise DataError(f"{path.name}: no video file and no folder of frames")
        if self.rate is not None:
            raise SettingError(f"frame_rate is for folders; {path.name} has its own: leave it null")
        header = read_video_header(path)
        return _Clip(
            path.name,
            partial(_file_frames, path, self.split),
            count=header.frames,
            rate=header.rate,
            tick=header.tick,
            notes=header.notes,
            is_file=True,
            digest=input_digest({"image": str(path)}),
        )

    def _refuse(self, clip: _Clip, result: str) -> None:
        """Refuse what would mix results of two runs, replace the source, or end in an error after hours."""
        taken = [self.output_dir, *(self.output_dir / view for view in _VIEWS)]
        if Path(self.source).expanduser().resolve() in [path.resolve() for path in taken]:
            raise OutputError(
                f"{self.output_dir.name}: holds the frames themselves; choose another output folder"
            )
        if result == "png":
            existing = [path for view in _VIEWS for path in islice((self.output_dir / view).glob("*.png"), 1)]
        else:
            if clip.rate is None:
                raise SettingError(
                    "a folder of frames has no frame rate: set frame_rate to make a video of it"
                )
            if self.resume:
                raise SettingError(
                    f"a video cannot be resumed: set result to png, or resume to false for {result}"
                )
            existing = [path for path in [self._video(clip, result)] if path.exists()]
        if existing and self.resume:
            # Where there is no report, whoever says resume knows.
            before = self._earlier_report()
            self.report.refuse_mixture(clip.name, before)
            _refuse_other_frames(clip, before)
        elif existing and not self.overwrite:
            raise OutputError(
                f"{existing[0].relative_to(self.output_dir).as_posix()}: is there already; choose another output "
                "folder, or set resume or overwrite to true"
            )

    def _earlier_report(self) -> dict[str, Any]:
        """The report in the output folder; empty if there is none that can be read."""
        found = None
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.output_dir / "report.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}

    def _video(self, clip: _Clip, result: str) -> Path:
        return self.output_dir / f"{Path(clip.name).stem if clip.is_file else clip.name}_superres.{result}"

    def _compare_rows(self, clip: _Clip, entry: dict[str, Any]) -> int:
        """The shift of the rows for all frames; what was measured goes to the report."""
        frames = (item["image"] for item in islice(clip.items(), _LOOKED_AT) if "error" not in item)
        matches = list(islice(filter(None, map(match_rows, frames)), _ENOUGH))
        offset = median(match.offset_px for match in matches) if matches else 0.0
        shift = self.rows if isinstance(self.rows, int) else round(offset)
        entry.update(row_offset_px=shift, warnings=list(clip.notes))
        if clip.rate is not None:
            entry["frame_rate"] = round(float(clip.rate), 3)
        if not matches:
            entry["warnings"].append("the views have too little in common to tell whether they are rectified")
        else:
            residual = max(abs(offset - shift), median(match.spread_px for match in matches))
            disparity = median(match.disparity_px for match in matches)
            entry.update(row_residual_px=round(residual, 2), disparity_px=disparity)
            if residual > ROW_RESIDUAL_LIMIT_PX:
                entry["warnings"].append(
                    f"rows of the views differ by {residual:.1f} px after a shift of {shift}; rectify the video"
                )
        for warning in entry["warnings"]:
            _log.warning("%s: %s", clip.name, warning)
        return shift

    def _frames(self, clip: _Clip, result: str, *, rows: int, entry: dict[str, Any], replaces: bool) -> None:
        """Super-resolve all frames, and write each while the next one is computed."""
        tally = _Tally(entry, whole=clip.is_file)
        # Disabled or not said: TQDM_DISABLE counts only where nothing is said.
        quiet = {} if self.progress else {"disable": True}
        bar = tqdm(total=clip.count, desc=clip.name, unit="frame", **quiet)
        with tally, self._writer(clip, result, replaces=replaces) as writer, bar:
            with _Behind(writer, tally) as behind:
                for item in clip.items():
                    if self.resume and "error" not in item and writer.has(item["case"]):
                        tally.kept += 1
                    else:
                        behind.write(item["case"], partial(self._enlarged, item, rows))
                    bar.update()
            if not tally.done + tally.kept:
                raise DataError(f"{clip.name}: no frame can be used; the first reason: {tally.first_reason}")
        _log.info("%s: %d frames, %s per second", clip.name, tally.done, entry["frames_per_second"])

    @contextmanager
    def _writer(self, clip: _Clip, result: str, *, replaces: bool) -> Iterator[_Writer]:
        entry = self.report.cases[clip.name]
        if result == "png":
            entry["files"] = [f"{view}/" for view in _VIEWS]
            yield _Pairs(self.output_dir, replaces=replaces)
            return
        path = self._video(clip, result)
        assert clip.rate is not None
        assert clip.tick is not None
        with write_video(path, rate=clip.rate, tick=clip.tick) as video:
            yield _SideBySide(video)
        entry["files"] = [path.name]

    def _enlarged(self, item: Mapping[str, Any], shift: int) -> _Frame:
        """The frame with its rows at one height, and the enlarged views."""
        if "error" in item:
            raise DataError(item["error"])
        since = time.monotonic()
        pair = shift_rows(item["image"], shift)
        found: Tensor = self.inferer(pair[None].to(self.device), self.network)
        seconds = time.monotonic() - since
        return _Frame(item, pair, found[0].chunk(2), seconds, getattr(self.inferer, "facts", {}))


class _Clip(NamedTuple):
    """What is known of a source: items with ``case``, ``ticks``, and ``image`` or ``error``, anew at each call."""

    name: str
    items: Callable[[], Iterator[dict[str, Any]]]
    count: int | None
    rate: Fraction | None
    tick: Fraction | None
    notes: tuple[str, ...] = ()
    is_file: bool = False
    digest: str = ""


def _of_frames(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of clips that became frames, and no video."""
    cases = report.get("cases", {}).items()
    return {name: entry for name, entry in cases if f"{_VIEWS[0]}/" in entry.get("files", ())}


def _refuse_other_frames(clip: _Clip, before: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder that holds frames of another source, whose numbers may be the same."""
    for name, entry in _of_frames(before).items():
        if name != clip.name:
            raise OutputError(
                f"{clip.name}: frames of {name} are there already; choose another output folder"
            )
        # Reports of earlier releases do not tell.
        if entry.get("input_digest", clip.digest) != clip.digest:
            raise OutputError(
                f"{clip.name}: is there already, made of other frames; choose another output folder or set overwrite "
                "to true"
            )


class _Frame(NamedTuple):
    """What was made of an item, how long it took, and what the inferer says of it."""

    item: Mapping[str, Any]
    pair: Tensor
    views: Sequence[Tensor]
    seconds: float
    facts: Mapping[str, Any]

    @property
    def encoding(self) -> ImageEncoding:
        assert isinstance(self.pair, MetaTensor)
        return ImageEncoding.from_meta(self.pair.meta).magnified(
            self.views[0].shape[-1] / self.pair.shape[-1]
        )


class _Writer(Protocol):
    """Where enlarged frames go."""

    def has(self, case: str) -> bool: ...

    def write(self, frame: _Frame) -> None: ...


class _Pairs:
    """Two folders of PNG files; of what an earlier run has left there nothing stays, if this one replaces it."""

    def __init__(self, folder: Path, *, replaces: bool) -> None:
        self.folders, self.replaces = [folder / view for view in _VIEWS], replaces
        for one in self.folders:
            probe_folder(one)

    def has(self, case: str) -> bool:
        return all(path.exists() for path in self._paths(case))

    def write(self, frame: _Frame) -> None:
        paths = self._paths(frame.item["case"])
        if self.replaces:
            # Not before there is a frame, and all of them, because the earlier ones may be of another clip.
            for path in [path for folder in self.folders for path in folder.glob("*.png")]:
                path.unlink()
            self.replaces = False
        try:
            for path, view in zip(paths, frame.views, strict=True):
                write_image(path, view.numpy(), frame.encoding)
        except BaseException:
            for path in paths:
                path.unlink(missing_ok=True)
            raise

    def _paths(self, case: str) -> list[Path]:
        return [folder / f"{case}.png" for folder in self.folders]


class _SideBySide:
    """A video of both views."""

    def __init__(self, video: VideoWriter) -> None:
        self.video = video

    def has(self, case: str) -> bool:
        return False

    def write(self, frame: _Frame) -> None:
        self.video.add(np.concatenate([view.numpy() for view in frame.views], 2), frame.item["ticks"])


class _Behind(AbstractContextManager["_Behind"]):
    """Writes each frame on a thread of its own, while the next one is computed.

    ``monai.data.ThreadBuffer`` was considered: an error on its thread looks like the end of the data.
    """

    def __init__(self, writer: _Writer, tally: _Tally) -> None:
        self.writer, self.tally = writer, tally
        self._thread = ThreadPoolExecutor(1)
        self._last: tuple[_Frame, Future[None]] | None = None

    def write(self, case: str, compute: Callable[[], _Frame]) -> None:
        """Compute a frame, and start to write it once the one before is there."""
        error: Exception | None = None
        try:
            frame = compute()
        except Exception as found:
            error = found
        # Frames are told of in their order.
        self.settle()
        if error is not None:
            self.tally.failed(case, error)
        else:
            self._last = frame, self._thread.submit(self.writer.write, frame)

    def settle(self) -> None:
        """Wait for the frame that is being written, and tell how that ended."""
        if self._last is None:
            return
        frame, written = self._last
        error = written.exception()
        self._last = None
        if error is not None:
            self.tally.failed(frame.item["case"], error)
        else:
            self.tally.add(frame)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # The error that led here is the one to be told.
        told = contextlib.nullcontext() if kind is None else contextlib.suppress(Exception)
        with self._thread, told:
            self.settle()


class _Tally(AbstractContextManager["_Tally"]):
    """Counts frames, and keeps what the report says of all of them up to date, also where an error ends the run."""

    def __init__(self, entry: dict[str, Any], *, whole: bool) -> None:
        self.entry, self.whole = entry, whole
        self.done = self.kept = 0
        self.failures: dict[str, str] = {}
        self.lowest: dict[str, float] = {}
        self.network_seconds = 0.0
        self.since = time.monotonic()

    @property
    def first_reason(self) -> str:
        return next(iter(self.failures.values()), "there is none")

    def add(self, frame: _Frame) -> None:
        source, pair, views, facts = frame.item["image"], frame.pair, frame.views, frame.facts
        self.done += 1
        self.network_seconds += frame.seconds
        self.entry.update({key: facts[key] for key in _FACTS if key in facts})
        self.entry.setdefault("input_size", list(source.shape[1:]))
        self.entry.setdefault("output_size", list(views[0].shape[1:]))
        for key in _LOWEST:
            if facts.get(key) is not None:
                self.lowest[key] = min(facts[key], self.lowest.get(key, facts[key]))
        notes = str(pair.meta.get("notes", "")).splitlines() if isinstance(pair, MetaTensor) else []
        known = self.entry["warnings"]
        known += [line for line in dict.fromkeys([*notes, *facts.get("warnings", [])]) if line not in known]

    def failed(self, case: str, error: BaseException) -> None:
        """Name the frame that an error is about; raise it where all are wanted, or the next would do no better."""
        if self.whole or isinstance(error, (OutputError, SettingError)):
            raise error
        reason = self.failures[case] = one_line(error)
        _log.error("%s", named(case, reason))

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        seconds = time.monotonic() - self.since
        self.entry.update(
            frames=self.done,
            frames_kept=self.kept,
            frames_failed=self.failures,
            seconds=round(seconds, 1),
            frames_per_second=_per_second(self.done, seconds),
            frames_per_second_network=_per_second(self.done, self.network_seconds),
            **{f"lowest_{key}": value for key, value in self.lowest.items()},
        )
        if kind is not None:
            return
        self.entry["status"] = "incomplete" if self.failures else "done"
        self.entry.pop("reason")
        if self.failures:
            count = len(self.failures)
            self.entry["reason"] = f"{count} frames left out, the first because of: {self.first_reason}"


def _folder(path: Path, split: SplitFramed, rate: Fraction | None) -> _Clip:
    items = sorted(find_stereo_cases(path), key=lambda item: _by_numbers(item["case"]))
    paired = any("image_right" in item or "error" in item for item in items)
    transforms: list[Callable[..., Any]] = [LoadImageFiled("image"), split]
    if paired:
        transforms = [LoadImageFiled(("image", "image_right")), JoinViewsd(channels=None)]
        for item in items:
            if "image_right" not in item:
                item.setdefault("error", f"{item['case']}: there is no second view")
    frames = CaseDataset(items, Compose(transforms))

    def every() -> Iterator[dict[str, Any]]:
        return ({**frames[index], "ticks": index} for index in range(len(items)))

    files = [item[key] for item in items for key in ("image", "image_right") if key in item]
    return _Clip(
        path.resolve().name,
        every,
        count=len(items),
        rate=rate,
        tick=None if rate is None else 1 / rate,
        digest=input_digest({f"{number:09d}": file for number, file in enumerate(files)}),
    )


def _file_frames(path: Path, split: SplitFramed) -> Iterator[dict[str, Any]]:
    meta = {"filename_or_obj": path.name, **ImageEncoding("PNG", 8, 3).to_meta()}
    for number, frame in enumerate(read_frames(path), 1):
        image = MetaTensor(torch.from_numpy(frame.values), meta=dict(meta))
        yield {"case": f"frame_{number:06d}", "ticks": frame.ticks, "image": split({"image": image})["image"]}


def _by_numbers(name: str) -> list[Any]:
    """Sorts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.casefold())]


def _rate(given: float | str | None) -> Fraction | None:
    if given is None:
        return None
    try:
        rate = Fraction(str(given))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise SettingError(f"frame_rate must be a positive number or fraction, got '{given}'")
    return rate


def _per_second(frames: int, seconds: float) -> float | None:
    """Rounded to three digits: on a processor a frame may take minutes."""
    return float(f"{frames / seconds:.3g}") if frames and seconds > 0 else None
