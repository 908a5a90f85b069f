"""PDF documents as images of their pages, rendered when a page is looked at.

    Document ── expand ──► one Image of a Page each ── decode_image ──► render ──► PIL, RGB

A page is rendered with its longer side at `pdfium.PAGE_SIDE` pixels at any size on paper (about 140
dpi for A4 and Letter): small print stays legible, and no page is larger than that squared. pdfium
reads them (`pip install 'visavis[pdf]'`) in a child process with limits of time and memory; scripts
in a document are never run. A model sees what is visible on a page; the text layer (`page_text`)
is for searching.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image as pil

from visavis.errors import ImageError, InputError
from visavis.inputs import Document, Image, Message, Page, Part, Prompt
from visavis.processing import bounded
from visavis.processing.media import name_of, open_media

MAX_LISTED = 100_000  # pages of one document
SECONDS, MEMORY = 20.0, 1536 << 20  # of one page, in the child process
MAX_TEXT = 100_000  # characters of one page
MAX_PAGES = 64  # of one document in a prompt; each becomes hundreds of tokens


def expand(prompt: Prompt) -> Prompt:
    """Return the prompt with the pages of every document in its place, as images.

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
    """Return an image of each page, or of those the document names; none is rendered yet.

    Raises:
        ImageError: the document cannot be read.
        InputError: it has fewer pages than were named.
    """
    source = _file(document.source)
    num_pages, _ = _ask("count_pages", source)
    if num_pages > MAX_LISTED:
        raise ImageError(
            f"{name_of(source, 'document')} says that it has {num_pages} pages, expected at most "
            f"{MAX_LISTED}; it is damaged: export it again"
        )
    name = name_of(source, "document")
    numbers = document.pages or tuple(range(1, num_pages + 1))
    if max(numbers) > num_pages:
        raise InputError(
            f"page {max(numbers)} of {name}, which has {num_pages} pages; pages count from 1"
        )
    return tuple(Image(Page(source, number)) for number in numbers)


def page_size(page: Page) -> tuple[int, int]:
    """Return width and height in pixels that `render` will give; nothing is rendered."""
    (width, height), _ = _ask("page_size", page.document, page.number)
    return width, height


def render(page: Page) -> pil.Image:
    """Return one page on white as an RGB image.

    Raises:
        ImageError: the document cannot be read, or the page takes too much time or memory.
    """
    size, rgb = _ask("render_page", page.document, page.number)
    return pil.frombytes("RGB", tuple(size), rgb)


def page_text(page: Page) -> dict[str, str]:
    """Return the `text` of a page's text layer (at most MAX_TEXT characters; empty for a scan) and
    the document's `title` and `date`, as `D:20240517140322+02'00'`.

    Raises:
        ImageError: the document cannot be read, or the page takes too much time or memory.
    """
    found, _ = _ask("page_text", page.document, page.number, MAX_TEXT)
    return dict(found)


def _file(source: Path | bytes | str) -> Path | bytes:
    assert not isinstance(source, str)  # Document has replaced it
    return source


def _ask(what: str, source: Path | bytes, *args: int) -> tuple[Any, bytes]:
    """Call a function of `pdfium.py` on a document in a child process and return its result."""
    if find_spec("pypdfium2") is None:
        raise InputError(
            "documents need pypdfium2, which is not installed: pip install 'visavis[pdf]'"
        )
    name = name_of(source, "document")
    with open_media(source, "document") as data:
        if b"%PDF-" not in data.read(1024):
            raise ImageError(
                f"{name} is not a PDF document, the only kind that is read; save it as PDF, or "
                "pass images as images"
            )
    path, content, stamp = "", b"", []
    if isinstance(source, bytes):
        content = source
    else:
        status = os.stat(source)
        path, stamp = os.path.abspath(source), [status.st_mtime_ns, status.st_size, status.st_ino]
    try:
        return bounded.call(
            f"visavis.processing.pdfium:{what}",
            *(path, stamp, name, *args),
            seconds=SECONDS,
            memory=MEMORY,
            data=content,
        )
    except bounded.BoundExceededError as error:
        page = f"page {args[0]} of " if args else ""
        raise ImageError(
            f"{page}{name} cannot be read: {error}; it is damaged or hostile: export it again"
        ) from None
