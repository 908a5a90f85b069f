"""Metadata in files of images and videos: date, position and captions.

    image ── EXIF, XMP, IPTC, PNG texts ──►┐
    video ── tags of the container ───────►┴─ MediaMetadata(date, position, captions)

A file with damaged metadata is read as one without.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image as pil
from PIL import ImageFile, IptcImagePlugin

from visavis.inputs import Image, Stored, Video
from visavis.processing.images import open_image, without_warnings
from visavis.processing.media import frame_files
from visavis.processing.video_scan import container_tags

MAX_CAPTION = 20_000  # characters of one field
MAX_XMP = 1 << 20  # bytes

_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_DATES = (0x9003, 0x9004, 0x0132)  # taken, digitised, changed
_USER_COMMENT = 0x9286
_DESCRIPTION = 0x010E
_XP = (0x9C9B, 0x9C9C, 0x9C9E, 0x9C9F)  # Windows: title, comment, keywords, subject; UTF-16
_IPTC = ((2, 5), (2, 105), (2, 120), (2, 25), (2, 92), (2, 90), (2, 95), (2, 101))
_DC = "{http://purl.org/dc/elements/1.1/}"
_PHOTOSHOP = "{http://ns.adobe.com/photoshop/1.0/}"
_XMP_FIELDS = {
    *(f"{_DC}{name}" for name in ("title", "description", "subject")),
    *(f"{_PHOTOSHOP}{name}" for name in ("Headline", "City", "State", "Country")),
}
_PNG_TEXTS = ("Title", "Description", "Comment", "comment")
# What encoders write when nobody has set a clock.
_NO_DATES = {datetime(1904, 1, 1), datetime(1970, 1, 1)}
_DATE = re.compile(r"(?:D:)?(\d{4})[:-]?(\d\d)[:-]?(\d\d)(?:[T ]?(\d\d):?(\d\d)(?::?(\d\d))?)?")
_ISO_6709 = re.compile(r"([+-]\d+(?:\.\d+)?)([+-]\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class MediaMetadata:
    """Metadata of one file.

    Attributes:
        date: Unix seconds. The clock of a camera is read as the local time of this machine, its
            time zone is left out: a photo of an evening abroad is found by the date of that
            evening. Times that end in Z, as of most videos, are UTC.
        position: latitude and longitude in degrees.
        captions: titles, descriptions and keywords, each once.
    """

    date: float | None = None
    position: tuple[float, float] | None = None
    captions: tuple[str, ...] = ()


def media_metadata(part: Image | Video) -> MediaMetadata:
    """Return the metadata of a file, empty for what is no file (pages, pixels, folders of frames).

    Raises:
        ImageError: the file cannot be opened.
    """
    source = part.source
    assert not isinstance(source, str)  # Image and Video have replaced it
    if isinstance(part, Video):
        return MediaMetadata() if frame_files(source) else _of_tags(container_tags(part))
    if not isinstance(source, (Path, bytes, Stored)):
        return MediaMetadata()
    with open_image(source) as (_, opened), without_warnings():
        return _of_image(opened)


def parse_date(text: str) -> float | None:
    """Return the Unix seconds of a date as EXIF, PDF and ISO 8601 write it: in UTC if it ends in
    Z, else local time; None if it is no date or one that stands for none."""
    found = _DATE.match(text.strip())
    if found is None:
        return None
    with suppress(ValueError, OverflowError, OSError):
        year, month, day, hour, minute, second = (int(number or 0) for number in found.groups())
        date = datetime(year, month, day, hour, minute, second)
        if date.year >= 1826 and date not in _NO_DATES:  # the oldest photograph
            return date.replace(tzinfo=UTC if text.strip().endswith("Z") else None).timestamp()
    return None


def _of_image(opened: pil.Image) -> MediaMetadata:
    exif: Any = {}
    details: Mapping[int, Any] = {}
    gps: Mapping[int, Any] = {}
    with suppress(Exception):  # as decoding does: broken EXIF data is no data
        exif = opened.getexif()
        details, gps = exif.get_ifd(_EXIF_IFD), exif.get_ifd(_GPS_IFD)
    dates = (parse_date(_text(details.get(tag) or exif.get(tag))) for tag in _DATES)
    captions: list[str] = [_text(exif.get(_DESCRIPTION))]
    captions += [_text(exif.get(tag), "utf-16-le") for tag in _XP]
    captions.append(_user_comment(details.get(_USER_COMMENT)))
    captions += [_text(opened.info.get(key)) for key in _PNG_TEXTS]
    with suppress(Exception):
        captions += _iptc(opened)
    with suppress(Exception):
        captions += _xmp(opened.info.get("xmp") or opened.info.get("XML:com.adobe.xmp") or b"")
    position = None
    with suppress(Exception):
        position = _degrees(gps)
    return MediaMetadata(next(filter(None, dates), None), position, _each_once(captions))


def _of_tags(tags: Mapping[str, str]) -> MediaMetadata:
    lower = {key.lower(): value for key, value in tags.items()}
    date = lower.get("com.apple.quicktime.creationdate") or lower.get("creation_time") or ""
    place = lower.get("com.apple.quicktime.location.iso6709") or lower.get("location") or ""
    found = _ISO_6709.match(place)
    position = _on_earth(float(found[1]), float(found[2])) if found else None
    captions = [lower.get(key, "") for key in ("title", "description", "comment", "keywords")]
    return MediaMetadata(parse_date(date), position, _each_once(captions))


def _degrees(gps: Mapping[int, Any]) -> tuple[float, float] | None:
    """Return the position of an EXIF GPS directory: degrees, minutes, seconds and hemispheres."""

    def angle(values: Any, is_negative: bool) -> float:
        degrees, minutes, seconds = (*map(float, values), 0.0, 0.0)[:3]
        return (degrees + minutes / 60 + seconds / 3600) * (-1 if is_negative else 1)

    if not gps.get(2) or not gps.get(4):
        return None
    south, west = (_text(gps.get(tag)).upper() for tag in (1, 3))
    return _on_earth(angle(gps[2], south == "S"), angle(gps[4], west == "W"))


def _on_earth(latitude: float, longitude: float) -> tuple[float, float] | None:
    """Return the position, unless it is none or the one that devices without a fix write."""
    if not (math.isfinite(latitude) and math.isfinite(longitude)) or latitude == longitude == 0:
        return None
    return (latitude, longitude) if abs(latitude) <= 90 and abs(longitude) <= 180 else None


def _user_comment(value: Any) -> str:
    """Return EXIF's UserComment, whose first 8 bytes name the encoding."""
    if not isinstance(value, bytes):
        return _text(value)
    kind, content = value[:8].rstrip(b"\0"), value[8:]
    return _text(content, "utf-16" if kind == b"UNICODE" else "utf-8")


def _iptc(opened: pil.Image) -> Iterator[str]:
    assert isinstance(opened, ImageFile.ImageFile)
    found = IptcImagePlugin.getiptcinfo(opened) or {}
    for key in _IPTC:
        values = found.get(key) or []
        yield from map(_text, values if isinstance(values, list) else [values])


def _xmp(data: bytes | str) -> Iterator[str]:
    """Yield the captions in an XMP packet."""
    packet = data.encode() if isinstance(data, str) else data
    if not packet or len(packet) > MAX_XMP or b"<!" in packet:  # no entities
        return
    for element in ElementTree.fromstring(packet.strip(b"\0 \r\n\t")).iter():
        if element.tag in _XMP_FIELDS:
            yield from map(_text, element.itertext())
        for name, value in element.attrib.items():
            if name in _XMP_FIELDS:
                yield _text(value)


def _text(value: Any, encoding: str = "utf-8") -> str:
    if isinstance(value, tuple):  # of bytes, as Pillow gives XP tags
        value = bytes(value)
    if isinstance(value, bytes):
        value = value.decode(encoding, "replace")
    if not isinstance(value, str):
        return ""
    return value.replace("\0", "").encode("utf-8", "ignore").decode().strip()[:MAX_CAPTION]


def _each_once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, texts)))
