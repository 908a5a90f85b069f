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
import re
import struct
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image as pil

from visavis.errors import ImageError, InputError, VisavisError
from visavis.inputs import Video
from visavis.processing.config import VideoConfig
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


def sample(total: int, rate: float, config: VideoConfig, asked: int | None = None) -> list[int]:
    """Return which of `total` frames to take, each at most once.

    Args:
        rate: frames per second of the video.
        asked: a number of frames that goes before the config's.
    """
    wanted = asked or config.frames
    if wanted > config.max_frames:
        raise InputError(
            f"{wanted} frames of a video, but this model takes at most {config.max_frames}; ask "
            "for fewer"
        )
    if config.sampling == "smolvlm":
        return _smolvlm_sample(total, rate, config.fps or 1.0, wanted, asked is not None)
    if config.sampling == "internvl":
        return _internvl_sample(total, min(wanted, total))
    if config.sampling == "qwen3-vl":
        return _qwen3_vl_sample(total, rate, config, asked)
    if asked is None and config.fps is not None:
        stepped = range(0, total, max(1, round(rate / config.fps)))
        if len(stepped) <= config.max_frames:
            return list(stepped)
        wanted = config.max_frames
    if total <= wanted:
        return list(range(total))
    return [int(index) for index in np.linspace(0, total - 1, wanted)]


def _smolvlm_sample(total: int, rate: float, fps: float, wanted: int, asked: bool) -> list[int]:
    """Return SmolVLM2's frames: `fps` a second and at most `wanted`, or that many if they are asked
    for; of videos much longer than that without their first and last second."""
    duration, first, last = total / rate, 0, total - 1
    if duration - 2 > wanted * fps:
        first, last = int(rate), min(int(total - rate), total - 1)
    number = wanted if asked else max(1, min(round(fps * duration), wanted))
    return sorted({int(place) for place in np.linspace(first, last, number)})


def _internvl_sample(total: int, wanted: int) -> list[int]:
    """Return the frames in the middle of `wanted` equal parts, as InternVL takes them."""
    places = total / wanted / 2 + np.arange(wanted) * (total / wanted)
    return [int(place) for place in places.astype(np.float32)]


def _qwen3_vl_sample(total: int, rate: float, config: VideoConfig, asked: int | None) -> list[int]:
    """Return Qwen3-VL's frames: `fps` a second, from the first to the last."""
    wanted = config.frames
    if config.fps is not None:
        wanted = max(int(total / rate * config.fps), config.min_frames, 1)
    wanted = min(asked or wanted, config.max_frames, total)
    return [int(index) for index in np.linspace(0, total - 1, wanted).round()]


def time_instruction(duration: float, times: Sequence[float]) -> str:
    """Return the text on the frames between video and question in LLaVA-Video's prompts."""
    listed = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly "
        f"sampled from it. These frames are located at {listed}.Please answer the following "
        "questions related to this video."
    )


def read_frames(video: Video, config: VideoConfig) -> Clip:
    """Return the frames a model is shown, in order.

    Raises:
        ImageError: the video cannot be read, or its frames are too large.
        InputError: more frames are asked for than the config allows.
    """
    with _open(video) as reader:
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
    with _open(video) as reader:
        indices = _sample(reader, config, video)
        size = reader.read(indices[:1])[0].size
        return Survey(tuple(indices), len(reader.times), reader.rate, size)


def frame_times(video: Video, config: VideoConfig) -> tuple[tuple[float, ...], float]:
    """Return the seconds of the frames that `read_frames` will give, and of the whole video; none
    is decoded where the file says when they are shown."""
    with _open(video) as reader:
        indices = _sample(reader, config, video)
        return tuple(reader.times[index] for index in indices), reader.duration


def middle_frame(video: Video) -> pil.Image:
    """Return the frame that stands for a video where one image must; the first is often black.

    Raises:
        ImageError: the video cannot be read.
    """
    with _open(video) as reader:
        return reader.read([len(reader.times) // 2])[0]


def duration(video: Video) -> float:
    """Return the length of a video in seconds; no frame is decoded.

    Raises:
        ImageError: the video cannot be read.
    """
    with _open(video) as reader:
        return reader.duration


def read_between(video: Video, begin_s: float, end_s: float, number: int) -> Clip:
    """Return up to `number` frames that are shown between two times, evenly spaced; at least the
    one that is shown at `begin_s`.

    Raises:
        ImageError: the video cannot be read.
    """
    with _open(video) as reader:
        first = max(bisect(reader.times, begin_s) - 1, 0)
        last = max(bisect(reader.times, end_s - 1e-6), first + 1)
        indices = sorted({int(i) for i in np.linspace(first, last - 1, number + 2)[1:-1]})
        indices = indices or [first]
        times = tuple(reader.times[index] for index in indices)
        return Clip(tuple(reader.read(indices)), times, reader.duration)


def _sample(reader: _Reader, config: VideoConfig, video: Video) -> list[int]:
    indices = sample(len(reader.times), reader.rate, config, video.frames)
    width, height = reader.size
    if len(indices) * width * height > MAX_CLIP_PIXELS:
        raise ImageError(
            f"{len(indices)} frames of {width}×{height} = "
            f"{len(indices) * width * height / 1e6:.0f} megapixels, expected at most "
            f"{MAX_CLIP_PIXELS / 1e6:.0f}; make the video smaller or ask for fewer frames"
        )
    return indices


@contextmanager
def _open(video: Video) -> Iterator[_Reader]:
    """Yield the reader of a video; any failure while it is open raises ImageError."""
    pictures = frame_files(video.source)
    if pictures:
        yield _Pictures(pictures)
        return
    source = video.source
    assert isinstance(source, (Path, bytes))
    name = name_of(source, "video")
    with open_media(source, "video") as data:
        start = data.read(12)
        data.seek(0)
        kind = next((kind for kind, magic in _ANIMATIONS.items() if magic.match(start)), None)
        try:
            if kind is None:
                yield _File(data, name)
            else:
                with pil.open(data, formats=(kind,)) as opened:
                    yield _Animation(opened, name)
        except VisavisError:
            raise
        except Exception as error:  # readers raise nearly anything on damaged data
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise ImageError(
                f"{name} cannot be read as a video ({reason}); it is damaged or of another kind: "
                "open it in a player and export it as MP4"
            ) from error


class _Reader(Protocol):
    """The metadata of a video, known before decoding, and a method that decodes frames."""

    times: list[float]  # seconds, when each frame is shown, from 0
    rate: float  # frames per second
    duration: float
    size: tuple[int, int]  # of a stored frame

    def read(self, indices: Sequence[int]) -> list[pil.Image]: ...


class _Pictures:
    """Frames given as images, one after another."""

    def __init__(self, pictures: Sequence[Any]) -> None:
        self.pictures, self.rate = pictures, float(PICTURES_PER_SECOND)
        self.times = [index / self.rate for index in range(len(pictures))]
        self.duration = len(pictures) / self.rate
        self.size = image_size(pictures[0])

    def read(self, indices: Sequence[int]) -> list[pil.Image]:
        return [decode_image(self.pictures[index]) for index in indices]


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

    def read(self, indices: Sequence[int]) -> list[pil.Image]:
        pictures = []
        for index in indices:
            self.opened.seek(index)
            pictures.append(decode_image(self.opened).copy())
        return pictures


class _File:
    """A video file that PyAV reads. Its frames are known by the time stamps of their packets or,
    where these are of no use, by decoding all once and counting."""

    def __init__(self, data: BinaryIO, name: str) -> None:
        self.data, self.name = data, name
        with self._container() as (container, stream):
            packets = [packet for packet in container.demux(stream) if packet.size]
            self.size = (stream.codec_context.width, stream.codec_context.height)
            self.rate = float(stream.average_rate or PICTURES_PER_SECOND)
            self.scale = float(stream.time_base or 0)  # seconds of one step of the time stamps
            codec, promised = stream.codec_context.name, stream.frames
            kind = container.format.name.split(",")[0]
        if kind == "mov" and len(packets) < promised:
            self._check_whole(promised)
        self.stamps = sorted(p.pts for p in packets if p.pts is not None and not p.is_discard)
        # Where decoding can start: the time stamp of each key frame, and where to seek for it.
        self.keys = sorted(
            (p.pts, p.pts if p.dts is None else min(p.pts, p.dts))
            for p in packets
            if p.is_keyframe and p.pts is not None
        )
        self.has_stamps = self.seekable = (
            kind in _STAMPED
            and codec != "vp8"  # keeps frames that are never shown in packets of their own
            and _rise(self.stamps, self.scale)
            and all(p.pts is not None for p in packets)
            and bool(self.keys and self.keys[0][0] <= self.stamps[0])
        )
        if not self.seekable:
            self._list_all()
        span = (self.stamps[-1] - self.stamps[0]) * self.scale
        self.times = [(stamp - self.stamps[0]) * self.scale for stamp in self.stamps]
        self.duration = span + 1 / self.rate

    def _check_whole(self, promised: int) -> None:
        """Check that the packets which an edit list hides are what is missing, not the end.

        Raises:
            ImageError: the file is truncated.
        """
        with self._container({"ignore_editlist": "1"}) as (container, stream):
            stored = sum(1 for packet in container.demux(stream) if packet.size)
        if stored < promised:
            raise ImageError(
                f"{self.name} holds {stored} of its {promised} frames, the end is missing; "
                "download or export it again"
            )

    def _list_all(self) -> None:
        with self._container() as (container, stream):
            self.stamps = [frame.pts for frame in container.decode(stream)]
        if not self.stamps:
            raise ImageError(f"{self.name} holds no frame that can be decoded; export it again")
        self.has_stamps = _rise(self.stamps, self.scale)
        if not self.has_stamps:
            self.stamps, self.scale = list(range(len(self.stamps))), 1 / self.rate

    def read(self, indices: Sequence[int]) -> list[pil.Image]:
        found = self._read(indices, seek=True) if self.seekable else None
        if found is None:
            found = self._read(indices, seek=False)
        if found is None:
            raise ImageError(
                f"{self.name} ends before its last frame can be decoded; it is damaged: download "
                "or export it again"
            )
        return found

    def _read(self, indices: Sequence[int], seek: bool) -> list[pil.Image] | None:
        """Return frames by decoding from the start, or only from the key frame before each; None
        if that does not lead to them."""
        pictures: list[pil.Image] = []
        last: float = -math.inf
        with self._container() as (container, stream):
            frames = self._decode(container, stream)
            for wanted in (self.stamps[index] for index in indices):
                if seek:
                    key, place = self.keys[bisect(self.keys, (wanted, math.inf)) - 1]
                    if key > last:
                        container.seek(place, stream=stream)
                        frames = self._decode(container, stream)
                found = next(((stamp, f) for stamp, f in frames if stamp >= wanted), None)
                if found is None or (seek and found[0] != wanted):
                    return None
                pictures.append(self._picture(found[1]))
                last = wanted
        return pictures

    def _decode(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        for index, frame in enumerate(container.decode(stream)):
            yield (frame.pts if self.has_stamps else index), frame

    def _picture(self, frame: Any) -> pil.Image:
        _check_size((frame.width, frame.height), self.name)
        picture: pil.Image = frame.to_image()
        turn = _UPRIGHT.get(_orientation(frame))
        return picture if turn is None else picture.transpose(turn)

    @contextmanager
    def _container(
        self, settings: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the file, opened at its start, and its first stream of frames.

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
        self.data.seek(0)
        options = {"format_whitelist": FORMATS, **settings}
        with av.open(self.data, options=options, io_open=_refuse) as container:
            cover = av.stream.Disposition.attached_pic  # of a song
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise ImageError(f"{self.name} holds no frames, only sound; expected a video")
            stream = streams[0]
            stream.thread_type = "AUTO"
            _check_size((stream.codec_context.width, stream.codec_context.height), self.name)
            yield container, stream


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
