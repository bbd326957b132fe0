"""Video files, frame by frame: read in order with their times, written whole or not at all.

PyAV, which brings FFmpeg, comes with ``pip install 'medsr[video]'``; it is imported on use. Frames pass one at a time,
so that the length of a video does not matter for the memory. Sound, subtitles and tags are left out: they may hold
patient data.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medsr.errors import DataError, MissingExtraError, OutputError
from medsr.io.writing import atomic_path

__all__ = ["VIDEO_FORMATS", "VideoFrame", "VideoHeader", "VideoWriter", "is_video", "read_frames"]
__all__ += ["read_video_header", "write_video"]

_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".mxf", ".h264", ".h265"),
)

_CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    ".mkv": ("ffv1", "bgr0", {"level": "3", "slicecrc": "1"}),
    ".mp4": ("libx264", "yuv420p", {"crf": "12"}),
}
"""Encoder, pixel format and options by the ending of the file."""

VIDEO_FORMATS = tuple(suffix[1:] for suffix in _CODECS)

_BT709, _LIMITED = 1, 1
"""Matrix, primaries and transfer of HD video, and levels from 16 to 235, by their numbers in FFmpeg."""

_EXACT = 4 | 1 << 13 | 1 << 18
"""Bicubic chroma, interpolated at every pixel, and rounded: by default FFmpeg's colours are a level too dark."""

_MISSING_FRAMES = 3
"""Frames that a video may be shorter than it says: containers round, and count the time of the last frame or not."""

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video before its frames are decoded.

    Args:
        path: the file.
        size: rows and columns.
        rate: frames per second.
        tick: seconds that the unit of the frames' times is long.
        length: seconds from the first frame to the end of the last one; None if the file does not say.
        notes: warnings for the run report; they hold no patient data.

    Example:
        >>> VideoHeader(Path("a.mp4"), (480, 1280), Fraction(25), Fraction(1, 25), Fraction(2)).frames
        50
    """

    path: Path
    size: tuple[int, int]
    rate: Fraction
    tick: Fraction
    length: Fraction | None = None
    notes: tuple[str, ...] = ()

    @property
    def frames(self) -> int | None:
        """Number of frames that the length lets expect."""
        return None if self.length is None else round(self.length * self.rate)


class VideoFrame(NamedTuple):
    """A decoded frame.

    Args:
        ticks: time since the first frame, in ticks of the video.
        values: red, green and blue, ``(3, H, W)`` float32 in [0, 1].

    Example:
        >>> VideoFrame(40, np.zeros((3, 4, 5), np.float32)).values.shape
        (3, 4, 5)
    """

    ticks: int
    values: npt.NDArray[np.float32]


def is_video(path: PathLike) -> bool:
    """Whether a path ends like the name of a video file.

    Example:
        >>> is_video("clip.MP4"), is_video("frames")
        (True, False)
    """
    return Path(path).suffix.lower() in _SUFFIXES


def read_video_header(path: PathLike) -> VideoHeader:
    """Read what a video file says about its first video track.

    Args:
        path: any file that FFmpeg reads.

    Raises:
        MissingExtraError: if PyAV is not installed.
        DataError: if the file is missing, damaged, no video, or has no frame rate.

    Example:
        >>> read_video_header("none.mp4")
        Traceback (most recent call last):
        medsr.errors.DataError: none.mp4: no such file
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        rate = stream.guessed_rate or stream.average_rate
        if not rate or not stream.width or not stream.height or not stream.format:
            raise DataError(
                f"{path.name}: the video tells no size, colours or frame rate; copy or convert it again"
            )
        length = None
        if stream.duration:
            length = stream.duration * stream.time_base
        elif container.duration and len(container.streams) == 1:
            length = Fraction(container.duration, 1_000_000)
        bits = max(one.bits for one in stream.format.components)
        notes = [f"the video has {bits} bits per colour; its frames were read with 8"] if bits > 8 else []
        shape = stream.sample_aspect_ratio
        if shape and shape != 1:
            notes.append(f"the pixels are {shape} times as wide as high; a result does not say so")
        return VideoHeader(
            path=path,
            size=(int(stream.height), int(stream.width)),
            rate=Fraction(rate),
            tick=Fraction(stream.time_base),
            length=length,
            notes=tuple(notes),
        )


def read_frames(path: PathLike) -> Iterator[VideoFrame]:
    """Decode the first video track of a file, in the order of display, one frame at a time.

    OpenCV's ``VideoCapture`` was considered: it tells the end of a video from a damaged frame by nothing, and no exact
    times; MONAI's ``VideoFileDataset`` reads through it. Colours become RGB by the matrix that the file names; where it
    names none, by FFmpeg's default. FFmpeg may conceal damage inside a frame, or read it as another picture: the
    coding of most codecs has no checksum.

    Args:
        path: any file that FFmpeg reads.

    Raises:
        MissingExtraError: if PyAV is not installed.
        DataError: if the file cannot be read, a frame is damaged, of another size or to be turned, or the video ends
            early.

    Example:
        >>> next(read_frames("none.mp4"))
        Traceback (most recent call last):
        medsr.errors.DataError: none.mp4: no such file
    """
    header = read_video_header(path)
    name, length = header.path.name, 1 / (header.rate * header.tick)
    first, number, ticks = 0, 0, 0
    with _opened(header.path) as (container, stream):
        # Without this, most damage is painted over.
        stream.codec_context.options = {"err_detect": "explode"}
        for number, frame in enumerate(container.decode(stream), 1):
            if frame.is_corrupt:
                raise DataError(f"{name}: frame {number} is damaged; copy the file again or cut it before")
            if (frame.height, frame.width) != header.size:
                raise DataError(
                    f"{name}: frame {number} has another size than the first; cut the video there"
                )
            if frame.rotation:
                raise DataError(
                    f"{name}: the video is to be shown turned by {frame.rotation} degrees; turn its frames first"
                )
            # Raw streams have no times: all frames are as long then.
            ticks = round((number - 1) * length) if frame.pts is None else frame.pts
            first = ticks if number == 1 else first
            exact = frame.reformat(format="rgb24", interpolation=_EXACT)
            levels = np.moveaxis(exact.to_ndarray(), -1, 0)
            yield VideoFrame(ticks - first, np.divide(levels, np.float32(255), dtype=np.float32, order="C"))
    if not number:
        raise DataError(f"{name}: there is no frame in this video")
    end = (ticks - first) * header.tick + 1 / header.rate
    if header.length is not None and end + _MISSING_FRAMES / header.rate < header.length:
        raise DataError(
            f"{name}: truncated, it ends after {float(end):.2f} of {float(header.length):.2f} s; copy it again"
        )


class VideoWriter:
    """Adds frames to a video file; made by :func:`write_video`.

    Args:
        path: the unfinished file.
        name: what to call it in a message.
        rate: frames per second.
        tick: seconds that the unit of the frames' times is long.

    Example:
        >>> VideoWriter(Path("a.mkv"), name="a.mkv", rate=Fraction(25), tick=Fraction(1, 25)).frames
        0
    """

    def __init__(self, path: Path, *, name: str, rate: Fraction, tick: Fraction) -> None:
        self.path, self.name, self.rate, self.tick = path, name, rate, tick
        self.frames = 0
        self._size: tuple[int, ...] = ()
        self._container: Any = None
        self._stream: Any = None

    def add(self, values: npt.ArrayLike, ticks: int) -> None:
        """Add a frame; values are clipped to [0, 1] and rounded to 8 bits.

        Args:
            values: grey or red, green and blue, ``(1 or 3, H, W)``.
            ticks: its time, later than that of the frame before.

        Raises:
            DataError: if it has another size than the first frame.
            OutputError: if a value is not finite, or the format cannot hold the frame.
        """
        image = np.asarray(values, dtype=np.float32)
        if self._size and image.shape[1:] != self._size:
            sizes = [" x ".join(map(str, size)) for size in (image.shape[1:], self._size)]
            raise DataError(f"{self.name}: a frame of {sizes[0]} does not fit into a video of {sizes[1]}")
        if not np.isfinite(image).all():
            raise OutputError(f"{self.name}: a frame has values that are NaN or infinite; nothing was saved")
        levels = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
        pixels = np.ascontiguousarray(np.moveaxis(np.broadcast_to(levels, (3, *levels.shape[1:])), 0, -1))
        av = _package()
        with self._one_line_faults():
            if not self._size:
                self._open(image.shape[1:])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if self._stream.pix_fmt.startswith("yuv"):
                frame = frame.reformat(
                    format=self._stream.pix_fmt, dst_colorspace=_BT709, dst_color_range=_LIMITED
                )
            frame.pts, frame.time_base = int(ticks), self.tick
            self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def finish(self) -> None:
        """Write what the encoder still holds, close the file, and count its frames."""
        if not self.frames:
            raise OutputError(f"{self.name}: there is no frame to write; nothing was saved")
        with self._one_line_faults():
            self._container.mux(self._stream.encode())
            self._container.close()
            with _package().open(str(self.path)) as container:
                found = sum(packet.size > 0 for packet in container.demux(video=0))
        if found != self.frames:
            raise OutputError(f"{self.name}: {found} of {self.frames} frames were written; nothing was saved")

    def abandon(self) -> None:
        """Close the file as it is."""
        # The error that led here is the one to be told.
        with contextlib.suppress(Exception):
            self._container.close()

    def _open(self, size: tuple[int, ...]) -> None:
        suffix = self.path.suffix.lower()
        codec, pixels, options = _CODECS[suffix]
        if "420" in pixels and (size[0] % 2 or size[1] % 2):
            raise OutputError(
                f"{self.name}: {suffix[1:]} holds even numbers of rows and columns, not {size[0]} x {size[1]}; "
                "write mkv instead"
            )
        self._container = _package().open(str(self.path), "w")
        self._stream = self._container.add_stream(codec, rate=self.rate, options=options)
        self._stream.height, self._stream.width = (int(n) for n in size)
        context = self._stream.codec_context
        self._stream.pix_fmt, context.time_base = pixels, self.tick
        if pixels.startswith("yuv"):
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
        self._size = size

    @contextmanager
    def _one_line_faults(self) -> Iterator[None]:
        try:
            yield
        except _package().FFmpegError as error:
            raise OutputError(
                f"{self.name}: cannot be written ({error.strerror or type(error).__name__}); nothing was saved"
            ) from None


@contextmanager
def write_video(path: PathLike, *, rate: Fraction, tick: Fraction) -> Iterator[VideoWriter]:
    """Write a video, which takes its name only if the block ends without an exception.

    ``.mkv`` (FFV1) keeps every pixel, ``.mp4`` (H.264, BT.709) is smaller, plays everywhere, and is not exact.
    ``monai.handlers`` and ``monai.data`` have no writer of videos.

    Args:
        path: target ending in ``.mkv`` or ``.mp4``; an existing file is replaced whole.
        rate: frames per second.
        tick: seconds that the unit of the frames' times is long.

    Raises:
        MissingExtraError: if PyAV is not installed.
        OutputError: if the name ends otherwise, no frame was added, or the file cannot be written whole.

    Example:
        >>> with write_video("a.gif", rate=Fraction(25), tick=Fraction(1, 25)) as video:
        ...     pass
        Traceback (most recent call last):
        medsr.errors.OutputError: a.gif: a video is written as .mkv or .mp4
    """
    final = Path(path)
    if final.suffix.lower() not in _CODECS:
        raise OutputError(f"{final.name}: a video is written as {' or '.join(_CODECS)}")
    _package()
    with atomic_path(final) as temporary:
        writer = VideoWriter(temporary, name=final.name, rate=rate, tick=tick)
        try:
            yield writer
            writer.finish()
        finally:
            writer.abandon()


def _package() -> Any:
    try:
        return import_module("av")
    except ImportError:
        raise MissingExtraError(
            "videos need av, which is not installed; install it with: pip install 'medsr[video]'"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video track; what FFmpeg says of them as one line."""
    if not path.is_file():
        raise DataError(f"{path.name}: no such file")
    av = _package()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path.name}: there is no video in this file")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise DataError(
            f"{path.name}: damaged, or no video ({error.strerror or type(error).__name__}); copy or convert it again"
        ) from None
