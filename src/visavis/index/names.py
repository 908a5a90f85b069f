"""Sources of items that are files, and what they say.

/photos/cat.jpg            an image
/clips/cat.mp4             a video
/clips/cat.mp4#t=10,20     a segment of a video in seconds, as in Media Fragments URIs
/papers/a.pdf#page=3       a page of a document, as in URLs
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from visavis.inputs import VIDEO_SUFFIXES

_PAGE = re.compile(r"(.+\.pdf)#page=([1-9][0-9]{0,8})", re.IGNORECASE | re.DOTALL)
_SEGMENT = re.compile(
    r"(.+)#t=([0-9]{1,9}(?:\.[0-9]{1,3})?),([0-9]{1,9}(?:\.[0-9]{1,3})?)", re.DOTALL
)


@dataclass(frozen=True)
class SourceName:
    """A source, taken apart: the file, and the page or segment of it."""

    path: str
    kind: str  # "image", "page" or "video"
    page: int | None = None
    begin_s: float | None = None
    end_s: float | None = None

    @classmethod
    def parse(cls, source: str) -> SourceName:
        """Return the parts of the source of a file."""
        if page := _PAGE.fullmatch(source):
            return cls(page[1], "page", page=int(page[2]))
        segment = _SEGMENT.fullmatch(source)
        if segment and _is_video(segment[1]):
            return cls(segment[1], "video", begin_s=float(segment[2]), end_s=float(segment[3]))
        return cls(source, "video" if _is_video(source) else "image")

    @property
    def title(self) -> str:
        """A display name: the file name, with the page or the begin of the segment."""
        name = os.path.basename(self.path)
        if self.page is not None:
            return f"{name}, page {self.page}"
        return name if self.begin_s is None else f"{name}, {clock(self.begin_s)}"


def page_source(path: str, page: int) -> str:
    """Return the source of a page of a document."""
    return f"{path}#page={page}"


def segment_source(path: str, begin_s: float, end_s: float) -> str:
    """Return the source of a segment of a video; times are rounded to milliseconds."""
    return f"{path}#t={_seconds(begin_s)},{_seconds(end_s)}"


def clock(seconds: float) -> str:
    """Return seconds as a player shows them: 75.2 -> "1:15"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _seconds(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _is_video(path: str) -> bool:
    return Path(path).suffix.lower() in VIDEO_SUFFIXES
