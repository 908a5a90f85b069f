"""Dates, positions and captions in files of images and videos, and files where they are damaged."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pil
from PIL import PngImagePlugin, TiffImagePlugin

from visavis.errors import ImageError
from visavis.inputs import Image, Video
from visavis.processing.media_metadata import MediaMetadata, media_metadata, parse_date


def seconds(*parts, zone=None):
    return datetime(*parts, tzinfo=zone).timestamp()


def jpeg(exif=None, **options):
    data = io.BytesIO()
    if exif is not None:
        options["exif"] = exif
    pil.new("RGB", (32, 24), "red").save(data, "JPEG", **options)
    return data.getvalue()


def camera_exif(latitude=(52, 31, 12.0), south="N", longitude=(13, 24, 18.0), west="E"):
    exif = pil.Exif()
    exif[0x010E] = "Grandma's birthday"
    exif[0x0132] = "2025:01:01 00:00:00"
    rational = TiffImagePlugin.IFDRational
    exif.get_ifd(0x8769)[0x9003] = "2024:05:17 14:03:22"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "Kuchen für alle".encode("utf-16-le")
    exif.get_ifd(0x8769)[0x9011] = "+02:00"
    gps = exif.get_ifd(0x8825)
    gps[1], gps[3] = south, west
    gps[2] = tuple(rational(int(x * 100), 100) for x in latitude)
    gps[4] = tuple(rational(int(x * 100), 100) for x in longitude)
    exif[0x9C9E] = "party;cake".encode("utf-16-le") + b"\0\0"
    return exif


def test_a_photo_says_when_where_and_what():
    found = media_metadata(Image(jpeg(camera_exif())))
    assert found.date == seconds(2024, 5, 17, 14, 3, 22)  # the camera's clock, not the last change
    assert found.position == pytest.approx((52.52, 13.405))
    assert found.captions == ("Grandma's birthday", "party;cake", "Kuchen für alle")


def test_hemispheres():
    exif = camera_exif((33, 52, 0), "S", (151, 12, 36.0), "E")
    assert media_metadata(Image(jpeg(exif))).position == pytest.approx((-33.8667, 151.21), abs=1e-4)
    exif = camera_exif((40, 30, 0), "N", (3, 42, 0), "W")
    assert media_metadata(Image(jpeg(exif))).position == pytest.approx((40.5, -3.7))


def test_a_position_that_is_none():
    for latitude, longitude in (((0, 0, 0), (0, 0, 0)), ((91, 0, 0), (5, 0, 0))):
        exif = camera_exif(latitude, "N", longitude, "E")
        assert media_metadata(Image(jpeg(exif))).position is None


XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
 xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" photoshop:City="Lisbon">
<dc:description><rdf:Alt>
<rdf:li xml:lang="x-default">A yellow tram</rdf:li></rdf:Alt></dc:description>
<dc:subject><rdf:Bag><rdf:li>tram</rdf:li><rdf:li>street</rdf:li></rdf:Bag></dc:subject>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""


def test_xmp_captions():
    found = media_metadata(Image(jpeg(xmp=XMP.encode())))
    assert found.captions == ("Lisbon", "A yellow tram", "tram", "street")


def test_xmp_with_entities_is_not_read():
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]>' + XMP.replace("A yellow tram", "&a;")
    assert media_metadata(Image(jpeg(xmp=bomb.encode()))).captions == ()


def test_iptc_captions():
    def field(number, text):
        return b"\x1c\x02" + bytes([number]) + len(text).to_bytes(2, "big") + text

    iptc = field(120, "Café in Wien".encode()) + field(25, b"coffee") + field(25, b"cake")
    block = b"8BIM\x04\x04\0\0" + len(iptc).to_bytes(4, "big") + iptc + b"\0" * (len(iptc) % 2)
    segment = b"Photoshop 3.0\0" + block
    data = jpeg()
    data = data[:2] + b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    assert media_metadata(Image(data)).captions == ("Café in Wien", "coffee", "cake")


def test_png_texts():
    data, texts = io.BytesIO(), PngImagePlugin.PngInfo()
    texts.add_itxt("Description", "Ein Schloss am See")
    texts.add_text("Software", "not a caption")
    pil.new("RGB", (8, 8)).save(data, "PNG", pnginfo=texts)
    assert media_metadata(Image(data.getvalue())).captions == ("Ein Schloss am See",)


def test_heic_says_the_same_as_jpeg():
    heif = pytest.importorskip("pillow_heif")
    data = io.BytesIO()
    picture = heif.from_pillow(pil.new("RGB", (64, 64), "red"))
    picture.save(data, format="HEIF", exif=camera_exif().tobytes())
    assert media_metadata(Image(data.getvalue())) == media_metadata(Image(jpeg(camera_exif())))


def test_pixels_and_frames_have_none(tmp_path):
    pil.new("RGB", (8, 8)).save(tmp_path / "1.png")
    for part in (Image(pil.new("RGB", (8, 8))), Video(tmp_path), Video((Image(jpeg()),))):
        assert media_metadata(part) == MediaMetadata()


def test_tags_of_a_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "First steps"
        container.metadata["creation_time"] = "2023-08-09T10:11:12Z"
        container.metadata["location"] = "-33.8667+151.2100/"
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(pil.new("RGB", (32, 32)))))
        container.mux(stream.encode())
    found = media_metadata(Video(path))
    assert found.date == seconds(2023, 8, 9, 10, 11, 12, zone=UTC)
    assert found.captions == ("First steps",)
    assert found.position == pytest.approx((-33.8667, 151.21))


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2024:05:17 14:03:22", seconds(2024, 5, 17, 14, 3, 22)),
        ("D:20240517140322+02'00'", seconds(2024, 5, 17, 14, 3, 22)),
        ("D:2024", None),
        ("2024-05-17", seconds(2024, 5, 17)),
        ("1899:12:31 23:59:59", seconds(1899, 12, 31, 23, 59, 59)),
        ("0000:00:00 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("2024:13:01 00:00:00", None),
        ("1904-01-01T00:00:00Z", None),
        ("1970:01:01 00:00:00", None),
        ("yesterday", None),
    ],
)
def test_dates(text, date):
    assert parse_date(text) == date


@given(st.binary(max_size=400))
def test_damaged_exif_is_no_exif(noise):
    found = media_metadata(Image(jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08" + noise)))
    assert isinstance(found, MediaMetadata)


@given(st.data())
def test_damaged_bytes_never_raise_anything_else(data):
    content = bytearray(jpeg(camera_exif()))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = media_metadata(Image(bytes(content)))
    except ImageError:
        return
    assert all(isinstance(caption, str) for caption in found.captions)
