"""The store of an index in a SQLite file: items, vectors, words.

items.vector ──► vectors.id      items of the same content share one vector
items.slot                       grows with every item that is added or changed, never reused:
                                 what was read up to a slot needs only what came after it, and
                                 the slots in `removed`
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visavis.index.filters import Filter
from visavis.index.schema import damaged, facet_id, new_generation
from visavis.index.sql_values import from_sql, readable, to_sql
from visavis.index.sqlite_file import SqliteFile
from visavis.index.sqlite_rows import SqliteRows
from visavis.index.store import (
    FileState,
    IndexRow,
    KnownItem,
    Stamp,
    StoredItem,
    WordMatch,
    check_meta,
    cosines_by_id,
)

SPACE = "(SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'space')"
_CHUNK = 500  # values of one query
COMMON = 4000  # a word that is in more items, and in more than a tenth of all, says too little
_ITEM_COLUMNS = (
    "i.id, i.source, v.content, f.kind, i.path, i.page, i.begin_s, i.end_s, i.date, i.place,"
    " w.text, w.found_text, f.metadata, i.preview"
)
_ITEMS = (
    f"SELECT {_ITEM_COLUMNS} FROM items i LEFT JOIN vectors v ON v.id = i.vector"
    " LEFT JOIN facets f ON f.id = i.facet LEFT JOIN words w ON w.rowid = i.id"
)


class SqliteStore:
    """A `VectorStore` in one SQLite file.

    Args:
        path: the index file; made by the first `put`.

    Raises:
        StoreError: the file is damaged or not an index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = SqliteFile(path)
        self._rows = SqliteRows(self.file)

    @property
    def name(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return self.file.exists()

    def close(self) -> None:
        self.file.close()

    def refresh(self) -> None:
        self._rows.save()

    def meta(self) -> dict[str, str]:
        if not self.exists():
            return {}
        rows = self.file.all(
            "SELECT key, value FROM meta WHERE key IN ('model', 'fingerprint', 'dim')"
        )
        return dict(rows)

    # --- writing ----------------------------------------------------------------------------------

    def put(self, rows: Sequence[IndexRow], meta: Mapping[str, str]) -> None:
        with self.file.writing() as connection:
            connection.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", meta.items())
            check_meta(self.name, dict(connection.execute("SELECT key, value FROM meta")), meta)
            slot = _next_slot(connection, len(rows))
            for number, row in enumerate(rows, slot):
                self._put(connection, row, number)

    def _put(self, connection: sqlite3.Connection, row: IndexRow, slot: int) -> None:
        vector = _vector_id(connection, row)
        source = to_sql(row.source)
        old = connection.execute(
            "SELECT i.id, i.slot, i.vector, f.metadata FROM items i"
            " LEFT JOIN facets f ON f.id = i.facet WHERE i.source = ?",
            (source,),
        ).fetchone()
        kept = (old and old[3]) or "{}"
        metadata = kept if row.metadata is None else _json(row.metadata)
        facet = facet_id(connection, row.kind, row.path, metadata)
        values = (
            *(slot, vector, facet, source, to_sql(row.path), row.page, row.begin_s, row.end_s),
            *(row.date, readable(row.place), row.stamp.size, row.stamp.mtime_ns, row.parts),
            *(row.settings, row.preview),
        )
        if old is None:
            places = ", ".join("?" * len(values))
            number = connection.execute(
                f"INSERT INTO items VALUES (NULL, {places})", values
            ).lastrowid
        else:
            number = old[0]
            connection.execute("DELETE FROM items WHERE id = ?", (number,))
            connection.execute("DELETE FROM words WHERE rowid = ?", (number,))
            connection.execute("INSERT INTO removed (slot) VALUES (?)", (old[1],))
            places = ", ".join("?" * (len(values) + 1))
            connection.execute(f"INSERT INTO items VALUES ({places})", (number, *values))
            _forget_vector(connection, old[2])
        connection.execute(
            "INSERT INTO words (rowid, text, found_text) VALUES (?, ?, ?)",
            (number, readable(row.text), readable(row.found_text)),
        )

    def remove(self, sources: Iterable[str]) -> None:
        with self.file.writing() as connection:
            for source in sources:
                found = connection.execute(
                    "SELECT id, slot, vector FROM items WHERE source = ?", (to_sql(source),)
                ).fetchone()
                if found is not None:
                    connection.execute("DELETE FROM items WHERE id = ?", (found[0],))
                    connection.execute("DELETE FROM words WHERE rowid = ?", (found[0],))
                    connection.execute("INSERT INTO removed (slot) VALUES (?)", (found[1],))
                    _forget_vector(connection, found[2])

    def folders(self) -> dict[tuple[str, str], int]:
        rows = self.file.all(
            "SELECT f.kind, f.folder, sum(i.number) FROM facets f JOIN"
            " (SELECT facet, count(*) AS number FROM items GROUP BY facet) i ON i.facet = f.id"
            " GROUP BY f.kind, f.folder ORDER BY f.kind, f.folder"
        )
        return {(kind, from_sql(folder)): number for kind, folder, number in rows}

    def leave_out(self, place: str, reasons: Mapping[tuple[str, str], int]) -> None:
        with self.file.writing() as connection:
            connection.execute("DELETE FROM left_out WHERE place = ?", (to_sql(place),))
            connection.executemany(
                "INSERT INTO left_out VALUES (?, ?, ?, ?)",
                [
                    (to_sql(place), readable(suffix), readable(reason), number)
                    for (suffix, reason), number in reasons.items()
                ],
            )

    # --- reading ----------------------------------------------------------------------------------

    def known(self, sources: Sequence[str]) -> dict[str, KnownItem]:
        rows = self._chunked(
            "SELECT i.source, v.content, i.size, i.mtime_ns, i.settings, i.parts FROM items i"
            " LEFT JOIN vectors v ON v.id = i.vector WHERE i.source IN ({})",
            [to_sql(source) for source in sources],
        )
        return {
            from_sql(row[0]): KnownItem(row[1] or "", Stamp(row[2], row[3]), row[4], row[5])
            for row in rows
        }

    def files(self, paths: Sequence[str]) -> dict[str, list[FileState]]:
        rows = self._chunked(
            "SELECT path, size, mtime_ns, settings, parts, count(*) FROM items"
            " WHERE path IN ({}) GROUP BY path, size, mtime_ns, settings, parts",
            [to_sql(path) for path in paths],
        )
        found: dict[str, list[FileState]] = {}
        for path, size, mtime_ns, settings, parts, number in rows:
            state = FileState(Stamp(size, mtime_ns), settings, parts, number)
            found.setdefault(from_sql(path), []).append(state)
        return found

    def sources_of(self, path: str) -> list[str]:
        rows = self.file.all("SELECT source FROM items WHERE path = ? ORDER BY id", to_sql(path))
        return [from_sql(row[0]) for row in rows]

    def vectors_of(self, contents: Sequence[str]) -> dict[str, np.ndarray]:
        rows = self._chunked(
            f"SELECT content, vector FROM vectors WHERE content IN ({{}}) AND space = {SPACE}",
            list(contents),
        )
        return {content: self._vector(vector, content) for content, vector in rows}

    def vectors(self, ids: Sequence[int]) -> dict[int, np.ndarray]:
        rows = self._chunked(
            "SELECT i.id, v.vector FROM items i JOIN vectors v ON v.id = i.vector"
            " WHERE i.id IN ({})",
            list(ids),
        )
        return {number: self._vector(vector, f"item {number}") for number, vector in rows}

    def items(self, ids: Sequence[int]) -> dict[int, StoredItem]:
        rows = self._chunked(f"{_ITEMS} WHERE i.id IN ({{}})", list(ids))
        return {row[0]: self._item(row) for row in rows}

    def first(self, limit: int, offset: int = 0, filter: Filter | None = None) -> list[StoredItem]:
        if filter is None:
            rows = self.file.all(f"{_ITEMS} ORDER BY i.id LIMIT ? OFFSET ?", limit, offset)
            return [self._item(row) for row in rows]
        ids = self._rows.ids(filter)[offset : offset + limit].tolist()
        found = self.items(ids)
        return [found[number] for number in ids if number in found]

    def file_items(self) -> Iterator[tuple[str, str]]:
        last = 0
        while True:
            rows = self.file.all(
                "SELECT id, source, path FROM items WHERE id > ? AND path != ''"
                " ORDER BY id LIMIT 1000",
                last,
            )
            for _, source, path in rows:
                yield from_sql(source), from_sql(path)
            if not rows:
                return
            last = rows[-1][0]

    def count(self, filter: Filter | None = None) -> int:
        if not self.exists():
            return 0
        if filter is None:
            return int(self.file.all("SELECT count(*) FROM items")[0][0])
        return len(self._rows.ids(filter))

    def left_out(self) -> dict[tuple[str, str], int]:
        rows = self.file.all(
            "SELECT suffix, reason, sum(files) FROM left_out GROUP BY suffix, reason"
            " ORDER BY suffix, reason"
        )
        return {(suffix, reason): number for suffix, reason, number in rows}

    # --- searching --------------------------------------------------------------------------------

    def nearest(
        self, query: np.ndarray, limit: int, filter: Filter | None = None
    ) -> list[tuple[int, float]]:
        return self._rows.nearest(query, limit, filter)

    def cosines(self, query: np.ndarray, ids: Sequence[int]) -> dict[int, float]:
        return cosines_by_id(self.vectors(ids), query)

    def matching(
        self, words: Sequence[str], limit: int, filter: Filter | None = None
    ) -> list[WordMatch]:
        found: dict[int, tuple[float, list[str]]] = {}
        useful = [word for word in words if not self._is_common(word)] or list(words)
        for word in useful:
            rows = self.file.all(
                "SELECT rowid, -bm25(words) FROM words WHERE words MATCH ?", _quoted(word)
            )
            for number, score in rows:
                total, had = found.get(number, (0.0, []))
                found[number] = total + score, [*had, word]
        least = (len(useful) + 1) // 2
        allowed = None if filter is None else set(self._rows.ids(filter).tolist())
        matches = [
            WordMatch(number, score, tuple(had))
            for number, (score, had) in found.items()
            if len(had) >= least and (allowed is None or number in allowed)
        ]
        matches.sort(key=lambda match: (-len(match.words), -match.score, match.id))
        return matches[:limit]

    def _is_common(self, word: str) -> bool:
        limit = max(COMMON, self.count() // 10)
        rows = self.file.all(
            "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)",
            *(_quoted(word), limit + 1),
        )
        return bool(rows[0][0] > limit)

    # --- rows -------------------------------------------------------------------------------------

    def _chunked(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        for first in range(0, len(values), _CHUNK):
            chunk = values[first : first + _CHUNK]
            rows += self.file.all(query.format(", ".join("?" * len(chunk))), *chunk)
        return rows

    def _vector(self, stored: object, what: str, dim: int | None = None) -> np.ndarray:
        if not isinstance(stored, bytes) or len(stored) % 4:
            raise damaged(self.name, f"the vector of {what[:80]} is not one")
        if dim is not None and len(stored) != 4 * dim:
            raise damaged(
                self.name, f"the vector of {what[:80]} has {len(stored)} bytes, not {4 * dim}"
            )
        return np.frombuffer(stored, "<f4")

    def _item(self, row: tuple[Any, ...]) -> StoredItem:
        number, source, content, kind, path, page, begin_s, end_s, date, place, *texts = row
        text, found_text, stored, preview = texts
        is_sound = (
            isinstance(source, (str, bytes))
            and isinstance(path, (str, bytes))
            and all(isinstance(one, str) for one in (content, kind, place, text, found_text))
            and isinstance(page, (int, type(None)))
            and all(isinstance(one, (int, float, type(None))) for one in (begin_s, end_s, date))
            and isinstance(preview, (bytes, type(None)))
        )
        metadata = self._rows.metadata(stored)
        if not is_sound:
            raise damaged(self.name, f"item {number} has a value of another type")
        return StoredItem(
            *(number, from_sql(source), content, kind, from_sql(path), page, begin_s, end_s),
            *(date, place, text, found_text, metadata, preview),
        )


def _json(metadata: Mapping[str, Any]) -> str:
    return json.dumps(dict(metadata), sort_keys=True)


def _next_slot(connection: sqlite3.Connection, number: int) -> int:
    """Take slots for new items; return the first."""
    slot = int(connection.execute("SELECT value FROM meta WHERE key = 'next_slot'").fetchone()[0])
    connection.execute("UPDATE meta SET value = ? WHERE key = 'next_slot'", (str(slot + number),))
    return slot


def _vector_id(connection: sqlite3.Connection, row: IndexRow) -> int:
    """Return the number of the vector of a content, kept now if it is new."""
    stored = row.vector.astype("<f4").tobytes()
    found = connection.execute(
        f"SELECT id, vector = ? FROM vectors WHERE content = ? AND space = {SPACE}",
        (stored, row.content),
    ).fetchone()
    if found is None:
        inserted = connection.execute(
            f"INSERT INTO vectors (space, content, vector) VALUES ({SPACE}, ?, ?)",
            (row.content, stored),
        )
        return int(inserted.lastrowid or 0)
    if not found[1]:  # it was unusable, and other items share it
        connection.execute("UPDATE vectors SET vector = ? WHERE id = ?", (stored, found[0]))
        new_generation(connection)
    return int(found[0])


def _forget_vector(connection: sqlite3.Connection, number: int) -> None:
    connection.execute(
        "DELETE FROM vectors WHERE id = ? AND NOT EXISTS (SELECT 1 FROM items WHERE vector = ?)",
        (number, number),
    )


def _quoted(word: str) -> str:
    """Return a word as FTS5 reads it literally."""
    return '"' + word.replace('"', '""') + '"'
