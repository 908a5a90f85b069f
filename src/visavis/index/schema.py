"""Tables of an index file (SQLite), their check, and the upgrade of older files.

meta       model, fingerprint, dim; generation and next slot, see `SqliteStore`
vectors    content hash (unique) → float32 vector
items      source (unique) and everything else that is known of an item
words      full-text index (FTS5) of an item's own text and of text found in it
removed    slots that hold no item any more
left_out   numbers of files that were not indexed, by place, suffix and reason
"""

from __future__ import annotations

import os
import re
import secrets
import sqlite3

from visavis.errors import StoreError
from visavis.index.sql_values import to_sql

APPLICATION_ID = 0x56495341  # "VISA": tells our files from other SQLite databases
FORMAT_VERSION = 2

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE vectors (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  space INTEGER NOT NULL,
  content TEXT NOT NULL,
  vector BLOB NOT NULL,
  UNIQUE (content, space)
);
CREATE TABLE facets (
  id INTEGER PRIMARY KEY,
  kind TEXT NOT NULL,
  folder TEXT NOT NULL,
  metadata TEXT NOT NULL,
  UNIQUE (kind, folder, metadata)
);
CREATE TABLE items (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  slot INTEGER NOT NULL UNIQUE,
  vector INTEGER NOT NULL,
  facet INTEGER NOT NULL,
  source TEXT NOT NULL UNIQUE,
  path TEXT NOT NULL,
  page INTEGER,
  begin_s REAL,
  end_s REAL,
  date REAL,
  place TEXT NOT NULL,
  size INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL,
  parts INTEGER NOT NULL,
  settings TEXT NOT NULL,
  preview BLOB
);
CREATE INDEX items_by_path ON items (path, size, mtime_ns, settings, parts);
CREATE INDEX items_by_vector ON items (vector);
CREATE VIRTUAL TABLE words USING fts5 (
  text, found_text, tokenize = 'porter unicode61 remove_diacritics 2'
);
CREATE TABLE removed (number INTEGER PRIMARY KEY AUTOINCREMENT, slot INTEGER NOT NULL);
CREATE TABLE left_out (
  place TEXT NOT NULL,
  suffix TEXT NOT NULL,
  reason TEXT NOT NULL,
  files INTEGER NOT NULL,
  PRIMARY KEY (place, suffix, reason)
);
"""
_STATEMENTS = [one.strip() for one in _SCHEMA.split(";\n") if one.strip()]
_TABLES = {
    found[1]: one
    for one in _STATEMENTS
    if (found := re.match(r"CREATE (?:VIRTUAL )?TABLE (\w+)", one))
}
_SHADOWS = {f"words_{name}" for name in ("data", "idx", "content", "docsize", "config")}
_INTERNAL = {"sqlite_sequence"}
_OLD_TABLE = """CREATE TABLE items (
  id INTEGER PRIMARY KEY,
  source TEXT NOT NULL UNIQUE,
  content TEXT NOT NULL,
  size INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL,
  is_file INTEGER NOT NULL,
  text TEXT NOT NULL,
  preview BLOB,
  vector BLOB NOT NULL
)"""
_OLD_TABLES = {"meta": _TABLES["meta"], "items": _OLD_TABLE}


def make_tables(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file; the caller commits."""
    for statement in _STATEMENTS:
        connection.execute(statement)
    new_generation(connection)
    connection.execute("INSERT INTO meta VALUES ('next_slot', '1'), ('space', '1')")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def facet_id(connection: sqlite3.Connection, kind: str, path: str, metadata: str) -> int:
    """Return the number of a facet, kept now if it is new; `metadata` is a JSON object."""
    values = (kind, to_sql(os.path.dirname(path)), metadata)
    connection.execute("INSERT OR IGNORE INTO facets VALUES (NULL, ?, ?, ?)", values)
    found = connection.execute(
        "SELECT id FROM facets WHERE kind = ? AND folder = ? AND metadata = ?", values
    ).fetchone()
    return int(found[0])


def new_generation(connection: sqlite3.Connection) -> None:
    """Make every file of coded vectors that was derived from the database invalid."""
    connection.execute("DELETE FROM removed")
    connection.execute(
        "INSERT OR REPLACE INTO meta VALUES ('generation', ?)", (secrets.token_hex(16),)
    )


def is_empty(connection: sqlite3.Connection) -> bool:
    """Return whether a database was just made."""
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    num_tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return bool(application_id == 0 and num_tables == 0)


def check_tables(connection: sqlite3.Connection, name: str) -> int:
    """Return the format version of an index file.

    Raises:
        StoreError: it is the database of another program or of a newer version, or holds other
            tables, views or triggers.
    """
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if application_id != APPLICATION_ID:
        raise StoreError(
            f"{name} is a SQLite database of another program, expected an index "
            "that visavis wrote; name another file"
        )
    if version not in (1, FORMAT_VERSION):
        raise StoreError(
            f"{name} has index format {version}, expected {FORMAT_VERSION}; it comes "
            "from a newer version of visavis: upgrade visavis, or make a new index"
        )
    found = dict(
        connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view', 'trigger')"
        )
    )
    shadows = found.keys() & (_SHADOWS | _INTERNAL)
    tables = {key: sql for key, sql in found.items() if key not in shadows}
    if tables != (_OLD_TABLES if version == 1 else _TABLES):
        raise damaged(name, f"other tables than those of an index: {', '.join(tables) or 0}")
    return version


def damaged(name: str, found: str) -> StoreError:
    """Return the error for a file that cannot be what `visavis index` wrote."""
    return StoreError(
        f"{name} is not an index or is damaged ({found}); expected a file that "
        "`visavis index add` wrote. A copy made while it was being written, or a failing disk, "
        "is the likely cause: `visavis index repair` keeps what can be read of it"
    )
