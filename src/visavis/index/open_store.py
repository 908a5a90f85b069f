"""Opens the store that an address names."""

from __future__ import annotations

from pathlib import Path

from visavis.errors import StoreError
from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import VectorStore, address_or_path


def open_store(address: str | Path) -> VectorStore:
    """Return the store at the path of an index file.

    Raises:
        StoreError: it cannot be opened.
    """
    named = address_or_path(address)
    if isinstance(named, str):
        raise StoreError("PostgreSQL is not supported yet; name an index file")
    return SqliteStore(named)
