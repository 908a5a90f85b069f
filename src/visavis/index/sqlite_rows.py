"""Exact vector search and filters over the items of a SQLite store.

Rows are read from the database once, coded (`coding.py`) and mapped from files (`coded_rows.py`);
later only what was added or removed is read. The database alone counts: the best candidates are
compared by their exact vectors in it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import NonFiniteError
from visavis.index.coded_rows import ROW, CodedRows
from visavis.index.coding import Query, encode
from visavis.index.filters import Filter, is_below
from visavis.index.schema import damaged
from visavis.index.sql_values import from_sql
from visavis.index.sqlite_file import SqliteFile
from visavis.index.store import cosines

_READ = 4096  # rows of the database at a time
_RESCORED = 500  # candidates whose exact vectors are read at a time
_KEPT_MASKS = 16  # filters whose rows are remembered
_SPARSE = 4  # a filter that keeps fewer than one row of this many is a list of rows


class SqliteRows:
    """The searchable rows of one index file; methods may be called from several threads."""

    def __init__(self, file: SqliteFile) -> None:
        self.file = file
        self.folder = Path(f"{file.path}.vectors")
        self._version: tuple[int, int] | None = None
        self._rows: CodedRows | None = None
        self._masks: OrderedDict[Filter | None, np.ndarray] = OrderedDict()

    def nearest(
        self, query: np.ndarray, limit: int, filter: Filter | None
    ) -> list[tuple[int, float]]:
        """See `VectorStore.nearest`."""
        with self.file.lock:
            rows = self.refresh(len(query))
            records, parts = rows.records, rows.codes
            scales, errors = rows.scales, rows.errors
            mask = self._mask(rows, filter)
        asked = Query(query)
        if np.count_nonzero(mask) * _SPARSE < len(mask):
            chosen = np.flatnonzero(mask)
            records, scales, errors = records[chosen], scales[chosen], errors[chosen]
            scores = asked.scores(_products(asked, parts, chosen), scales)
        else:
            scores = asked.scores(_products(asked, parts, None), scales)
            scores[~mask] = -np.inf
        found, upper = asked.candidates(scores, errors, limit)
        return self._exact(query, records[found], upper, limit)

    def ids(self, filter: Filter) -> np.ndarray:
        """Return the numbers of the items that match, in order, int64 [N]."""
        with self.file.lock:
            rows = self.refresh(self._dim())
            return np.sort(rows.records["item"][self._mask(rows, filter)])

    def save(self) -> None:
        """Write what is coded to the files."""
        if self.file.exists() and self._dim():
            with self.file.lock:
                self.refresh(self._dim()).save()
                self._version = None  # the rows may have been read again

    def refresh(self, dim: int) -> CodedRows:
        """Return all rows as the database has them now."""
        version = self.file.version()
        if self._rows is not None and self._version == version and self._rows.dim == dim:
            return self._rows
        with self.file.reading() as connection:
            rows = self._current(connection, dim)
            self._read_new(connection, rows)
            _mark_removed(connection, rows)
        self._rows, self._version = rows, version
        self._masks.clear()
        return rows

    # --- reading the database ---------------------------------------------------------------------

    def _dim(self) -> int:
        rows = self.file.all("SELECT value FROM meta WHERE key = 'dim'")
        return int(rows[0][0]) if rows and str(rows[0][0]).isdigit() else 0

    def _current(self, connection: sqlite3.Connection, dim: int) -> CodedRows:
        """Return the rows that are known already, or are in the files, if they are of this
        database."""
        meta = dict(connection.execute("SELECT key, value FROM meta"))
        generation = str(meta.get("generation"))
        if len(generation) != 32 or set(generation) - set("0123456789abcdef"):
            raise damaged(str(self.file.path), "the generation is not a number")
        rows = self._rows
        if rows is None or rows.generation != generation or rows.dim != dim:
            rows = CodedRows(self.folder, generation, dim)
            if len(rows) and not _is_of(connection, rows):
                rows.discard()  # the database is a copy from before the files were written
        return rows

    def _read_new(self, connection: sqlite3.Connection, rows: CodedRows) -> None:
        cursor = connection.execute(
            "SELECT i.slot, i.id, i.vector, i.date, i.facet, v.content, v.vector, i.source"
            " FROM items i LEFT JOIN vectors v ON v.id = i.vector WHERE i.slot > ?"
            " ORDER BY i.slot",
            (rows.last_slot,),
        )
        while found := cursor.fetchmany(_READ):
            for row in found:
                self._check(row, rows.dim)
            vectors = np.frombuffer(b"".join(row[6] for row in found), "<f4")
            codes, scales, errors = encode(vectors.reshape(len(found), rows.dim))
            records = np.empty(len(found), ROW)
            for number, name in enumerate(("slot", "item", "vector")):
                records[name] = [row[number] for row in found]
            records["date"] = [np.nan if row[3] is None else row[3] for row in found]
            records["facet"] = [row[4] for row in found]
            records["check"] = [zlib.crc32(row[5].encode()) for row in found]
            records["scale"], records["error"] = scales, errors
            rows.extend(records, codes)

    def _check(self, row: tuple[Any, ...], dim: int) -> None:
        """Refuse a row that no version of visavis wrote."""
        numbers, date, facet, content, vector, source = row[:3], *row[3:]
        if not isinstance(source, (str, bytes)) or not isinstance(vector, bytes):
            raise damaged(str(self.file.path), f"{str(source)[:80]!r} has no name or no vector")
        name = from_sql(source)[:80]
        if len(vector) != 4 * dim:
            raise damaged(
                str(self.file.path),
                f"the vector of {name} has {len(vector)} bytes, not {4 * dim}",
            )
        is_sound = (
            all(isinstance(one, int) for one in numbers)
            and isinstance(facet, int)
            and abs(facet) < 2**31
            and isinstance(content, str)
            and isinstance(date, (int, float, type(None)))
        )
        if not is_sound:
            raise damaged(str(self.file.path), f"{name} has a value of another type")

    # --- filters ----------------------------------------------------------------------------------

    def _mask(self, rows: CodedRows, filter: Filter | None) -> np.ndarray:
        """Return which rows match, bool [N]."""
        if filter in self._masks:
            self._masks.move_to_end(filter)
            return self._masks[filter]
        mask = ~rows.dead
        if filter is not None:
            mask &= self._in_facets(rows, filter)
            if filter.after is not None:
                mask &= rows.records["date"] >= filter.after
            if filter.before is not None:
                mask &= rows.records["date"] < filter.before
            if filter.glob:
                mask &= self._named(rows, filter)
        self._masks[filter] = mask
        while len(self._masks) > _KEPT_MASKS:
            self._masks.popitem(last=False)
        return mask

    def _in_facets(self, rows: CodedRows, filter: Filter) -> np.ndarray:
        """Return which rows have a kind, folder and metadata that match."""
        facets = self.file.all("SELECT id, kind, folder, metadata FROM facets")
        wanted = [
            number
            for number, kind, folder, metadata in facets
            if (not filter.kinds or kind in filter.kinds)
            and (not filter.folder or is_below(os.path.join(from_sql(folder), ""), filter.folder))
            and (not filter.metadata or filter.matches_metadata(self.metadata(metadata)))
        ]
        if len(wanted) == len(facets):
            return np.ones(len(rows), bool)
        highest = int(rows.records["facet"].max(initial=0))
        table = np.zeros(highest + 1, bool)
        table[[number for number in wanted if 0 <= number <= highest]] = True
        numbers = rows.records["facet"]
        return np.where(numbers >= 0, table[np.maximum(numbers, 0)], False)

    def _named(self, rows: CodedRows, filter: Filter) -> np.ndarray:
        """Return which rows have a source that matches a glob: all of them are looked at."""
        found = self.file.all("SELECT slot, source FROM items ORDER BY slot")
        slots = [slot for slot, source in found if filter.matches_source(from_sql(source))]
        return np.isin(rows.records["slot"], np.array(slots, np.int64))

    def metadata(self, stored: object) -> dict[str, Any]:
        """Return the metadata of a facet.

        Raises:
            StoreError: it is not what visavis wrote.
        """
        try:
            metadata = json.loads(stored)  # type: ignore[arg-type]
        except (ValueError, TypeError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict):
            raise damaged(str(self.file.path), "metadata is not a JSON object")
        return metadata

    # --- exact comparison -------------------------------------------------------------------------

    def _exact(
        self, query: np.ndarray, rows: np.ndarray, upper: np.ndarray, limit: int
    ) -> list[tuple[int, float]]:
        """Return the best rows by their exact vectors; `rows` come with falling upper bounds."""
        self._refuse_non_finite(rows)
        exact: dict[int, float] = {}
        items = np.empty(0, np.int64)
        scores = np.empty(0)
        at = 0
        while at < len(rows):
            if len(scores) >= limit and upper[at] < scores[limit - 1]:
                break
            last = _end_of_chunk(rows["vector"], at, exact)
            self._compare(query, rows["vector"][at:last], exact)
            new = np.array([exact.get(int(one), -np.inf) for one in rows["vector"][at:last]])
            items = np.concatenate([items, rows["item"][at:last]])
            scores = np.concatenate([scores, new])
            best = np.lexsort((items, -scores))[:limit]
            items, scores, at = items[best], scores[best], last
        kept = scores > -np.inf  # what was removed meanwhile is left out
        return [(int(i), float(s)) for i, s in zip(items[kept], scores[kept], strict=True)]

    def _compare(self, query: np.ndarray, vectors: np.ndarray, exact: dict[int, float]) -> None:
        """Add the exact cosines of vectors, by their numbers."""
        wanted = [one for one in dict.fromkeys(vectors.tolist()) if one not in exact]
        if not wanted:
            return
        places = ", ".join("?" * len(wanted))
        found = self.file.all(f"SELECT id, vector FROM vectors WHERE id IN ({places})", *wanted)
        sound = [
            one for one in found if isinstance(one[1], bytes) and len(one[1]) == 4 * len(query)
        ]
        if sound:
            matrix = np.frombuffer(b"".join(one[1] for one in sound), "<f4")
            values = cosines(matrix.reshape(len(sound), len(query)), query)
            if not np.isfinite(values).all():  # the files were made before it was damaged
                bad = sound[int(np.flatnonzero(~np.isfinite(values))[0])][0]
                raise self._non_finite("vector", bad, 1)
            exact.update(zip((one[0] for one in sound), values.tolist(), strict=True))

    def _refuse_non_finite(self, rows: np.ndarray) -> None:
        bad = rows["item"][~np.isfinite(rows["error"])]
        if len(bad):
            raise self._non_finite("id", int(bad.min()), len(bad))

    def _non_finite(self, column: str, number: int, total: int) -> NonFiniteError:
        found = self.file.all(f"SELECT source FROM items WHERE {column} = ?", number)
        name = from_sql(found[0][0]) if found else f"item {number}"
        others = f", as do {total - 1} others" if total > 1 else ""
        return NonFiniteError(
            f"{self.file.path}: the vector of {name} holds NaN or infinite numbers{others}. The "
            "model that made it was damaged or overflowed. Make the index again with a model that "
            "works."
        )


def _is_of(connection: sqlite3.Connection, rows: CodedRows) -> bool:
    """Return whether the last row is of this database."""
    last = rows.records[-1]
    found = connection.execute(
        "SELECT v.content FROM items i JOIN vectors v ON v.id = i.vector WHERE i.slot = ?",
        (int(last["slot"]),),
    ).fetchone()
    if found is None:
        gone = "SELECT 1 FROM removed WHERE slot = ?"
        return connection.execute(gone, (int(last["slot"]),)).fetchone() is not None
    return isinstance(found[0], str) and zlib.crc32(found[0].encode()) == int(last["check"])


def _mark_removed(connection: sqlite3.Connection, rows: CodedRows) -> None:
    found = connection.execute(
        "SELECT number, slot FROM removed WHERE number > ? ORDER BY number", (rows.removed_seen,)
    ).fetchall()
    if found:
        rows.remove(np.array([slot for _, slot in found], np.int64))
        rows.removed_seen = found[-1][0]


def _products(query: Query, parts: list[np.ndarray], chosen: np.ndarray | None) -> np.ndarray:
    """Return the products with all rows of all parts, or with the chosen ones, float32 [N]."""
    if chosen is None and len(parts) == 1:
        return query.products(parts[0])
    if chosen is None:
        return np.concatenate([np.empty(0, np.float32), *map(query.products, parts)])
    found, at = [np.empty(0, np.float32)], 0
    for part in parts:
        first, last = np.searchsorted(chosen, (at, at + len(part)))
        found.append(query.products(part, chosen[first:last] - at))
        at += len(part)
    return np.concatenate(found)


def _end_of_chunk(vectors: np.ndarray, first: int, known: dict[int, float]) -> int:
    """Return the end of a chunk that holds at most _RESCORED vectors that are not known; many rows
    may share one."""
    last = min(len(vectors), first + _RESCORED)
    if last == len(vectors):
        return last
    shared = vectors[first]
    if int(shared) in known or (vectors[first:last] == shared).all():
        others = np.flatnonzero(vectors[first:] != shared)
        last = max(last, first + int(others[0])) if len(others) else len(vectors)
    return last
