"""Searchable text, date and place of items: file name, text layer of PDF pages, EXIF."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from visavis.index.words import file_words
from visavis.inputs import Image, Page, Visual
from visavis.processing.pdf import page_text


@dataclass(frozen=True)
class ExtractedText:
    """Text found in an item, its date in Unix seconds (None: unknown) and its place."""

    text: str = ""
    date: float | None = None
    place: str = ""


def found_text(part: Visual, path: Path | None, *, ocr: bool = False) -> ExtractedText:
    """Return the searchable text, date and place of an image, page, video or segment.

    Args:
        part: the input that is embedded.
        path: the file it comes from, if there is one.
        ocr: recognise text in images and scanned pages.

    Raises:
        InputError: `ocr` is set, and the package for it is not installed.
        ImageError: the file cannot be read.
    """
    texts = []
    date = None
    if path is not None:
        texts.append(file_words(str(path)))
        date = os.stat(path).st_mtime
    if isinstance(part, Image) and isinstance(part.source, Page):
        texts.append(page_text(part.source))
    return ExtractedText("\n".join(filter(None, texts)), date)
