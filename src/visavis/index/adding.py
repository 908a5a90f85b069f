"""Adding to an index: files and items are compared with what is known, the rest is embedded.

paths, items ──► file unchanged? nothing to do
            └──► content hash ──► known? its vector is used again
                             └──► model.embed, a batch at a time ──► store   (one commit each)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.errors import InputError, StoreError, VisavisError
from visavis.index.extract import ExtractedText, found_text
from visavis.index.files import (
    Entry,
    Settings,
    embedded,
    entries_of_file,
    entry_of_item,
    identified,
    stamp_of,
)
from visavis.index.filters import is_below
from visavis.index.items import picture_of
from visavis.index.store import IndexRow, KnownItem, VectorStore
from visavis.processing.images import ContentHasher
from visavis.processing.media import scan_media
from visavis.utils import jpeg_preview, track

if TYPE_CHECKING:
    from visavis.api import Model

BATCH_ITEMS = 32  # per commit: what Ctrl-C or a crash may lose
LOOKED_UP = 500  # files that are looked up in the store at a time
KEPT_PREVIEW_SIZE = 512  # pixels, longer side; only for images that are not files


@dataclass
class AddReport:
    """Result of `add`.

    Attributes:
        added, changed, unchanged: numbers of items.
        removed: number of items that changed files no longer hold: pages, segments.
        failed: (source, reason) of each item or folder that cannot be read.
        left_out: (suffix, reason) → number of files in folders that were not tried.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def is_useless(self) -> bool:
        """Whether not one item could be used."""
        return not self.added + self.changed + self.unchanged


class Adder:
    """One call of `add`.

    Args:
        meta: model, fingerprint and dim of the vectors.
        metadata: of all files; None: those that they have already.
    """

    def __init__(
        self,
        store: VectorStore,
        model: Model,
        meta: Mapping[str, str],
        settings: Settings,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.store, self.model, self.meta = store, model, meta
        self.settings, self.metadata = settings, metadata
        self.report = AddReport()
        self._hasher = ContentHasher()
        self._waiting: dict[str, list[Entry]] = {}  # content → items that need its vector
        self._ready: list[IndexRow] = []  # items whose vector is known already
        self._was_known: dict[str, bool] = {}  # source → it had other content
        self._is_same: set[str] = set()  # sources whose content is as it was
        self._changed_files: dict[str, set[str]] = {}  # path → sources that it has now
        self._left_out: dict[str, Counter[tuple[str, str]]] = {}  # folder → (suffix, reason)

    def run(self, items: Sequence[Any], *, progress: bool) -> AddReport:
        """Add everything; Ctrl-C and errors keep every finished batch."""
        files, others = self._collect(items)
        shown = len(files) + len(others)
        steps = track(self._steps(files, others), "indexing", weights=[1] * shown, show=progress)
        for entries in steps:
            self._take(entries)
        self._flush()
        self._remove_superseded()
        if self.report.added + self.report.changed + self.report.removed:
            self.store.refresh()
        self._keep_left_out()
        return self.report

    def _collect(self, items: Sequence[Any]) -> tuple[list[Path], list[Entry]]:
        """Find out what is to be added, each once; folders are searched here."""
        files: dict[Path, None] = {}
        others: dict[str, Entry] = {}
        for item in items:
            if not isinstance(item, (str, Path)):
                with self._reported(type(item).__name__):
                    entry = entry_of_item(item, self._hasher)
                    others[entry.source] = entry
                continue
            with self._reported(str(item)):
                # Absolute, so that the index works from any folder; links stay as they were named.
                path = Path(item).expanduser()
                is_folder = os.path.isdir(path)
                place = Path(os.path.abspath(path)) if is_folder else path
                scan = scan_media(place, with_others=True)
                self.report.failed += [(str(one), reason) for one, reason in scan.unreadable]
                self.report.left_out += scan.left_out
                if is_folder:
                    files |= scan.files
                    self._left_out[str(place)] = Counter(scan.left_out)
                else:
                    files[Path(os.path.abspath(path))] = None
        return list(files), list(others.values())

    def _reported(self, source: str) -> _Reported:
        return _Reported(self.report, source)

    def _steps(self, files: Sequence[Path], others: Sequence[Entry]) -> Iterator[list[Entry]]:
        """Yield the items of each file or other item; none where a file is unchanged."""
        for first in range(0, len(files), LOOKED_UP):
            chunk = files[first : first + LOOKED_UP]
            exists = self.store.exists()
            states = self.store.files([str(file) for file in chunk]) if exists else {}
            for file in chunk:
                stamp = stamp_of(file)
                found = states.get(str(file), [])
                is_current = (
                    len(found) == 1
                    and self.metadata is None
                    and found[0].stamp == stamp
                    and found[0].settings == str(self.settings)
                    and found[0].parts == found[0].found
                )
                if is_current:
                    self.report.unchanged += found[0].found
                    yield []
                    continue
                entries: list[Entry] = []
                with self._reported(str(file)):
                    entries = entries_of_file(file, stamp, self.settings)
                if found and entries:
                    self._changed_files[str(file)] = {entry.source for entry in entries}
                yield [replace(entry, metadata=self.metadata) for entry in entries]
        for entry in others:
            yield [entry]

    def _take(self, entries: Sequence[Entry]) -> None:
        """Settle items whose vector the index has; put the others among the waiting."""
        exists = self.store.exists()
        known = self.store.known([entry.source for entry in entries]) if exists else {}
        for entry in entries:
            with self._reported(entry.source):
                self._take_one(entry, known.get(entry.source))
            if len(self._waiting) + len(self._ready) >= BATCH_ITEMS:
                self._flush()

    def _take_one(self, entry: Entry, known: KnownItem | None) -> None:
        if known and entry.is_current(known, str(self.settings)):
            self.report.unchanged += 1
            return
        entry, content = identified(entry, self._hasher)
        self._was_known[entry.source] = known is not None
        if known and known.content == content:
            self._is_same.add(entry.source)
        vectors = self.store.vectors_of([content]) if self.store.exists() else {}
        vector = vectors.get(content)
        if vector is None or not np.isfinite(vector).all():
            self._waiting.setdefault(content, []).append(entry)
        else:
            self._ready.append(self._row(entry, content, vector))

    def _flush(self) -> None:
        """Embed what waits and commit everything; if one item fails, find out which."""
        rows, self._ready = self._ready, []
        waiting, self._waiting = self._waiting, {}
        for (content, sharing), vector in zip(
            waiting.items(), self._embedded([one[0] for one in waiting.values()]), strict=True
        ):
            for entry in sharing:
                if isinstance(vector, VisavisError):
                    self.report.failed.append((entry.source, str(vector)))
                    continue
                with self._reported(entry.source):
                    rows.append(self._row(entry, content, vector))
        if rows:
            self.store.put(rows, self.meta)
        for row in rows:
            self._count(row.source)

    def _embedded(self, entries: Sequence[Entry]) -> list[np.ndarray | VisavisError]:
        if not entries:
            return []
        try:
            return list(self.model.embed(embedded(entries)))
        except VisavisError:
            return [self._embedded_one(entry) for entry in entries]

    def _embedded_one(self, entry: Entry) -> np.ndarray | VisavisError:
        try:
            vector: np.ndarray = self.model.embed(embedded([entry]))[0]
        except VisavisError as error:
            return error
        return vector

    def _row(self, entry: Entry, content: str, vector: np.ndarray) -> IndexRow:
        found = self._extracted(entry)
        segment = entry.segment
        return IndexRow(
            source=entry.source,
            content=content,
            vector=vector,
            kind=entry.kind,
            path=entry.path,
            page=entry.page,
            begin_s=None if segment is None else segment.begin_s,
            end_s=None if segment is None else segment.end_s,
            date=found.date if entry.date is None else entry.date,
            place=entry.place or found.place,
            text=entry.prompt.text,
            found_text=found.text,
            metadata=entry.metadata,
            preview=_kept_preview(entry),
            stamp=entry.stamp,
            parts=entry.parts,
            settings=str(self.settings) if entry.path else "",
        )

    def _extracted(self, entry: Entry) -> ExtractedText:
        """Return the text found in an item; a file that can be embedded is added without its text
        where that cannot be read, and reported."""
        if not entry.visuals:
            return ExtractedText()
        path = Path(entry.path) if entry.path else None
        try:
            return found_text(entry.visuals[0], path, ocr=self.settings.ocr)
        except (OSError, VisavisError) as error:
            self.report.failed.append((entry.source, f"its text was not found: {error}"))
            return ExtractedText()

    def _count(self, source: str) -> None:
        if source in self._is_same:
            self.report.unchanged += 1
        elif self._was_known[source]:
            self.report.changed += 1
        else:
            self.report.added += 1

    def _remove_superseded(self) -> None:
        """Forget the pages and segments that changed files no longer have."""
        for path, sources in self._changed_files.items():
            gone = [one for one in self.store.sources_of(path) if one not in sources]
            if gone:
                self.store.remove(gone)
                self.report.removed += len(gone)

    def _keep_left_out(self) -> None:
        """Keep how many files of each folder are not in the index, for its statistics."""
        for source, _ in self.report.failed:
            for folder, reasons in self._left_out.items():
                if is_below(source, folder):
                    reasons[Path(source).suffix.lower(), "cannot be read"] += 1
        if self.store.exists():
            for folder, reasons in self._left_out.items():
                self.store.leave_out(folder, reasons)


class _Reported(suppress):
    """Report an item that cannot be used, and continue; errors of the store are raised."""

    def __init__(self, report: AddReport, source: str) -> None:
        super().__init__()
        self.report, self.source = report, source

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if not isinstance(error, VisavisError) or isinstance(error, StoreError):
            return False
        self.report.failed.append((self.source, str(error)))
        return True


def as_items(paths_or_items: Any) -> list[Any]:
    """Return a list of what is to be added.

    Raises:
        InputError: it is empty.
    """
    many = isinstance(paths_or_items, Iterable) and not isinstance(
        paths_or_items, (str, bytes, Mapping, np.ndarray)
    )
    items = list(paths_or_items) if many else [paths_or_items]
    if not items:
        raise InputError("nothing to add: the list of paths and items is empty")
    return items


def _kept_preview(entry: Entry) -> bytes | None:
    """A small JPEG of an image that is nowhere else to be found later."""
    if entry.path or not entry.visuals:
        return None
    return jpeg_preview(picture_of(entry.visuals[0]), KEPT_PREVIEW_SIZE)
