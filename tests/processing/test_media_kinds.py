"""Media as users have them: transparency keys of every depth, HEIC, camera raw, URLs as paths."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pil

from visavis.errors import ImageError, InputError
from visavis.inputs import Document, Image, Prompt, Video
from visavis.processing import images
from visavis.processing.config import VideoConfig
from visavis.processing.images import content_hash, decode_image, image_format, image_size
from visavis.processing.media import FORMATS, SUFFIXES, UNREAD_SUFFIXES, find_images
from visavis.processing.pdf import pages
from visavis.processing.video import read_frames


def png(depth: int, color: int, row: list, key: tuple[int, ...]) -> bytes:
    """One row of grey (color 0) or RGB (color 2) samples, with a transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    samples = np.ravel(row)
    bits = "".join(format(int(sample), f"0{depth}b") for sample in samples)
    bits += "0" * (-len(bits) % 8)
    data = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", len(row), 1, depth, color, 0, 0, 0)
    transparent = struct.pack(f">{len(key)}H", *key)
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", transparent)
    chunks += chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("which", ["black", "middle", "white"])
def test_a_transparent_grey_is_white_at_every_depth(depth, which):
    top = 2**depth - 1
    row = [0, top // 2, top, top // 3, 0]
    key = {"black": 0, "middle": top // 2, "white": top}[which]
    expected = [255 if value == key else round(value * 255 / top) for value in row]
    shown = np.asarray(decode_image(png(depth, 0, row, (key,))))[0]
    assert np.abs(shown.astype(int) - np.array(expected)[:, None]).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("key", [(0, 0, 0), (9, 90, 200), (255, 255, 255)])
def test_a_transparent_colour_is_white_at_every_depth(depth, key):
    row = [(0, 0, 0), (9, 90, 200), (255, 255, 255), (9, 90, 201)]
    scale = 257 if depth == 16 else 1
    expected = [(255, 255, 255) if value == key else value for value in row]
    stored = [tuple(part * scale for part in value) for value in row]
    shown = decode_image(png(depth, 2, stored, tuple(part * scale for part in key)))
    assert [tuple(pixel) for pixel in np.asarray(shown)[0]] == expected


def test_a_16_bit_pil_image_with_a_key_lies_on_white():
    image = pil.fromarray(np.array([[0, 65535, 257 * 9]], np.uint16))
    image.info["transparency"] = 0
    assert np.asarray(decode_image(image))[0, :, 0].tolist() == [255, 255, 9]


def heic(size: tuple[int, int] = (40, 24)) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    encoded = io.BytesIO()
    image = pil.new("RGB", size, (200, 30, 40))
    pillow_heif.from_pillow(image).save(encoded, quality=95)
    return encoded.getvalue()


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    file = tmp_path / "phone.heic"
    file.write_bytes(heic())
    decoded = decode_image(file)
    assert decoded.size == image_size(file) == (40, 24)
    assert np.abs(np.asarray(decoded).astype(int) - [200, 30, 40]).max() <= 4
    assert find_images(tmp_path) == [file]
    assert image_format(heic()) == "HEIF" and len(content_hash(file)) == 32


def test_heic_without_pillow_heif_names_the_extra(monkeypatch):
    data = heic()
    monkeypatch.delitem(FORMATS, "HEIF")
    with pytest.raises(ImageError, match=r"HEIC image: pip install 'visavis\[heic\]'"):
        decode_image(data)


def raw_tiff() -> bytes:
    encoded = io.BytesIO()
    tags = {254: 1, 330: 8, 50706: b"\x01\x04\x00\x00"}  # a preview, with sub-images, DNG 1.4
    pil.new("RGB", (8, 6), (9, 9, 9)).save(encoded, "TIFF", tiffinfo=tags)
    return encoded.getvalue()


@pytest.mark.parametrize(
    "data", [raw_tiff(), b"FUJIFILMCCD-RAW 0201", b"\0\0\0\x18ftypcrx \0\0\0\1", b"IIU\0\x18\0\0\0"]
)
def test_camera_raw_is_named_and_its_preview_is_not_taken(data):
    with pytest.raises(ImageError, match="camera raw file; export it as JPEG or TIFF"):
        decode_image(data)


def test_suffixes_that_are_not_read_have_a_reason():
    assert not UNREAD_SUFFIXES.keys() & SUFFIXES
    assert "raw" in UNREAD_SUFFIXES[".nef"] and ".psd" in UNREAD_SUFFIXES
    assert ("HEIF" in FORMATS) == (".heic" in SUFFIXES) == (".heic" not in UNREAD_SUFFIXES)


@pytest.mark.parametrize("url", ["https://example.com/a.png", "s3://bucket/a.pdf", "file:///a.mp4"])
def test_a_url_given_as_a_path_is_named_as_one(url):
    for read in (
        lambda: decode_image(Path(url)),
        lambda: find_images(Path(url)),
        lambda: pages(Document(Path(url))),
    ):
        with pytest.raises(ImageError, match=r"is a URL \(\w+\).*visavis opens no URLs"):
            read()


def test_a_folder_given_as_an_image_is_named_as_one(tmp_path):
    with pytest.raises(ImageError) as caught:
        decode_image(tmp_path)
    assert str(caught.value).count("is a folder") == 1 and "cannot be opened" not in str(
        caught.value
    )


def test_a_data_uri_given_as_a_path():
    with pytest.raises(ImageError, match="a data: URI stands where"):
        decode_image(Path("data:image/png;base64,iVBORw0KGgo="))


@pytest.mark.parametrize(
    "suffix",
    [
        "MTS",
        "m2ts",
        "3gp",
        "3g2",
        "asf",
        "ogv",
        "wmv",
        "vob",
        "mxf",
        "m2v",
        "h264",
        "hevc",
        "ivf",
        "nut",
    ],
)
def test_suffixes_of_formats_that_are_read_are_videos(suffix):
    (part,) = Prompt.of(Path(f"a.{suffix}")).messages[0].parts
    assert isinstance(part, Video) and not isinstance(part, Image)


def large(kind: str, size: tuple[int, int]) -> bytes:
    """An encoded image, dark on the left and bright on the right."""
    image = pil.new("RGB", size, (20, 30, 40))
    image.paste((220, 210, 200), (size[0] // 2, 0, *size))
    encoded = io.BytesIO()
    image.save(encoded, kind)
    return encoded.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("size", [(403, 201), (801, 99), (1205, 640)])
def test_larger_images_are_read_reduced_where_that_is_set(kind, size, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 50_000)
    monkeypatch.setattr(images, "_max_pixels", 50_000)
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", pil.MAX_IMAGE_PIXELS)
    data = large(kind, size)
    with pytest.raises(ImageError, match="raise --max-pixels"):
        decode_image(data)
    images.set_max_pixels(1_000_000)
    decoded = decode_image(data)
    assert decoded.size == image_size(data)
    assert 50_000 / 4.2 < decoded.width * decoded.height <= 50_000
    whole = pil.open(io.BytesIO(data)).convert("RGB").resize(decoded.size, pil.Resampling.BOX)
    error = np.abs(np.asarray(decoded).astype(int) - np.asarray(whole).astype(int))
    assert error.mean() < 1.5
    with pytest.raises(InputError, match="expected at least 50000"):
        images.set_max_pixels(9)


def test_a_turned_image_is_reduced_too(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 50_000)
    monkeypatch.setattr(images, "_max_pixels", 1_000_000)
    encoded, exif = io.BytesIO(), pil.Exif()
    exif[0x0112] = 6
    pil.new("RGB", (801, 99), (9, 9, 9)).save(encoded, "JPEG", exif=exif)
    assert decode_image(encoded.getvalue()).size == image_size(encoded.getvalue()) == (50, 401)


@pytest.mark.parametrize(("side", "frames"), [(7900, 80), (2, 20_001)])
def test_an_animation_that_takes_too_long_is_refused(side, frames):
    """Frames are repeated by their bytes, as a hostile file would do it."""
    encoded = io.BytesIO()
    pil.new("P", (side, side)).save(encoded, "GIF")
    data = encoded.getvalue()
    header = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    repeated = data[:header] + data[header:-1] * frames + b";"
    with pytest.raises(ImageError, match=f"an animation of {frames} frames of {side}×{side}"):
        read_frames(Video(repeated), VideoConfig(frames=2))


def test_images_that_are_not_read_are_counted_with_the_reason(tmp_path):
    for name in ("a.NEF", "b.nef", "c.psd", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    reason = r"2 \.nef \(camera raw is not read: export it as JPEG or TIFF\); 1 \.psd \(this image"
    with pytest.raises(
        ImageError, match=rf"holds no pictures \(4 other files\).*left out {reason}"
    ):
        find_images(tmp_path)
    pil.new("RGB", (2, 2)).save(tmp_path / "d.png")
    with pytest.warns(UserWarning, match=f"left out {reason}"):
        assert find_images(tmp_path) == [tmp_path / "d.png"]


def test_an_array_is_reduced_too(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 50_000)
    monkeypatch.setattr(images, "_max_pixels", 1_000_000)
    assert decode_image(np.zeros((300, 401, 3), np.uint8)).size == (201, 150)
