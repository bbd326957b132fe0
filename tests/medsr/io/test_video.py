from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from medsr.errors import DataError, MissingExtraError, OutputError
from medsr.io import video as module
from medsr.io.video import VideoWriter, is_video, read_frames, read_video_header, write_video

SIZE = (32, 48)
NTSC = Fraction(30000, 1001)


def frames(count: int = 8, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """Noise of 8 bits: nothing of it can be guessed from another frame."""
    return list(np.random.default_rng(0).integers(0, 256, (count, 3, *size)).astype(np.float32) / 255)


def save(
    path: Path, images: list[np.ndarray], *, rate: Fraction = NTSC, ticks: list[int] | None = None
) -> Path:
    with write_video(path, rate=rate, tick=1 / rate) as video:
        for number, image in enumerate(images):
            video.add(image, number if ticks is None else ticks[number])
    return path


def encode(path: Path, images: list[np.ndarray], codec: str, pixels: str) -> Path:
    """What :func:`write_video` would not write."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=NTSC)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[1:], pixels
        for image in images:
            levels = np.ascontiguousarray(np.moveaxis(np.uint8(255 * image), 0, -1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode())
    return path


# --- There and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [NTSC, Fraction(25)])
def test_mkv_keeps_every_pixel_their_order_and_the_rate(tmp_path, rate):
    images = frames()
    path = save(tmp_path / "a.mkv", images, rate=rate)
    header = read_video_header(path)
    assert (header.size, header.rate, header.frames, header.notes) == (SIZE, rate, 8, ())
    found = list(read_frames(path))
    assert all(np.array_equal(one.values, image) for one, image in zip(found, images, strict=True))
    times = [float(one.ticks * header.tick) for one in found]
    # This container counts in milliseconds.
    assert times == pytest.approx([n / float(rate) for n in range(8)], abs=5e-4)


def test_times_that_are_not_equally_far_apart_stay(tmp_path):
    ticks = [0, 1, 5, 6, 13]
    for suffix in ("mkv", "mp4"):
        path = save(tmp_path / f"a.{suffix}", frames(5), rate=Fraction(25), ticks=ticks)
        tick = read_video_header(path).tick
        assert [one.ticks * tick * 25 for one in read_frames(path)] == ticks


def test_mp4_keeps_the_colours_nearly(tmp_path):
    image = np.empty((3, *SIZE), np.float32)
    image[:, :, :24], image[:, :, 24:] = (
        np.reshape([0.8, 0.1, 0.2], (3, 1, 1)),
        np.reshape([0.1, 0.7, 0.9], (3, 1, 1)),
    )
    path = save(tmp_path / "a.mp4", [image] * 4)
    assert read_video_header(path).rate == NTSC
    found = list(read_frames(path))
    assert len(found) == 4
    # The wrong matrix would be off by ten levels and more; the colours of neighbours are shared.
    away = np.abs(found[0].values - image)[:, :, [*range(20), *range(28, 48)]]
    assert 255 * away.max() < 5


def test_colours_are_read_without_a_bias(tmp_path):
    image = np.repeat(np.random.default_rng(1).uniform(0.2, 0.8, (3, 16, 24)), 2, 1).repeat(2, 2)
    path = encode(tmp_path / "a.mkv", [image.astype(np.float32)], "ffv1", "yuv420p")
    with av.open(str(path)) as container:
        (frame,) = container.decode(video=0)
    luma, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width].astype(float)
        for plane in frame.planes
    )
    blue, red = (np.repeat(np.repeat(plane - 128, 2, 0), 2, 1) * 255 / 224 for plane in (blue, red))
    grey = (luma - 16) * 255 / 219
    # BT.601, which a file of no name is taken to have.
    exact = [grey + 1.402 * red, grey - 0.344136 * blue - 0.714136 * red, grey + 1.772 * blue]
    (found,) = read_frames(path)
    bias = (255 * found.values - np.stack(exact)).mean((1, 2))
    assert np.abs(bias).max() < 0.3


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = frames(2)[0][:1]
    (found,) = read_frames(save(tmp_path / "a.mkv", [grey]))
    assert np.array_equal(found.values, grey.repeat(3, 0))


def test_values_are_clipped_and_rounded(tmp_path):
    image = np.full((3, *SIZE), 100.4 / 255, np.float32)
    image[0], image[1] = -1, 2
    (found,) = read_frames(save(tmp_path / "a.mkv", [image]))
    assert (255 * found.values).round().max((1, 2)).tolist() == [0, 255, 100]


def test_frames_come_one_by_one(tmp_path):
    path = save(tmp_path / "a.mkv", frames())
    path.write_bytes(path.read_bytes()[:-12000])
    reader = read_frames(path)
    # The damage at the end is not met yet.
    assert next(reader).ticks == 0
    reader.close()


def test_a_raw_stream_without_times_gets_equal_ones(tmp_path):
    path = encode(tmp_path / "a.h264", frames(4), "libx264", "yuv420p")
    tick, rate = read_video_header(path).tick, read_video_header(path).rate
    times = [one.ticks * tick for one in read_frames(path)]
    assert times == pytest.approx([n / rate for n in range(4)], abs=float(tick))


def test_more_than_eight_bits_are_told(tmp_path):
    path = encode(tmp_path / "a.mkv", frames(2), "ffv1", "yuv420p10le")
    assert "10 bits" in read_video_header(path).notes[0]


def test_a_video_that_is_to_be_shown_turned_is_refused(tmp_path):
    path = save(tmp_path / "a.mp4", frames(2))
    content = path.read_bytes()
    upright, turned = (
        struct.pack(">9i", a, b, 0, -b, a, 0, 0, 0, 1 << 30) for a, b in ((1 << 16, 0), (0, 1 << 16))
    )
    track = content.index(b"tkhd")
    assert upright in content[track:]
    path.write_bytes(content[:track] + content[track:].replace(upright, turned, 1))
    with pytest.raises(DataError, match=r"a\.mp4: the video is to be shown turned by -90 degrees"):
        next(read_frames(path))


def test_pixels_that_are_not_square_are_told(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        for frame in (av.VideoFrame(SIZE[1], SIZE[0], "yuv420p"), None):
            container.mux(stream.encode(frame))
    assert read_video_header(path).notes == (
        "the pixels are 2 times as wide as high; a result does not say so",
    )


@pytest.mark.parametrize(
    ("name", "expected"), [("a.MOV", True), ("a.h264", True), ("a.png", False), ("mp4", False)]
)
def test_what_counts_as_a_video(name, expected):
    assert is_video(name) == expected


# --- What cannot be read ------------------------------------------------------------------------------------------


def test_a_truncated_video_gives_its_frames_and_then_says_so(tmp_path):
    path = save(tmp_path / "a.mkv", frames())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 4 // 10])
    found, reader = [], read_frames(path)
    with pytest.raises(DataError, match=r"a\.mkv: truncated, it ends after 0\.\d\d of 0\.27 s"):
        found.extend(one.values for one in reader)
    assert 1 < len(found) < 5
    assert all(np.array_equal(one, image) for one, image in zip(found, frames(), strict=False))


def test_a_video_cut_before_its_first_frame_is_no_crash(tmp_path):
    path = encode(tmp_path / "a.mkv", frames(), "libx264", "yuv420p")
    content = path.read_bytes()
    # Where the header ends and no frame is whole, FFmpeg knows no pixel format.
    for end in range(400, len(content) // 2, 97):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"^a\.mkv: "):
            list(read_frames(path))


def test_damage_inside_a_video_ends_it(tmp_path):
    path = save(tmp_path / "a.mp4", frames())
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    # Longer than a frame: what is inside one alone, FFmpeg may read as something else.
    content[middle : middle + 1500] = b"\xff" * 1500
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^a\.mp4: "):
        list(read_frames(path))


def test_what_is_no_video_is_refused_in_one_line(tmp_path):
    for name, content in (("text.mp4", b"no video"), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"^{name}: damaged, or no video") as caught:
            read_video_header(tmp_path / name)
        assert "\n" not in str(caught.value)
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate, sound.pts = 8000, 0
        container.mux(stream.encode(sound))
    with pytest.raises(DataError, match="there is no video"):
        read_video_header(tmp_path / "sound.mkv")


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    path = save(tmp_path / "a.mkv", frames(1))

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(module, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'medsr\[video\]'"):
        read_video_header(path)
    with pytest.raises(MissingExtraError, match="av"):
        save(tmp_path / "b.mkv", frames(1))


# --- Whole or not at all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3])
def test_an_error_leaves_nothing_and_what_was_there_before(tmp_path, count):
    class Interrupted(list):
        def __iter__(self) -> Iterator[np.ndarray]:
            yield from frames(count)
            raise KeyboardInterrupt

    (tmp_path / "a.mkv").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.mkv", Interrupted())
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]
    assert (tmp_path / "a.mkv").read_text() == "before"


@pytest.mark.parametrize(
    ("name", "images", "kind", "fragment"),
    [
        ("a.mkv", [], OutputError, "no frame to write"),
        ("a.mkv", [np.full((3, *SIZE), np.nan)], OutputError, "NaN or infinite"),
        (
            "a.mkv",
            [np.zeros((3, *SIZE)), np.zeros((3, 32, 50))],
            DataError,
            "32 x 50 does not fit .* 32 x 48",
        ),
        ("a.mp4", [np.zeros((3, 33, 48))], OutputError, "even numbers .* mkv"),
        ("a.gif", [], OutputError, r"as \.mkv or \.mp4"),
        ("none/a.mkv", [np.zeros((3, *SIZE))], OutputError, "no such folder"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, name, images, kind, fragment):
    with pytest.raises(kind, match=fragment):
        save(tmp_path / name, images)
    assert not list(tmp_path.iterdir())


def test_times_must_go_forward(tmp_path):
    with pytest.raises(OutputError, match=r"a\.mkv: cannot be written"):
        save(tmp_path / "a.mkv", frames(3), ticks=[0, 4, 2])
    assert not list(tmp_path.iterdir())


def test_frames_that_do_not_arrive_are_noticed(tmp_path):
    writer = VideoWriter(tmp_path / "a.mkv", name="a.mkv", rate=NTSC, tick=1 / NTSC)
    writer.add(frames(1)[0], 0)
    writer.frames += 1
    with pytest.raises(OutputError, match="1 of 2 frames"):
        writer.finish()
