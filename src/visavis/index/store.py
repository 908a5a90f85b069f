"""Items as an index keeps them, and the store that it needs (`VectorStore`).

Stores: a SQLite file (`sqlite_store.py`) and a PostgreSQL database. They give the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from visavis.errors import StoreError
from visavis.index.filters import Filter


@dataclass(frozen=True)
class Stamp:
    """Size and modification time of a file, to detect changes without reading it."""

    size: int = 0
    mtime_ns: int = 0


NO_STAMP = Stamp()  # of an item that is no file


@dataclass(frozen=True)
class IndexRow:
    """One item to keep.

    Attributes:
        source: its name; a later row of that name replaces it.
        content: hash of the content; items of the same content share their vector.
        vector: float32 [D], unit length.
        kind: one of `filters.KINDS`.
        path: the file it can be read from again; empty for an item from memory.
        page: page of a document, from 1.
        begin_s, end_s: seconds of a video segment.
        date: Unix seconds.
        place: where an image was taken; empty if unknown.
        text: caption or own text.
        found_text: searchable text found in it: text layer, recognised text, file name.
        metadata: values that the user gave; None: those that the item has already.
        preview: JPEG of an image that is nowhere else to be found.
        stamp: of the file.
        parts: number of items of the file; fewer in the index means that it is incomplete.
        settings: how the file was read, see `files.Settings`.
    """

    source: str
    content: str
    vector: np.ndarray
    kind: str = "image"
    path: str = ""
    page: int | None = None
    begin_s: float | None = None
    end_s: float | None = None
    date: float | None = None
    place: str = ""
    text: str = ""
    found_text: str = ""
    metadata: Mapping[str, Any] | None = None
    preview: bytes | None = None
    stamp: Stamp = NO_STAMP
    parts: int = 1
    settings: str = ""


@dataclass(frozen=True)
class StoredItem:
    """One item as it is shown: everything but the vector; see `IndexRow`."""

    id: int
    source: str
    content: str
    kind: str
    path: str
    page: int | None
    begin_s: float | None
    end_s: float | None
    date: float | None
    place: str
    text: str
    found_text: str
    metadata: Mapping[str, Any] = field(hash=False)
    preview: bytes | None

    @property
    def is_file(self) -> bool:
        """Whether the item is a file, a page or a segment of one, that can be read again."""
        return bool(self.path)


@dataclass(frozen=True)
class KnownItem:
    """A source in an index: its content hash, and how its file was read."""

    content: str
    stamp: Stamp
    settings: str
    parts: int


@dataclass(frozen=True)
class FileState:
    """A file in an index: its stamp and settings at that time, the number of its items, and of
    those that are in the index."""

    stamp: Stamp
    settings: str
    parts: int
    found: int


@dataclass(frozen=True)
class WordMatch:
    """An item whose text holds words of a query; `score` is BM25, higher is better."""

    id: int
    score: float
    words: tuple[str, ...]


class VectorStore(Protocol):
    """A store of items and vectors; methods may be called from several threads.

    Methods raise `StoreError` where the store cannot be read or written.
    """

    @property
    def name(self) -> str:
        """Path or address, for messages, without passwords."""

    def exists(self) -> bool:
        """Return whether the store has been made; the first `put` makes it."""

    def close(self) -> None:
        """Close it; everything put is kept."""

    def refresh(self) -> None:
        """Prepare searches after many items were added, so that the first one need not."""

    def meta(self) -> dict[str, str]:
        """Return model, fingerprint and dim of the first batch; empty for a new store."""

    def put(self, rows: Sequence[IndexRow], meta: Mapping[str, str]) -> None:
        """Add or replace rows by source, all or none of them. A replaced item keeps its number.

        Raises:
            StoreError: the store holds vectors of another model than `meta` names.
        """

    def remove(self, sources: Iterable[str]) -> None:
        """Forget items by source."""

    def known(self, sources: Sequence[str]) -> dict[str, KnownItem]:
        """Return those sources that are in the store."""

    def files(self, paths: Sequence[str]) -> dict[str, list[FileState]]:
        """Return the states of the items of files; one state for a file that is up to date."""

    def sources_of(self, path: str) -> list[str]:
        """Return the sources of the items of one file."""

    def vectors_of(self, contents: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the vectors of those contents that are known."""

    def vectors(self, ids: Sequence[int]) -> dict[int, np.ndarray]:
        """Return the vectors of items."""

    def items(self, ids: Sequence[int]) -> dict[int, StoredItem]:
        """Return items by their numbers, those that exist."""

    def first(self, limit: int, offset: int = 0, filter: Filter | None = None) -> list[StoredItem]:
        """Return the items that were added first."""

    def file_items(self) -> Iterator[tuple[str, str]]:
        """Yield (source, path) of the items that are files, those added first first."""

    def folders(self) -> dict[tuple[str, str], int]:
        """Return (kind, folder of the file) → number of items; "" is the folder of items that are
        no files."""

    def count(self, filter: Filter | None = None) -> int:
        """Return the number of items that match."""

    def nearest(
        self, query: np.ndarray, limit: int, filter: Filter | None = None
    ) -> list[tuple[int, float]]:
        """Return (number, cosine) of the items with the highest cosine, exactly; of equal ones
        that with the lower number first.

        Args:
            query: float32 [D], unit length.

        Raises:
            NonFiniteError: a vector in the store holds NaN or infinity.
        """

    def cosines(self, query: np.ndarray, ids: Sequence[int]) -> dict[int, float]:
        """Return the exact cosines of items, those that exist."""

    def matching(
        self, words: Sequence[str], limit: int, filter: Filter | None = None
    ) -> list[WordMatch]:
        """Return the items whose text holds at least half of the words, best first."""

    def leave_out(self, place: str, reasons: Mapping[tuple[str, str], int]) -> None:
        """Keep how many files were left out below a place: (suffix, reason) → number; replaces
        what was kept of that place."""

    def left_out(self) -> dict[tuple[str, str], int]:
        """Return (suffix, reason) → number of files, over all places."""


def check_meta(name: str, found: Mapping[str, str], meta: Mapping[str, str]) -> None:
    """Refuse vectors of another model than a store was made with.

    Raises:
        StoreError: the store was made with another model.
    """
    if found and any(found.get(key) != meta[key] for key in ("fingerprint", "dim")):
        raise StoreError(
            f"{name} was made with {_describe(found)}, but is opened with {_describe(meta)}; "
            "vectors of different models cannot be compared. Load the model it was made with, "
            "move it to this one with `visavis index migrate`, or make a new index"
        )


def _describe(meta: Mapping[str, str]) -> str:
    return (
        f"the model {meta.get('model')!r} (fingerprint {meta.get('fingerprint')}, "
        f"{meta.get('dim')} dimensions)"
    )


def cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the exact cosine of each vector [N, D] with a query [D], float64 [N]; a row's result
    does not depend on the other rows.

    All stores rank by it, so that equal vectors give equal scores.
    """
    result: np.ndarray = (vectors.astype(np.float64) * query.astype(np.float64)).sum(1)
    return result


def cosines_by_id(vectors: Mapping[int, np.ndarray], query: np.ndarray) -> dict[int, float]:
    """Return item number → exact cosine of its vector with a query [D]."""
    if not vectors:
        return {}
    scores = cosines(np.stack(list(vectors.values())), query)
    return dict(zip(vectors, map(float, scores), strict=True))


def address_or_path(name: str | Path) -> str | Path:
    """Return the address of a database, or the path of an index file."""
    text = str(name)
    return text if text.startswith(("postgresql://", "postgres://")) else Path(name).expanduser()
