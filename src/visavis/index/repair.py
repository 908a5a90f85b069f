"""Repair of a damaged index: what can still be read is written into a new file.

Rows are read by their numbers, in ranges that are halved where one cannot be read, so that a
damaged page costs only the rows on it. The damaged file is kept beside the new one.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import StoreError, VisavisError
from visavis.index.names import SourceName
from visavis.index.sql_values import from_sql
from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import IndexRow, Stamp
from visavis.utils import temporary_folder

_PUT = 500  # rows that are written at a time
_MOST = 2**40  # numbers of items beyond it are not looked for
_COLUMNS = (
    "vector, facet, source, path, page, begin_s, end_s, date, place, size, mtime_ns, parts,"
    " settings, preview"
)


@dataclass
class RepairReport:
    """Result of `repair`.

    Attributes:
        items: items that the new file holds.
        lost: items that could be seen and not be read, or had no vector.
        kept: the damaged file, under its new name.
    """

    items: int
    lost: int
    kept: Path


def repair(path: Path) -> RepairReport:
    """Write what can be read of an index into a new file, and put that in its place.

    Items that are lost are added again by `visavis index add`, which skips the others. The index
    must not be open in another process.

    Raises:
        StoreError: nothing can be read: not even the tables.
    """
    if not path.is_file():
        raise StoreError(f"there is no index file {path}; check the spelling")
    kept = _free_name(path)
    with temporary_folder(path) as folder:
        new = SqliteStore(folder / "repaired")
        lost = _copy(path, new)
        number = new.count()
        with suppress(VisavisError):  # of an empty one
            new.file.all("PRAGMA wal_checkpoint(TRUNCATE)")
        new.close()
        if not number:
            raise StoreError(f"nothing can be read of {path}: delete it and add your images again")
        os.replace(path, kept)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.replace(f"{path}{suffix}", f"{kept}{suffix}")
        os.replace(folder / "repaired", path)
    return RepairReport(number, lost, kept)


def _free_name(path: Path) -> Path:
    number = 1
    while os.path.lexists(found := path.with_name(f"{path.name}.damaged{number}")):
        number += 1
    return found


def _copy(path: Path, new: SqliteStore) -> int:
    """Copy every item whose row, vector and facet can be read; return how many were lost."""
    address = f"{path.absolute().as_uri()}?mode=rw"  # with what is still in its log
    with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as connection:
        connection.execute("PRAGMA trusted_schema = OFF")
        try:
            meta = dict(connection.execute("SELECT key, value FROM meta"))
            known = {key: str(meta[key]) for key in ("model", "fingerprint", "dim")}
            old = _Damaged(connection, int(known["dim"]))
            rows: list[IndexRow] = []
            for number in old.numbers():
                if row := old.row(number):
                    rows.append(row)
                if len(rows) >= _PUT:
                    new.put(rows, known)
                    rows = []
        except (sqlite3.DatabaseError, KeyError, ValueError) as error:
            raise StoreError(
                f"nothing can be read of {path} ({error}): delete it and add your images again"
            ) from error
        if rows:
            new.put(rows, known)
        return old.lost


class _Damaged:
    """A database some of whose pages cannot be read."""

    def __init__(self, connection: sqlite3.Connection, dim: int) -> None:
        self.connection, self.dim = connection, dim
        self.lost = 0

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of the items that can be seen."""
        yield from self._between(1, self._highest())

    def row(self, number: int) -> IndexRow | None:
        """Return an item; None if it is lost."""
        found = self._one(f"SELECT {_COLUMNS} FROM items WHERE id = ?", number)
        vector = found and self._one("SELECT content, vector FROM vectors WHERE id = ?", found[0])
        facet = found and self._one("SELECT kind, metadata FROM facets WHERE id = ?", found[1])
        texts = self._one("SELECT c0, c1 FROM words_content WHERE id = ?", number)
        try:
            if found is None or vector is None or len(vector[1]) != 4 * self.dim:
                raise ValueError
            return _row(found, vector, facet, texts)
        except (TypeError, ValueError, AttributeError):
            self.lost += 1
            return None

    def _highest(self) -> int:
        for query in (
            "SELECT seq FROM sqlite_sequence WHERE name = 'items'",
            "SELECT max(id) FROM items",
        ):
            found = self._one(query)
            if found and isinstance(found[0], int):
                return min(found[0], _MOST)
        return 0

    def _between(self, first: int, last: int) -> Iterator[int]:
        """Yield numbers in a range, halving it where it cannot be read."""
        if first > last:
            return
        query = "SELECT id FROM items WHERE id BETWEEN ? AND ? ORDER BY id"
        try:
            yield from [row[0] for row in self.connection.execute(query, (first, last))]
            return
        except sqlite3.DatabaseError:
            if first == last:
                self.lost += 1
                return
        middle = (first + last) // 2
        yield from self._between(first, middle)
        yield from self._between(middle + 1, last)

    def _one(self, query: str, *values: int) -> tuple[Any, ...] | None:
        try:
            found: tuple[Any, ...] | None = self.connection.execute(query, values).fetchone()
        except (sqlite3.DatabaseError, OverflowError):
            return None
        return found


def _row(
    item: tuple[Any, ...],
    vector: tuple[Any, ...],
    facet: tuple[Any, ...] | None,
    texts: tuple[Any, ...] | None,
) -> IndexRow:
    """Return the row of an item; texts and metadata are left out where they cannot be read."""
    _, _, source, path, page, begin_s, end_s, date, place, *stamp, parts, settings, preview = item
    name = from_sql(source)
    kind, metadata = facet or (SourceName.parse(name).kind if path else "text", "{}")
    text, found_text = texts or ("", "")
    return IndexRow(
        source=name,
        content=vector[0],
        vector=np.frombuffer(vector[1], "<f4"),
        kind=kind,
        path=from_sql(path),
        page=page,
        begin_s=begin_s,
        end_s=end_s,
        date=date,
        place=place,
        text=text,
        found_text=found_text,
        metadata=json.loads(metadata),
        preview=preview,
        stamp=Stamp(*stamp),
        parts=parts,
        settings=settings,
    )
