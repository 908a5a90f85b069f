"""Inputs of evaluation: items, retrieval tasks, and problems with their records."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import InputError, VisavisError
from visavis.evaluate.metrics import Relevant
from visavis.inputs import Image, Stored, Video
from visavis.processing.images import decode_image

THUMBNAIL = 160  # pixels of the longer side
SHOWN_FAILURES = 6  # of each task, in reports
VISUAL = "<|visual|>"  # where the image or video stands in `Item.verbatim`


class MissingFilesError(InputError):
    """The files of a task are not there."""


@dataclass(frozen=True)
class Item:
    """A query or candidate.

    Args:
        text: its own text, without an instruction.
        visuals: its images and videos, in order.
        instruction: what the vector is for.
        verbatim: the whole string that the task's original evaluation code writes, blanks and
            newlines included, with `VISUAL` in the place of the image or video; models trained on
            these strings embed it instead of instruction and text.
    """

    text: str = ""
    visuals: tuple[Image | Video, ...] = ()
    instruction: str = ""
    verbatim: str = ""

    def key(self) -> str:
        """Return 32 hex digits of all its content; files by path, size and time of change."""
        parts = [self.text, self.instruction, self.verbatim]
        parts += [_visual_key(visual) for visual in self.visuals]
        text = json.dumps(parts, ensure_ascii=False)
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return its text and where its images lie, for results and reports."""
        shown: dict[str, Any] = {"text": self.text or self.verbatim.replace(VISUAL, "").strip()}
        paths = [path for visual in self.visuals for path in visual_paths(visual)]
        if paths:
            shown["images"] = [str(path) for path in paths]
        elif self.visuals:
            shown["images"] = [_name(visual.source) for visual in self.visuals]
        return shown


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used: which one, and why."""

    record: str
    message: str


@dataclass
class RetrievalData:
    """Queries, candidates and which answer which.

    Args:
        queries, query_ids: [Q].
        candidates: [C], each once.
        relevant: [Q].
        pools: [Q], the numbers of each query's own candidates in the order of its row; None: every
            query has all.
        problems: records left out.
        sources: files that were read, for the fingerprint of the data.
        notes: what was found out while reading, as the layout and overlays.
        candidate_ids: [C], their names in predictions; empty: their numbers.
    """

    queries: list[Item] = field(default_factory=list)
    query_ids: list[str] = field(default_factory=list)
    candidates: list[Item] = field(default_factory=list)
    relevant: list[Relevant] = field(default_factory=list)
    pools: list[np.ndarray] | None = None
    problems: list[Problem] = field(default_factory=list)
    sources: list[Path] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    candidate_ids: list[str] = field(default_factory=list)


class CandidateSet:
    """Candidates by content: equal ones get one number."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.ids: list[str] = []
        self.numbers: dict[Any, int] = {}

    def add(self, item: Item, name: str, key: Any = None) -> int:
        """Return the number of an item, adding it where it is new.

        Args:
            key: what makes it the same as another one; None: all its content.
        """
        key = item if key is None else key
        if key not in self.numbers:
            self.numbers[key] = len(self.items)
            self.items.append(item)
            self.ids.append(name)
        return self.numbers[key]


def thumbnails(visuals: Iterable[Image | Video]) -> list[str]:
    """Return small JPEG copies, as data: URIs, of images that lie in no file of their own."""
    found = []
    for visual in visuals:
        if isinstance(visual, Image) and not isinstance(visual.source, Path):
            try:
                found.append(thumbnail(visual))
            except VisavisError:
                continue
    return found


def thumbnail(image: Image | Path) -> str:
    """Return a small JPEG copy as a data: URI.

    Raises:
        ImageError: the image cannot be read.
    """
    copy = decode_image(image)
    copy.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def data_fingerprint(sources: Iterable[Path]) -> str:
    """Return 16 hex digits of the content of annotation files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(set(sources)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def visual_paths(visual: Image | Video) -> Sequence[Path]:
    """Return the files of an image or video that lies in files."""
    source = visual.source
    if isinstance(source, Path):
        return [source]
    if isinstance(source, tuple):
        return [frame.source for frame in source if isinstance(frame.source, Path)]
    return []


def _visual_key(visual: Image | Video) -> str:
    paths = visual_paths(visual)
    if paths:
        return " ".join(map(_file_key, paths)) + f" {getattr(visual, 'frames', None)}"
    source = visual.source
    if isinstance(source, Stored):
        return source.name
    content = source if isinstance(source, bytes) else repr(source).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _file_key(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return str(path)
    return f"{path} {found.st_size} {found.st_mtime_ns}"


def _name(source: Any) -> str:
    return source.name if isinstance(source, Stored) else f"<{type(source).__name__}>"
