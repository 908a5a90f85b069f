"""Pages of PDF documents: which, how large, what they show, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from visavis.errors import ImageError, InputError
from visavis.inputs import Document, Image, Message, Page, Prompt, Text, Video
from visavis.processing import pdf
from visavis.processing.images import content_hash, decode_image, image_size
from visavis.processing.pdf import expand, pages
from visavis.processing.pdfium import PAGE_SIDE

pytest.importorskip("pypdfium2")

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pdf_bytes(num_pages=2, size=(200, 100), rotate=0, field=False):
    """Return a PDF whose page n is red in its leftmost n tenths, or in a filled form field."""
    kids = " ".join(f"{3 + 2 * index} 0 R" for index in range(num_pages))
    last = 3 + 2 * num_pages
    form = f"/AcroForm << /Fields [{last} 0 R] >>" if field else ""
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R {form} >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {num_pages} >>",
    ]
    for index in range(num_pages):
        box = f"/MediaBox [0 0 {size[0]} {size[1]}] /Rotate {rotate}"
        notes = f"/Annots [{last} 0 R]" if field else ""
        width = 0 if field else (index + 1) * size[0] / 10
        drawing = f"1 0 0 rg 0 0 {width} {size[1]} re f"
        objects += [
            f"<< /Type /Page /Parent 2 0 R {box} /Contents {4 + 2 * index} 0 R {notes} >>",
            f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream",
        ]
    if field:
        drawing = "1 0 0 rg 0 0 200 100 re f"
        look = f"/BBox [0 0 200 100] /Length {len(drawing)}"
        objects += [
            "<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /V (b) /F 4 /Rect [0 0 200 100] "
            f"/P 3 0 R /AP << /N {last + 1} 0 R >> >>",
            f"<< /Type /XObject /Subtype /Form {look} >>\nstream\n{drawing}\nendstream",
        ]
    data, offsets = "%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    trailer = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return f"{data}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()


def test_pages_are_pictures_in_the_documents_place(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf_bytes(3))
    video, picture = Video("b.mp4"), Image("c.png")
    parts = (Text("of"), Document(path), Text("and"), video, Document(path, pages=(3, 1)), picture)
    prompt = Prompt((Message("system", "be brief"), Message("user", parts)))
    expanded = expand(prompt)
    first, second, third = (Image(Page(path, number)) for number in (1, 2, 3))
    assert expanded.messages[1].parts == (
        *(Text("of"), first, second, third, Text("and"), video, third, first, picture),
    )
    assert expanded.messages[0] == prompt.messages[0]
    assert expanded.visuals == (first, second, third, video, third, first, picture)
    assert expand(expanded) is expanded


def test_pages_show_what_is_on_them(tmp_path):
    data = pdf_bytes(4)
    (tmp_path / "a.pdf").write_bytes(data)
    for source in (data, tmp_path / "a.pdf"):
        for number, image in enumerate(pages(Document(source)), 1):
            shown = decode_image(image)
            assert shown.mode == "RGB" and shown.size == image_size(image) == (PAGE_SIDE, 800)
            edge = PAGE_SIDE * number // 10
            assert shown.getpixel((edge - 2, 400)) == RED
            assert shown.getpixel((edge + 2, 400)) == WHITE


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"rotate": 90}, (800, 1600)),
        ({"size": (595.28, 841.89)}, (1132, 1600)),
        ({"size": (14_400, 3)}, (1600, 1)),
        ({"size": (1, 1)}, (1600, 1600)),
    ],
)
def test_every_page_has_its_longer_side_at_one_length(settings, size):
    (image,) = pages(Document(pdf_bytes(1, **settings)))
    assert image_size(image) == decode_image(image).size == size


def test_filled_forms_are_drawn():
    (image,) = pages(Document(pdf_bytes(1, field=True)))
    assert decode_image(image).getpixel((800, 400)) == RED


def test_pages_are_named_by_document_and_number(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf_bytes())
    one, two = pages(Document(tmp_path / "a.pdf"))
    hashes = {content_hash(image) for image in (one, two, *pages(Document(pdf_bytes())))}
    assert len(hashes) == 2
    assert content_hash(Document(pdf_bytes())) != content_hash(Document(pdf_bytes(), pages=(1,)))
    assert one == Image(Page(tmp_path / "a.pdf", 1)) != two


def test_threads_share_children():
    images = pages(Document(pdf_bytes(4))) * 4
    with ThreadPoolExecutor(4) as pool:
        shown = list(pool.map(decode_image, images))
    assert all(shown[i].tobytes() == shown[i % 4].tobytes() for i in range(16))


def test_pages_that_are_not_there(monkeypatch):
    for document in (Document(pdf_bytes(), pages=(1, 3)), Document(pdf_bytes(), pages=(3,))):
        with pytest.raises(InputError, match="page 3 of the document of .* has 2 pages"):
            pages(document)
    with pytest.raises(InputError, match="page 7 .* has 2 pages"):
        decode_image(Image(Page(pdf_bytes(), 7)))
    monkeypatch.setattr(pdf, "MAX_PAGES", 3)
    with pytest.raises(InputError, match=r"4 pages .*at most 3.*pages=\(1, 2\)"):
        expand(Prompt.of(Document(pdf_bytes(4))))
    assert len(expand(Prompt.of(Document(pdf_bytes(4), pages=(2, 3, 4)))).visuals) == 3
    assert len(pages(Document(pdf_bytes(4)))) == 4  # each in a prompt of its own


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes"),
        (b"\x89PNG\r\n\x1a\n", "not a PDF document"),
        (pdf_bytes()[:300], "damaged"),
        (b"%PDF-1.4 and nothing else", "damaged"),
    ],
)
def test_what_is_no_document(data, says, tmp_path):
    (tmp_path / "a.pdf").write_bytes(data)
    for source in (data, tmp_path / "a.pdf"):
        with pytest.raises(ImageError, match=says):
            expand(Prompt.of(Document(source)))


def test_paths_that_are_no_documents(tmp_path):
    for path, says in ((tmp_path, "is a folder"), (tmp_path / "a.pdf", "does not exist")):
        with pytest.raises(ImageError, match=says):
            pages(Document(path))


def test_a_document_given_as_a_picture_is_told_what_to_do():
    with pytest.raises(ImageError, match=r"visavis\.Document"):
        decode_image(pdf_bytes())


def test_without_pdfium_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(pdf, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'visavis\[pdf\]'"):
        pages(Document(pdf_bytes()))


@pytest.mark.shared
def test_real_documents(shared_data):
    folder = shared_data / "us-gov-pdf"
    counts = {path.name: len(pages(Document(path))) for path in folder.glob("*.pdf")}
    assert sorted(counts.values()) == [1, 1, 1, 15]
    for number in (1, 9):  # text, then a page that is one scanned picture
        image = Image(Page(folder / "federal-register-2020-17221.pdf", number))
        shown = decode_image(image).convert("L").resize((32, 32))
        assert image_size(image) == (1237, 1600)
        assert min(shown.get_flattened_data()) < 220
