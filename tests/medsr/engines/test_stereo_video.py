from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr.engines import stereo_video as module
from medsr.engines.stereo_video import StereoVideo
from medsr.errors import DataError, MedsrError, OutputError, SettingError
from medsr.io.video import VideoWriter, read_frames, read_video_header, write_video
from medsr.transforms.bicubic import bicubic_resize
from PIL import Image
from torch import Tensor, nn

SIZE = (32, 96)
RATE = Fraction(30000, 1001)


class Bicubic(nn.Module):
    scale, in_channels, size_multiple, exact_halo, half_precision_safe = 2, 6, 1, 2, False

    def forward(self, image: Tensor) -> Tensor:
        return bicubic_resize(image, tuple(2 * n for n in image.shape[-2:]))


def frame(number: int, *, side: str = "left", row: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """One of a series of smooth textures, ``(H, W, 3)`` of 8 bits, seen from either side."""
    texture = torch.from_numpy(np.random.default_rng(number).random((3, size[0] // 4, size[1] // 4))).float()
    smooth = np.asarray(bicubic_resize(texture, size)).clip(0, 1)
    moved = np.roll(smooth, (-row, -5) if side == "right" else (0, 0), (1, 2))
    return np.uint8(255 * moved.transpose(1, 2, 0))


def joint(number: int, *, axis: int = 1, **changes: Any) -> np.ndarray:
    return np.concatenate([frame(number, side=side, **changes) for side in ("left", "right")], axis)


def save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def folder(path: Path, count: int = 3, **changes: Any) -> Path:
    for number in range(count):
        for side in ("left", "right"):
            save(frame(number, side=side, **changes), path / side / f"{number}.png")
    return path


def film(path: Path, count: int = 4, **changes: Any) -> Path:
    with write_video(path, rate=RATE, tick=1 / RATE) as video:
        for number in range(count):
            video.add(joint(number, **changes).transpose(2, 0, 1) / np.float32(255), number)
    return path


def expected(image: np.ndarray) -> np.ndarray:
    enlarged = bicubic_resize(
        torch.from_numpy(image).permute(2, 0, 1) / 255, tuple(2 * n for n in image.shape[:2])
    )
    return np.asarray(enlarged.clamp(0, 1) * 255).round().transpose(1, 2, 0)


def close(found: np.ndarray, image: np.ndarray) -> bool:
    return bool(np.abs(found.astype(float) - expected(image)).max() <= 1)


def run(source: Path, out: Path, **settings: Any) -> StereoVideo:
    video = StereoVideo(source, Bicubic(), out, **{"progress": False, **settings})
    video.run()
    return video


def pngs(out: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(out).as_posix(): np.asarray(Image.open(path)) for path in sorted(out.rglob("*.png"))
    }


def entry(out: Path) -> dict[str, Any]:
    (case,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["cases"].values()
    return case


def files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


# --- Sources and results ------------------------------------------------------------------------------------------


def test_a_folder_of_pairs_becomes_one(tmp_path):
    run(folder(tmp_path / "in"), tmp_path / "out").finish()
    found = pngs(tmp_path / "out")
    assert list(found) == [f"{side}/{number}.png" for side in ("left", "right") for number in range(3)]
    for name, image in found.items():
        side, _, number = name.partition("/")
        assert close(image, frame(int(number[0]), side=side))
    case = entry(tmp_path / "out")
    assert (case["status"], case["frames"], case["files"]) == ("done", 3, ["left/", "right/"])
    assert (case["input_size"], case["output_size"]) == ([32, 96], [64, 192])
    assert case["disparity_px"] == 5
    assert case["row_residual_px"] < 0.5
    assert case["lowest_data_consistency_right_db"] > 30
    assert 0 < case["frames_per_second"] <= case["frames_per_second_network"]
    assert "reason" not in case
    # The result is a folder of frames again.
    run(tmp_path / "out", tmp_path / "again").finish()
    assert entry(tmp_path / "again")["output_size"] == [128, 384]


@pytest.mark.parametrize("right_first", [False, True])
@pytest.mark.parametrize(("layout", "axis"), [("side_by_side", 1), ("top_bottom", 0)])
def test_frames_that_hold_both_views_are_cut(tmp_path, layout, axis, right_first):
    save(joint(0, axis=axis), tmp_path / "in" / "a.png")
    run(tmp_path / "in", tmp_path / "out", layout=layout, right_first=right_first).finish()
    found = pngs(tmp_path / "out")
    first, second = ("right", "left") if right_first else ("left", "right")
    assert close(found[f"{first}/a.png"], frame(0))
    assert close(found[f"{second}/a.png"], frame(0, side="right"))


def test_a_video_becomes_a_video_with_the_same_rate_and_order(tmp_path):
    run(film(tmp_path / "clip.mkv"), tmp_path / "out").finish()
    assert files(tmp_path / "out") == {"clip_superres.mkv", "report.json"}
    header = read_video_header(tmp_path / "out" / "clip_superres.mkv")
    assert (header.rate, header.size, header.frames) == (RATE, (64, 384), 4)
    ticks = []
    for number, one in enumerate(read_frames(header.path)):
        left, right = np.split(255 * one.values.transpose(1, 2, 0), 2, 1)
        assert close(left, frame(number))
        assert close(right, frame(number, side="right"))
        ticks.append(one.ticks)
    assert ticks == [one.ticks for one in read_frames(tmp_path / "clip.mkv")]
    case = entry(tmp_path / "out")
    assert (case["files"], case["frames"], case["frame_rate"]) == (["clip_superres.mkv"], 4, 29.97)


def test_a_video_becomes_pairs_of_images(tmp_path):
    run(film(tmp_path / "clip.mkv", 2), tmp_path / "out", result="png").finish()
    found = pngs(tmp_path / "out")
    assert list(found) == [
        f"{side}/frame_{number:06d}.png" for side in ("left", "right") for number in (1, 2)
    ]
    assert close(found["right/frame_000002.png"], frame(1, side="right"))


def test_a_folder_becomes_a_video_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 2, 1):
        save(joint(number), tmp_path / "in" / f"f{number}.png")
    run(tmp_path / "in", tmp_path / "out", result="mkv", frame_rate="30000/1001").finish()
    header = read_video_header(tmp_path / "out" / "in_superres.mkv")
    assert header.rate == RATE
    for number, one in zip((1, 2, 10), read_frames(header.path), strict=True):
        assert close(np.split(255 * one.values.transpose(1, 2, 0), 2, 1)[0], frame(number))


def test_one_shift_holds_for_all_frames(tmp_path):
    # The first frame is black: it tells nothing.
    source = folder(tmp_path / "in", 4, row=3)
    for side in ("left", "right"):
        save(np.zeros((*SIZE, 3), np.uint8), source / side / "0.png")
    run(source, tmp_path / "out", rows="estimate").finish()
    case = entry(tmp_path / "out")
    # Rolled up by three, the right view has everything three rows higher.
    assert (case["row_offset_px"], case["output_size"]) == (-3, [58, 192])
    assert case["input_size"] == list(SIZE)
    assert case["row_residual_px"] < 0.5
    found = pngs(tmp_path / "out")
    assert {image.shape for image in found.values()} == {(58, 192, 3)}
    inner = np.abs(found["left/1.png"].astype(int) - expected(frame(1))[6:])[8:-8]
    assert inner.max() <= 1
    run(source, tmp_path / "as_it_is").finish()
    (warning,) = entry(tmp_path / "as_it_is")["warnings"]
    assert warning.startswith("rows of the views differ by 3.0 px")


def test_grey_frames_stay_grey_with_all_their_bits(tmp_path):
    for side in ("left", "right"):
        save(np.uint16(frame(0, side=side)[:, :, 0]) * 257, tmp_path / "in" / side / "a.png")
    run(tmp_path / "in", tmp_path / "out").finish()
    with Image.open(tmp_path / "out" / "left" / "a.png") as image:
        assert image.mode == "I;16"
    assert "grey image" in entry(tmp_path / "out")["warnings"][0]
    run(tmp_path / "in", tmp_path / "film", result="mkv", frame_rate=25).finish()


# --- Writing beside the network -----------------------------------------------------------------------------------


class Watched(Bicubic):
    """Says when it starts, and fails at one frame if told."""

    def __init__(self, *, fails_at: int | None = None, fault: type[BaseException] = ValueError) -> None:
        super().__init__()
        self.started = [threading.Event() for _ in range(9)]
        self.count, self.fails_at, self.fault = 0, fails_at, fault

    def forward(self, image: Tensor) -> Tensor:
        self.started[self.count].set()
        self.count += 1
        if self.count - 1 == self.fails_at:
            raise self.fault
        return super().forward(image)


def watch_writing(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> list[int]:
    """Numbers of the frames that have been written to a video; ``before`` is called before each."""
    written: list[int] = []
    add = VideoWriter.add

    def watched(self: VideoWriter, values: Any, ticks: int) -> None:
        before(self.frames)
        add(self, values, ticks)
        written.append(self.frames - 1)

    monkeypatch.setattr(VideoWriter, "add", watched)
    return written


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_a_frame_is_written_while_the_next_is_computed_and_no_more_wait(tmp_path, monkeypatch):
    count, read, waiting = 7, [], []
    source, network = film(tmp_path / "clip.mkv", count), Watched()

    def after_the_next_has_started(number: int) -> None:
        assert network.started[min(number + 1, count - 1)].wait(30)

    written = watch_writing(monkeypatch, after_the_next_has_started)

    def watched(path: Path) -> Iterator[Any]:
        for one in read_frames(path):
            read.append(one)
            waiting.append(len(read) - module._ENOUGH - len(written))
            yield one

    monkeypatch.setattr(module, "read_frames", watched)
    StereoVideo(source, network, tmp_path / "out", progress=False).run()
    assert written == list(range(count))
    # The frame that is read, and the one before it. Some were read before, for their rows.
    assert max(waiting) == 2


@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("fails_at", [0, 2, 3])
def test_an_error_of_the_writer_ends_the_run_and_leaves_no_half_video(tmp_path, monkeypatch, fails_at):
    def full(number: int) -> None:
        if number == fails_at:
            raise OutputError("clip_superres.mkv: cannot be written (No space left on device)")

    source, network = film(tmp_path / "clip.mkv"), Watched()
    written = watch_writing(monkeypatch, full)
    with pytest.raises(OutputError, match=r"^clip_superres\.mkv: .*No space left on device\)$"):
        StereoVideo(source, network, tmp_path / "out", progress=False).run()
    assert files(tmp_path / "out") == {"report.json"}
    assert written == list(range(fails_at))
    assert network.count == min(fails_at + 2, 4)
    case = entry(tmp_path / "out")
    assert (case["status"], case["frames"]) == ("unfinished", fails_at)
    assert "No space" in case["reason"]


@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("result", ["mkv", "png"])
def test_an_error_of_the_network_waits_for_the_frame_before_it(tmp_path, fault, result):
    network = Watched(fails_at=2, fault=fault)
    video = StereoVideo(film(tmp_path / "clip.mkv"), network, tmp_path / "out", progress=False, result=result)
    with pytest.raises(fault):
        video.run()
    case = entry(tmp_path / "out")
    assert (case["status"], case["frames"]) == ("unfinished", 2)
    assert files(tmp_path / "out") == {"report.json"} | {
        f"{side}/frame_{number:06d}.png" for side in ("left", "right") for number in (1, 2) if result == "png"
    }


@pytest.mark.skipif(sys.platform == "win32", reason="the signal would end the process there")
@pytest.mark.usefixtures("no_thread_is_left")
def test_ctrl_c_while_the_writer_is_waited_for_ends_the_run(tmp_path, monkeypatch):
    source, network = film(tmp_path / "clip.mkv"), Watched()

    def interrupted(number: int) -> None:
        if number == 1:
            assert network.started[2].wait(30)
            # The network is done with this frame at once.
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    watch_writing(monkeypatch, interrupted)
    # A shell lets its background jobs ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            StereoVideo(source, network, tmp_path / "out", progress=False).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert files(tmp_path / "out") == {"report.json"}
    assert network.count == 3
    assert entry(tmp_path / "out")["reason"] == "clip.mkv: interrupted"


# --- What goes wrong ----------------------------------------------------------------------------------------------


def test_a_bad_frame_of_a_folder_is_named_and_the_others_go_on(tmp_path, caplog):
    source = folder(tmp_path / "in", 5)
    (source / "right" / "1.png").write_bytes(b"no image")
    (source / "left" / "2.png").unlink()
    save(frame(3, size=(32, 92)), source / "left" / "3.png")
    video = run(source, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        video.finish()
    assert stop.value.code == MedsrError.exit_code
    case = entry(tmp_path / "out")
    assert (case["status"], case["frames"]) == ("incomplete", 2)
    assert list(case["frames_failed"]) == ["1", "2", "3"]
    assert case["frames_failed"]["1"].startswith("1.png: not a")
    assert case["frames_failed"]["2"] == "2: there is no left view"
    assert "3 x 32 x 92, the right one 3 x 32 x 96" in case["frames_failed"]["3"]
    assert case["reason"].startswith("3 frames left out, the first because of: 1.png")
    assert set(pngs(tmp_path / "out")) == {f"{side}/{n}.png" for side in ("left", "right") for n in (0, 4)}
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_frame_that_is_left_out_leaves_its_time_in_a_video(tmp_path):
    source = folder(tmp_path / "in", 4)
    # The first is found out when it is written, the second before.
    for side in ("left", "right"):
        save(frame(1, side=side, size=(32, 92)), source / side / "1.png")
    (source / "right" / "2.png").unlink()
    video = run(source, tmp_path / "out", result="mkv", frame_rate=25)
    path = tmp_path / "out" / "in_superres.mkv"
    tick = read_video_header(path).tick
    assert [one.ticks * tick * 25 for one in read_frames(path)] == [0, 3]
    case = video.report.cases["in"]
    assert "64 x 368 does not fit" in case["frames_failed"]["1"]
    assert (case["frames"], list(case["frames_failed"])) == (2, ["1", "2"])


@pytest.mark.parametrize("result", ["mkv", "png"])
def test_a_damaged_video_ends_in_one_line_and_leaves_no_half_video(tmp_path, result):
    path = film(tmp_path / "clip.mkv", 9)
    path.write_bytes(path.read_bytes()[:-40000])
    with pytest.raises(DataError, match=r"^clip\.mkv: truncated, it ends after") as caught:
        run(path, tmp_path / "out", result=result)
    assert "\n" not in str(caught.value)
    case = entry(tmp_path / "out")
    assert (case["status"], case["reason"]) == ("unfinished", str(caught.value))
    # What is there as images is whole.
    assert files(tmp_path / "out") == {"report.json"} | {
        f"{side}/frame_{number:06d}.png"
        for side in ("left", "right")
        for number in range(1, case["frames"] + 1)
        if result == "png"
    }


def test_a_disk_error_ends_the_run_and_leaves_no_half_pair(tmp_path, monkeypatch):
    write = module.write_image

    def failing(path: Path, *arguments: Any) -> None:
        if path.parent.name == "right" and path.stem == "1":
            raise OutputError("1.png: cannot be written (No space left on device)")
        write(path, *arguments)

    monkeypatch.setattr(module, "write_image", failing)
    with pytest.raises(OutputError, match="No space"):
        run(folder(tmp_path / "in"), tmp_path / "out")
    assert files(tmp_path / "out") == {"left/0.png", "right/0.png", "report.json"}


def test_no_usable_frame_is_an_error(tmp_path):
    source = folder(tmp_path / "in", 2)
    for number in range(2):
        (source / "right" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no frame can be used; the first reason: 0\.png"):
        run(source, tmp_path / "out", result="mkv", frame_rate=25)
    assert files(tmp_path / "out") == {"report.json"}


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("", "no input"),
        (["a", "b"], "several inputs"),
        ("none.mp4", "none.mp4: no video"),
        ("a.txt", "a.txt: no video"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, source, fragment):
    (tmp_path / "a.txt").write_text("text")
    given = tmp_path / source if source and isinstance(source, str) else source
    with pytest.raises(DataError, match=fragment):
        run(given, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"result": "avi"}, "result must be one of"),
        ({"layout": "diagonal"}, "layout must be one of"),
        ({"rows": "guess"}, "row_shift must be"),
        ({"rows": 1.5}, "row_shift must be"),
        ({"overwrite": "no"}, "overwrite must be true or false"),
        ({"resume": "no"}, "resume must be true or false"),
        ({"rows": 40}, "leaves nothing of 32"),
        ({"resume": True, "overwrite": True}, "choose one"),
        ({"result": "mkv"}, "set frame_rate"),
        ({"result": "mkv", "frame_rate": 25, "resume": True}, "cannot be resumed"),
        ({"frame_rate": 0}, "frame_rate must be"),
        ({"frame_rate": "fast"}, "frame_rate must be"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, fragment):
    with pytest.raises(SettingError, match=fragment):
        run(folder(tmp_path / "in", 1), tmp_path / "out", **settings)


def test_a_video_has_its_own_rate(tmp_path):
    with pytest.raises(SettingError, match=r"clip\.mkv has its own"):
        run(film(tmp_path / "clip.mkv", 1), tmp_path / "out", frame_rate=25)


# --- Results of an earlier run ------------------------------------------------------------------------------------


def test_results_are_not_replaced_unless_told(tmp_path):
    source, out = folder(tmp_path / "in", 2), tmp_path / "out"
    run(source, out)
    with pytest.raises(OutputError, match=r"left/\d\.png: is there already"):
        run(source, out)
    run(source, out, overwrite=True).finish()
    clip = film(tmp_path / "clip.mkv", 1)
    run(clip, out)
    with pytest.raises(OutputError, match=r"clip_superres\.mkv: is there already"):
        run(clip, out)
    run(clip, out, overwrite=True).finish()


def test_the_source_is_never_replaced(tmp_path):
    source = folder(tmp_path / "in", 1)
    for folder_of_frames in (source, source / "left"):
        with pytest.raises(OutputError, match="holds the frames themselves"):
            run(folder_of_frames, source, overwrite=True)


@pytest.mark.parametrize("is_file", [False, True])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, is_file):
    source = film(tmp_path / "clip.mkv", 4) if is_file else folder(tmp_path / "in", 4)
    out, calls = tmp_path / "out", []

    class Interrupted(Bicubic):
        def forward(self, image: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().forward(image)

    settings = {"progress": False, "result": "png", "record": {"settings": {"scale": 2}}}
    with pytest.raises(KeyboardInterrupt):
        StereoVideo(source, Interrupted(), out, **settings).run()
    assert entry(out)["reason"] == f"{source.name}: interrupted"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(before) == 4
    # One view alone is no result.
    kept, halved = sorted(out.glob("left/*.png"))
    (out / "right" / halved.name).unlink()
    with pytest.raises(OutputError, match="made with scale 2, not 4; choose another output folder"):
        run(source, out, **{**settings, "resume": True, "record": {"settings": {"scale": 4}}})
    run(source, out, **settings, resume=True).finish()
    case = entry(out)
    assert (case["status"], case["frames"], case["frames_kept"]) == ("done", 3, 1)
    assert kept.stat().st_mtime_ns == before[kept]
    run(source, tmp_path / "at_once", **settings)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(pngs(out).values(), pngs(tmp_path / "at_once").values(), strict=True)
    )


def test_frames_of_two_clips_are_never_mixed(tmp_path):
    first, other, out = folder(tmp_path / "first", 3), folder(tmp_path / "other", 2), tmp_path / "out"
    run(first, out)
    with pytest.raises(OutputError, match="other: frames of first are there already"):
        run(other, out, resume=True)
    # Nothing of the longer one stays.
    run(other, out, overwrite=True)
    assert sorted(pngs(out)) == ["left/0.png", "left/1.png", "right/0.png", "right/1.png"]
    save(frame(7), other / "left" / "1.png")
    with pytest.raises(OutputError, match="other: is there already, made of other frames"):
        run(other, out, resume=True)


def test_a_video_in_the_same_folder_is_no_other_clip(tmp_path):
    source, out = folder(tmp_path / "in", 2), tmp_path / "out"
    run(source, out)
    run(film(tmp_path / "clip.mkv", 1), out)
    run(source, out, resume=True).finish()
    cases = json.loads((out / "report.json").read_text(encoding="utf-8"))["cases"]
    assert cases["in"]["frames_kept"] == 2


def test_images_that_no_run_has_made_stay(tmp_path):
    source, out = folder(tmp_path / "in", 1), tmp_path / "out"
    save(frame(5), out / "left" / "mine.png")
    run(source, out, overwrite=True)
    assert sorted(pngs(out)) == ["left/0.png", "left/mine.png", "right/0.png"]


def test_the_progress_bar_tells_the_frames_per_second(tmp_path, capsys):
    run(folder(tmp_path / "in", 2), tmp_path / "out", progress=True)
    assert "frame/s" in capsys.readouterr().err
    run(folder(tmp_path / "in2", 2), tmp_path / "out2", progress=False)
    assert "frame/s" not in capsys.readouterr().err
