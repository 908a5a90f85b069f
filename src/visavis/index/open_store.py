"""Opens the store that an address names."""

from __future__ import annotations

from pathlib import Path

from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import VectorStore, address_or_path


def open_store(address: str | Path) -> VectorStore:
    """Return the store at the path of an index file or the address of a PostgreSQL database.

    Raises:
        StoreError: it cannot be opened.
    """
    named = address_or_path(address)
    if isinstance(named, str):
        from visavis.index.postgres_store import PostgresStore

        return PostgresStore(named)
    return SqliteStore(named)
