"""A connection to the PostgreSQL database of an index, whose errors say what to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from visavis.errors import NonFiniteError, StoreError

CONNECT_SECONDS = 15
LOCK_SECONDS = 30  # how long to wait for another process that is writing


class PostgresConnection:
    """One connection, shared by threads; opened again where it was lost.

    Args:
        address: `postgresql://user:password@host:port/database`, as libpq reads it.

    Raises:
        StoreError: psycopg is not installed, or the address cannot be read.
    """

    def __init__(self, address: str) -> None:
        try:
            import pgvector.psycopg
            import psycopg
            from psycopg.conninfo import conninfo_to_dict
        except ImportError as error:
            raise StoreError(
                f"an index in PostgreSQL needs psycopg and pgvector ({error}): "
                "pip install 'visavis[postgres]'"
            ) from None
        self._psycopg, self._vectors = psycopg, pgvector.psycopg
        self._address = address
        self._lock = threading.RLock()
        self._connection: Any = None
        try:
            parts = conninfo_to_dict(address)
        except psycopg.ProgrammingError as error:
            raise StoreError(
                f"the address of the database cannot be read ({_line(error)}); expected "
                "postgresql://user:password@host:port/database"
            ) from None
        user, host = parts.get("user", ""), parts.get("host", "")
        port = f":{parts['port']}" if "port" in parts else ""
        at = f"{user}@" if user else ""
        self.name = f"postgresql://{at}{host}{port}/{parts.get('dbname', '')}"

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                with suppress(self._psycopg.Error):
                    self._connection.close()
            self._connection = None

    @contextmanager
    def transaction(self, *, writing: bool = False) -> Iterator[Any]:
        """Yield the connection within a transaction: all that is done in it is kept, or nothing.

        Raises:
            StoreError: PostgreSQL refuses it, or the connection is lost.
        """
        with self._lock, self._guarded():
            connection = self._open()
            with connection.transaction():
                if not writing:  # all queries see the same state
                    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                yield connection

    def all(self, query: str, values: Any = ()) -> list[tuple[Any, ...]]:
        """Return the rows of one query."""
        with self.transaction() as connection:
            rows: list[tuple[Any, ...]] = connection.execute(query, values).fetchall()
            return rows

    def register_vectors(self, connection: Any) -> None:
        """Make the connection read and write vectors, once the database has the extension."""
        self._vectors.register_vector(connection)

    def _open(self) -> Any:
        if self._connection is not None and (self._connection.closed or self._connection.broken):
            self.close()
        if self._connection is None:
            connection = self._psycopg.connect(
                self._address, autocommit=True, connect_timeout=CONNECT_SECONDS
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self, connection: Any) -> None:
        connection.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")
        encoding, version, installed = connection.execute(
            "SELECT current_setting('server_encoding'), (SELECT default_version FROM"
            " pg_available_extensions WHERE name = 'vector'), to_regtype('vector') IS NOT NULL"
        ).fetchone()
        if encoding != "UTF8":
            raise StoreError(
                f"the database {self.name} has the encoding {encoding}, expected UTF8; make one "
                "with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
            )
        if not installed and version is None:
            raise StoreError(
                f"the server of {self.name} has no pgvector, which an index needs; install it on "
                "the server (package postgresql-NN-pgvector, or https://github.com/pgvector/pgvector)"
            )
        if installed:
            self.register_vectors(connection)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        errors = self._psycopg.errors
        try:
            yield
        except errors.InsufficientPrivilege as error:
            raise StoreError(
                f"{self.name} does not allow this ({_line(error)}); ask its administrator for "
                "rights to the tables, or to run CREATE EXTENSION vector"
            ) from error
        except errors.LockNotAvailable as error:
            raise StoreError(
                f"{self.name} is locked: another process has been writing for {LOCK_SECONDS} "
                "seconds; try again when it has ended"
            ) from error
        except errors.DataException as error:
            if "not allowed in vector" in str(error):
                raise NonFiniteError(
                    f"{self.name}: a vector to keep holds NaN or infinite numbers. The model that "
                    "made it is damaged or overflowed"
                ) from error
            raise self._refused(error) from error
        except self._psycopg.OperationalError as error:
            is_lost = self._connection is not None and self._connection.broken
            what = "the connection was lost" if is_lost else "it cannot be reached"
            raise StoreError(
                f"{self.name}: {what} ({_line(error)}); check that the server runs and the address "
                "is right. What was acknowledged is kept: the same call again does the rest"
            ) from error
        except self._psycopg.Error as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> StoreError:
        return StoreError(f"{self.name}: PostgreSQL refuses it ({_line(error)})")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
