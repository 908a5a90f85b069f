"""Care of an index: upgrade of old files, another model, repair, statistics, export."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import picture, tiny_model, write_pictures
from visavis import Index
from visavis.errors import InputError, StoreError, VisavisError
from visavis.index import migrate as migration
from visavis.index.migrate import migrate
from visavis.index.overview import export, stats
from visavis.index.repair import repair
from visavis.index.schema import _OLD_TABLE
from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import IndexRow


def old_file(path: Path, sources: dict[str, bool], dim: int = 16) -> np.ndarray:
    """Write an index of format 1; `sources` says which are files. Return its vectors."""
    vectors = np.random.default_rng(0).normal(size=(len(sources), dim)).astype("<f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    model = tiny_model()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        connection.execute(_OLD_TABLE)
        connection.execute("CREATE INDEX items_by_content ON items (content)")
        connection.execute("PRAGMA application_id = 0x56495341")
        connection.execute("PRAGMA user_version = 1")
        meta = {"model": model.name, "fingerprint": model.fingerprint, "dim": str(dim)}
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        for number, (source, is_file) in enumerate(sources.items()):
            text = "" if is_file else "own text"
            values = (source, f"c{number}", 10, 20, is_file, text, None, vectors[number].tobytes())
            connection.execute("INSERT INTO items VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        connection.execute("UPDATE items SET content = 'c0', vector = ? WHERE id = 2",
                           (vectors[0].tobytes(),))  # fmt: skip
    connection.close()
    vectors[1] = vectors[0]
    return vectors


OLD = {
    "/photos/RedCar.png": True,
    "/photos/copy.png": True,
    "/papers/a.pdf#page=3": True,
    "/clips/b.mp4": True,
    "note": False,
}


def test_a_file_of_format_1_is_upgraded_in_place(tmp_path: Path) -> None:
    path = tmp_path / "old.idx"
    vectors = old_file(path, OLD)
    with Index(path, tiny_model()) as index:
        assert [item.source for item in index.items()] == list(OLD)
        assert [item.kind for item in index.items()] == ["image", "image", "page", "video", "text"]
        page, note = index.item(3), index.item(5)
        assert page is not None and (page.path, page.page) == ("/papers/a.pdf", 3)
        assert note is not None and (note.path, note.text, note.date) == ("", "own text", None)
        near = index.store.nearest(vectors[0], 5)
        assert [number for number, _ in near[:2]] == [1, 2]
        assert dict(near) == pytest.approx(dict(enumerate(vectors @ vectors[0], 1)), abs=1e-6)
        assert index.search("red car", k=1)[0].words == ("red", "car")
        index.add({"text": "new"})
    with Index(path, tiny_model()) as index:
        assert len(index) == 6


def test_an_upgrade_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.idx"
    old_file(path, OLD)
    before = path.read_bytes()

    def broken(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("visavis.index.upgrade.file_words", broken)
    with pytest.raises(KeyboardInterrupt):
        SqliteStore(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE items SET source = 3.5 WHERE id = 1")
        connection.execute("UPDATE items SET vector = 'x' WHERE id = 3")
    connection.close()
    store = SqliteStore(path)
    with pytest.raises(StoreError, match="damaged"):
        store.nearest(np.ones(16, np.float32), 3)


def test_with_rights_to_read_only_an_old_file_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_file(tmp_path / "old.idx", OLD)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StoreError, match=r"format 1, expected 2.*index stats .*old\.idx"):
        SqliteStore(tmp_path / "old.idx")


# --- another model --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images", 5)
    shutil.copy(tmp_path / "images" / "picture-001.png", tmp_path / "images" / "same.png")
    return tmp_path / "images"


def filled(path: Path, folder: Path) -> Index:
    index = Index(path, tiny_model())
    index.add([folder, {"text": "a note"}, {"image": picture(50), "text": "with words"}])
    return index


def assert_migrated(path: Path, folder: Path) -> None:
    """The answers are those of an index that the new model made, with the old numbers."""
    with Index(path, tiny_model(1)) as index:
        expected = tiny_model(1).embed([folder / "picture-003.png", "a note"])
        for query, vector in (("query", expected[0]), ("other", expected[1])):
            wanted = {
                i.id: float(vector @ index.store.vectors([i.id])[i.id]) for i in index.items()
            }
            assert dict(index.store.nearest(vector, 99)) == pytest.approx(wanted, abs=1e-5), query
        assert index.search(folder / "picture-003.png", k=1)[0].score == pytest.approx(1, abs=1e-5)
        assert index.search("a note", k=1, mode="vector")[0].score == pytest.approx(1, abs=1e-5)
        spaces = index.store.file.all("SELECT DISTINCT space FROM vectors")  # type: ignore[attr-defined]
        assert len(spaces) == 1


def test_an_index_moves_to_another_model(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.idx"
    with filled(path, folder) as index:
        before = [(item.id, item.source, item.found_text) for item in index.items()]
        report = migrate(SqliteStore(path), tiny_model(1))
        assert (report.embedded, report.items, report.is_done, report.failed) == (7, 8, True, [])
    assert_migrated(path, folder)
    with Index(path, tiny_model(1)) as index:
        assert [(item.id, item.source, item.found_text) for item in index.items()] == before
        assert index.add(folder).unchanged == 6
    with pytest.raises(StoreError, match="was made with"):
        Index(path, tiny_model())
    with pytest.raises(InputError, match="already"):
        migrate(SqliteStore(path), tiny_model(1))


def test_an_interrupted_move_answers_as_before_and_is_resumed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.idx"
    model = tiny_model(1)
    monkeypatch.setattr(migration, "BATCH_ITEMS", 2)
    calls: list[int] = []

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def embed(self, items: Any) -> np.ndarray:
            calls.append(len(items))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return model.embed(items)

    with filled(path, folder) as index:
        before = index.search("words", k=9)
        with pytest.raises(KeyboardInterrupt):
            migrate(SqliteStore(path), Interrupted())  # type: ignore[arg-type]
        assert index.search("words", k=9) == before
        index.add({"text": "added meanwhile"})
    report = migrate(SqliteStore(path), Interrupted())  # type: ignore[arg-type]
    assert report.embedded == 8 - 4 and report.is_done
    assert_migrated(path, folder)


def test_items_that_cannot_be_embedded_again(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.idx"
    filled(path, folder).close()
    (folder / "picture-000.png").unlink()
    picture(77).save(folder / "picture-002.png")
    report = migrate(SqliteStore(path), tiny_model(1))
    assert not report.is_done
    reasons = dict(report.failed)
    assert "does not exist" in reasons[str(folder / "picture-000.png")]
    assert "has changed" in reasons[str(folder / "picture-002.png")]
    with Index(path, tiny_model()) as index:
        assert len(index) == 8
    report = migrate(SqliteStore(path), tiny_model(1), drop=True)
    assert (report.is_done, report.removed, report.embedded) == (True, 2, 0)
    assert_migrated(path, folder)


# --- repair ---------------------------------------------------------------------------------------


def big(path: Path, number: int = 600) -> np.ndarray:
    vectors = np.random.default_rng(1).normal(size=(number, 16)).astype(np.float32)
    model = tiny_model()
    meta = {"model": model.name, "fingerprint": model.fingerprint, "dim": "16"}
    store = SqliteStore(path)
    store.put(
        [
            IndexRow(
                f"/a/{n}.png", f"c{n}", vectors[n], path=f"/a/{n}.png", found_text=f"word{n}",
                metadata={"n": n % 3},
            )
            for n in range(number)
        ],
        meta,
    )  # fmt: skip
    store.close()
    return vectors


@pytest.mark.parametrize("seed", range(6))
def test_pages_of_the_file_that_are_damaged_cost_only_what_is_on_them(
    tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "a.idx"
    vectors = big(path)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    pages = len(content) // 4096
    for page in random.choice(np.arange(4, pages), 2, replace=False):
        content[page * 4096 : (page + 1) * 4096] = random.bytes(4096)
    path.write_bytes(content)
    try:
        report = repair(path)
    except StoreError as error:
        assert "nothing can be read" in str(error)
        assert path.read_bytes() == content
        return
    assert report.kept.read_bytes() == content
    assert report.items > 200
    with Index(path, tiny_model()) as index:
        assert len(index) == report.items
        near = dict(index.store.nearest(vectors[0], 1000))
        assert len(near) == report.items
        for item in index.items(1000):
            number = int(Path(item.source).stem)
            stored = index.store.vectors([item.id])[item.id]
            np.testing.assert_array_equal(stored, vectors[number])


def test_repair_of_a_sound_index_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    big(path, 50)
    report = repair(path)
    assert (report.items, report.lost, report.kept.name) == (50, 0, "a.idx.damaged1")
    assert repair(path).kept.name == "a.idx.damaged2"
    store = SqliteStore(path)
    assert store.matching(["word7"], 5)[0].words == ("word7",)
    assert store.first(1)[0].metadata == {"n": 0}


@pytest.mark.parametrize("content", [b"", b"no database" * 500, None])
def test_repair_of_what_holds_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.idx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"nothing can be read|no index file"):
        repair(path)
    assert not path.exists() or path.read_bytes() == content


# --- statistics and export ------------------------------------------------------------------------


def test_statistics(tmp_path: Path, folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    (folder / "raw.dng").write_text("x")
    (folder / "broken.png").write_text("x")
    with filled(tmp_path / "a.idx", folder) as index:
        found = stats(index.store)
        assert found["items"] == 8 and found["kinds"] == {"image": 7, "text": 1}
        assert found["folders"] == {str(folder): 6} and found["bytes"] > 10_000
        assert found["model"] == "tiny"
        left_out = {(one["suffix"], one["reason"]): one["files"] for one in found["left_out"]}
        raw = "camera raw is not read: export it as JPEG or TIFF"
        assert left_out == {
            (".txt", "not a supported suffix"): 1,
            (".dng", raw): 1,
            (".png", "cannot be read"): 1,
        }
        picture(1).save(folder / "broken.png")
        (folder / "notes.txt").unlink()
        index.add(folder)
        assert [one["suffix"] for one in stats(index.store)["left_out"]] == [".dng"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_export(tmp_path: Path, folder: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    with filled(tmp_path / "a.idx", folder) as index:
        index.add(folder, metadata={"tag": ["a", 1]})
        assert export(index.store, output) == 8
        expected = {item.id: item for item in index.items()}
        vectors = index.store.vectors(list(expected))
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = parquet.read_table(output).to_pylist()
    assert [row["id"] for row in rows] == list(expected)
    for row in rows:
        item = expected[row["id"]]
        np.testing.assert_array_equal(np.float32(row["vector"]), vectors[item.id])
        assert (row["source"], row["kind"], row["text"]) == (item.source, item.kind, item.text)
        metadata = row["metadata"] if suffix == ".jsonl" else json.loads(row["metadata"])
        assert metadata == item.metadata
    with pytest.raises(InputError, match=r"ends in \.parquet or \.jsonl"):
        export(index.store, tmp_path / "out.csv")


def test_exports_are_filtered_and_atomic(tmp_path: Path, folder: Path) -> None:
    from visavis.index import Filter

    with filled(tmp_path / "a.idx", folder) as index:
        assert export(index.store, tmp_path / "out.jsonl", Filter(kinds=("text",))) == 1
        before = (tmp_path / "out.jsonl").read_bytes()
        index.store.file.all("SELECT 1")  # type: ignore[attr-defined]
        with sqlite3.connect(index.path) as connection:
            connection.execute("UPDATE vectors SET vector = 'x'")
        connection.close()
        with pytest.raises(VisavisError):
            export(index.store, tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == before
