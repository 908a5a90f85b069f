"""Index file: SQLite rows of (source, content hash, unit vector).

Every `put` is one transaction, so a crash, Ctrl-C or full disk loses that batch and nothing else.
Searching needs rights to read the file only.

    meta     model, fingerprint, dim            written together with the first batch
    items    id, source (unique), content hash, file size and time, text, preview, vector
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import NonFiniteError, StoreError
from visavis.utils import check_regular

APPLICATION_ID = 0x56495341  # "VISA": tells our files from other SQLite databases
FORMAT_VERSION = 1
BUSY_SECONDS = 30  # how long to wait for another process that is writing
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
  id INTEGER PRIMARY KEY,
  source TEXT NOT NULL UNIQUE,
  content TEXT NOT NULL,
  size INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL,
  is_file INTEGER NOT NULL,
  text TEXT NOT NULL,
  preview BLOB,
  vector BLOB NOT NULL
);
CREATE INDEX items_by_content ON items (content);
"""

_STATEMENTS = [statement.strip() for statement in _SCHEMA.split(";\n")]
_TABLES = {one.split()[2]: one for one in _STATEMENTS if one.startswith("CREATE TABLE")}
_ITEM_COLUMNS = "id, source, content, is_file, text, preview"


@dataclass(frozen=True)
class Stamp:
    """Size and modification time of a file, to detect changes without reading it."""

    size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True)
class IndexRow:
    """One item as it is kept. `is_file`: `source` is the path of an image that can be reread."""

    source: str
    content: str
    vector: np.ndarray  # float32 [D], unit length
    stamp: Stamp = Stamp()
    is_file: bool = False
    text: str = ""
    preview: bytes | None = None


@dataclass(frozen=True)
class StoredItem:
    """One item as it is shown: everything but the vector."""

    id: int
    source: str
    content: str
    is_file: bool
    text: str
    preview: bytes | None


class Store:
    """One index file. Safe to share between threads; several processes may open the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._num_writes = 0  # data_version counts only what other connections write
        if "\0" in str(path):
            raise StoreError(f"the index name {str(path)!r} holds a NUL, expected a file name")
        if os.path.isdir(path):
            raise StoreError(
                f"{path} is a folder, expected an index file; name a file, such as "
                f"{path / 'pictures.idx'}"
            )
        with self._guarded():
            check_regular(path)
        can_write = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
        self._is_read_only = os.path.exists(path) and not can_write
        if os.path.exists(path):
            with self._guarded(), self._reading() as connection:
                self._check(connection)

    def exists(self) -> bool:
        """Whether the file has been made; the first `put` makes it."""
        return self._connection is not None or self._is_read_only

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def meta(self) -> dict[str, str]:
        """Return the metadata of the first batch; empty for a new file."""
        return dict(self._all("SELECT key, value FROM meta")) if self.exists() else {}

    def check_meta(self, meta: dict[str, str]) -> None:
        """Refuse vectors of another model than the one the file was made with.

        Raises:
            StoreError: the file was made with another model.
        """
        found = self.meta()
        if found and any(found.get(key) != meta[key] for key in ("fingerprint", "dim")):
            raise StoreError(
                f"{self.path} was made with {_describe(found)}, but is opened with "
                f"{_describe(meta)}; vectors of different models cannot be compared. Load the "
                "model it was made with, or add your pictures to a new index file"
            )

    def put(self, rows: Sequence[IndexRow], meta: dict[str, str]) -> None:
        """Add or replace rows by source, all or none of them.

        Raises:
            StoreError: the disk is full, the file is damaged or cannot be written.
        """
        with self._guarded():
            connection = self._open()
            with connection:
                connection.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", meta.items())
                self.check_meta(meta)
                connection.executemany(
                    "INSERT INTO items (source, content, size, mtime_ns, is_file, text, preview,"
                    " vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (source) DO UPDATE SET"
                    " content = excluded.content, size = excluded.size,"
                    " mtime_ns = excluded.mtime_ns, is_file = excluded.is_file,"
                    " text = excluded.text, preview = excluded.preview, vector = excluded.vector",
                    [
                        (
                            _sql_name(row.source),
                            row.content,
                            row.stamp.size,
                            row.stamp.mtime_ns,
                            row.is_file,
                            row.text,
                            row.preview,
                            row.vector.astype("<f4").tobytes(),
                        )
                        for row in rows
                    ],
                )
            self._num_writes += 1

    def remove(self, sources: Iterable[str]) -> None:
        """Forget items by source."""
        with self._guarded():
            connection = self._open()
            with connection:
                connection.executemany(
                    "DELETE FROM items WHERE source = ?",
                    [(_sql_name(source),) for source in sources],
                )
            self._num_writes += 1

    def known(self, source: str) -> tuple[str, Stamp] | None:
        """Return content hash and stamp of a source, or None if it is not in the index."""
        rows = self._all(
            "SELECT content, size, mtime_ns FROM items WHERE source = ?", _sql_name(source)
        )
        return (rows[0][0], Stamp(rows[0][1], rows[0][2])) if rows else None

    def vector_of(self, content: str) -> np.ndarray | None:
        """Return the vector of any item with this content: a copied or moved file costs nothing."""
        rows = self._all("SELECT vector FROM items WHERE content = ? LIMIT 1", content)
        if not rows:
            return None
        if not isinstance(rows[0][0], bytes) or len(rows[0][0]) % 4:
            raise self._damaged(f"the vector of the content {content} is not one")
        return np.frombuffer(rows[0][0], "<f4")

    def item(self, item_id: int) -> StoredItem | None:
        """Return one item without its vector."""
        rows = self._all(f"SELECT {_ITEM_COLUMNS} FROM items WHERE id = ?", item_id)
        return self._item(rows[0]) if rows else None

    def items(self, limit: int) -> list[StoredItem]:
        """Return the items that were added first."""
        query = f"SELECT {_ITEM_COLUMNS} FROM items ORDER BY id LIMIT ?"
        return [self._item(row) for row in self._all(query, limit)]

    def file_sources(self) -> list[str]:
        """Return the sources that are paths of files."""
        rows = self._all("SELECT source FROM items WHERE is_file ORDER BY id")
        return [_name(row[0]) for row in rows if isinstance(row[0], (str, bytes))]

    def __len__(self) -> int:
        return int(self._all("SELECT count(*) FROM items")[0][0]) if self.exists() else 0

    def version(self) -> tuple[int, int]:
        """Return a value that changes whenever anybody has changed the file."""
        if self._is_read_only:
            with self._guarded():
                return self.path.stat().st_mtime_ns, self._wal_size()
        return self._num_writes, int(self._all("PRAGMA data_version")[0][0])

    def matrix(self, dim: int) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Return ids int64 [N], sources, and vectors float32 [N, dim]."""
        rows = self._all("SELECT id, source, vector FROM items ORDER BY id")
        for _, source, vector in rows:
            if not isinstance(source, (str, bytes)) or not isinstance(vector, bytes):
                raise self._damaged(f"{str(source)[:80]!r} has no name or no vector")
            if len(vector) != 4 * dim:
                raise self._damaged(
                    f"the vector of {_name(source)} has {len(vector)} bytes, not {4 * dim}"
                )
        ids = np.array([row[0] for row in rows], np.int64)
        vectors = np.frombuffer(b"".join(row[2] for row in rows), "<f4").reshape(len(rows), dim)
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise NonFiniteError(
                f"{self.path}: the vector of {_name(rows[bad[0]][1])} holds NaN or infinite numbers"
                f"{f', as do {len(bad) - 1} others' if len(bad) > 1 else ''}. The model that made "
                "it was damaged or overflowed. Make the index again with a model that works."
            )
        return ids, [_name(row[1]) for row in rows], vectors

    def _item(self, row: tuple[Any, ...]) -> StoredItem:
        item_id, source, content, is_file, text, preview = row
        is_sound = (
            isinstance(source, (str, bytes))
            and isinstance(content, str)
            and isinstance(text, str)
            and isinstance(preview, (bytes, type(None)))
        )
        if not is_sound:
            raise self._damaged(f"item {item_id} has a value of another type")
        return StoredItem(item_id, _name(source), content, bool(is_file), text, preview)

    # --- the connection ---------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        """Return the connection; make the file and its tables if they are not there."""
        if self._is_read_only:
            raise self._cannot_use("readonly file or folder")
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self.path,
                timeout=BUSY_SECONDS,
                check_same_thread=False,
                isolation_level="IMMEDIATE",
            )
            try:
                if _is_empty(connection):
                    with connection:
                        connection.execute("BEGIN IMMEDIATE")  # two processes may be making it
                        if _is_empty(connection):
                            _make_tables(connection)
                self._check(connection)
                if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    # Readers go on while somebody adds; after the checks, as it marks the file.
                    connection.execute("PRAGMA journal_mode = WAL")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection for one query; with rights to read only, one that writes nothing."""
        if not self._is_read_only:
            yield self._open()
            return
        address = f"{self.path.absolute().as_uri()}?mode=ro"
        if not self._wal_size():  # nobody is writing: SQLite need not make its lock files
            address += "&immutable=1"
        with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as connection:
            yield connection

    def _wal_size(self) -> int:
        """Return the size of what has been written and is not in the main file yet."""
        log = Path(f"{self.path}-wal")
        return log.stat().st_size if log.exists() else 0

    def _check(self, connection: sqlite3.Connection) -> None:
        """Refuse a file that is not an index of this format, views and triggers included."""
        application_id = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application_id != APPLICATION_ID:
            raise StoreError(
                f"{self.path} is a SQLite database of another program, expected an index "
                "that visavis wrote; name another file"
            )
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{self.path} has index format {version}, expected {FORMAT_VERSION}; it comes "
                "from another version of visavis: upgrade, or delete it and add again"
            )
        found = dict(
            connection.execute(
                "SELECT name, sql FROM sqlite_master"
                " WHERE name IN ('meta', 'items') OR type IN ('view', 'trigger')"
            )
        )
        if found != _TABLES:
            raise self._damaged(f"other tables than those of an index: {', '.join(found) or 0}")

    def _all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._guarded(), self._reading() as connection:
            return connection.execute(query, values).fetchall()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Hold the lock, and turn what SQLite says into what a user can act on."""
        with self._lock:
            try:
                yield
            except sqlite3.OperationalError as error:
                raise self._cannot_use(str(error)) from error
            except sqlite3.DatabaseError as error:
                raise self._damaged(str(error)) from error
            except OSError as error:
                raise self._cannot_use(error.strerror or str(error)) from error

    def _damaged(self, found: str) -> StoreError:
        return StoreError(
            f"{self.path} is not an index or is damaged ({found}); expected a file that "
            "`visavis index add` wrote. A copy made while it was being written, or a failing disk, "
            "is the likely cause: delete it and add your pictures again"
        )

    def _cannot_use(self, found: str) -> StoreError:
        advice = "check that its folder exists and may be written to"
        if "full" in found or "No space" in found:
            advice = "free some space and run the same command again; finished batches are kept"
        elif "locked" in found:
            advice = "another process is writing to it: wait until it is done"
        elif "readonly" in found:
            advice = "change the rights of the file and its folder"
        elif "no such" in found or "malformed" in found:
            return self._damaged(found)
        return StoreError(f"cannot use the index {self.path} ({found}); {advice}")


def _is_empty(connection: sqlite3.Connection) -> bool:
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    num_tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return bool(application_id == 0 and num_tables == 0)


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in _STATEMENTS:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def _sql_name(source: str) -> str | bytes:
    """Return a source as it is stored: a file name that is not UTF-8 as bytes."""
    try:
        source.encode()
    except UnicodeEncodeError:
        return source.encode("utf-8", "surrogatepass")
    return source


def _name(stored: str | bytes) -> str:
    if isinstance(stored, str):
        return stored
    try:
        return stored.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # of another program
        return os.fsdecode(stored)


def _describe(meta: dict[str, str]) -> str:
    return (
        f"the model {meta.get('model')!r} (fingerprint {meta.get('fingerprint')}, "
        f"{meta.get('dim')} dimensions)"
    )
