"""MMEB, LLaVA-Hound, ViDoRe and VisRAG: the strings and places that VLM2Vec trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.data_files import matches, opened, picture_bytes, said, write_lines
from visavis.errors import TrainError
from visavis.inputs import Stored, Video


def read(folder: Path, format: str, *rows: dict[str, Any], **settings: Any) -> list[Any]:
    write_lines(folder / "train.jsonl", rows)
    return matches(opened(folder, format, "train.jsonl", **settings))


# ---- MMEB ----------------------------------------------------------------------------------------


def mmeb(**fields: Any) -> dict[str, Any]:
    return {
        "qry": "<|image_1|>\nRepresent the given image for classification\n",
        "qry_image_path": "images/a.jpg",
        "pos_text": "a cat",
        "pos_image_path": "",
        "neg_text": "",
        "neg_image_path": "",
        **fields,
    }


def test_pictures_take_the_place_of_their_token(tmp_path: Path) -> None:
    page = mmeb(
        qry="Find it.\n", qry_image_path="", pos_text="<|image_1|>\nThis one", pos_image_path="b"
    )
    inside = mmeb(qry="Before <image> after")
    first, second, third, fourth = read(
        tmp_path, "mmeb", mmeb(), page, inside, mmeb(qry="No token"), images="MMEB"
    )
    question = "Represent the given image for classification\n"
    assert said(first.query) == [["[a.jpg]", question]]
    assert first.query.visuals[0].source == tmp_path / "MMEB" / "images" / "a.jpg"
    assert (said(first.target), first.negatives) == ([["a cat"]], ())
    assert (said(second.query), said(second.target)) == ([["Find it.\n"]], [["[b]", "This one"]])
    assert said(third.query) == [["Before ", "[a.jpg]", " after"]]
    assert said(fourth.query) == [["[a.jpg]", "No token"]]
    assert [one.id for one in (first, second, third)] == ["train:0", "train:1", "train:2"]


def test_a_token_without_a_picture_is_dropped(tmp_path: Path) -> None:
    """WebQA's queries are such."""
    row = mmeb(qry="<|image_1|>\nFind a Wikipedia image: why?", qry_image_path=None)
    assert said(read(tmp_path, "mmeb", row)[0].query) == [["Find a Wikipedia image: why?"]]


def test_negatives_are_one_or_several_with_or_without_pictures(tmp_path: Path) -> None:
    one = mmeb(neg_text="<|image_1|>\na dog", neg_image_path="n.jpg")
    several = mmeb(neg_text=["a dog", "", "a fox"], neg_image_path=[None, "n.jpg"])
    first, second = read(tmp_path, "mmeb", one, several)
    assert [said(each) for each in first.negatives] == [[["[n.jpg]", "a dog"]]]
    assert [said(each)[0] for each in second.negatives] == [["a dog"], ["[n.jpg]"], ["a fox"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"qry": "a", "pos": "b"}, "it has no 'pos_text'"),
        (mmeb(qry="<image> <image>"), "has 2 image tokens and 1 pictures"),
        (mmeb(qry_image_path=["a", "b"]), "has 1 image tokens and 2 pictures"),
        (mmeb(qry="", qry_image_path=""), "empty text and no image"),
        (mmeb(pos_text=None), "its 'pos_text' is 'None', expected a text"),
    ],
)
def test_bad_rows_of_mmeb(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError) as caught:
        read(tmp_path, "mmeb", row)
    assert "'train:0' (train.jsonl, record 1)" in str(caught.value)
    assert message in str(caught.value)


# ---- LLaVA-Hound ---------------------------------------------------------------------------------


def hound(question: str = "<video>\nWhat is he doing?", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "He dances."}]
    return {"id": "v1-0", "video": "v1", "conversations": turns, **fields}


@pytest.mark.parametrize(
    ("mode", "query", "target"),
    [
        (
            "qa",
            ["Answer a question based on the content of a video. ", "[v1]", "What is he doing?"],
            ["He dances."],
        ),
        ("caption_retrieval", ["[v1]", "What is he doing?"], ["He dances."]),
        (
            "video_retrieval",
            ["Find a video that contains the following visual content: He dances."],
            ["Understand the content of the provided video: ", "[v1]"],
        ),
    ],
)
def test_modes_of_hound(tmp_path: Path, mode: str, query: list[str], target: list[str]) -> None:
    settings = {"images": "frames", "options": {"mode": mode, "frames": 8}}
    (sample,) = read(tmp_path, "llava-hound", hound(), **settings)
    assert (said(sample.query), said(sample.target)) == ([query], [target])
    assert (*sample.query.visuals, *sample.target.visuals) == (Video(tmp_path / "frames/v1", 8),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (hound("What?"), "its question has 0 <video>"),
        (hound("<video> <video>"), "its question has 2 <video>"),
        (hound(conversations=[]), "its conversation has 0 turns"),
        (hound(conversations=[{"from": "human"}, "no"]), "expected a question and an answer"),
        (hound(video=None), "its video is None"),
    ],
)
def test_bad_rows_of_hound(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match="v1-0") as caught:
        read(tmp_path, "llava-hound", row, options={"mode": "qa"})
    assert message in str(caught.value)


def test_hound_needs_a_mode(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="mode: Field required. It takes mode, frames"):
        read(tmp_path, "llava-hound", hound())


# ---- ViDoRe and VisRAG ---------------------------------------------------------------------------


def test_pages_come_from_tables(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "image": {"bytes": picture_bytes(number), "path": "x.jpg"},
            "query": f"Question {number}?",
            "answer": f"Answer {number}.",
            "source": source,
        }
        for number, source in enumerate(("ChartQA", "own"))
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    first, _ = matches(opened(tmp_path, "vidore", "*.parquet"))
    assert said(first.query) == [["[Stored]", "Question 0?"]]
    assert said(first.target) == [["Answer 0."]]
    picture = first.query.visuals[0].source
    assert isinstance(picture, Stored) and picture.read() == picture_bytes(0)
    chart, own = matches(opened(tmp_path, "visrag", "train.parquet"))
    (asked,) = said(chart.query)
    # Blanks are as in the code that trained VLM2Vec.
    assert asked[0].startswith("This query is related to retrieving a relevant chart")
    assert asked[0].endswith("related to the query:  Question 0? ")
    shown = "A statistical chart comparing values or analyzing trends.  "
    assert said(chart.target) == [[shown, "[Stored]"]]
    assert (said(own.query), said(own.target)) == ([["Question 1? "]], [["[Stored]"]])


def test_bad_rows_of_pages(tmp_path: Path) -> None:
    row = {"image": None, "query": "Why?", "answer": "So."}
    for format in ("vidore", "visrag"):
        with pytest.raises(TrainError, match="its picture is None"):
            read(tmp_path, format, row)
        with pytest.raises(TrainError, match="it has no 'query'"):
            read(tmp_path, format, {"image": "a.png"})
