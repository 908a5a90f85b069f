"""Videos as segments: where scenes change, and what of each is embedded."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image as pil
from PIL import ImageDraw

from visavis.errors import ImageError
from visavis.index import segments as module
from visavis.index.segments import FRAMES, LONGEST, SHORTEST, Segment, segment_videos, segments
from visavis.processing import video as video_module

av = pytest.importorskip("av")

COLOURS = ("red", "green", "blue", "white", "black")


def film(path, scenes, rate=10, codec="libx264", gop=25, size=(96, 64)):
    """Write scenes of (seconds, colour) in which a square moves; the codec puts key frames at
    regular distances, not at cuts."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if codec == "libx264":
            stream.options = {"g": str(gop), "sc_threshold": "0", "preset": "ultrafast"}
        for seconds, colour in scenes:
            for index in range(round(seconds * rate)):
                picture = pil.new("RGB", size, colour)
                left = index * 3 % 80
                ImageDraw.Draw(picture).rectangle((left, 20, left + 10, 30), "gray")
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def check(found, duration):
    """Segments follow each other, cover everything and are neither too short nor too long."""
    assert found[0].begin_s == 0 and found[-1].end_s == pytest.approx(duration, abs=0.01)
    for before, after in pairwise(found):
        assert before.end_s == after.begin_s
    if len(found) > 1:
        assert all(s.end_s - s.begin_s >= SHORTEST - 1e-6 for s in found)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4")])
def test_scenes_begin_where_the_picture_changes(tmp_path, name, codec):
    path = film(tmp_path / name, [(4, "red"), (7, "green"), (3, "blue")], codec=codec)
    found = segments(path)
    check(found, 14)
    assert [round(s.begin_s) for s in found] == [0, 4, 11]


def test_a_scene_that_is_long_is_divided(tmp_path):
    path = film(tmp_path / "a.mp4", [(50, "red"), (5, "blue")], rate=4)
    found = segments(path)
    check(found, 55)
    assert [round(s.begin_s, 1) for s in found] == [0, 16.7, 33.3, 50]
    assert max(s.end_s - s.begin_s for s in found) <= LONGEST


def test_flicker_makes_no_segments_of_its_own(tmp_path):
    path = film(tmp_path / "a.mp4", [(0.5, COLOURS[i % 5]) for i in range(24)])
    check(segments(path), 12)


def test_a_short_video_is_one_segment(tmp_path):
    assert segments(film(tmp_path / "a.mp4", [(1.5, "red")])) == [Segment(0.0, 1.5)]
    one = film(tmp_path / "b.mp4", [(0.1, "red")])
    assert segments(one) == [Segment(0.0, 0.1)]


def test_a_long_video_is_cut_by_its_key_frames(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", [(10, "red"), (10, "blue")], gop=20)
    monkeypatch.setattr(module, "WHOLE_FRAMES", 50)
    shown, original = [], video_module._File._picture

    def counting(file, frame, side):
        shown.append(frame.pts)
        return original(file, frame, side)

    monkeypatch.setattr(video_module._File, "_picture", counting)
    found = segments(path)
    check(found, 20)
    assert [s.begin_s for s in found] == [0, 10]
    assert len(shown) == 10  # one for each key frame, of 200 frames


def test_the_number_of_segments_is_bounded(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", [(3, COLOURS[i % 5]) for i in range(40)], rate=4)
    assert len(segments(path)) == 40
    monkeypatch.setattr(module, "MAX_SEGMENTS", 10)
    found = segments(path)
    check(found, 120)
    assert len(found) <= 10


def test_segments_are_the_same_every_time(tmp_path):
    path = film(tmp_path / "a.mp4", [(4, "red"), (4, "green")])
    assert segments(path) == segments(path)


def test_an_animation_has_segments_too(tmp_path):
    frames = [pil.new("RGB", (16, 16), "red")] * 5 + [pil.new("RGB", (16, 16), "white")] * 5
    frames = [frame.copy() for frame in frames]
    for index, frame in enumerate(frames):
        frame.putpixel((index, 0), (0, 0, 255))  # or equal frames would be joined
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    assert segments(tmp_path / "a.gif") == [Segment(0.0, 5.0), Segment(5.0, 10.0)]


def test_what_is_no_video_is_an_error(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video at all")
    with pytest.raises(ImageError, match="cannot be read as a video"):
        segments(path)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4")])
def test_a_segment_shows_its_own_scene(tmp_path, name, codec):
    path = film(tmp_path / name, [(4, "red"), (4, "white"), (4, "blue")], codec=codec)
    found = segments(path)
    videos = list(segment_videos(path, found))
    assert len(videos) == len(found) == 3
    for video, colour in zip(videos, ((255, 0, 0), (255, 255, 255), (0, 0, 255)), strict=True):
        assert len(video.source) == FRAMES
        for image in video.source:
            shown = np.asarray(image.source)[-8:].mean((0, 1))  # below the square
            assert np.abs(shown - colour).max() < 12


def test_segments_can_be_read_one_by_one(tmp_path):
    path = film(tmp_path / "a.mp4", [(4, "red"), (4, "white")])
    found = segments(path)
    videos = segment_videos(path, found)
    next(videos)
    videos.close()  # the file is closed with it
    (last,) = segment_videos(path, found[1:], frames=2)
    assert len(last.source) == 2
