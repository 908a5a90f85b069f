"""Queries with positives and negatives, corpora, mined negatives, folders of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.data_files import (
    matches,
    opened,
    picture_bytes,
    said,
    spec,
    write_lines,
    write_pictures,
)
from visavis.data.sources import open_data_source, source_fingerprint
from visavis.errors import TrainError


def pair(id: Any = 1, **fields: Any) -> dict[str, Any]:
    return {"id": id, "query": {"text": "a cat"}, "positives": [{"image": "a.jpg"}], **fields}


def read(folder: Path, *rows: dict[str, Any], **settings: Any) -> list[Any]:
    write_lines(folder / "train.jsonl", rows)
    return matches(opened(folder, "pairs", "train.jsonl", **settings))


def test_items_keep_their_parts_in_order(tmp_path: Path) -> None:
    row = pair(
        query={"image": "q.png", "text": "like this"},
        positives=[{"text": "seen", "image": ["a.jpg", "b.jpg"], "score": 0.9}],
        negatives=["a dog", {"video": "clip", "score": 0.4, "source": "nano"}],
        group=7,
    )
    (sample,) = read(tmp_path, row, instruction="Find it.", target_instruction="Seen.")
    assert said(sample.query) == [["[q.png]", "like this"]]
    assert said(sample.target) == [["seen", "[a.jpg]", "[b.jpg]"]]
    assert [said(one) for one in sample.negatives] == [[["a dog"]], [["[clip]"]]]
    assert (sample.id, sample.group) == ("1", "7")
    assert (sample.instruction, sample.target_instruction) == ("Find it.", "Seen.")


def test_several_positives_are_samples_of_one_group(tmp_path: Path) -> None:
    row = pair(positives=["one", "two", "three"], negatives=["no"])
    first, second, third, other = read(tmp_path, row, pair(2))
    assert [one.id for one in (first, second, third, other)] == ["1", "1#1", "1#2", "2"]
    assert [said(one.target)[0][0] for one in (first, second, third)] == ["one", "two", "three"]
    assert {one.group for one in (first, second, third)} == {"1"} and other.group == ""
    assert len(third.negatives) == 1


@pytest.mark.parametrize("query", ["anchor", "query"])
def test_columns_of_sentence_transformers(tmp_path: Path, query: str) -> None:
    row = {query: "a cat", "positive": {"image": "a.png", "text": "seen"}, "negative": "a dog"}
    row |= {"negative_10": "ten", "negative_2": {"image": "b.png"}, "negative_1": ["x", "y"]}
    first, second = read(tmp_path, row, {query: {"image": "q.png"}, "positive": "a cat"})
    assert said(first.query) == [["a cat"]] and said(first.target) == [["[a.png]", "seen"]]
    found = [said(one)[0][0] for one in first.negatives]
    assert found == ["a dog", "x", "y", "[b.png]", "ten"]
    assert said(second.query) == [["[q.png]"]] and second.negatives == ()
    assert first.group == "" and (first.id, second.id) == ("train:0", "train:1")


def test_tables_with_columns_of_sentence_transformers(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = {"bytes": picture_bytes(3), "path": None}
    rows = [{"anchor": "a cat", "positive": image, "negative": image, "negative_1": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (sample,) = matches(opened(tmp_path, "pairs", "train.parquet"))
    assert said(sample.target) == [["[Stored]"]]
    assert [said(one) for one in sample.negatives] == [[["[Stored]"]]]


def test_messages_of_ms_swift(tmp_path: Path) -> None:
    def user(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    rows = (
        {
            "messages": user("<image>like this"),
            "images": ["q.png"],
            "positive_messages": [user("<image>seen"), user("<image><image>")],
            "positive_images": [["a.png"], ["b.png", "c.png"]],
            "negative_messages": [user("a dog"), user("<video>runs")],
            "negative_videos": [[], ["clip.mp4"]],
        },
        {"messages": user("a cat"), "positive_messages": user("<image>"), "positive_images": "a"},
    )
    first, second, third = read(tmp_path, *rows)
    assert said(first.query) == said(second.query) == [["[q.png]", "like this"]]
    assert said(first.target) == [["[a.png]", "seen"]]
    assert said(second.target) == [["[b.png]", "[c.png]"]]
    assert [said(one) for one in first.negatives] == [[["a dog"]], [["[clip.mp4]", "runs"]]]
    assert first.group == second.group == "train:0"
    assert said(third.target) == [["[a]"]] and third.negatives == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "positives": ["b"], "negativs": ["c"]}, "the key 'negativs', which is not"),
        ({"anchor": "a", "positive": "b", "label": 1}, "the key 'label', which is not read"),
        ({"anchor": "a", "query": "a", "positive": "b"}, "2 of 'anchor' and 'query'"),
        ({"positive": "b"}, "0 of 'anchor' and 'query'"),
        ({"messages": [], "positive_messages": []}, "0 'messages', expected one"),
        ({"messages": [{"role": "user", "content": "a"}]}, "'positive_messages' are empty"),
        (
            {"messages": [{"role": "user", "content": "a"}], "rejected_messages": []},
            "the key 'rejected_messages'",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "positive_messages": [[{"role": "user", "content": "<image>"}]],
                "positive_images": [["a"], ["b"]],
            },
            "1 'positive_messages' and 2 lists of 'positive_images'",
        ),
    ],
)
def test_what_is_wrong_with_columns_is_named(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        read(tmp_path, row)


def test_items_of_a_corpus_are_named_by_id(tmp_path: Path) -> None:
    corpus = [{"id": 1, "text": "a cat"}, {"id": "x", "image": "a.png", "score": 1}]
    write_lines(tmp_path / "corpus.jsonl", corpus)
    options = {"corpus": "corpus.jsonl"}
    row = pair(query={"text": "?"}, positives=["x"], negatives=["1"])
    (sample,) = read(tmp_path, row, options=options)
    assert (said(sample.target), said(sample.negatives[0])) == ([["[a.png]"]], [["a cat"]])
    with pytest.raises(TrainError, match="names the item 'y', which corpus.jsonl does not have"):
        read(tmp_path, pair(positives=["y"]), options=options)
    write_lines(tmp_path / "corpus.jsonl", [*corpus, {"id": "1", "text": "again"}])
    with pytest.raises(TrainError, match="record 3 has the id '1', expected one of its own"):
        read(tmp_path, row, options=options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "query": "a"}, "it has no 'positives', expected a list of items"),
        ({"id": 1, "positives": ["a"]}, "it has no 'query', expected an item"),
        (pair(positives="a"), "its 'positives' is 'a'"),
        (pair(positives=[]), "its 'positives' are empty"),
        (pair(negatives="a"), "its 'negatives' are 'a'"),
        (pair(positives=[{}]), "an item is empty"),
        (pair(positives=[{"text": "", "image": None}]), "an item is empty"),
        (pair(positives=[{"txt": "a"}]), "an item has the key 'txt'"),
        (pair(positives=[7]), "an item is '7'"),
        (pair(query={"text": 7}), "text is of type int"),
        (pair(query=" "), "empty text and no image"),
        (pair(negatives=[{"image": "../a.png"}]), "lies outside of"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_id(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError) as caught:
        read(tmp_path, pair(0), row)
    assert str(caught.value).startswith("mine: the record '1' (train.jsonl, record 2) cannot be")
    assert message in str(caught.value)


def test_mined_negatives_join_by_id(tmp_path: Path) -> None:
    mined = [
        {"id": "1", "negatives": [{"text": "mined", "score": 0.7, "source": "nano"}]},
        {"id": "2#1", "negatives": ["of the second positive"]},
        {"id": "9", "negatives": ["of nobody"]},
    ]
    write_lines(tmp_path / "mined.jsonl", mined)
    rows = (pair(1, negatives=["own"]), pair(2, positives=["a", "b"]), pair(3))
    found = read(tmp_path, *rows, negatives="mined.jsonl")
    assert [[said(one)[0][0] for one in sample.negatives] for sample in found] == [
        ["own", "mined"],
        [],
        ["of the second positive"],
        [],
    ]
    write_lines(tmp_path / "mined.jsonl", [{"id": "2", "negatives": ["of both"]}])
    found = read(tmp_path, *rows, negatives="mined.jsonl")
    assert [len(sample.negatives) for sample in found] == [1, 1, 1, 0]


@pytest.mark.parametrize("line", [{"negatives": []}, {"id": "", "negatives": []}])
def test_mined_negatives_without_an_id_are_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    write_lines(tmp_path / "mined.jsonl", [line])
    with pytest.raises(TrainError, match="expected one of its own"):
        read(tmp_path, pair(), negatives="mined.jsonl")
    with pytest.raises(TrainError, match=r"cannot read .*absent.jsonl"):
        read(tmp_path, pair(), negatives="absent.jsonl")


# ---- folders of classes --------------------------------------------------------------------------


def test_pictures_have_the_name_of_their_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path, "red_fox/b.png", "red_fox/deep/a.png", "owl/a.png", "owl/notes.txt")
    found = matches(opened(tmp_path, "images", ".", options={"text": "a photo of a {}"}))
    assert [one.id for one in found] == ["owl/a.png", "red_fox/b.png", "red_fox/deep/a.png"]
    assert [said(one.target)[0][0] for one in found][::2] == ["a photo of a owl"] * 1 + [
        "a photo of a red fox"
    ]
    assert said(found[0].query) == [["[a.png]"]]
    assert [one.group for one in found] == ["owl", "red_fox", "red_fox"]


def test_pictures_outside_of_a_class_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, "owl/a.png", "stray.png")
    with pytest.raises(TrainError, match="1 pictures beside its folders, the first is stray.png"):
        opened(tmp_path, "images", ".")
    with pytest.raises(TrainError, match="is no folder"):
        opened(tmp_path, "images", "stray.png")
    (tmp_path / "bare").mkdir()
    with pytest.raises(TrainError, match="holds no pictures"):
        opened(tmp_path, "images", "bare")


# ---- fingerprints --------------------------------------------------------------------------------


def test_a_fingerprint_changes_when_the_samples_would(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [pair()])
    write_lines(tmp_path / "mined.jsonl", [{"id": "1", "negatives": ["a"]}])
    write_lines(tmp_path / "corpus.jsonl", [{"id": "1", "text": "a"}])
    settings = [
        {},
        {"cap": 1},
        {"instruction": "Find it."},
        {"negatives": "mined.jsonl"},
        {"options": {"corpus": "corpus.jsonl"}},
    ]
    specs = [spec("pairs", "train.jsonl", **one) for one in settings]
    before = [source_fingerprint(one, tmp_path) for one in specs]
    assert len(set(before)) == len(specs)
    assert before == [source_fingerprint(one, tmp_path) for one in specs]
    write_lines(tmp_path / "mined.jsonl", [{"id": "1", "negatives": ["b"]}])
    changed = [
        source_fingerprint(one, tmp_path) != old for one, old in zip(specs, before, strict=True)
    ]
    assert changed == [False, False, False, True, False]
    write_lines(tmp_path / "train.jsonl", [pair(2)])
    assert all(
        source_fingerprint(one, tmp_path) != old for one, old in zip(specs, before, strict=True)
    )


def test_fingerprints_of_large_files_are_of_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visavis.data.readers.WHOLE_BYTES", 256)
    path = tmp_path / "train.jsonl"
    write_lines(path, [pair(number) for number in range(5)])
    first = source_fingerprint(spec("pairs", "train.jsonl"), tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert source_fingerprint(spec("pairs", "train.jsonl"), tmp_path) != first


def test_fingerprints_of_folders_are_of_names_and_sizes(tmp_path: Path) -> None:
    write_pictures(tmp_path, "owl/a.png", "fox/a.png")
    first = source_fingerprint(spec("images", "."), tmp_path)
    (tmp_path / "fox" / "a.png").rename(tmp_path / "fox" / "b.png")
    assert source_fingerprint(spec("images", "."), tmp_path) != first


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    source = spec("pairs", "a.jsonl").model_copy(update={"format": "pair"})
    with pytest.raises(TrainError, match="did you mean 'pairs'"):
        open_data_source(source, tmp_path, name="mine")
