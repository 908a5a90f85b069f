"""Upgrade of an index file of format 1 to the present one, in place and in one transaction."""

from __future__ import annotations

import sqlite3
from typing import Any

from visavis.errors import StoreError
from visavis.index.names import SourceName
from visavis.index.schema import check_tables, damaged, facet_id, make_tables
from visavis.index.sql_values import from_sql, to_sql
from visavis.index.words import file_words


def upgrade(connection: sqlite3.Connection, name: str) -> None:
    """Upgrade a file of format 1; killed or failing, it stays as it was.

    Vectors, numbers, texts and previews are kept. Text inside of files is found when they are added
    again with another setting or have changed.

    Raises:
        StoreError: it holds rows that no version of visavis wrote.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        if check_tables(connection, name) == 1:  # or another process has done it
            _upgrade(connection, name)
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _upgrade(connection: sqlite3.Connection, name: str) -> None:
    connection.execute("DROP INDEX IF EXISTS items_by_content")
    connection.execute("ALTER TABLE items RENAME TO old_items")
    meta = connection.execute("SELECT key, value FROM meta").fetchall()
    connection.execute("DROP TABLE meta")
    make_tables(connection)
    connection.executemany("INSERT INTO meta VALUES (?, ?)", meta)
    connection.execute(
        "INSERT INTO vectors (space, content, vector)"
        " SELECT 1, content, vector FROM old_items GROUP BY content ORDER BY min(id)"
    )
    slot = 1
    for row in connection.execute(
        "SELECT o.id, o.source, o.size, o.mtime_ns, o.is_file, o.text, o.preview, v.id"
        " FROM old_items o JOIN vectors v ON v.content = o.content ORDER BY o.id"
    ):
        try:
            item, texts = _new_rows(connection, row, slot)
        except (TypeError, ValueError, AttributeError) as error:
            raise damaged(name, f"item {row[0]} has a value of another type") from error
        connection.execute(f"INSERT INTO items VALUES ({', '.join('?' * len(item))})", item)
        connection.execute("INSERT INTO words (rowid, text, found_text) VALUES (?, ?, ?)", texts)
        slot += 1
    connection.execute("UPDATE meta SET value = ? WHERE key = 'next_slot'", (str(slot),))
    if slot - 1 != connection.execute("SELECT count(*) FROM old_items").fetchone()[0]:
        raise StoreError(f"{name} could not be upgraded: some items were lost on the way")
    connection.execute("DROP TABLE old_items")


def _new_rows(
    connection: sqlite3.Connection, row: tuple[Any, ...], slot: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    number, stored, size, mtime_ns, is_file, text, preview, vector = row
    source = from_sql(stored)
    named = SourceName.parse(source)
    kind = named.kind if is_file else "image" if preview is not None else "text"
    path = named.path if is_file else ""
    found = file_words(path) if path else ""
    date = mtime_ns / 1e9 if is_file and mtime_ns else None
    page = named.page if is_file else None
    item = (
        *(number, slot, vector, facet_id(connection, kind, path, "{}"), stored, to_sql(path)),
        *(page, None, None, date, "", size, mtime_ns, 0 if page else 1, "", preview),
    )
    return item, (number, text, found)
