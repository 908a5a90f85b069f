"""The index file itself: transactions, damage, other programs' files, disk full, kill -9."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from visavis.errors import StoreError
from visavis.index.store import IndexRow, Stamp, Store

META = {"model": "tiny", "fingerprint": "abc", "dim": "4"}


def row(number: int, content: str = "") -> IndexRow:
    vector = np.eye(4, dtype=np.float32)[number % 4]
    return IndexRow(
        f"/pictures/{number}.png", content or f"content {number}", vector, Stamp(number, 1)
    )


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.idx")
    store.put([row(0), row(1)], META)
    store.close()
    store = Store(tmp_path / "a.idx")
    assert store.meta() == META
    assert len(store) == 2
    assert store.known("/pictures/1.png") == ("content 1", Stamp(1, 1))
    assert store.known("/pictures/9.png") is None
    ids, sources, vectors = store.matrix(4)
    assert sources == ["/pictures/0.png", "/pictures/1.png"]
    np.testing.assert_array_equal(vectors, np.eye(4, dtype=np.float32)[:2])
    item = store.item(int(ids[1]))
    assert item is not None and item.source == "/pictures/1.png"


def test_a_source_is_replaced_and_keeps_its_number(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.idx")
    store.put([row(0)], META)
    number = store.items(1)[0].id
    store.put([row(0, content="changed")], META)
    assert len(store) == 1
    assert store.items(1)[0].id == number
    assert store.known("/pictures/0.png") == ("changed", Stamp(0, 1))


def test_nothing_is_made_before_the_first_put(tmp_path: Path) -> None:
    store = Store(tmp_path / "sub" / "a.idx")
    assert len(store) == 0 and not store.exists()
    assert list(tmp_path.iterdir()) == []


def test_one_bad_row_undoes_its_whole_batch(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.idx")
    store.put([row(0)], META)
    bad = IndexRow("x", None, np.zeros(4, np.float32))  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        store.put([row(1), row(2), bad], META)
    assert len(store) == 1


def test_another_connection_is_noticed(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "a.idx"), Store(tmp_path / "a.idx")
    one.put([row(0)], META)
    two = Store(tmp_path / "a.idx")
    before = one.version()
    two.put([row(1)], META)
    assert one.version() != before
    assert len(one) == 2


def test_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.idx")
    store.put([row(0)], META)
    other = {"model": "other", "fingerprint": "xyz", "dim": "4"}
    with pytest.raises(StoreError, match=r"'tiny'.*abc.*'other'.*xyz.*[Ll]oad the model"):
        store.put([row(1)], other)
    assert len(store) == 1


@pytest.mark.parametrize("content", [b"not a database, only words" * 50, b"\x89PNG\r\n\x1a\n" * 99])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is not an index or is damaged"):
        Store(path)
    assert path.read_bytes() == content


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "browser.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE history (url TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="of another program"):
        Store(path)
    assert path.read_bytes() == before


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    store = Store(path)
    store.put([row(0)], META)
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"index format 99, expected 1"):
        Store(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    store = Store(path)
    store.put([row(i) for i in range(500)], META)
    store.close()
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(StoreError, match=r"damaged.*delete it and add"):
        Store(path).matrix(4)


def test_a_vector_of_the_wrong_length(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.idx")
    store.put([row(0)], META)
    with pytest.raises(StoreError, match=r"has 16 bytes, not 32"):
        store.matrix(8)


def test_a_folder_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder"):
        Store(tmp_path)


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.idx")
    store.put([row(0)], META)
    # SQLite's own limit gives the very error of a full disk.
    connection = store._open()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match=r"full.*free some space"):
        store.put([row(i) for i in range(1, 2000)], META)
    store.close()
    assert len(Store(tmp_path / "a.idx")) == 1


def test_killed_inside_a_transaction(tmp_path: Path) -> None:
    """kill -9 while a batch is being written: that batch is gone, the one before is there."""
    path = tmp_path / "a.idx"
    code = f"""
import sys, time
import numpy as np
from pathlib import Path
from visavis.index.store import IndexRow, Store

class Stuck:
    def astype(self, kind):  # called in the middle of `put`, after it has begun to write
        print("writing", flush=True)
        time.sleep(600)

store = Store(Path({str(path)!r}))
meta = {META!r}
store.put([IndexRow("/first.png", "1", np.zeros(4, np.float32))], meta)
second = IndexRow("/second.png", "2", np.zeros(4, np.float32))
store.put([second, IndexRow("/third.png", "3", Stuck())], meta)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "writing"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    store = Store(path)
    assert [item.source for item in store.items(9)] == ["/first.png"]
    store.put([row(7)], META)
    assert len(store) == 2


READER = """
import os, sys
from pathlib import Path
from visavis.index.store import Store
os.setuid(65534)
store = Store(Path(sys.argv[1]))
print(len(store), store.matrix(4)[1], store.version() == store.version())
try:
    store.put([], {})
except Exception as error:
    print(type(error).__name__, "rights" in str(error))
"""


def read_without_rights(path: Path) -> list[str]:
    """Open an index in a child process that may read and not write."""
    child = subprocess.run(
        [sys.executable, "-c", READER, path], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs to be root")
@pytest.mark.parametrize("state", ["closed", "open elsewhere", "killed"])
def test_an_index_is_read_with_rights_to_read_only(state: str) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to others
    path = folder / "odd name ?#%41.idx"
    try:
        if state == "killed":
            write = (
                "import sys, os, numpy as np; from pathlib import Path\n"
                "from tests.index.test_store import META, row, Store\n"
                "Store(Path(sys.argv[1])).put([row(0), row(1)], META); os._exit(9)"
            )
            subprocess.run([sys.executable, "-c", write, path], check=False)
        store = Store(path)
        store.put([row(0), row(1)], META)
        if state == "closed":
            store.close()
        folder.chmod(0o555)
        expected = ["2 ['/pictures/0.png', '/pictures/1.png'] True", "StoreError True"]
        assert read_without_rights(path) == expected
        if state != "closed":
            store.put([row(2)], META)
            assert read_without_rights(path)[0].startswith("3 ")
        store.close()
    finally:
        shutil.rmtree(folder)


def test_changes_by_others_are_seen_with_rights_to_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.idx"
    owner = Store(path)
    owner.put([row(0)], META)
    access = os.access
    monkeypatch.setattr(os, "access", lambda *_: False)
    reader = Store(path)
    monkeypatch.setattr(os, "access", access)
    before = reader.version()
    assert len(reader) == 1
    owner.put([row(1)], META)
    assert reader.version() != before and len(reader) == 2
    owner.close()
    assert len(reader) == 2 and len(reader.matrix(4)[0]) == 2
    for write in (lambda: reader.put([row(3)], META), lambda: reader.remove(["x"])):
        with pytest.raises(StoreError, match="change the rights"):
            write()


def test_an_index_opens_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    Store(path).put([row(0)], META)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert len(Store(path)) == 1  # without waiting for the writer
    writer.rollback()
    writer.close()


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
FOREIGN_TABLES = {
    "an endless view": [
        "ALTER TABLE items RENAME TO hidden",
        f"CREATE VIEW items AS {ENDLESS} SELECT i AS id, 'x' AS source, x'00' AS vector FROM n",
    ],
    "a view of metadata": [
        "ALTER TABLE meta RENAME TO hidden",
        "CREATE VIEW meta AS SELECT * FROM hidden",
    ],
    "a trigger": ["CREATE TRIGGER t AFTER INSERT ON items BEGIN DELETE FROM items; END"],
    "a column that is computed": [
        "DROP TABLE meta",
        "CREATE TABLE meta (key TEXT, value TEXT AS (hex(zeroblob(1000000000))))",
    ],
    "no items": ["DROP TABLE items"],
    "another view": [f"CREATE VIEW other AS {ENDLESS} SELECT i FROM n"],
}


@pytest.mark.parametrize("name", FOREIGN_TABLES)
def test_tables_that_are_not_those_of_an_index(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.idx"
    store = Store(path)
    store.put([row(0)], META)
    store.close()
    with sqlite3.connect(path) as connection:
        for statement in FOREIGN_TABLES[name]:
            connection.execute(statement)
    connection.close()
    with pytest.raises(StoreError, match="not an index or is damaged"):
        Store(path)


@pytest.mark.parametrize("column", ["source", "vector", "content", "text", "preview"])
@pytest.mark.parametrize("value", [3, 2.5, "x", b"\xff\xfe", None])
def test_cells_of_another_type(tmp_path: Path, column: str, value: object) -> None:
    """Rows of another program: an answer or one of our errors, nothing else."""
    path = tmp_path / "a.idx"
    store = Store(path)
    store.put([row(0), row(1)], META)
    store.close()
    with sqlite3.connect(path) as connection:
        try:
            connection.execute(f"UPDATE items SET {column} = ? WHERE id = 1", (value,))
        except sqlite3.IntegrityError:  # NOT NULL
            return
    connection.close()
    store = Store(path)
    for read in (
        lambda: store.matrix(4),
        lambda: store.items(9),
        lambda: store.item(1),
        lambda: store.vector_of("content 0"),
        lambda: store.known("/pictures/0.png"),
        store.file_sources,
    ):
        try:
            read()
        except StoreError as error:
            assert "not an index or is damaged" in str(error)


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000 + "c", "nul\0.idx", ""])
def test_names_that_no_index_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError):
        Store(tmp_path / name).put([row(0)], META)
