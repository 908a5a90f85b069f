"""Decoding every kind of picture, refusing everything else, and sizing as the peers do."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pil
from PIL import ImageCms

from tests.pictures import RED, scene
from visavis.errors import ImageError
from visavis.inputs import Image
from visavis.processing import images
from visavis.processing.images import content_hash, decode_image, image_size
from visavis.processing.media import FORMATS, find_images, scan_media

GREEN, BLUE = (0, 255, 0), (0, 0, 255)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A valid PNG start that claims a size, with hardly any data behind it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(b"\0" * 10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")


# ---- pictures that must work ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP", "JPEG2000", "ICO"])
def test_lossless_formats_give_the_same_pixels_from_every_source(kind, tmp_path):
    options = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(16, 16)]}}.get(kind, {})
    expected = np.zeros((16, 16, 3), np.uint8)
    expected[:8], expected[8:, :4], expected[8:, 4:] = RED, GREEN, BLUE
    data = encoded(pil.fromarray(expected), kind, **options)
    path = tmp_path / "no-suffix"
    path.write_bytes(data)
    with pil.open(path) as lazy:
        for source in (data, path, str(path), Image(path), lazy, expected):
            decoded = decode_image(source)
            assert decoded.mode == "RGB"
            assert np.array_equal(np.asarray(decoded), expected)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_lossy_formats_are_close(kind):
    ramp = pil.linear_gradient("L").resize((64, 64)).convert("RGB")
    decoded = decode_image(encoded(ramp, kind, quality=95))
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(ramp)).max() < 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [pil.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with pil.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3  # type: ignore[attr-defined]
    assert decode_image(data).getpixel((4, 4)) == RED


def test_cmyk():
    cmyk = pil.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind in ("TIFF", "JPEG"):
        red, green, blue = decode_image(encoded(cmyk, kind)).getpixel((8, 8))
        assert red > 245 and green < 10 and blue < 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    decoded = np.asarray(decode_image(encoded(pil.fromarray(values), kind)))
    assert decoded[:, :, 0].tolist() == [[0, 100], [200, 255]]
    assert (decoded[:, :, :1] == decoded).all()


def test_wide_integers_and_floats():
    grey = pil.fromarray(np.array([[0, 100, 255]], np.uint8))
    for mode in ("I", "F"):
        assert [p[0] for p in decode_image(grey.convert(mode)).get_flattened_data()] == [
            0,
            100,
            255,
        ]
    unit = pil.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert decode_image(encoded(unit, "TIFF")).getpixel((1, 0)) == (128, 128, 128)
    for bad in ([[-5.0, 1.0]], [[0.0, 900.0]], [[0.0, float("nan")]]):
        with pytest.raises(ImageError, match="expected 0 to 1 or 0 to 255"):
            decode_image(pil.fromarray(np.array(bad, np.float32)))


def test_transparency_lies_on_white():
    half = pil.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 0, 128))
    for source in (half, encoded(half, "PNG"), np.asarray(half)):
        decoded = decode_image(source)
        assert decoded.getpixel((0, 0)) == (255, 255, 255)
        assert decoded.getpixel((1, 0)) == (127, 127, 127)
    for mode in ("LA", "La", "RGBa"):
        assert decode_image(pil.new(mode, (1, 1))).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_transparency_lies_on_white():
    palette = pil.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        decoded = decode_image(encoded(palette, kind, transparency=0))
        assert decoded.getpixel((0, 0)) == (255, 255, 255)
        assert decoded.getpixel((1, 0)) == BLUE
    assert decode_image(palette).getpixel((0, 0)) == RED
    assert decode_image(palette.convert("RGBA").convert("PA")).getpixel((1, 0)) == BLUE


def test_colour_key_transparency_is_applied_once():
    data = encoded(pil.new("RGB", (2, 2), RED), "PNG", transparency=RED)
    once = decode_image(data)
    assert once.getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(once).getpixel((0, 0)) == (255, 255, 255)


def test_one_bit():
    bits = pil.fromarray(np.array([[True, False]]))
    assert bits.mode == "1"
    for source in (bits, encoded(bits, "PNG"), encoded(bits, "PPM")):
        assert np.asarray(decode_image(source))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_including_mirrored(orientation, tmp_path):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:] = RED, GREEN
    flipped = upright.transpose(1, 0, 2)
    stored = {  # how a camera stores it, by the EXIF definition of where row 0 and column 0 are
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: flipped,
        6: np.rot90(upright, 1),
        7: flipped[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = pil.Exif()
    exif[0x0112] = orientation
    picture = pil.fromarray(np.ascontiguousarray(stored))
    path = tmp_path / "a"
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        decoded = decode_image(encoded(picture, kind, exif=exif))
        assert decoded.size == (32, 16)
        assert decoded.getpixel((4, 3))[0] > 200 > 60 > decoded.getpixel((4, 3))[1]
        assert decoded.getpixel((28, 3))[1] > 200 > 60 > decoded.getpixel((28, 3))[0]
        assert max(decoded.getpixel((4, 13))) < 60
        again = decode_image(decoded)  # turning twice would be wrong
        assert np.array_equal(np.asarray(again), np.asarray(decoded))

        path.write_bytes(encoded(picture, kind, exif=exif))
        assert image_size(path) == (32, 16)


def test_broken_exif_is_not_a_broken_picture():
    data = encoded(scene(), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff garbage")
    assert decode_image(data).size == (97, 61)


def test_colour_profiles_are_not_applied():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(scene(), "PNG", icc_profile=profile)
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(scene()))


def test_numpy_arrays():
    grey = np.array([[0, 51], [102, 255]], np.uint8)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    opaque = np.concatenate([expected, np.full((2, 2, 1), 255, np.uint8)], axis=2)
    floats = [expected.astype(kind) / 255 for kind in (np.float16, np.float32, np.float64)]
    for array in (grey, grey[:, :, None], expected, opaque, *floats, grey / 255):
        assert np.array_equal(np.asarray(decode_image(array)), expected)
    flipped = expected[:, ::-1]  # not contiguous
    assert np.array_equal(np.asarray(decode_image(flipped)), flipped)
    mask = np.array([[True, False]])
    assert np.asarray(decode_image(mask)).tolist() == [[[255] * 3, [0] * 3]]


# ---- pictures that must be refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 8, 9), np.uint8), "transpose"),
        (np.zeros((8, 9, 2), np.uint8), "expected"),
        (np.zeros((2, 8, 9, 3), np.uint8), "one by one"),
        (np.zeros(8, np.uint8), "expected"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), object), "object"),
        (np.full((4, 4), 255.0), "0..1"),
        (np.full((4, 4), -1.0), "0..1"),
        (np.full((4, 4), np.nan), "nan"),
    ],
)
def test_wrong_arrays(array, says):
    with pytest.raises(ImageError, match=says):
        decode_image(array)


@pytest.mark.parametrize("function", [decode_image, content_hash])
def test_paths_that_are_no_pictures(function, tmp_path, monkeypatch):
    (tmp_path / "empty.jpg").touch()
    for path, says in (
        (tmp_path / "missing.jpg", "missing.jpg' does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty.jpg", r"0 bytes"),
        (tmp_path / "empty.jpg" / "x", "cannot be opened|does not exist"),
        (Path("nul\0"), "cannot be opened"),
        (Path("x" * 5000), "cannot be opened"),
        (Path(os.devnull), "device"),
        (b"", "0 bytes"),
    ):
        with pytest.raises(ImageError, match=says):
            function(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=f"looked in {tmp_path}"):
        function(Path("missing.jpg"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"just some words", "just some wo"),
        (b"%PDF-1.7 ...", "PDF"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a video; pass it as visavis.Video"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "HEIC"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture|cannot be decoded"),
    ],
)
def test_not_an_image(data, says, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, tmp_path / "a.jpg"):
        with pytest.raises(ImageError, match=says):
            decode_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(kind, share, tmp_path):
    data = encoded(scene(), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut\.img.*(damaged|not a picture)"):
        decode_image(path)


def test_a_hundred_megapixel_jpeg_is_refused_by_name_and_size(tmp_path):
    path = tmp_path / "poster.jpg"
    pil.new("L", (10_000, 10_000)).save(path, quality=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one clear error, no warning beside it
        with pytest.raises(ImageError, match=r"poster\.jpg.*10000×10000 = 100.0 megapixels"):
            decode_image(path)


@pytest.mark.parametrize("size", [(8001, 8000), (30_000, 30_000), (65_536, 1), (1, 70_000)])
def test_bombs_are_refused_from_the_header(size):
    with pytest.raises(ImageError, match="megapixels and 65535 pixels a side"):
        decode_image(png_header(*size))


def test_arrays_and_pil_images_are_bounded_too(monkeypatch):
    monkeypatch.setattr(images, "_max_pixels", 100)
    for source in (np.zeros((11, 10), np.uint8), pil.new("RGB", (11, 10))):
        with pytest.raises(ImageError, match="megapixels"):
            decode_image(source)


def test_a_closed_pil_image_is_an_image_error(tmp_path):
    scene().save(tmp_path / "a.png")
    picture = pil.open(tmp_path / "a.png")
    picture.close()
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(picture)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=300))
def test_random_bytes_are_an_image_error(data):
    magics = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"P6 ", b"II*\0", b"RIFF")
    for start in (b"", *magics):
        with suppress(ImageError):
            assert decode_image(start + data).mode == "RGB"


KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO")
SEEDS = [encoded(scene(24, 18), kind) for kind in KINDS]


@settings(deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_damaged_pictures_decode_or_are_an_image_error(seed, data):
    damaged = bytearray(seed)
    spot = st.integers(0, len(seed) - 1)
    for position, value in data.draw(st.lists(st.tuples(spot, st.integers(0, 255)), max_size=8)):
        damaged[position] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ImageError):
            assert decode_image(bytes(damaged[: data.draw(spot) + 1])).mode == "RGB"


# ---- sizes from headers --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_the_header_gives_the_size_of_the_decoded_picture(kind):
    data = encoded(scene(64, 48), kind)
    for source in (data, scene(64, 48), np.asarray(scene(64, 48))):
        assert image_size(source) == decode_image(source).size


def test_sizes_need_no_pixels():
    data = encoded(scene(), "JPEG")
    assert image_size(data[: len(data) // 2]) == (97, 61)
    assert image_size(png_header(4000, 3000)) == (4000, 3000)


def test_a_png_may_say_behind_its_pixels_how_it_is_turned():
    exif = pil.Exif()
    exif[0x0112] = 6
    data = encoded(scene(), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    chunk, rest = data[start:end], data[:start] + data[end:]
    moved = rest[:-12] + chunk + rest[-12:]  # before IEND
    assert image_size(moved) == decode_image(moved).size == (61, 97)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"just some words", "not a picture"),
        (png_header(30_000, 30_000), "megapixels"),
        (b"", "0 bytes"),
    ],
)
def test_wrong_headers(source, says):
    with pytest.raises(ImageError, match=says):
        image_size(source)


@settings(deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_sizes_of_damaged_pictures_are_an_image_error(seed, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ImageError):
            width, height = image_size(seed[: data.draw(st.integers(1, len(seed)))])
            assert width * height > 0


# ---- content hash --------------------------------------------------------------------------------


def test_content_hash(tmp_path):
    data = encoded(scene(), "PNG")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(data)
    by_file = content_hash(tmp_path / "a.png")
    assert len(by_file) == 32 and int(by_file, 16)
    assert by_file == content_hash(tmp_path / "b.png") == content_hash(data)
    by_pixels = content_hash(scene())
    assert by_pixels == content_hash(np.asarray(scene())) == content_hash(scene().copy())
    assert by_pixels != content_hash(scene(seed=1)) != by_file
    tall, wide = np.zeros((2, 8, 3), np.uint8), np.zeros((8, 2, 3), np.uint8)
    assert content_hash(tall) != content_hash(wide)  # same bytes, other shape


def test_content_hash_sees_the_palette():
    first = pil.new("P", (2, 2))
    second = first.copy()
    first.putpalette([*RED])
    second.putpalette([*BLUE])
    assert content_hash(first) != content_hash(second)


# ---- finding files -------------------------------------------------------------------------------


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/.hidden.png", ".cache/d.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    expected = [tmp_path / name for name in ("a.png", "b.JPG", "sub/c.webp")]
    assert find_images(tmp_path) == find_images([str(tmp_path), tmp_path / "a.png"]) == expected
    for name in ("sub/e.MP4", "f.pdf"):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == expected
    others = [tmp_path / "f.pdf", tmp_path / "sub" / "e.MP4"]
    assert list(scan_media(tmp_path, with_others=True).files) == sorted([*expected, *others])
    named = [tmp_path / "notes.txt", tmp_path / "b.JPG"]
    assert find_images(named) == named  # named files are taken, in the order given


def test_find_images_errors(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match=r"no pictures \(1 other files\).*\.png"):
        find_images([tmp_path])
    with pytest.raises(ImageError, match="gone.*does not exist"):
        find_images([tmp_path / "gone"])


def test_no_torch():
    code = "import sys, visavis.processing.images; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
