"""The SQLite file of an index: opened for writing or reading, checked, its errors explained.

Every write is one transaction, so a crash, Ctrl-C or full disk loses that batch and nothing else.
Reading needs rights to read the file only.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from visavis.errors import StoreError
from visavis.index.schema import FORMAT_VERSION, check_tables, damaged, is_empty, make_tables
from visavis.index.upgrade import upgrade
from visavis.utils import check_regular

BUSY_SECONDS = 30  # how long to wait for another process that is writing


class SqliteFile:
    """One index file. Safe to share between threads; several processes may open the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._num_writes = 0  # data_version counts only what other connections write
        if "\0" in str(path):
            raise StoreError(f"the index name {str(path)!r} holds a NUL, expected a file name")
        if os.path.isdir(path):
            raise StoreError(
                f"{path} is a folder, expected an index file; name a file, such as "
                f"{path / 'pictures.idx'}"
            )
        with self.guarded():
            check_regular(path)
        can_write = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
        self.is_read_only = os.path.exists(path) and not can_write
        if os.path.exists(path):
            with self.guarded(), self._reading() as connection:
                self._check(connection)

    def exists(self) -> bool:
        """Return whether the file has been made; the first write makes it."""
        return self._connection is not None or self.is_read_only

    def close(self) -> None:
        """Close the connection."""
        with self.lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def version(self) -> tuple[int, int]:
        """Return a value that changes whenever anybody has changed the file."""
        if self.is_read_only:
            with self.guarded():
                return self.path.stat().st_mtime_ns, self._wal_size()
        return self._num_writes, int(self.all("PRAGMA data_version")[0][0])

    def all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        with self.guarded(), self._reading() as connection:
            return connection.execute(query, values).fetchall()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection whose queries all see the same state of the file."""
        with self.guarded(), self._reading() as connection:
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.rollback()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection for one transaction; an error undoes all of it."""
        with self.guarded():
            connection = self._open()
            with connection:
                if not connection.in_transaction:
                    connection.execute("BEGIN IMMEDIATE")
                yield connection
            self._num_writes += 1

    def _open(self) -> sqlite3.Connection:
        """Return the connection; make the file and its tables if they are not there."""
        if self.is_read_only:
            raise self._cannot_use("readonly file or folder")
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self.path,
                timeout=BUSY_SECONDS,
                check_same_thread=False,
                isolation_level=None,
            )
            try:
                if is_empty(connection):
                    with connection:
                        connection.execute("BEGIN IMMEDIATE")  # two processes may be making it
                        if is_empty(connection):
                            make_tables(connection)
                if check_tables(connection, str(self.path)) != FORMAT_VERSION:
                    upgrade(connection, str(self.path))
                if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    # Readers continue while somebody adds; after the checks, as it marks the file.
                    connection.execute("PRAGMA journal_mode = WAL")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection; with rights to read only, one that writes nothing."""
        if not self.is_read_only:
            yield self._open()
            return
        address = f"{self.path.absolute().as_uri()}?mode=ro"
        if not self._wal_size():  # nobody is writing: SQLite need not make its lock files
            address += "&immutable=1"
        opened = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        with closing(opened) as connection:
            yield connection

    def _wal_size(self) -> int:
        """Return the size of what has been written and is not in the main file yet."""
        log = Path(f"{self.path}-wal")
        return log.stat().st_size if log.exists() else 0

    def _check(self, connection: sqlite3.Connection) -> None:
        if check_tables(connection, str(self.path)) != FORMAT_VERSION and self.is_read_only:
            raise StoreError(
                f"{self.path} has index format 1, expected {FORMAT_VERSION}, and cannot be changed "
                "with rights to read only; open it once with rights to write, for example by "
                f"`visavis index stats {self.path}`"
            )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Hold the lock, and turn what SQLite says into what a user can act on."""
        with self.lock:
            try:
                yield
            except sqlite3.OperationalError as error:
                raise self._cannot_use(str(error)) from error
            except sqlite3.DatabaseError as error:
                raise damaged(str(self.path), str(error)) from error
            except OSError as error:
                raise self._cannot_use(error.strerror or str(error)) from error

    def _cannot_use(self, found: str) -> StoreError:
        advice = "check that its folder exists and may be written to"
        if "full" in found or "No space" in found:
            advice = "free some space and run the same command again; finished batches are kept"
        elif "locked" in found:
            advice = "another process is writing to it: wait until it is done"
        elif "readonly" in found:
            advice = "change the rights of the file and its folder"
        elif "fts5" in found and "no such module" in found:
            advice = "this Python's SQLite was built without FTS5: use another build of Python"
        elif "no such" in found or "malformed" in found:
            return damaged(str(self.path), found)
        return StoreError(f"cannot use the index {self.path} ({found}); {advice}")
