"""An index in PostgreSQL with several writers, lost connections, wrong models and missing parts."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.fakes import tiny_model, write_pictures
from tests.index.conftest import new_schema
from visavis.errors import StoreError
from visavis.index import Index
from visavis.index.postgres_store import PostgresStore
from visavis.index.store import IndexRow

META = {"model": "tiny", "fingerprint": "f00", "dim": "4"}


def rows(prefix, number):
    vectors = np.random.default_rng(number).normal(size=(number, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [IndexRow(f"{prefix}{i}", f"c{i}", vector) for i, vector in enumerate(vectors)]


def test_an_index_in_a_database_answers_as_one_in_a_file(postgres, tmp_path):
    model = tiny_model()
    photos = write_pictures(tmp_path / "photos", 12)
    for address in (postgres, tmp_path / "photos.idx"):
        with Index(address, model) as index:
            report = index.add([tmp_path / "photos", {"text": "a red car", "metadata": {"n": 1}}])
            assert (report.added, len(index)) == (13, 13)
            assert index.add([tmp_path / "photos"]).unchanged == 12
            assert index.prune() == []
            photos[0].rename(photos[0].with_suffix(".gone"))
            assert index.prune() == [str(photos[0])]
            photos[0].with_suffix(".gone").rename(photos[0])
    with Index(postgres, model) as ours, Index(tmp_path / "photos.idx", model) as file:
        assert len(ours) == len(file) == 12
        for query in ("red car", photos[3], "picture 007"):
            for mode in ("hybrid", "vector"):
                found, expected = (one.search(query, 5, mode=mode) for one in (ours, file))
                assert [hit.source for hit in found] == [hit.source for hit in expected]
                assert [hit.score for hit in found] == [hit.score for hit in expected]
                assert [hit.why for hit in found] == [hit.why for hit in expected]
        assert [hit.source for hit in ours.search("car", filter="n=1")] == ["a red car"]


def test_an_index_of_another_model_is_refused(postgres, tmp_path):
    with Index(postgres, tiny_model()) as index:
        index.add({"text": "a text"})
    with pytest.raises(StoreError, match="vectors of different models cannot be compared"):
        Index(postgres, tiny_model(1))


def test_two_writers_lose_nothing(postgres):
    stores = [PostgresStore(postgres) for _ in range(4)]

    def write(number):
        for part in range(5):  # the same contents from all
            stores[number].put(rows(f"writer{number}-{part}-", 20), META)
        stores[number].remove([f"writer{number}-0-3"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    store = PostgresStore(postgres)
    assert store.count() == len(store.first(1000)) == 4 * (5 * 20 - 1)
    assert len(store.vectors_of([f"c{i}" for i in range(30)])) == 20
    assert len(store.known([f"writer3-4-{i}" for i in range(20)])) == 20


def test_a_reader_sees_whole_batches_while_another_writes(postgres):
    writer, reader = PostgresStore(postgres), PostgresStore(postgres)
    writer.put(rows("a", 10), META)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(
            lambda: [writer.put(rows(f"b{part}-", 10), META) for part in range(10)]
        )
        while not writing.done():
            assert reader.count() % 10 == 0
            assert len(reader.nearest(rows("a", 10)[0].vector, 500)) % 10 == 0
        writing.result()
    assert reader.count() == 110


def test_a_lost_connection_is_an_error_and_is_made_again(postgres):
    import psycopg

    store = PostgresStore(postgres)
    store.put(rows("a", 3), META)
    pid = store.database.all("SELECT pg_backend_pid()")[0][0]
    with psycopg.connect(postgres, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    with pytest.raises(StoreError, match="the connection was lost"):
        store.count()
    assert store.count() == 3


def test_a_writer_that_is_killed_leaves_whole_batches(postgres):
    script = f"""
        import numpy as np
        from visavis.index.postgres_store import PostgresStore
        from visavis.index.store import IndexRow
        store = PostgresStore({postgres!r})
        for part in range(10**6):
            vectors = np.eye(4, dtype=np.float32)
            names = [f"{{part}}-{{i}}" for i in range(4)]
            store.put([IndexRow(n, n, v) for n, v in zip(names, vectors)], {META!r})
            print(part, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    acknowledged = 4 + sum(1 for _ in process.stdout)
    process.wait()
    store = PostgresStore(postgres)
    deadline = time.monotonic() + 30  # the server notices that the client is gone
    while store.count() % 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert store.count() % 4 == 0 and store.count() >= 4 * acknowledged
    assert len(store.first(10**6)) == store.count()


def test_a_server_that_is_not_there(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="it cannot be reached .*check that the server runs"):
        PostgresStore(f"postgresql://me:secret@/photos?host={tmp_path}")
    with pytest.raises(StoreError, match="address of the database cannot be read"):
        PostgresStore("postgresql://me@[host/photos")


def test_passwords_are_not_in_messages(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError) as caught:
        PostgresStore(f"postgresql://me:secret@/photos?host={tmp_path}")
    assert "secret" not in str(caught.value) and "me@" in str(caught.value)


def test_a_server_without_pgvector(postgres_server):
    import psycopg

    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE bare")
    bare = postgres_server.replace("/postgres?", "/bare?")
    hidden = f"{bare}&options=-cextension_control_path%3D/nowhere"
    with pytest.raises(StoreError, match="no pgvector, which an index needs; install it"):
        PostgresStore(hidden)
    store = PostgresStore(bare)  # available, and installed by the first put
    store.put(rows("a", 3), META)
    assert store.count() == 3


def test_an_encoding_that_cannot_hold_all_texts(postgres_server):
    import psycopg

    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StoreError, match="encoding LATIN1, expected UTF8"):
        PostgresStore(postgres_server.replace("/postgres?", "/latin?"))


def test_a_user_who_may_only_read(postgres_server):
    import psycopg

    address = new_schema(postgres_server)
    store = PostgresStore(address)
    store.put(rows("a", 3), META)
    with psycopg.connect(address, autocommit=True) as connection:
        schema = connection.execute("SELECT current_schema()").fetchone()[0]
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO reader")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO reader")
    reader = PostgresStore(address.replace("postgres:@", "reader:@"))
    assert reader.nearest(rows("a", 3)[1].vector, 1)[0][0] == 2
    with pytest.raises(StoreError, match="does not allow this"):
        reader.put(rows("b", 1), META)


def test_an_index_of_a_newer_version_is_refused(postgres):
    store = PostgresStore(postgres)
    store.put(rows("a", 1), META)
    with store.database.transaction(writing=True) as connection:
        connection.execute("UPDATE visavis_meta SET value = '9' WHERE key = 'format'")
    with pytest.raises(StoreError, match="index format 9, expected 1"):
        PostgresStore(postgres)


def test_without_psycopg_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"pip install 'visavis\[postgres\]'"):
        PostgresStore("postgresql://host/photos")
