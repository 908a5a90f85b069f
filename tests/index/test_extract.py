"""The words, date and place by which items are found, and text recognised in images."""

from __future__ import annotations

import importlib.util
import io
import socket
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pil
from PIL import ImageDraw, ImageFont

from tests.processing.test_media_metadata import camera_exif, jpeg
from visavis.errors import InputError
from visavis.index import extract, ocr
from visavis.index.extract import ExtractedText, clean, found_text
from visavis.inputs import Document, Image, Page, Text
from visavis.processing.pdf import pages

pypdfium2 = pytest.importorskip("pypdfium2")
needs_ocr = pytest.mark.skipif(
    not (importlib.util.find_spec("rapidocr") and importlib.util.find_spec("onnxruntime")),
    reason="needs the extra `ocr`: rapidocr and onnxruntime",
)


def text_pdf(*texts, title="", date=""):
    """Return a PDF with one page for each text; an empty one is an empty page."""
    info = f"<< /Title ({title}) /CreationDate ({date}) >>"
    kids = " ".join(f"{5 + 2 * index} 0 R" for index in range(len(texts)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(texts)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        info,
    ]
    for index, text in enumerate(texts):
        drawing = f"BT /F 24 Tf 20 100 Td ({text}) Tj ET" if text else ""
        objects += [
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 200] /Resources "
            f"<< /Font << /F 3 0 R >> >> /Contents {6 + 2 * index} 0 R >>",
            f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream",
        ]
    data, offsets = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    end = f"trailer << /Size {len(objects) + 1} /Root 1 0 R /Info 4 0 R >>\n"
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n"
    return f"{data}{head}{table}{end}startxref\n{len(data)}\n%%EOF\n".encode()


def written(text, size=(900, 160)):
    picture = pil.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((30, 40), text, "black", ImageFont.load_default(48))
    return picture


# ---- documents -----------------------------------------------------------------------------------


def test_the_text_layer_of_each_page(tmp_path):
    path = tmp_path / "annual_report.pdf"
    path.write_bytes(text_pdf("Revenue grew", "Outlook", title="Annual", date="D:20240301120000"))
    first, second = (found_text(page, path) for page in pages(Document(path)))
    assert "Revenue grew" in first.text and "Revenue" not in second.text
    assert "Annual\n" in first.text and "Annual\n" not in second.text  # the title, once
    assert "annual report" in first.text
    assert first.date == second.date == datetime(2024, 3, 1, 12).timestamp()
    assert "1 March 2024" in first.text
    assert first.place == ""


def test_a_page_in_memory_has_its_text():
    page = Image(Page(text_pdf("Lorem ipsum"), 1))
    assert found_text(page, None).text == "Lorem ipsum"


@needs_ocr
def test_only_pages_without_text_layer_are_recognised(tmp_path, monkeypatch):
    scan = io.BytesIO()
    written("Delivery note 5512").save(scan, "PDF")
    scanned = Image(Page(scan.getvalue(), 1))
    assert "Delivery" not in found_text(scanned, None).text
    assert found_text(scanned, None, ocr=True).text.startswith("Delivery note 5512\n")
    monkeypatch.setattr(extract, "read_text", lambda _: pytest.fail("the layer is there"))
    page = Image(Page(text_pdf("A page with a text layer"), 1))
    assert found_text(page, None, ocr=True).text == "A page with a text layer"


# ---- images --------------------------------------------------------------------------------------


def test_a_photo(tmp_path):
    path = tmp_path / "Summer2024" / "IMG_0042_beachParty.jpg"
    path.parent.mkdir()
    path.write_bytes(jpeg(camera_exif()))
    found = found_text(Image(path), path)
    assert found.date == datetime(2024, 5, 17, 14, 3, 22).timestamp()
    assert found.place.endswith("52.52000, 13.40500")
    words = found.text.split()
    for word in ("Summer2024", "Summer", "2024", "0042", "beach", "Party", "birthday", "Kuchen"):
        assert word in words
    assert "17 May 2024" in found.text


@pytest.mark.skipif(
    importlib.util.find_spec("reverse_geocode") is None, reason="needs the extra `places`"
)
def test_a_position_has_the_name_of_the_nearest_city():
    berlin, ocean = jpeg(camera_exif()), jpeg(camera_exif((0, 0, 0), "N", (150, 0, 0), "W"))
    assert found_text(Image(berlin), None).place == (
        "Mitte, State of Berlin, Germany, 52.52000, 13.40500"
    )
    assert found_text(Image(ocean), None).place == "0.00000, -150.00000"
    assert "Germany" in found_text(Image(berlin), None).text


def test_what_has_no_metadata_has_the_words_of_its_path(tmp_path):
    assert found_text(Image(pil.new("RGB", (8, 8))), None) == ExtractedText()
    path = tmp_path / "bc" / "D-e.txt"
    path.parent.mkdir()
    path.write_text("x")
    found = found_text(Text("a caption"), path)
    assert found == ExtractedText("bc D e txt", path.stat().st_mtime)


def test_names_that_are_no_text():
    surrogate = Path("/photos/caf\udce9/\udcff.jpg")
    page = Image(Page(text_pdf("x", date="D:20240301120000"), 1))
    found_text(page, surrogate).text.encode()


@given(st.text(max_size=60))
def test_cleaned_text_can_be_stored_anywhere(text):
    found = clean(text.encode("utf-8", "ignore").decode())
    assert "\0" not in found and "\r" not in found
    assert all(line and line == " ".join(line.split()) for line in filter(None, found.split("\n")))
    assert clean(found) == found


def test_divided_words_and_ligatures():
    assert clean("exam\ufffe\r\nple of an of\ufb01ce\0") == "example of an office"


# ---- recognition ---------------------------------------------------------------------------------


@needs_ocr
def test_text_in_an_image_is_read_without_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network is used"))
    assert ocr.read_text(written("Platform 9 to Hamburg")) == "Platform 9 to Hamburg"
    assert ocr.read_text(pil.new("RGB", (200, 100), "white")) == ""
    assert ocr.read_text(pil.new("RGB", (200, 2), "white")) == ""


@needs_ocr
def test_text_is_recognised_only_when_asked_for(tmp_path):
    path = tmp_path / "a.png"
    written("Exit 12").save(path)
    assert "Exit 12" not in found_text(Image(path), path).text
    assert "Exit 12" in found_text(Image(path), path, ocr=True).text


def test_without_its_packages_recognition_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ocr, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'visavis\[ocr\]'"):
        found_text(Image(pil.new("RGB", (20, 20))), None, ocr=True)
