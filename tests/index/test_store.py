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
from visavis.index.filters import Filter
from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import IndexRow, KnownItem, Stamp

META = {"model": "tiny", "fingerprint": "abc", "dim": "4"}


def row(number: int, content: str = "") -> IndexRow:
    vector = np.eye(4, dtype=np.float32)[number % 4]
    return IndexRow(
        f"/pictures/{number}.png", content or f"content {number}", vector, stamp=Stamp(number, 1)
    )


def all_of(store: SqliteStore, dim: int = 4) -> dict[str, list[float]]:
    """Return the vectors of all items by source, as a search reads them."""
    near = store.nearest(np.ones(dim, np.float32), 10**6)
    items = store.items([number for number, _ in near])
    vectors = store.vectors(list(items))
    return {items[number].source: vectors[number].tolist() for number in sorted(items)}


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.idx")
    store.put([row(0), row(1)], META)
    store.close()
    store = SqliteStore(tmp_path / "a.idx")
    assert store.meta() == META
    assert store.count() == 2
    known = {"/pictures/1.png": KnownItem("content 1", Stamp(1, 1), "", 1)}
    assert store.known(["/pictures/1.png", "/pictures/9.png"]) == known
    assert all_of(store) == {"/pictures/0.png": [1, 0, 0, 0], "/pictures/1.png": [0, 1, 0, 0]}
    assert [item.source for item in store.first(9)] == ["/pictures/0.png", "/pictures/1.png"]


def test_a_source_is_replaced_and_keeps_its_number(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.idx")
    store.put([row(0)], META)
    number = store.first(1)[0].id
    store.put([row(0, content="changed")], META)
    assert store.count() == 1
    assert store.first(1)[0].id == number
    assert store.known(["/pictures/0.png"])["/pictures/0.png"].content == "changed"


def test_nothing_is_made_before_the_first_put(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "sub" / "a.idx")
    assert store.count() == 0 and not store.exists()
    assert list(tmp_path.iterdir()) == []


def test_one_bad_row_undoes_its_whole_batch(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.idx")
    store.put([row(0)], META)
    bad = IndexRow("x", None, np.zeros(4, np.float32))  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        store.put([row(1), row(2), bad], META)
    assert store.count() == 1


def test_another_connection_is_noticed(tmp_path: Path) -> None:
    one, two = SqliteStore(tmp_path / "a.idx"), SqliteStore(tmp_path / "a.idx")
    one.put([row(0)], META)
    two = SqliteStore(tmp_path / "a.idx")
    before = one.file.version()
    two.put([row(1)], META)
    assert one.file.version() != before
    assert one.count() == 2


def test_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.idx")
    store.put([row(0)], META)
    other = {"model": "other", "fingerprint": "xyz", "dim": "4"}
    with pytest.raises(StoreError, match=r"'tiny'.*abc.*'other'.*xyz.*[Ll]oad the model"):
        store.put([row(1)], other)
    assert store.count() == 1


@pytest.mark.parametrize("content", [b"not a database, only words" * 50, b"\x89PNG\r\n\x1a\n" * 99])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is not an index or is damaged"):
        SqliteStore(path)
    assert path.read_bytes() == content


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "browser.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE history (url TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="of another program"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    store = SqliteStore(path)
    store.put([row(0)], META)
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"index format 99, expected 2"):
        SqliteStore(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    store = SqliteStore(path)
    store.put([row(i) for i in range(500)], META)
    store.close()
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(StoreError, match=r"damaged.*index repair"):
        all_of(SqliteStore(path))


def test_a_vector_of_the_wrong_length(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.idx")
    store.put([row(0)], META)
    with pytest.raises(StoreError, match=r"has 16 bytes, not 32"):
        all_of(store, 8)


def test_a_folder_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder"):
        SqliteStore(tmp_path)


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.idx")
    store.put([row(0)], META)
    # SQLite's own limit gives the very error of a full disk.
    connection = store.file._open()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match=r"full.*free some space"):
        store.put([row(i) for i in range(1, 2000)], META)
    store.close()
    assert SqliteStore(tmp_path / "a.idx").count() == 1


def test_killed_inside_a_transaction(tmp_path: Path) -> None:
    """kill -9 while a batch is being written: that batch is gone, the one before is there."""
    path = tmp_path / "a.idx"
    code = f"""
import sys, time
import numpy as np
from pathlib import Path
from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import IndexRow

class Stuck:
    def astype(self, kind):  # called in the middle of `put`, after it has begun to write
        print("writing", flush=True)
        time.sleep(600)

store = SqliteStore(Path({str(path)!r}))
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
    store = SqliteStore(path)
    assert [item.source for item in store.first(9)] == ["/first.png"]
    store.put([row(7)], META)
    assert store.count() == 2


READER = """
import os, sys
from pathlib import Path
from visavis.index.sqlite_store import SqliteStore
os.setuid(65534)
store = SqliteStore(Path(sys.argv[1]))
same = store.file.version() == store.file.version()
print(store.count(), [item.source for item in store.first(9)], same)
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
                "from tests.index.test_store import META, row, SqliteStore\n"
                "SqliteStore(Path(sys.argv[1])).put([row(0), row(1)], META); os._exit(9)"
            )
            subprocess.run([sys.executable, "-c", write, path], check=False)
        store = SqliteStore(path)
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
    owner = SqliteStore(path)
    owner.put([row(0)], META)
    access = os.access
    monkeypatch.setattr(os, "access", lambda *_: False)
    reader = SqliteStore(path)
    monkeypatch.setattr(os, "access", access)
    before = reader.file.version()
    assert reader.count() == 1
    owner.put([row(1)], META)
    assert reader.file.version() != before and reader.count() == 2
    owner.close()
    assert reader.count() == 2 and len(all_of(reader)) == 2
    for write in (lambda: reader.put([row(3)], META), lambda: reader.remove(["x"])):
        with pytest.raises(StoreError, match="change the rights"):
            write()


def test_an_index_opens_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    SqliteStore(path).put([row(0)], META)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert SqliteStore(path).count() == 1  # without waiting for the writer
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
    store = SqliteStore(path)
    store.put([row(0)], META)
    store.close()
    with sqlite3.connect(path) as connection:
        for statement in FOREIGN_TABLES[name]:
            connection.execute(statement)
    connection.close()
    with pytest.raises(StoreError, match="not an index or is damaged"):
        SqliteStore(path)


COLUMNS = (
    *("items.source", "items.path", "items.page", "items.date", "items.facet", "items.slot"),
    *("items.vector", "items.parts", "items.preview", "facets.kind", "facets.folder"),
    *("facets.metadata", "vectors.content", "vectors.vector", "words_content.c0", "meta.value"),
)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("value", [2.5, "x", b"\xff\xfe", 2**62])
def test_cells_of_another_type(tmp_path: Path, column: str, value: object) -> None:
    """Rows of another program: an answer or one of our errors, nothing else."""
    path = tmp_path / "a.idx"
    store = SqliteStore(path)
    store.put([row(0), row(1)], META)
    store.close()
    table, name = column.split(".")
    with sqlite3.connect(path) as connection:
        try:
            connection.execute(f"UPDATE {table} SET {name} = ? WHERE rowid = 1", (value,))
        except sqlite3.IntegrityError:  # NOT NULL
            return
    connection.close()
    store = SqliteStore(path)
    for read in (
        lambda: all_of(store),
        lambda: store.nearest(np.ones(4, np.float32), 2, Filter(kinds=("image",), glob="*")),
        lambda: store.nearest(np.ones(4, np.float32), 2, Filter(metadata=(("a", "b"),))),
        lambda: store.matching(["x"], 9),
        lambda: store.first(9),
        lambda: store.items([1]),
        lambda: store.vectors_of(["content 0"]),
        lambda: store.known(["/pictures/0.png"]),
        lambda: store.files(["/pictures/0.png"]),
        lambda: list(store.file_items()),
        lambda: store.put([row(0), row(2)], META),
        lambda: store.remove(["/pictures/0.png"]),
    ):
        try:
            read()
        except StoreError as error:
            assert "not an index or is damaged" in str(error) or "was made with" in str(error)


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000 + "c", "nul\0.idx", ""])
def test_names_that_no_index_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError):
        SqliteStore(tmp_path / name).put([row(0)], META)
