"""The text that an item can be found by, beside its vector, with its date and place.

PDF page ── text layer, else OCR ──►┐
image ── EXIF, XMP, IPTC, OCR ─────►├─ ExtractedText(text, date, place)
video ── tags of its file ─────────►│
path ── words of file and folder ──►┘
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from calendar import month_name
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visavis.index.ocr import read_text
from visavis.index.words import file_words
from visavis.inputs import Image, Page, Text, Video, Visual
from visavis.processing.images import decode_image
from visavis.processing.media_metadata import media_metadata, parse_date
from visavis.processing.pdf import page_text

LEAST_LAYER = 16  # letters and digits of a text layer; a page with fewer is taken for a scan
NEAREST_PLACE = 50.0  # km; farther away a position has no name
EARTH = 6371.0  # km, mean radius

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_SOFT_HYPHEN = re.compile("(?:\u00ad|\ufffe|\x02)\\s*")  # the latter two are pdfium's


@dataclass(frozen=True)
class ExtractedText:
    """The words, date and place of an item.

    Attributes:
        text: captions, recognised text and names, one a line.
        date: Unix seconds at which the file says that it was made, else of its last change.
        place: `52.52000, 13.40500`, with the extra `places` after the nearest city's name; or "".
    """

    text: str = ""
    date: float | None = None
    place: str = ""


def found_text(part: Text | Visual, path: Path | None, *, ocr: bool = False) -> ExtractedText:
    """Return the searchable text of an item, its date and its place.

    Args:
        part: what is embedded.
        path: the file it comes from; the words of its name and its folder's are part of the text.
        ocr: recognise text in images, and on pages without a text layer. A photo takes about a
            second on one core.

    Raises:
        ImageError: the file cannot be read.
        OSError: it is gone.
        InputError: OCR is asked for and not installed.
    """
    pieces = [file_words(str(path))] if path else []
    date, position = None, None
    if isinstance(part, Image) and isinstance(part.source, Page):
        page = page_text(part.source)
        date = parse_date(page["date"])
        layer = page["text"]
        if ocr and sum(map(str.isalnum, layer)) < LEAST_LAYER:
            layer = read_text(decode_image(part))
        pieces += [page["title"] if part.source.number == 1 else "", layer]
    elif isinstance(part, Image | Video):
        found = media_metadata(part)
        date, position = found.date, found.position
        pieces += found.captions
        if ocr and isinstance(part, Image):
            pieces.append(read_text(decode_image(part)))
    place = _place(*position) if position else ""
    pieces += [place, _date_words(date)]
    if date is None and path:
        date = os.stat(path).st_mtime
    return ExtractedText("\n".join(filter(None, map(clean, pieces))), date, place)


def clean(text: str) -> str:
    """Return text as it is searched: compatibility forms such as ligatures replaced (NFKC), words
    joined that were divided at the end of a line, control characters and blank lines left out."""
    text = _SOFT_HYPHEN.sub("", text)
    text = _CONTROL.sub(" ", unicodedata.normalize("NFKC", text).replace("\r", "\n"))
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))


def _date_words(date: float | None) -> str:
    """Return `2024-05-17 17 May 2024`, so that either way of writing a date finds it."""
    if date is None:
        return ""
    day = datetime.fromtimestamp(date)
    return f"{day:%Y-%m-%d} {day.day} {month_name[day.month]} {day.year}"


def _place(latitude: float, longitude: float) -> str:
    position = f"{latitude:.5f}, {longitude:.5f}"
    return ", ".join((*_names(latitude, longitude), position))


def _names(latitude: float, longitude: float) -> Iterator[str]:
    """Yield city, state and country of the nearest place, if the extra `places` is installed."""
    cities = _cities()
    if cities is None:
        return
    nearest = cities.get((latitude, longitude))
    if _distance(latitude, longitude, nearest["latitude"], nearest["longitude"]) <= NEAREST_PLACE:
        names = (nearest.get(key, "") for key in ("city", "state", "country"))
        yield from dict.fromkeys(filter(None, names))


@cache
def _cities() -> Any:
    if find_spec("reverse_geocode") is None:
        return None
    import reverse_geocode

    return reverse_geocode


def _distance(latitude: float, longitude: float, latitude_2: float, longitude_2: float) -> float:
    """Return the distance of two positions on the sphere in km (haversine formula)."""
    first, second = math.radians(latitude), math.radians(latitude_2)
    half = math.sin((second - first) / 2) ** 2
    half += (
        math.cos(first)
        * math.cos(second)
        * math.sin(math.radians(longitude_2 - longitude) / 2) ** 2
    )
    return 2 * EARTH * math.asin(math.sqrt(min(1.0, half)))
