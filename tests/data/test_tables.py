"""Parquet and Arrow: rows equal what was written, pictures come late, little is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.data.data_files import picture_bytes
from visavis.data import readers
from visavis.data.readers import open_rows
from visavis.errors import TrainError
from visavis.inputs import Stored

arrow = pytest.importorskip("pyarrow")

NUM_ROWS = 7
KINDS = ("a.parquet", "file.arrow", "stream.arrow")


def columns() -> dict[str, Any]:
    return {
        "id": [f"row-{number}" for number in range(NUM_ROWS)],
        "picture": [picture_bytes(number) for number in range(NUM_ROWS)],
        "image": [{"bytes": picture_bytes(number), "path": None} for number in range(NUM_ROWS)],
        "mixed": [
            {"bytes": None, "path": f"{number}.png"}
            if number % 2
            else {"bytes": picture_bytes(number), "path": "x"}
            for number in range(NUM_ROWS)
        ],
        "images": [
            [{"bytes": picture_bytes(i), "path": None} for i in range(number % 3)]
            for number in range(NUM_ROWS)
        ],
        "words": [["a"] * number for number in range(NUM_ROWS)],
    }


def write(path: Path, table: Any, rows_per_group: int = 3) -> Path:
    from pyarrow import ipc, parquet

    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=rows_per_group)
        return path
    new = ipc.new_stream if path.name.startswith("stream") else ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_group)
    return path


def content(value: Any) -> Any:
    return value.read() if isinstance(value, Stored) else value


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_was_written_in_any_order(tmp_path: Path, kind: str) -> None:
    rows = open_rows([write(tmp_path / kind, arrow.table(columns()))])
    assert len(rows) == NUM_ROWS
    for number in (6, 0, 3, 2, 5, 1, 4):
        row = rows[number]
        assert (row["id"], row["words"]) == (f"row-{number}", ["a"] * number)
        assert isinstance(row["picture"], Stored) and isinstance(row["image"], Stored)
        assert content(row["picture"]) == content(row["image"]) == picture_bytes(number)
        mixed = f"{number}.png" if number % 2 else picture_bytes(number)
        assert content(row["mixed"]) == mixed
        assert [content(one) for one in row["images"]] == list(
            map(picture_bytes, range(number % 3))
        )
        assert rows.where(number) == f"{kind}, row {number + 1}"


@pytest.mark.parametrize("kind", KINDS)
def test_missing_pictures_are_none(tmp_path: Path, kind: str) -> None:
    table = arrow.table({"picture": arrow.array([None, b"x"], arrow.binary())})
    rows = open_rows([write(tmp_path / kind, table)])
    assert rows[0]["picture"] is None and content(rows[1]["picture"]) == b"x"


def test_pictures_of_parquet_are_not_decoded_with_their_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = readers.Chunks(1)  # room for nothing: each column is dropped for the next
    monkeypatch.setattr(readers, "_CHUNKS", chunks)
    table = arrow.table({"id": ["a", "b"], "picture": [b"x", b"y"]})
    rows = open_rows([write(tmp_path / "a.parquet", table)])
    row = rows[1]
    assert [column for _, _, column in chunks.kept] == ["id"]
    assert content(row["picture"]) == b"y" and len(chunks.kept) == 1
    assert rows[0]["id"] == "a"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    whole = write(tmp_path / name, arrow.table(columns())).read_bytes()
    for content in (b"", b"nonsense" * 20, whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TrainError, match="cannot read"):
            open_rows([tmp_path / name])


def test_a_file_that_was_written_again_gives_its_new_rows(tmp_path: Path) -> None:
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    for number in range(4):
        parquet.write_table(arrow.table({"text": [f"row {number}"]}), path)
        os.utime(path, (7, 7))  # the same size, the same time
        table = readers.Table(path)
        assert table[0] == {"text": f"row {number}"}
