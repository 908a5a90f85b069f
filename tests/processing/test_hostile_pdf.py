"""PDF documents that would take all time or memory end in one error, and the next one renders."""

from __future__ import annotations

import resource
import zlib

import pytest

from visavis.errors import ImageError
from visavis.inputs import Document, Image, Page
from visavis.processing import pdf
from visavis.processing.images import decode_image, image_size
from visavis.processing.pdf import pages

pytest.importorskip("pypdfium2")


def document(objects: dict[int, bytes]) -> bytes:
    """Return a PDF of numbered objects; 1 is its catalogue."""
    data, offsets = b"%PDF-1.7\n", {}
    for number, content in objects.items():
        offsets[number] = len(data)
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(
        b"%010d 00000 n \n" % offsets[n] if n in offsets else b"0000000000 65535 f \n"
        for n in range(max(objects) + 1)
    )
    end = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
    size = max(objects) + 1
    return data + b"xref\n0 %d\n%s" % (size, table) + end % (size, len(data))


def stream(settings: bytes, content: bytes, deflate: int = 0) -> bytes:
    """Return a stream object, deflated any number of times."""
    filters = b""
    for _ in range(deflate):
        content = zlib.compress(content, 9)
        filters += b" /FlateDecode"
    filters = b"/Filter [%s]" % filters if deflate else b""
    head = b"<< %s %s /Length %d >>" % (settings, filters, len(content))
    return head + b"\nstream\n" + content + b"\nendstream"


def zeros(mebibytes: int) -> bytes:
    """Return a zlib stream of zeros, without compressing so many."""
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    check = ((mebibytes << 20) % 65521) << 16 | 1
    return b"\x78\xda" + piece * mebibytes + b"\x03\x00" + check.to_bytes(4, "big")


def bomb(settings: bytes, mebibytes: int) -> bytes:
    """Return a stream object of a few kilobytes that holds zeros."""
    content = zlib.compress(zeros(mebibytes), 9)
    head = b"<< %s /Filter [/FlateDecode /FlateDecode] /Length %d >>" % (settings, len(content))
    return head + b"\nstream\n" + content + b"\nendstream"


def page(content: bytes, resources: bytes = b"", extra: dict[int, bytes] | None = None) -> bytes:
    return document(
        {
            1: b"<< /Type /Catalog /Pages 2 0 R >>",
            2: b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            3: b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Contents 4 0 R "
            b"/Resources << %s >> >>" % resources,
            4: content,
            **(extra or {}),
        }
    )


FORM = b"/Type /XObject /Subtype /Form /BBox [0 0 200 100]"


def image_of(side: int) -> bytes:
    """A page that shows one image of side × side black pixels."""
    settings = (
        b"/Type /XObject /Subtype /Image /Width %d /Height %d /BitsPerComponent 8 "
        b"/ColorSpace /DeviceRGB" % (side, side)
    )
    picture = bomb(settings, 900)
    return page(stream(b"", b"200 0 0 100 0 0 cm /I Do"), b"/XObject << /I 5 0 R >>", {5: picture})


def forms(depth: int, width: int) -> bytes:
    """A page of forms that each show the next one `width` times."""
    objects = {}
    for level in range(depth):
        names = b"/XObject << /F %d 0 R >>" % (6 + level) if level < depth - 1 else b""
        drawing = b"/F Do " * width if level < depth - 1 else b"0 0 9 9 re f " * width
        objects[5 + level] = stream(FORM + b" /Resources << %s >>" % names, drawing)
    return page(stream(b"", b"/F Do"), b"/XObject << /F 5 0 R >>", objects)


HOSTILE = {
    "a content stream of 900 MiB": lambda: page(bomb(b"", 900)),
    "a long drawing, deflated twice": lambda: page(
        stream(b"", b"0 0 m 200 100 l 3 7 l h B " * 400_000, 2)
    ),
    "forms inside forms": lambda: forms(9, 40),
    "an image of 17,000 pixels a side": lambda: image_of(17_000),
    "patterns of small tiles": lambda: page(
        stream(b"", b"/Pattern cs /P scn 0 0 200 100 re f " * 2000),
        b"/Pattern << /P 5 0 R >>",
        {
            5: stream(
                b"/Type /Pattern /PatternType 1 /PaintType 1 /TilingType 1 /BBox [0 0 1 1] "
                b"/XStep 0.001 /YStep 0.001 /Resources << >>",
                b"1 0 0 rg 0 0 1 1 re f",
            )
        },
    ),
    "a page of ten million by ten million": lambda: page(stream(b"", b"")).replace(
        b"[0 0 200 100]", b"[0 0 9999999 .1]"
    ),
}


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_page_ends(make, monkeypatch):
    """It is rendered within the limits or refused; this process pays neither time nor memory."""
    monkeypatch.setattr(pdf, "SECONDS", 0.5)
    monkeypatch.setattr(pdf, "MEMORY", 256 << 20)
    data = make()
    before, time = memory(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        assert max(decode_image(Image(Page(data, 1))).size) == 1600
    except ImageError as error:
        assert "page 1 of" in str(error) or "cannot be read" in str(error)
    assert memory() - before < 200 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - time < 2
    good = page(stream(b"", b"1 0 0 rg 0 0 200 100 re f"))
    assert decode_image(Image(Page(good, 1))).getpixel((9, 9)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["forms inside forms", "a content stream of 900 MiB"])
def test_what_takes_too_much_is_refused(name, monkeypatch):
    monkeypatch.setattr(pdf, "SECONDS", 0.5)
    monkeypatch.setattr(pdf, "MEMORY", 128 << 20)
    with pytest.raises(ImageError, match="page 1 of the document of .* cannot be read: "):
        decode_image(Image(Page(HOSTILE[name](), 1)))


def test_a_page_tree_that_claims_too_many_pages():
    data = page(stream(b"", b"")).replace(b"/Count 1 ", b"/Count 2000000000 ")
    try:
        assert len(pages(Document(data))) <= pdf.MAX_LISTED
    except ImageError as error:
        assert "says that it has" in str(error)


def test_a_document_written_again_is_read_again(tmp_path):
    file = tmp_path / "a.pdf"
    for red in (1, 0):
        file.write_bytes(page(stream(b"", b"%d 0 0 rg 0 0 200 100 re f" % red)))
        (only,) = pages(Document(file))
        assert image_size(only) == (1600, 800)
        assert decode_image(only).getpixel((9, 9)) == (255 * red, 0, 0)
