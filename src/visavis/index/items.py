"""Items as they are shown, and the inputs that they stand for."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.errors import VisavisError
from visavis.index.names import SourceName, page_source
from visavis.index.segments import Segment, segment_image, segment_video
from visavis.index.store import StoredItem
from visavis.inputs import Document, Image, Page, Prompt, Text, Video, Visual
from visavis.processing.images import decode_image
from visavis.processing.pdf import pages
from visavis.processing.video import middle_frame

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


def preview(item: StoredItem, size: int = 256) -> PILImage | str:
    """Return a preview image of an item, or its text if it has none.

    Raises:
        ImageError: the file is gone or no longer readable.
    """
    if item.preview is None and not item.is_file:
        return item.text
    segment = segment_of(item)
    visual = segment_image(Path(item.path), segment) if segment else visual_of(item)
    assert visual is not None
    shown = picture_of(visual)
    shown.thumbnail((size, size))
    return shown


def title(item: StoredItem) -> str:
    """Return a display name: the file name with the page or the time, or the item's source."""
    return SourceName.parse(item.source).title if item.is_file else item.source


def visual_of(item: StoredItem) -> Visual | None:
    """Return the input of an item: its file, page or segment, or the stored preview of an item
    that is no file; None of a text.

    Raises:
        ImageError: the video of a segment is gone or no longer readable.
    """
    if item.preview is not None:
        return Image(item.preview)
    return shown_by(item.source) if item.is_file else None


def segment_of(item: StoredItem) -> Segment | None:
    """Return the segment of a video that an item is, if it is one."""
    if item.begin_s is None or item.end_s is None:
        return None
    return Segment(item.begin_s, item.end_s)


def shown_by(source: str) -> Visual:
    """Return the input of an item that is a file.

    Raises:
        ImageError: the video of a segment is gone or no longer readable.
    """
    named = SourceName.parse(source)
    if named.page is not None:
        return Image(Page(Path(named.path), named.page))
    if named.begin_s is not None and named.end_s is not None:
        return segment_video(Path(named.path), Segment(named.begin_s, named.end_s))
    return _file_input(Path(source))


def _file_input(path: Path) -> Visual:
    (part,) = Prompt.of(path).messages[0].parts
    assert not isinstance(part, Text)
    return part


def file_of(source: str) -> Path:
    """Return where the file of an item lies."""
    return Path(SourceName.parse(source).path)


def still_there(source: str, num_pages: dict[Path, int]) -> bool:
    """Return whether a file is there; with the page, where it is one. Fills in `num_pages`."""
    named = SourceName.parse(source)
    file = Path(named.path)
    if named.page is None or not os.path.isfile(file):
        return os.path.isfile(file)
    if file not in num_pages:
        with suppress(VisavisError):  # it is there, but cannot be read
            num_pages[file] = len(pages(Document(file)))
    return named.page <= num_pages.get(file, math.inf)


def picture_of(visual: Visual) -> PILImage:
    """Return a document's first page, a video's middle frame, or an image, as a copy."""
    if isinstance(visual, Document):
        visual = pages(visual)[0]
    return middle_frame(visual) if isinstance(visual, Video) else decode_image(visual).copy()


def kind_of(prompt: Prompt) -> str:
    """Return the kind of an item from memory: that of the first thing to be seen in it."""
    visuals = [p for m in prompt.messages for p in m.parts if not isinstance(p, Text)]
    if not visuals:
        return "text"
    first = visuals[0]
    if isinstance(first, Video):
        return "video"
    is_page = isinstance(first, Document) or isinstance(first.source, Page)
    return "page" if is_page else "image"


def source_of(visual: Visual) -> str:
    """Return the name of the file or page that is shown, if that says all; else nothing."""
    source = visual.source
    file = source.document if isinstance(source, Page) else source
    if not isinstance(file, Path):
        return ""
    path = Path(os.path.abspath(file.expanduser()))
    if isinstance(source, Page):
        named = page_source(str(path), source.number)
        absolute: Any = Page(path, source.number)
    else:
        named, absolute = str(path), path
    parsed = SourceName.parse(named)
    if parsed.begin_s is not None:  # a file that is named as a segment is
        return ""
    return named if replace(visual, source=absolute) == shown_by(named) else ""
