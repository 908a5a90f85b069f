"""Index items that are files: names, inputs and previews.

/photos/cat.jpg        an image
/clips/cat.mp4         a video
/papers/a.pdf#page=3   a page of a document, as in URLs
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.errors import VisavisError
from visavis.index.store import StoredItem
from visavis.inputs import Document, Image, Page, Prompt, Text, Video, Visual
from visavis.processing.images import decode_image
from visavis.processing.pdf import pages
from visavis.processing.video import middle_frame

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_PAGE = re.compile(r"(.+\.pdf)#page=([1-9][0-9]*)", re.IGNORECASE | re.DOTALL)


def preview(item: StoredItem, size: int = 256) -> PILImage | str:
    """Return a preview image of an item, or its text if it has none.

    Raises:
        ImageError: the file is gone or no longer readable.
    """
    visual = visual_of(item)
    if visual is None:
        return item.text
    picture = picture_of(visual)
    picture.thumbnail((size, size))
    return picture


def title(item: StoredItem) -> str:
    """Return a display name: the file name with the page, or the source of the item."""
    if not item.is_file:
        return item.source
    page = _PAGE.fullmatch(item.source)
    return file_of(item.source).name + (f", page {page[2]}" if page else "")


def visual_of(item: StoredItem) -> Visual | None:
    """Return the input of an item: its file, or the stored preview of an in-memory item."""
    if item.preview is not None:
        return Image(item.preview)
    return shown_by(item.source) if item.is_file else None


def shown_by(source: str) -> Visual:
    """Return the input of an item that is a file."""
    page = _PAGE.fullmatch(source)
    if page is not None:
        return Image(Page(Path(page[1]), int(page[2])))
    (part,) = Prompt.of(Path(source)).messages[0].parts
    assert not isinstance(part, Text)
    return part


def file_of(source: str) -> Path:
    """Return where the file of an item lies."""
    page = _PAGE.fullmatch(source)
    return Path(source if page is None else page[1])


def still_there(source: str, num_pages: dict[Path, int]) -> bool:
    """Return whether a file is there; with the page, where it is one. Fills in `num_pages`."""
    file, page = file_of(source), _PAGE.fullmatch(source)
    if page is None or not os.path.isfile(file):
        return os.path.isfile(file)
    if file not in num_pages:
        with suppress(VisavisError):  # it is there, but cannot be read
            num_pages[file] = len(pages(Document(file)))
    return int(page[2]) <= num_pages.get(file, math.inf)


def picture_of(visual: Visual) -> PILImage:
    """Return a document's first page, a video's middle frame, or an image, as a copy."""
    if isinstance(visual, Document):
        visual = pages(visual)[0]
    return middle_frame(visual) if isinstance(visual, Video) else decode_image(visual).copy()


def source_of(visual: Visual) -> str:
    """Return the name of the file or page that is shown, if that says all; else nothing."""
    source = visual.source
    page = f"#page={source.number}" if isinstance(source, Page) else ""
    file = source.document if isinstance(source, Page) else source
    if not isinstance(file, Path):
        return ""
    path = Path(os.path.abspath(file.expanduser()))
    absolute: Any = Page(path, source.number) if isinstance(source, Page) else path
    named = f"{path}{page}"
    return named if replace(visual, source=absolute) == shown_by(named) else ""
