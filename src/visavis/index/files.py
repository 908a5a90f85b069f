"""Entries of an index: files taken apart into items, and items from memory.

image ──► one item      document ──► one a page      video ──► one, or one a segment
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from visavis.errors import InputError
from visavis.index.items import kind_of, source_of
from visavis.index.names import SourceName, page_source, segment_source
from visavis.index.segments import Segment, segment_videos, segments
from visavis.index.store import NO_STAMP, KnownItem, Stamp
from visavis.inputs import Document, Prompt, Text, Video, Visual
from visavis.processing.images import ContentHasher
from visavis.processing.pdf import pages

_NO_KEYS = ("source", "metadata", "date", "place")  # of a dict, what is not embedded


@dataclass(frozen=True)
class Settings:
    """How files are read.

    Attributes:
        ocr: recognise text in images and scanned pages.
        segments: cut videos into segments, each of which is an item.
    """

    ocr: bool = False
    segments: bool = False

    def __str__(self) -> str:
        return " ".join(name for name in ("ocr", "segments") if getattr(self, name))


@dataclass(frozen=True)
class Entry:
    """One item on its way into the index; `path` is empty for an item from memory.

    `segment` is set for a segment of a video, whose prompt is made when it is embedded."""

    source: str
    prompt: Prompt
    kind: str
    path: str = ""
    page: int | None = None
    segment: Segment | None = None
    parts: int = 1
    metadata: Mapping[str, Any] | None = None  # None: what the index has
    date: float | None = None
    place: str = ""
    stamp: Stamp = NO_STAMP

    def is_current(self, known: KnownItem, settings: str) -> bool:
        """Return whether the index holds this file as it is, read with the same settings."""
        return (
            bool(self.path)
            and self.metadata is None
            and known.stamp == self.stamp
            and known.settings == settings
            and known.parts == self.parts
        )

    @property
    def visuals(self) -> list[Visual]:
        """Everything to be seen in it."""
        return [p for m in self.prompt.messages for p in m.parts if not isinstance(p, Text)]


def entries_of_file(path: Path, stamp: Stamp, settings: Settings) -> list[Entry]:
    """Return the item that a file is, or those that its pages or segments are.

    Raises:
        VisavisError: the file cannot be read.
    """
    (part,) = Prompt.of(path).messages[0].parts
    name = str(path)
    if isinstance(part, Document):
        found = pages(part)
        return [
            Entry(
                page_source(name, number),
                Prompt.of(page),
                kind="page",
                path=name,
                page=number,
                parts=len(found),
                stamp=stamp,
            )
            for number, page in enumerate(found, 1)
        ]
    if isinstance(part, Video) and settings.segments:
        cut = segments(path)
        return [
            Entry(
                segment_source(name, one.begin_s, one.end_s),
                Prompt.of(part),
                kind="video",
                path=name,
                segment=one,
                parts=len(cut),
                stamp=stamp,
            )
            for one in cut
        ]
    kind = "video" if isinstance(part, Video) else "image"
    return [Entry(name, Prompt.of(part), kind=kind, path=name, stamp=stamp)]


def entry_of_item(item: Any, hasher: ContentHasher) -> Entry:
    """Return the entry of an item from memory, or of a file in another form than its path.

    Raises:
        VisavisError: it cannot be used.
    """
    given: dict[str, Any] = {}
    if isinstance(item, Mapping) and "role" not in item and "type" not in item:
        given = {key: item[key] for key in _NO_KEYS if key in item}
        item = {key: value for key, value in item.items() if key not in _NO_KEYS}
    prompt = Prompt.of(item)
    extra = _extra(given)
    if "source" in given:
        return Entry(str(given["source"]), prompt, kind=kind_of(prompt), **extra)
    entry = Entry("", prompt, kind=kind_of(prompt), **extra)
    visuals = entry.visuals
    if len(visuals) == 1 and (path := source_of(visuals[0])):
        if prompt.text.strip():
            return replace(entry, source=f"{path} + {prompt.text}")
        named = SourceName.parse(path)
        stamp = stamp_of(named.path)
        return replace(entry, source=path, path=named.path, page=named.page, stamp=stamp)
    if not visuals:
        return replace(entry, source=prompt.text)
    prompt = hasher.identify(prompt)
    return replace(entry, source=f"item {prompt.content_key(hasher.hash)}", prompt=prompt)


def _extra(given: Mapping[str, Any]) -> dict[str, Any]:
    date = given.get("date")
    metadata = checked_metadata(given.get("metadata"))
    if date is not None and (isinstance(date, bool) or not isinstance(date, (int, float))):
        raise InputError(f"date is {date!r:.80}, expected Unix seconds")
    return {"metadata": metadata, "date": date, "place": str(given.get("place") or "")}


def checked_metadata(metadata: Any) -> Mapping[str, Any] | None:
    """Return metadata that can be kept.

    Raises:
        InputError: it is no dict that JSON can hold.
    """
    if metadata is None:
        return None
    try:
        if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
            raise TypeError("expected a dict whose keys are str")
        json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"metadata is {metadata!r:.80}, which JSON cannot hold ({error})"
        ) from None
    return metadata


def stamp_of(path: str | Path) -> Stamp:
    """Return the stamp of a file; an empty one if it is gone or has no possible name: reading it
    says so."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return NO_STAMP
    return Stamp(status.st_size, status.st_mtime_ns & 2**63 - 1)  # what SQLite can hold


def identified(entry: Entry, hasher: ContentHasher) -> tuple[Entry, str]:
    """Return an entry whose content is known, and the key of the content.

    Raises:
        VisavisError: the file cannot be read.
    """
    if entry.segment is not None:  # hashed as the file and the times; decoded when embedded
        (video,) = entry.visuals
        cut = Text(f"seconds {entry.segment.begin_s:.3f} to {entry.segment.end_s:.3f}")
        whole = hasher.identify(Prompt.of([video, cut]))
        return entry, whole.content_key(hasher.hash)
    prompt = hasher.identify(entry.prompt)
    return replace(entry, prompt=prompt), prompt.content_key(hasher.hash)


def embedded(entries: Sequence[Entry]) -> list[Prompt]:
    """Return the prompts of entries that are embedded; consecutive segments of one video are read
    from it at once.

    Raises:
        ImageError: the video of a segment cannot be read.
    """
    prompts: list[Prompt] = []
    for path, group in groupby(entries, lambda one: one.path if one.segment else ""):
        sharing = list(group)
        if path:
            cut = [entry.segment for entry in sharing if entry.segment]
            prompts += [Prompt.of(video) for video in segment_videos(Path(path), cut)]
        else:
            prompts += [entry.prompt for entry in sharing]
    return prompts
