"""Pages of PDF documents by pdfium, in the child process of `bounded.call`; used by `pdf.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import ceil
from typing import Any

from visavis.errors import ImageError, InputError

PAGE_SIDE = 1600  # pixels, longer side of a rendered page
_opened: list[tuple[Any, Any]] = []  # the document asked for last, and by what


def count_pages(data: bytes, path: str, stamp: list[int], name: str) -> tuple[int, bytes]:
    """Return the number of pages of the document in a file, or in `data` if `path` is empty."""
    with _named(name):
        return len(_open(data, path, stamp)), b""


def page_size(
    data: bytes, path: str, stamp: list[int], name: str, number: int
) -> tuple[list[int], bytes]:
    """Return width and height in pixels of a rendered page."""
    with _named(name), closing(_page(_open(data, path, stamp), name, number)) as page:
        return list(_pixels(page)[1]), b""


def render_page(
    data: bytes, path: str, stamp: list[int], name: str, number: int
) -> tuple[list[int], bytes]:
    """Return width, height and the RGB bytes of a page on white."""
    with _named(name), closing(_page(_open(data, path, stamp), name, number)) as page:
        scale, size = _pixels(page)
        with closing(page.render(scale=scale, rev_byteorder=True)) as bitmap:
            rgb = bitmap.to_pil().convert("RGB")
            assert rgb.size == size, (rgb.size, size)
            return list(size), rgb.tobytes()


def page_text(
    data: bytes, path: str, stamp: list[int], name: str, number: int, most: int
) -> tuple[dict[str, str], bytes]:
    """Return the text layer of a page, at most `most` characters of it, and the document's title
    and the date it was made on, as `D:20240517140322+02'00'`."""
    with _named(name):
        document = _open(data, path, stamp)
        known = document.get_metadata_dict(skip_empty=True)
        with closing(_page(document, name, number)) as page, closing(page.get_textpage()) as layer:
            text = layer.get_text_range(0, min(layer.count_chars(), most))
        found = {
            "text": text,
            "title": known.get("Title", ""),
            "date": known.get("CreationDate", ""),
        }
        return {
            key: value[:most].encode("utf-8", "ignore").decode() for key, value in found.items()
        }, b""


def _pixels(page: Any) -> tuple[float, tuple[int, int]]:
    width, height = page.get_size()
    scale = PAGE_SIDE / max(width, height)
    return scale, (ceil(width * scale), ceil(height * scale))  # as pdfium's binding rounds


def _page(document: Any, name: str, number: int) -> Any:
    if not 1 <= number <= len(document):
        raise InputError(
            f"page {number} of {name}, which has {len(document)} pages; pages count from 1"
        )
    return document[number - 1]


def _open(data: bytes, path: str, stamp: list[int]) -> Any:
    """Return the open document; the last one is kept open for its next page."""
    import pypdfium2

    key = (data, path, stamp)
    if _opened and _opened[0][0] == key:
        return _opened[0][1]
    while _opened:
        _opened.pop()[1].close()
    # A file object, because pdfium takes only names that are UTF-8; closed with the document.
    file: Any = open(path, "rb") if path else data  # noqa: SIM115
    document = pypdfium2.PdfDocument(file, autoclose=True)
    document.init_forms()  # or what was filled in would not be drawn
    _opened.append((key, document))
    return document


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Raise what pdfium cannot do as ImageError."""
    import pypdfium2

    try:
        yield
    except pypdfium2.PdfiumError as error:
        hint = "it is damaged; download or export it again"
        if "password" in str(error).lower():
            hint = "it is protected by a password: save it without one"
        raise ImageError(f"{name} cannot be read ({error}); {hint}") from None
