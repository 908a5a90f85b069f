"""Videos as a few frames: which ones, read without decoding the rest where a file allows.

    file · bytes · folder or list of images ── read_frames ──► Clip: PIL images, RGB, and times

PyAV reads files (`pip install 'visavis[video]'`), Pillow animated GIF, WebP and PNG. Frames are
found by their time stamps: a first pass reads the packets without decoding them, a second decodes
from the key frame before each wanted frame. Where the stamps are missing or lead elsewhere,
everything is decoded; both ways give the same frames. Frames are shown as a player shows them:
turned and mirrored by the display matrix, without those that an edit list hides. Playlists and
other files that name files are refused. Pixels that are not square are left as stored, as LLaVA
does.
"""

from __future__ import annotations

import math
import os
import re
import struct
from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

from PIL import Image as pil

from visavis.errors import ImageError, InputError, VisavisError
from visavis.inputs import Video
from visavis.processing.config import VideoConfig
from visavis.processing.frame_sampling import sample
from visavis.processing.images import MAX_PIXELS, decode_image, image_size
from visavis.processing.media import frame_files, name_of, open_media

MAX_ANIMATION_FRAMES = 20_000
MAX_ANIMATION_PIXELS = 4_000_000_000  # of all frames of an animated image, which must be decoded
MAX_CLIP_PIXELS = 1_000_000_000  # of all frames of one clip together: 3 GB
PICTURES_PER_SECOND = 2  # taken for pictures that carry no times, as LLaVA does for its folders

# FFmpeg's names of what may be read: files that hold their own frames, and nothing that names
# other files or addresses.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,h264,hevc,"
    "ivf,obu,nut,mxf"
)
# Those that say of each frame when it is shown. Others (AVI) say in which order frames are decoded,
# and what FFmpeg concludes from that is wrong after seeking.
_STAMPED = {"mov", "matroska", "mpegts", "flv"}
_ANIMATIONS = {
    "GIF": re.compile(rb"GIF8"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "PNG": re.compile(rb"\x89PNG"),
}
# Display matrices (x', y') = (ax + cy, bx + dy) by the signs of a, b, c, d.
_UPRIGHT = {
    (-1, 0, 0, 1): pil.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): pil.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): pil.Transpose.ROTATE_180,
    (0, 1, 1, 0): pil.Transpose.TRANSPOSE,
    (0, -1, -1, 0): pil.Transpose.TRANSVERSE,
    (0, -1, 1, 0): pil.Transpose.ROTATE_90,
    (0, 1, -1, 0): pil.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Clip:
    """Frames of a video, upright, with the second each is shown at."""

    frames: tuple[pil.Image, ...]
    times: tuple[float, ...]
    duration: float  # seconds, of the whole video


def read_frames(video: Video, config: VideoConfig) -> Clip:
    """Return the frames a model is shown, in order.

    Raises:
        ImageError: the video cannot be read, or its frames are too large.
        InputError: more frames are asked for than the config allows.
    """
    with open_video(video) as reader:
        indices = _sample(reader, config, video)
        times = tuple(reader.times[index] for index in indices)
        return Clip(tuple(reader.read(indices)), times, reader.duration)


@dataclass(frozen=True)
class Survey:
    """The frames that `read_frames` will give, before they are decoded.

    Args:
        indices: their numbers among all frames of the video.
        total: frames of the whole video.
        rate: its frames per second.
        size: width and height of the first one.
    """

    indices: tuple[int, ...]
    total: int
    rate: float
    size: tuple[int, int]

    def times(self, temporal: int) -> tuple[float, ...]:
        """Return when each group of `temporal` frames is shown, in seconds from the start: the mean
        of its first and last frame. A last group that is short repeats the last frame."""
        more = (*self.indices, *self.indices[-1:] * (-len(self.indices) % temporal))
        groups = [more[at : at + temporal] for at in range(0, len(more), temporal)]
        return tuple((one[0] / self.rate + one[-1] / self.rate) / 2 for one in groups)

    def interval(self, temporal: int) -> float:
        """Return the seconds from one group of `temporal` frames to the next, on average."""
        return temporal * self.total / (self.rate * len(self.indices))


def survey(video: Video, config: VideoConfig) -> Survey:
    """Return the frames that `read_frames` will give; only the first one is decoded."""
    with open_video(video) as reader:
        indices = _sample(reader, config, video)
        size = next(reader.read(indices[:1])).size
        return Survey(tuple(indices), len(reader.times), reader.rate, size)


def frame_times(video: Video, config: VideoConfig) -> tuple[tuple[float, ...], float]:
    """Return the seconds of the frames that `read_frames` will give, and of the whole video; none
    is decoded where the file says when they are shown."""
    with open_video(video) as reader:
        indices = _sample(reader, config, video)
        return tuple(reader.times[index] for index in indices), reader.duration


def middle_frame(video: Video) -> pil.Image:
    """Return the frame that stands for a video where one image must; the first is often black.

    Raises:
        ImageError: the video cannot be read.
    """
    with open_video(video) as reader:
        return next(reader.read([len(reader.times) // 2]))


def _sample(reader: VideoReader, config: VideoConfig, video: Video) -> list[int]:
    indices = sample(len(reader.times), reader.rate, config, video.frames)
    check_clip(len(indices), reader.size)
    return indices


def check_clip(count: int, size: tuple[int, int]) -> None:
    width, height = size
    if count * width * height > MAX_CLIP_PIXELS:
        raise ImageError(
            f"{count} frames of {width}×{height} = {count * width * height / 1e6:.0f} megapixels, "
            f"expected at most {MAX_CLIP_PIXELS / 1e6:.0f}; make the video smaller or ask for "
            "fewer frames"
        )


@contextmanager
def open_video(video: Video) -> Iterator[VideoReader]:
    """Yield the reader of a video; any failure while it is open raises ImageError."""
    pictures = frame_files(video.source)
    if pictures:
        yield _Pictures(pictures)
        return
    source = video.source
    assert isinstance(source, (Path, bytes))
    name = name_of(source, "video")
    with open_media(source, "video") as data:
        kind = animation(data)
        with readable(name):
            if kind is None:
                yield _File(data, name)
            else:
                with pil.open(data, formats=(kind,)) as opened:
                    yield _Animation(opened, name)


def animation(data: BinaryIO) -> str | None:
    """Return Pillow's name of the format of an animated image; None for any other file."""
    start = data.read(12)
    data.seek(0)
    return next((kind for kind, magic in _ANIMATIONS.items() if magic.match(start)), None)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Raise all errors of a reader as ImageError."""
    try:
        yield
    except VisavisError:
        raise
    except Exception as error:  # readers raise nearly anything on damaged data
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ImageError(
            f"{name} cannot be read as a video ({reason}); it is damaged or of another kind: "
            "open it in a player and export it as MP4"
        ) from error


class VideoReader(Protocol):
    """The metadata of a video, known before decoding, and a method that decodes frames."""

    times: list[float]  # seconds, when each frame is shown, from 0
    rate: float  # frames per second
    duration: float
    size: tuple[int, int]  # of a stored frame

    def read(self, indices: Sequence[int], side: int | None = None) -> Iterator[pil.Image]:
        """Yield frames, upright; with `side` as squares of that many pixels, as stored."""
        ...

    def key_frames(self) -> Sequence[int]:
        """Return the frames that can be decoded alone; all, where that is not known."""
        ...


class _Pictures:
    """Frames given as images, one after another."""

    def __init__(self, pictures: Sequence[Any]) -> None:
        self.pictures, self.rate = pictures, float(PICTURES_PER_SECOND)
        self.times = [index / self.rate for index in range(len(pictures))]
        self.duration = len(pictures) / self.rate
        self.size = image_size(pictures[0])

    def read(self, indices: Sequence[int], side: int | None = None) -> Iterator[pil.Image]:
        return (_sized(decode_image(self.pictures[index]), side) for index in indices)

    def key_frames(self) -> Sequence[int]:
        return range(len(self.times))


class _Animation:
    """An animated GIF, WebP or PNG."""

    def __init__(self, opened: pil.Image, name: str) -> None:
        _check_size(opened.size, name)
        self.opened, self.size = opened, opened.size
        self.times: list[float] = []
        self.duration = 0.0
        count = getattr(opened, "n_frames", 1)
        total = count * opened.width * opened.height
        if count > MAX_ANIMATION_FRAMES or total > MAX_ANIMATION_PIXELS:
            raise ImageError(
                f"{name} is an animation of {count} frames of {opened.width}×{opened.height} = "
                f"{total / 1e6:.0f} megapixels, expected at most {MAX_ANIMATION_FRAMES} frames and "
                f"{MAX_ANIMATION_PIXELS / 1e6:.0f} megapixels; export it as MP4 or make it smaller"
            )
        for index in range(count):
            opened.seek(index)
            opened.load()  # only now WebP says how long a frame is shown
            self.times.append(self.duration)
            self.duration += (opened.info.get("duration") or 100) / 1000  # 0: as browsers do
        self.rate = len(self.times) / self.duration

    def read(self, indices: Sequence[int], side: int | None = None) -> Iterator[pil.Image]:
        for index in indices:
            self.opened.seek(index)
            yield _sized(decode_image(self.opened).copy(), side)

    def key_frames(self) -> Sequence[int]:
        return range(len(self.times))


@dataclass(frozen=True)
class _Frames:
    """Which frames a video file holds, found without decoding where its time stamps allow.

    Attributes:
        stamps: when each is shown, in steps of `scale` seconds; where there are no usable time
            stamps, their numbers.
        keys: where decoding can start: the time stamp of each key frame, and where to seek for it.
    """

    size: tuple[int, int]
    rate: float
    scale: float
    stamps: list[int]
    keys: list[tuple[int, int]]
    has_stamps: bool
    seekable: bool


_listed: OrderedDict[tuple[int, ...], _Frames] = OrderedDict()  # of the files opened last
_LISTED = 4  # files


def _frames_of(data: BinaryIO, name: str) -> _Frames:
    """Return the frames of a file; an unchanged file is listed once."""
    try:
        status = os.fstat(data.fileno())
    except (OSError, ValueError):  # bytes in memory
        return _list(data, name)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    found = _listed.get(key) or _list(data, name)
    _listed[key] = found
    while len(_listed) > _LISTED:
        _listed.popitem(last=False)
    return found


def _list(data: BinaryIO, name: str) -> _Frames:
    with container(data, name) as (opened, stream):
        packets = [  # not their content
            (packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
            for packet in opened.demux(stream)
            if packet.size
        ]
        size = (stream.codec_context.width, stream.codec_context.height)
        rate = float(stream.average_rate or PICTURES_PER_SECOND)
        scale = float(stream.time_base or 0)
        codec, promised = stream.codec_context.name, stream.frames
        kind = opened.format.name.split(",")[0]
    if kind == "mov" and len(packets) < promised:
        _check_whole(data, name, promised)
    stamps = sorted(pts for pts, _, _, is_discard in packets if pts is not None and not is_discard)
    keys = sorted(
        (pts, pts if dts is None else min(pts, dts))
        for pts, dts, is_key, _ in packets
        if is_key and pts is not None
    )
    seekable = (
        kind in _STAMPED
        and codec != "vp8"  # keeps frames that are never shown in packets of their own
        and _rise(stamps, scale)
        and all(pts is not None for pts, *_ in packets)
        and bool(keys and keys[0][0] <= stamps[0])
    )
    if seekable:
        return _Frames(size, rate, scale, stamps, keys, has_stamps=True, seekable=True)
    with container(data, name) as (opened, stream):
        shown = [frame.pts for frame in opened.decode(stream)]
    if not shown:
        raise ImageError(f"{name} holds no frame that can be decoded; export it again")
    if _rise(shown, scale):
        return _Frames(size, rate, scale, shown, keys, has_stamps=True, seekable=False)
    numbers = list(range(len(shown)))
    return _Frames(size, rate, 1 / rate, numbers, keys, has_stamps=False, seekable=False)


def _check_whole(data: BinaryIO, name: str, promised: int) -> None:
    """Check that the packets which an edit list hides are what is missing, not the end.

    Raises:
        ImageError: the file is truncated.
    """
    with container(data, name, {"ignore_editlist": "1"}) as (opened, stream):
        stored = sum(1 for packet in opened.demux(stream) if packet.size)
    if stored < promised:
        raise ImageError(
            f"{name} holds {stored} of its {promised} frames, the end is missing; "
            "download or export it again"
        )


class _File:
    """A video file that PyAV reads. Its frames are known by the time stamps of their packets or,
    where these are of no use, by decoding all once and counting."""

    def __init__(self, data: BinaryIO, name: str) -> None:
        self.data, self.name = data, name
        self.frames = frames = _frames_of(data, name)
        self.size, self.rate = frames.size, frames.rate
        self.times = [(stamp - frames.stamps[0]) * frames.scale for stamp in frames.stamps]
        self.duration = (frames.stamps[-1] - frames.stamps[0]) * frames.scale + 1 / self.rate

    def key_frames(self) -> Sequence[int]:
        if not self.frames.seekable:
            return range(len(self.times))
        keys = {stamp for stamp, _ in self.frames.keys}
        return [index for index, stamp in enumerate(self.frames.stamps) if stamp in keys]

    def read(self, indices: Sequence[int], side: int | None = None) -> Iterator[pil.Image]:
        num_found = 0
        for seek in (True, False) if self.frames.seekable else (False,):
            for picture in self._read(indices[num_found:], side, seek=seek):
                yield picture
                num_found += 1
        if num_found < len(indices):
            raise ImageError(
                f"{self.name} ends before its last frame can be decoded; it is damaged: download "
                "or export it again"
            )

    def _read(self, indices: Sequence[int], side: int | None, *, seek: bool) -> Iterator[pil.Image]:
        """Yield frames by decoding from the start, or only from the key frame before each; stop
        where that does not lead to one."""
        keys = self.frames.keys
        last: float = -math.inf
        if not indices:
            return
        with container(self.data, self.name) as (opened, stream):
            frames = self._decode(opened, stream)
            for wanted in (self.frames.stamps[index] for index in indices):
                if seek:
                    key, place = keys[bisect(keys, (wanted, math.inf)) - 1]
                    if key > last:
                        opened.seek(place, stream=stream)
                        frames = self._decode(opened, stream)
                found = next(((stamp, f) for stamp, f in frames if stamp >= wanted), None)
                if found is None or (seek and found[0] != wanted):
                    return
                yield self._picture(found[1], side)
                last = wanted

    def _decode(self, opened: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        for index, frame in enumerate(opened.decode(stream)):
            yield (frame.pts if self.frames.has_stamps else index), frame

    def _picture(self, frame: Any, side: int | None) -> pil.Image:
        _check_size((frame.width, frame.height), self.name)
        if side is not None:
            small: pil.Image = frame.to_image(width=side, height=side, interpolation="AREA")
            return small
        picture: pil.Image = frame.to_image()
        turn = _UPRIGHT.get(_orientation(frame))
        return picture if turn is None else picture.transpose(turn)


@contextmanager
def container(
    data: BinaryIO, name: str, settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[Any, Any]]:
    """Yield a file, opened at its start, and its first stream of frames.

    Args:
        settings: options of FFmpeg's demuxer.
    """
    try:
        import av
        import av.stream
    except ImportError:
        raise InputError(
            "videos need PyAV, which is not installed: pip install 'visavis[video]'"
        ) from None
    data.seek(0)
    options = {"format_whitelist": FORMATS, **settings}
    with av.open(data, options=options, io_open=_refuse) as opened:
        cover = av.stream.Disposition.attached_pic  # of a song
        streams = [s for s in opened.streams.video if not s.disposition & cover]
        if not streams:
            raise ImageError(f"{name} holds no frames, only sound; expected a video")
        stream = streams[0]
        stream.thread_type = "AUTO"
        _check_size((stream.codec_context.width, stream.codec_context.height), name)
        yield opened, stream


def _sized(picture: pil.Image, side: int | None) -> pil.Image:
    return picture if side is None else picture.resize((side, side), pil.Resampling.BOX)


def _orientation(frame: Any) -> tuple[int, int, int, int]:
    """Return the signs of a, b, c, d in a frame's display matrix; of a matrix that turns by other
    angles than multiples of 90°, those of the nearest one that does not."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))  # 16.16, rows [a b u], [c d v], [x y w]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def _rise(stamps: Sequence[int | None], scale: float) -> bool:
    """Whether time stamps tell frames apart, and stand for seconds."""
    known = [stamp for stamp in stamps if stamp is not None]
    return scale > 0 and len(known) == len(stamps) > 0 and all(a < b for a, b in pairwise(known))


def _refuse(url: str, flags: int, options: Any) -> Any:
    raise PermissionError(f"it names another file: {url[:80]!r}")


def _check_size(size: tuple[int, int], name: str) -> None:
    if not 0 < size[0] * size[1] <= MAX_PIXELS:
        raise ImageError(
            f"{name} has frames of {size[0]}×{size[1]} pixels, expected at least one and at most "
            f"{MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first"
        )
