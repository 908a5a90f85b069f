"""PDF documents as pictures of their pages, rendered when a page is looked at.

    Document ── expand ──► one Image of a Page each ── decode_image ──► render ──► PIL, RGB

A page is rendered with its longer side at PAGE_SIDE pixels whatever its size on paper (about 140
dpi for A4 and Letter): small print stays legible, and no page is larger than that squared. pdfium
reads them (`pip install 'visavis[pdf]'`); scripts in a document are never run. Knows no models and
no text layer: what is seen on a page is what a model sees.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image as pil

from visavis.errors import ImageError, InputError
from visavis.inputs import Document, Image, Message, Page, Part, Prompt
from visavis.processing.media import name_of, open_media

PAGE_SIDE = 1600  # pixels, longer side of a rendered page
MAX_PAGES = 64  # of one document in a prompt; each becomes hundreds of tokens
_lock = threading.Lock()  # pdfium keeps global state


def expand(prompt: Prompt) -> Prompt:
    """Return the prompt with the pages of every document in its place, as pictures.

    Raises:
        ImageError: a document cannot be read.
        InputError: it has fewer pages than were named, or more than MAX_PAGES.
    """
    if not any(isinstance(part, Document) for m in prompt.messages for part in m.parts):
        return prompt
    return Prompt(tuple(replace(m, parts=_expand_parts(m)) for m in prompt.messages))


def _expand_parts(message: Message) -> tuple[Part, ...]:
    expanded: list[Part] = []
    for part in message.parts:
        found = pages(part) if isinstance(part, Document) else (part,)
        if len(found) > MAX_PAGES:
            assert isinstance(part, Document)
            raise InputError(
                f"{len(found)} pages of {name_of(_file(part.source), 'document')}, expected at "
                f"most {MAX_PAGES} in one prompt; name those you mean: visavis.Document(path, "
                "pages=(1, 2))"
            )
        expanded += found
    return tuple(expanded)


def pages(document: Document) -> tuple[Image, ...]:
    """Return a picture of each page, or of those the document names; none is rendered yet.

    Raises:
        ImageError: the document cannot be read.
        InputError: it has fewer pages than were named.
    """
    source = _file(document.source)
    with _open(source) as pdf:
        num_pages = len(pdf)
    name = name_of(source, "document")
    numbers = document.pages or tuple(range(1, num_pages + 1))
    if max(numbers) > num_pages:
        raise InputError(
            f"page {max(numbers)} of {name}, which has {num_pages} pages; pages count from 1"
        )
    return tuple(Image(Page(source, number)) for number in numbers)


def page_size(page: Page) -> tuple[int, int]:
    """Return width and height in pixels that `render` will give; nothing is rendered."""
    with _open_page(page) as opened:
        return _pixels(opened)[1]


def render(page: Page) -> pil.Image:
    """Return one page on white as an RGB picture."""
    with _open_page(page) as opened:
        scale, size = _pixels(opened)
        bitmap = opened.render(scale=scale, rev_byteorder=True)
        try:
            picture = bitmap.to_pil().convert("RGB").copy()  # of its own, not pdfium's, memory
        finally:
            bitmap.close()
    assert picture.size == size, (picture.size, size)
    return picture


def _pixels(page: Any) -> tuple[float, tuple[int, int]]:
    width, height = page.get_size()
    scale = PAGE_SIDE / max(width, height)
    return scale, (ceil(width * scale), ceil(height * scale))  # as pdfium's binding rounds


def _file(source: Path | bytes | str) -> Path | bytes:
    assert not isinstance(source, str)  # Document has replaced it
    return source


@contextmanager
def _open_page(page: Page) -> Iterator[Any]:
    with _open(page.document) as pdf:
        if not 1 <= page.number <= len(pdf):
            raise InputError(
                f"page {page.number} of {name_of(page.document, 'document')}, which has "
                f"{len(pdf)} pages; pages count from 1"
            )
        opened = pdf[page.number - 1]
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def _open(source: Path | bytes) -> Iterator[Any]:
    """Yield the open document; whatever pdfium cannot do meanwhile is one ImageError."""
    try:
        import pypdfium2
    except ImportError:
        raise InputError(
            "documents need pypdfium2, which is not installed: pip install 'visavis[pdf]'"
        ) from None
    name = name_of(source, "document")
    with open_media(source, "document") as data, _lock:
        if b"%PDF-" not in data.read(1024):
            raise ImageError(
                f"{name} is not a PDF document, the only kind that is read; save it as PDF, or "
                "pass pictures as images"
            )
        data.seek(0)
        try:
            pdf = pypdfium2.PdfDocument(source if isinstance(source, bytes) else data)
            try:
                pdf.init_forms()  # or what was filled in would not be drawn
                yield pdf
            finally:
                pdf.close()
        except pypdfium2.PdfiumError as error:
            hint = "it is damaged; download or export it again"
            if "password" in str(error).lower():
                hint = "it is protected by a password: save it without one"
            raise ImageError(f"{name} cannot be read ({error}); {hint}") from None
