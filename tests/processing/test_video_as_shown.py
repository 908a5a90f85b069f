"""Videos are read as players show them: display matrices, edit lists, every container by suffix."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pil

from visavis.errors import ImageError
from visavis.inputs import Prompt, Video
from visavis.processing.config import VideoConfig
from visavis.processing.video import middle_frame, read_frames, survey

av = pytest.importorskip("av")

ALL = VideoConfig(frames=100, max_frames=100)
ONE = 1 << 16
MATRICES = [
    *itertools.product((ONE, -ONE), (0,), (0,), (ONE, -ONE)),
    *itertools.product((0,), (ONE, -ONE), (ONE, -ONE), (0,)),
]


def encode(path: Path, codec: str = "libx264", num: int = 60, options=None, faststart=True) -> Path:
    """Write frames whose grey level is four times their number, brighter to the right and below."""
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    form = {"movflags": "faststart"} if faststart and path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=form) as container:
        stream = container.add_stream(codec, rate=15)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = options or {}
        for number in range(num):
            level = np.clip(number * 4 + (x > 40) * 12 + (y > 30) * 6, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_image(pil.fromarray(level).convert("RGB"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(video: Video) -> list[int]:
    """Return the number of each frame, by its grey level."""
    levels = [np.asarray(frame)[:20, :20].mean() for frame in read_frames(video, ALL).frames]
    return [round(level / 4) for level in levels]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    options = {"g": "12", "bf": "2", "qp": "4"}
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", options=options)


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_display_matrices_turn_and_mirror(clip, matrix):
    a, b, c, d = matrix
    data = bytearray(clip.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    stored = np.asarray(read_frames(Video(clip), ALL).frames[5])
    height, width = stored.shape[:2]
    ys, xs = np.mgrid[:height, :width]
    shown_x, shown_y = (a * xs + c * ys) // ONE, (b * xs + d * ys) // ONE
    shown_x, shown_y = shown_x - shown_x.min(), shown_y - shown_y.min()
    expected = np.zeros((shown_y.max() + 1, shown_x.max() + 1, 3), np.uint8)
    expected[shown_y, shown_x] = stored
    video = Video(bytes(data))
    assert np.array_equal(np.asarray(read_frames(video, ALL).frames[5]), expected)
    assert survey(video, ALL).size == middle_frame(video).size == expected.shape[1::-1]


def edited(clip: Path, first: int, count: int) -> bytes:
    """Return the file with an edit list that shows `count` frames from number `first`."""
    data = bytearray(clip.read_bytes())
    at = data.index(b"elst") + 4
    version, entries, _, media_time = struct.unpack_from(">IIIi", data, at)
    assert (version, entries) == (0, 1)
    per_frame = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0] // 15
    movie_scale = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    shown = round(count / 15 * movie_scale)
    struct.pack_into(">Ii", data, at + 8, shown, media_time + first * per_frame)
    return bytes(data)


@pytest.mark.parametrize(
    ("first", "count"), [(0, 60), (0, 20), (12, 20), (17, 9), (30, 30), (47, 13), (59, 1)]
)
def test_what_an_edit_list_hides_is_hidden(clip, first, count):
    video = Video(edited(clip, first, count))
    assert numbers(video) == [*range(first, first + count)]
    few = VideoConfig(frames=3)
    times = read_frames(video, few).times
    assert times[0] == 0 and times[-1] <= count / 15
    assert len(survey(video, ALL).indices) == count


@pytest.mark.parametrize(("first", "count"), [(0, 60), (0, 20), (17, 9)])
def test_a_truncated_file_is_refused_with_every_edit_list(clip, first, count):
    data = edited(clip, first, count)
    with pytest.raises(ImageError, match="of its 60 frames, the end is missing|ends before"):
        read_frames(Video(data[: len(data) * 3 // 4]), ALL)


CONTAINERS = {
    "a.mts": "libx264",
    "a.m2ts": "libx264",
    "a.3gp": "libx264",
    "a.3g2": "libx264",
    "a.mov": "libx264",
    "a.qt": "libx264",
    "a.asf": "wmv2",
    "a.wmv": "wmv2",
    "a.vob": "mpeg2video",
    "a.m2v": "mpeg2video",
    "a.mpe": "mpeg2video",
    "a.f4v": "libx264",
    "a.ogv": "libvpx",
    "a.mk3d": "libx264",
    "a.divx": "mpeg4",
    "a.h265": "libx265",
    "a.ivf": "libvpx-vp9",
    "a.nut": "mpeg4",
}
_MUXERS = {"a.qt": "b.mov", "a.mpe": "b.mpg", "a.divx": "b.avi", "a.h265": "b.hevc"}
_MUXERS |= {"a.mk3d": "b.mkv"}


@pytest.mark.parametrize(("name", "codec"), CONTAINERS.items(), ids=CONTAINERS)
def test_videos_are_read_by_their_suffix(name, codec, tmp_path):
    written = encode(tmp_path / _MUXERS.get(name, name), codec, num=20)
    path = written.rename(tmp_path / name)
    (part,) = Prompt.of(path).messages[0].parts
    assert isinstance(part, Video)
    found = numbers(part)
    assert len(found) == 20
    assert np.abs(np.array(found) - np.arange(20)).max() <= 2  # lossy
