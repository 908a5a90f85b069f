"""Which frames of a video are taken, and that finding them quickly gives those of a full decode."""

from __future__ import annotations

import builtins
import io
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pil

from visavis.errors import ImageError, InputError
from visavis.inputs import Image, Video
from visavis.processing import video as module
from visavis.processing.config import ImageProcessorConfig, VideoConfig
from visavis.processing.frame_sampling import sample, time_instruction
from visavis.processing.image_processor import grid_of, pixels_of
from visavis.processing.images import content_hash
from visavis.processing.media import frame_files
from visavis.processing.video import read_frames, survey

av = pytest.importorskip("av")

EIGHT = VideoConfig(frames=8)
SIZE = (64, 48)


def colour(index):
    return (index * 4 % 256, 255 - index * 4 % 256, index * 40 % 256)


def encode(path, codec="libx264", options=None, num=60, stamps=None):
    """Write frames that differ, with key frames every 12 and frames that refer to later ones."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=15)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = options or {"g": "12", "bf": "2"}
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num):
            frame = av.VideoFrame.from_image(pil.new("RGB", SIZE, colour(index)))
            if stamps:
                frame.pts, frame.time_base = stamps[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_all(path):
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_image()) for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4")


# ---- which frames --------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.integers(1, 64))
def test_even_spread_is_llavas(total, wanted):
    taken = sample(total, 30.0, VideoConfig(frames=wanted))
    if total > wanted:
        assert taken == np.linspace(0, total - 1, wanted, dtype=int).tolist()
    else:
        assert taken == list(range(total))  # LLaVA would repeat some


@given(st.integers(1, 2000), st.sampled_from([0.5, 1, 2, 7]), st.floats(1, 60))
def test_frames_by_the_second_are_llavas(total, fps, rate):
    config = VideoConfig(frames=8, fps=fps, max_frames=16)
    taken = sample(total, rate, config)
    stepped = list(range(0, total, max(1, round(rate / fps))))
    if len(stepped) > 16:
        stepped = np.linspace(0, total - 1, 16, dtype=int).tolist()
    assert taken == stepped


def test_a_prompt_may_ask_for_another_number():
    config = VideoConfig(frames=8, fps=1, max_frames=16)
    assert sample(100, 10, config, asked=2) == [0, 99]
    with pytest.raises(InputError, match="17 frames.*at most 16"):
        sample(100, 10, config, asked=17)


def test_time_instruction():
    assert time_instruction(2.6, (0.0, 1.016)) == (
        "The video lasts for 2.60 seconds, and 2 frames are uniformly sampled from it. These "
        "frames are located at 0.00s,1.02s.Please answer the following questions related to this "
        "video."
    )


# ---- finding them --------------------------------------------------------------------------------

OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}
FILES = {
    "mp4": ("a.mp4", "libx264", None),
    "mp4 with open groups": ("a.mp4", "libx264", OPEN_GOP),
    "mkv": ("a.mkv", "libx264", None),
    "transport stream": ("a.ts", "libx264", None),
    "flash": ("a.flv", "libx264", None),
    "avi": ("a.avi", "mpeg4", None),
    "avi of H.264": ("a.avi", "libx264", None),
    "webm": ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20"}),
    "stream without time stamps": ("a.h264", "libx264", None),
    "programme stream": ("a.mpg", "mpeg2video", None),
}


@pytest.mark.parametrize(("name", "codec", "options"), FILES.values(), ids=FILES)
def test_seeking_finds_the_frames_of_a_full_decode(name, codec, options, tmp_path):
    path = encode(tmp_path / name, codec, options)
    every = decode_all(path)
    assert len(every) == 60
    for config in (EIGHT, VideoConfig(frames=3), VideoConfig(frames=60)):
        found = read_frames(Video(path), config)
        indices = sample(60, 15.0, config)
        assert [f.tobytes() for f in found.frames] == [every[i][1].tobytes() for i in indices]
        rate = 25 if name == "a.h264" else 15  # what is assumed where nothing is said
        assert found.times == pytest.approx([i / rate for i in indices], abs=2e-3)
        assert found.duration == pytest.approx(60 / rate, abs=2e-3)
        told = survey(Video(path), config)
        assert (list(told.indices), told.size) == (list(indices), SIZE)


def test_bytes_and_an_open_file_name_the_same(clip):
    by_path, by_bytes = (read_frames(Video(s), EIGHT) for s in (clip, clip.read_bytes()))
    assert by_path.times == by_bytes.times
    assert [f.tobytes() for f in by_path.frames] == [f.tobytes() for f in by_bytes.frames]
    for index, frame in zip(sample(60, 15, EIGHT), by_path.frames, strict=True):
        assert np.abs(np.array(frame.getpixel((30, 20))) - colour(index)).max() < 12


def test_only_the_groups_of_wanted_frames_are_decoded(clip, monkeypatch):
    decoded = []
    original = module._File._decode

    def counting(self, container, stream):
        for stamp, frame in original(self, container, stream):
            decoded.append(stamp)
            yield stamp, frame

    monkeypatch.setattr(module._File, "_decode", counting)
    read_frames(Video(clip), VideoConfig(frames=2))
    assert len(decoded) < 20


def test_frames_of_uneven_length_keep_their_times(tmp_path):
    stamps = [index * 40 + (index // 10) * 500 for index in range(60)]
    path = encode(tmp_path / "a.mkv", stamps=stamps)
    found = read_frames(Video(path), EIGHT)
    assert found.times == pytest.approx([stamps[i] / 1000 for i in sample(60, 15, EIGHT)])


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation_is_applied(clip, turn):
    """The matrix that phones write says how far to turn clockwise."""
    data = bytearray(clip.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    a, b = {0: (one, 0), 90: (0, one), 180: (-one, 0), 270: (0, -one)}[turn]
    struct.pack_into(">9i", data, matrix, a, b, 0, -b, a, 0, 0, 0, 1 << 30)
    plain = read_frames(Video(clip), EIGHT).frames[3]
    turned = read_frames(Video(bytes(data)), EIGHT).frames[3]
    assert turned.tobytes() == plain.rotate(-turn, expand=True).tobytes()
    assert survey(Video(bytes(data)), EIGHT).size == turned.size


# ---- pictures as a video -------------------------------------------------------------------------


def test_pictures_and_folders(tmp_path):
    pictures = [pil.new("RGB", (8, 6), colour(index)) for index in range(12)]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"frame{index}.png")
    by_list = read_frames(Video(pictures, frames=12), EIGHT)
    by_folder = read_frames(Video(tmp_path, frames=12), EIGHT)
    for found in (by_list, by_folder):  # frame10 after frame9
        assert [f.getpixel((0, 0)) for f in found.frames] == [colour(i) for i in range(12)]
        assert found.times[:3] == (0, 0.5, 1) and found.duration == 6
    few = read_frames(Video(pictures[:3]), EIGHT)
    assert len(few.frames) == 3
    told = survey(Video(tmp_path), EIGHT)
    assert (len(told.indices), told.size, told.rate) == (8, (8, 6), 2)
    assert frame_files(tmp_path / "frame1.png") == ()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no pictures"):
        read_frames(Video(tmp_path / "empty"), EIGHT)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations(kind):
    pictures = [pil.new("RGB", (16, 16), colour(index)) for index in range(10)]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        kind,
        save_all=True,
        append_images=pictures[1:],
        duration=[100] * 5 + [300] * 5,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    found = read_frames(Video(buffer.getvalue()), VideoConfig(frames=4))
    assert [f.getpixel((3, 3)) for f in found.frames] == [colour(i) for i in (0, 3, 6, 9)]
    assert found.times == pytest.approx((0, 0.3, 0.8, 1.7))
    assert found.duration == pytest.approx(2)
    told = survey(Video(buffer.getvalue()), VideoConfig(frames=4))
    assert (len(told.indices), told.size) == (4, (16, 16))


def test_content_hash_names_frames(clip, tmp_path):
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    assert content_hash(Video(clip)) == content_hash(Video(copy))
    assert content_hash(Video(clip)) != content_hash(Video(clip, frames=4))
    pictures = [pil.new("RGB", (8, 6), colour(index)) for index in range(2)]
    assert content_hash(Video(pictures)) != content_hash(Video(pictures[::-1]))


def test_views_for_a_tower(clip):
    processor = ImageProcessorConfig(16, "squash", (0.5,) * 3, (0.5,) * 3, video=EIGHT)
    assert ImageProcessorConfig.from_dict(processor.to_dict()) == processor
    views, shape = pixels_of(Video(clip), processor, is_only_image=True)
    assert views.shape == (8, 3, 16, 16) and views.dtype == np.float32
    assert shape == grid_of(Video(clip), processor, is_only_image=True)
    assert shape.video and shape.views == 8
    one = pixels_of(Image(read_frames(Video(clip), EIGHT).frames[2]), processor, True)[0]
    assert np.array_equal(views[2:3], one)


# ---- what is refused -----------------------------------------------------------------------------


def test_broken_files(clip, tmp_path):
    whole = encode(tmp_path / "a.mp4", options={"g": "12"}).read_bytes()
    fast = tmp_path / "fast.mp4"
    with (
        av.open(io.BytesIO(whole)) as source,
        av.open(str(fast), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    for data, says in (
        (b"", "0 bytes"),
        (b"just some words", "cannot be read as a video"),
        (b"GIF89a", "cannot be read as a video"),
        (whole[: len(whole) // 2], "cannot be read as a video"),
        (fast.read_bytes()[:-200], "of its 60 frames, the end is missing|ends before its last"),
    ):
        with pytest.raises(ImageError, match=says):
            read_frames(Video(data), EIGHT)
    with pytest.raises(ImageError, match="does not exist"):
        read_frames(Video(tmp_path / "gone.mp4"), EIGHT)


def test_sound_alone(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(ImageError, match="only sound"):
        read_frames(Video(path), EIGHT)


@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4"])
def test_files_that_name_files_are_refused(clip, tmp_path, name):
    (tmp_path / "b.mp4").write_bytes(clip.read_bytes())
    text = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{tmp_path}/b.mp4\n",
        "a.mp4": "ffconcat version 1.0\nfile b.mp4\n",
    }[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ImageError, match="cannot be read as a video"):
        read_frames(Video(tmp_path / name), EIGHT)


def test_bounds(clip, monkeypatch):
    monkeypatch.setattr(module, "MAX_CLIP_PIXELS", 7 * SIZE[0] * SIZE[1])
    with pytest.raises(ImageError, match="8 frames of 64×48.*fewer frames"):
        read_frames(Video(clip), EIGHT)
    assert len(read_frames(Video(clip, frames=7), EIGHT).frames) == 7
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="64×48 pixels.*make it smaller"):
        read_frames(Video(clip, frames=1), EIGHT)


def test_without_pyav_the_extra_is_named(clip, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'visavis\[video\]'"):
        read_frames(Video(clip), EIGHT)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"fps": 0}, "fps is 0"),
        ({"frames": 200}, "at most max_frames=128"),
        ({"max_frames": True}, "max_frames is True"),
        ({"frame": 3}, "did you mean 'frames'"),
    ],
)
def test_wrong_configs(values, says):
    with pytest.raises(InputError, match=says):
        VideoConfig.from_dict(values)


def test_import_is_light():
    code = (
        "import sys, visavis.processing.video, visavis.processing.pdf, "
        "visavis.processing.anyres; print({'torch', 'av', 'pypdfium2'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["asl-no", "classroom", "fruit-and-vegetable-detection"])
def test_real_clips(name, shared_data):
    path = shared_data / "sample-videos" / f"{name}.mp4"
    every = decode_all(path)
    found = read_frames(Video(path), EIGHT)
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
    indices = sample(len(every), rate, EIGHT)
    assert [f.tobytes() for f in found.frames] == [every[i][1].tobytes() for i in indices]
    assert found.times == pytest.approx([every[i][0] - every[0][0] for i in indices], abs=1e-3)
