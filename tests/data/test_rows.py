"""Rows of every kind of file: all of them, in order, by number, and damage named."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.data_files import picture_bytes, write_lines, write_tar
from visavis.data import readers as rows_module
from visavis.data.readers import Rows, find_files, open_rows
from visavis.errors import ImageError, TrainError
from visavis.inputs import Image, Stored
from visavis.processing.images import content_hash, decode_image, image_size

ROWS: list[dict[str, Any]] = [
    {"id": 0, "text": 'a "quoted" one, with [brackets] and {braces}'},
    {"id": 1, "text": "grün 🎈 \\ \n"},
    {"id": 2, "nested": [{"a": [1, 2]}, None]},
    {"id": 3, "text": "x" * 500},
]


def write_json(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def everything(rows: Rows) -> list[dict[str, Any]]:
    return [rows[number] for number in range(len(rows))]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii", [True, False])
def test_lists_of_any_layout_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, ascii: bool
) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK", chunk)
    text = json.dumps(ROWS, indent=indent, ensure_ascii=ascii)
    assert everything(open_rows([write_json(tmp_path / "a.json", text)])) == ROWS
    assert everything(open_rows([write_json(tmp_path / "b.json", f"\ufeff {text} \n")])) == ROWS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_lines_with_blank_ones_between(tmp_path: Path, end: str) -> None:
    lines = end.join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    for name, start in (("a.jsonl", ""), ("b.json", "\ufeff")):
        path = tmp_path / name
        path.write_bytes((start + lines).encode())
        assert everything(open_rows([path])) == ROWS


def test_an_empty_list_and_an_empty_file_have_no_rows(tmp_path: Path) -> None:
    assert len(open_rows([write_json(tmp_path / "a.json", " [ ] ")])) == 0
    assert len(open_rows([write_json(tmp_path / "b.jsonl", "")])) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 0}, {"id": ', "breaks off at byte 12, after 1 records"),
        ('[{"id": 0}', "breaks off"),
        ('[{"id": 0}, 7]', "record 2 is '7', expected an object"),
        ("[", "breaks off"),
    ],
)
def test_damaged_lists_are_refused_when_opened(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        open_rows([write_json(tmp_path / "a.json", text)])


@pytest.mark.parametrize("line", ['{"id": ', "[1]", "7", "nonsense"])
def test_damaged_lines_are_named_when_read(tmp_path: Path, line: str) -> None:
    rows = open_rows([write_json(tmp_path / "a.jsonl", f'{{"id": 0}}\n{line}\n{{"id": 2}}\n')])
    assert (rows[0], rows[2]) == ({"id": 0}, {"id": 2})
    with pytest.raises(TrainError, match="a.jsonl, record 2 is"):
        rows[1]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"id": "\xff\xfe"}]')
    with pytest.raises(TrainError, match="expected JSON in UTF-8"):
        open_rows([tmp_path / "a.json"])


def test_a_file_cut_while_in_use_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    rows = open_rows([path])
    path.write_text("")
    with pytest.raises(TrainError, match="changed or cut while in use"):
        rows[1]
    path.unlink()
    with pytest.raises(TrainError, match="cannot read"):
        rows[1]


def test_files_of_folders_and_patterns_come_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_lines(tmp_path / f"part-{number}.jsonl", [{"id": f"{number}/{i}"} for i in range(2)])
    (tmp_path / "README.md").write_text("about")
    names = ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]
    for path in ("part-*.jsonl", "../" + tmp_path.name, str(tmp_path / "part-?.jsonl")):
        assert [file.name for file in find_files(path, tmp_path)] == names
    rows = open_rows(find_files("*.jsonl", tmp_path))
    assert [row["id"] for row in everything(rows)] == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]
    assert rows.where(3) == "part-1.jsonl, record 2"


@pytest.mark.parametrize("path", ["", "absent.json", "absent/*.json", "README.md/*"])
def test_no_files_is_an_error_that_says_where(tmp_path: Path, path: str) -> None:
    with pytest.raises(TrainError, match="--data"):
        find_files(path, tmp_path)


# ---- tars ----------------------------------------------------------------------------------------


def test_a_tars_pictures_belong_to_their_json(tmp_path: Path) -> None:
    members: dict[str, Any] = {
        "x/one.json": {"text": "one"},
        "x/one.png": picture_bytes(1),
        "two.1.png": picture_bytes(3),
        "two.0.png": picture_bytes(2),
        "two.txt": b"left out",
        "two.json": {"id": "own", "image": "two.0.png"},
        "film.mp4": b"frames",
        "film.json": {},
        "words.json": {"text": "alone"},
    }
    one, two, film, words = everything(open_rows([write_tar(tmp_path / "a.tar", members)]))
    assert (one["id"], one["text"]) == ("x/one", "one")
    assert one["image"].read() == picture_bytes(1)
    assert two["id"] == "own"
    assert [image.read() for image in two["image"]] == [picture_bytes(2), picture_bytes(3)]
    assert film["video"].read() == b"frames"
    assert words == {"id": "words", "text": "alone"}


def test_tars_that_are_damaged_or_incomplete(tmp_path: Path) -> None:
    alone = write_tar(tmp_path / "a.tar", {"a.png": b"", "b.json": {}})
    with pytest.raises(TrainError, match="1 pictures have no JSON beside them, the first is 'a'"):
        open_rows([alone])
    with pytest.raises(TrainError, match="no JSON at all"):
        open_rows([write_tar(tmp_path / "b.tar", {"notes.txt": b""})])
    (tmp_path / "c.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(tmp_path / "d.tar", "w:gz") as packed:
        packed.add(alone)
    for name in ("c.tar", "d.tar"):
        with pytest.raises(TrainError, match="not compressed"):
            open_rows([tmp_path / name])
    broken = open_rows([write_tar(tmp_path / "e.tar", {"x.json": b"{", "y.json": b"[]"})])
    for number, message in enumerate(("e.tar, record 'x' is not JSON", "no JSON object")):
        with pytest.raises(TrainError, match=message):
            broken[number]


def test_pictures_within_files_are_read_when_needed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.json": {}, "a.png": picture_bytes(1)})
    stored = open_rows([path])[0]["image"]
    image = Image(stored)
    assert image_size(image) == (8, 6) == decode_image(image).size
    assert content_hash(image) == content_hash(Image(picture_bytes(1)))
    assert image == Image(open_rows([path])[0]["image"]) and len({image, Image(stored)}) == 1
    with pytest.raises(ImageError, match="'b: a.png' is not a picture"):
        decode_image(Image(Stored("b: a.png", lambda: b"nonsense")))
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="changed or cut while in use"):
        decode_image(image)
