"""LLaVA's conversations: pictures where markers stand, and every way to get them wrong named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.data_files import chats, opened, picture_bytes, said, write_lines, write_tar
from visavis.errors import TrainError
from visavis.inputs import Video


def row(*values: str, **fields: Any) -> dict[str, Any]:
    """A record whose turns alternate."""
    turns = [
        {"from": "gpt" if number % 2 else "human", "value": value}
        for number, value in enumerate(values)
    ]
    return {"id": "r", **fields, "conversations": turns}


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Any]:
    write_lines(folder / "train.jsonl", rows)
    source = opened(folder, "llava", "train.jsonl", images="pictures", options=options)
    return [said(sample.prompt) for sample in chats(source)]


def test_pictures_stand_where_their_markers_do(tmp_path: Path) -> None:
    rows = (
        row("<image>\nWho?", "A cat.", "Sure?", "Yes.", image="a.png"),
        row("Who is it?\n<image>", "A cat.", image=["a.png"]),
        row("<image> and <image>\n?", "Two.", "And <image>?", "One.", image=["a", "b", "c"]),
        row("Hello", "Hi."),
        row("<image>", "A cat.", image="a.png"),
    )
    first, second, third, fourth, fifth = read(tmp_path, *rows)
    assert first == [["[a.png]", "Who?"], ["A cat."], ["Sure?"], ["Yes."]]
    assert second == [["Who is it?\n", "[a.png]"], ["A cat."]]
    assert third == [["[a]", " and ", "[b]", "?"], ["Two."], ["And ", "[c]", "?"], ["One."]]
    assert fourth == [["Hello"], ["Hi."]]
    assert fifth == [["[a.png]"], ["A cat."]]


def test_markers_are_text_where_a_row_has_no_such_files(tmp_path: Path) -> None:
    rows = (
        row("What does <image> mean in HTML?", "<image> is no tag; <video>\n is.", image=None),
        row("<video> or <image>?", "Neither.", image="a.png"),
        row("<image>\n<image>", "Two tags.", image=[], images=None, video=""),
    )
    first, second, third = read(tmp_path, *rows)
    assert first == [["What does <image> mean in HTML?"], ["<image> is no tag; <video>\n is."]]
    assert second == [["<video> or ", "[a.png]", "?"], ["Neither."]]
    assert third == [["<image>\n<image>"], ["Two tags."]]
    for mode in ("one", "all"):
        assert read(tmp_path, rows[0], images_first=mode)[0] == first


def test_messages_are_read_like_conversations(tmp_path: Path) -> None:
    def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
        roles = ("user", "assistant") * len(contents)
        turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        return {"id": "r", "messages": turns, **fields}

    def image(**fields: Any) -> dict[str, Any]:
        return {"type": "image", **fields}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    rows = (
        chat("<image>Who?", "A cat.", "And <image>?", "A dog.", images=["a.png", "b.png"]),
        chat("<video>What happens?", "It rains.", videos=["clip.mp4"]),
        chat([image(), text("Who?")], [text("A cat.")], images=["a.png"]),
        chat([text("Is <image> a tag?"), image(image="a.png")], "No."),
        chat("Hello", "Hi.", source="somewhere", images=None),
        row("<image>\nWho?", "A cat.", images=["a.png"]),
    )
    assert read(tmp_path, *rows) == [
        [["[a.png]", "Who?"], ["A cat."], ["And ", "[b.png]", "?"], ["A dog."]],
        [["[clip.mp4]", "What happens?"], ["It rains."]],
        [["[a.png]", "Who?"], ["A cat."]],
        [["Is <image> a tag?", "[a.png]"], ["No."]],
        [["Hello"], ["Hi."]],
        [["[a.png]", "Who?"], ["A cat."]],
    ]


def test_only_a_newline_ends_a_json_line(tmp_path: Path) -> None:
    words = "one\u2028two\u2029three\u0085four\x0cfive\x1csix"
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(row(words, words), ensure_ascii=False) for _ in range(3)]
    path.write_bytes("\r\n".join(lines).encode())
    samples = chats(opened(tmp_path, "llava", "train.jsonl"))
    assert [said(sample.prompt) for sample in samples] == [[[words], [words]]] * 3


def test_markers_move_to_the_front_as_the_original_code_moves_them(tmp_path: Path) -> None:
    rows = (
        row("Who is it?\n<image>", "A.", image="a"),
        row(" <image>\nWho? ", "A.", image="a"),
        row("<image>\n<image> Same? ", "No.", image=["a", "b"]),
        row("This <image> or that <image>?", "No.", image=["a", "b"]),
    )
    moved = [["[a]", "Who is it?"], ["[a]", "Who?"]]
    both = read(tmp_path, *rows, images_first="all")
    assert [turns[0] for turns in both] == [
        *moved,
        ["[a]", "[b]", "Same?"],
        ["[a]", "[b]", "This  or that ?"],
    ]
    one = read(tmp_path, *rows, images_first="one")
    assert [turns[0] for turns in one] == [
        *moved,
        ["[a]", "[b]", " Same? "],
        ["This ", "[a]", " or that ", "[b]", "?"],
    ]


def test_videos_under_either_marker_beside_pictures_under_their_own(tmp_path: Path) -> None:
    rows = (
        row("<video>\nWhat?", "A dog.", video="clip"),
        row("<image>\nWhat?", "A dog.", video="clip.mp4"),
        row("<image> <video>?", "Both.", image="a", video="clip"),
    )
    write_lines(tmp_path / "train.jsonl", rows)
    source = opened(tmp_path, "llava", "train.jsonl", options={"frames": 8})
    first, second, third = (sample.prompt for sample in chats(source))
    assert said(first)[0] == ["[clip]", "What?"]
    assert first.visuals == (Video(tmp_path / "clip", 8),)
    assert said(second)[0] == ["[clip.mp4]", "What?"]
    assert said(third)[0] == ["[a]", " ", "[clip]", "?"]


def test_other_names_of_roles_and_a_system_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
    ]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 3, "conversations": turns}]))
    (sample,) = chats(opened(tmp_path, "llava", "train.json"))
    assert sample.id == "3"
    assert [message.role for message in sample.prompt.messages] == ["system", "user", "assistant"]


def turns(*roles: str) -> dict[str, Any]:
    return {"id": "r", "conversations": [{"from": role, "value": "text"} for role in roles]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (row("Who?", "A.", images=["a"]), "it has 0 <image> in its text and 1 files"),
        (row("<image>", "A.", image="a", images=["b"]), "both 'image' and 'images'"),
        (row("hi", "A.", messages=[]), "both 'conversations' and 'messages'"),
        ({"id": "r", "messages": []}, "its conversation is empty"),
        ({"id": "r", "messages": [{"role": "tool", "content": "x"}]}, "its turn 1 is"),
        ({"id": "r", "messages": [{"role": ["user"], "content": "x"}]}, "its turn 1 is"),
        ({"id": "r", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of"),
        (row("Who?", "A.", image="a"), "it has 0 <image> in its text and 1 files"),
        (row("<image> <image>", "A.", image="a"), "it has 2 <image> in its text and 1 files"),
        (row("<video>", "A.", image="a"), "it has 0 <image> in its text and 1 files"),
        (row("<image>", "A.", video=["a", "b"]), "it has 1 <image> or <video> in its text and 2"),
        (row("Who?", "A <image>.", image="a"), "in a turn of the assistant"),
        (turns(), "its conversation is empty"),
        ({"id": "r"}, "it has no 'conversations', expected a list of turns {from, value}"),
        ({"id": "r", "conversations": "hi"}, "its 'conversations' is 'hi'"),
        ({"id": "r", "conversations": ["hi"]}, "its turn 1 is 'hi'"),
        (turns("human"), "its turns are of user; expected human and gpt in turn"),
        (turns("gpt", "human"), "its turns are of assistant, user"),
        (turns("human", "human", "gpt"), "its turns are of user, user, assistant"),
        (turns("human", "gpt", "human"), "its turns are of user, assistant, user"),
        (turns("human", "gpt", "system"), "its turns are of"),
        (turns("system"), "its turns are of system"),
        (turns("bing", "gpt"), "its turn 1 is"),
        ({"id": "r", "conversations": [{"from": "human", "value": None}]}, "its turn 1 is"),
        (row("", "A."), "empty text and no image"),
        (row("<image>", "A.", image="../a.png"), "lies outside of"),
        (row("<image>", "A.", image="x/../../a.png"), "lies outside of"),
        (row("<image>", "A.", image="/etc/a.png"), "lies outside of"),
        (row("<image>", "A.", image="https://a.b/c.png"), "nothing is downloaded"),
        (row("<image>", "A.", image="data:image/png;base64,AA"), "nothing is downloaded"),
        (row("<image>", "A.", image=[7]), "its picture is 7"),
        (row("<image>", "A.", image=["a\0"]), "expected a path of a picture below"),
    ],
)
def test_what_is_wrong_with_a_record_is_said_with_its_id(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError) as caught:
        read(tmp_path, row("Hello", "Hi."), record)
    assert str(caught.value).startswith("mine: the record 'r' (train.jsonl, record 2) cannot be")
    assert message in str(caught.value)


def test_a_path_that_stays_below_the_folder_is_taken(tmp_path: Path) -> None:
    inside = str(tmp_path / "pictures" / "a.png")
    assert read(tmp_path, row("<image>", "A.", image="x/../a.png"))[0][0] == ["[a.png]"]
    assert read(tmp_path, row("<image>", "A.", image=inside))[0][0] == ["[a.png]"]


def test_tars_and_tables_hold_the_same_conversations(tmp_path: Path) -> None:
    said_of_tar = {**row("<image>\nWho?", "A cat."), "id": "7", "image": "ignored.jpg"}
    write_tar(tmp_path / "a.tar", {"7.json": said_of_tar, "7.png": picture_bytes(3)})
    (sample,) = chats(opened(tmp_path, "llava", "*.tar"))
    assert (sample.id, said(sample.prompt)[0]) == ("7", ["[Stored]", "Who?"])
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**said_of_tar, "image": {"bytes": picture_bytes(3), "path": None}}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (other,) = chats(opened(tmp_path, "llava", "a.parquet"))
    assert said(other.prompt) == said(sample.prompt)


def test_records_without_an_id_get_their_number(tmp_path: Path) -> None:
    rows = [{"conversations": row("Hello", "Hi.")["conversations"]} for _ in range(3)]
    write_lines(tmp_path / "train.jsonl", rows)
    source = opened(tmp_path, "llava", "train.jsonl", cap=2)
    assert [sample.id for sample in source] == ["train:0", "train:1"]
    assert len(source) == 2 and source[-1].id == "train:1" and source[:1][0].id == "train:0"
    with pytest.raises(IndexError):
        source[2]


def test_what_only_queries_take_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [row("Hello", "Hi.")])
    source = opened(tmp_path, "llava", "train.jsonl", instruction="Find it.")
    with pytest.raises(TrainError, match="instructions and negatives are of queries"):
        source[0]


def test_unknown_options_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [row("Hello", "Hi.")])
    with pytest.raises(TrainError, match="image_first.*It takes images_first, frames"):
        opened(tmp_path, "llava", "train.jsonl", options={"image_first": "all"})
    with pytest.raises(TrainError, match="It takes none"):
        opened(tmp_path, "mmeb", "train.jsonl", options={"images_first": "all"})


def test_a_source_without_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(TrainError, match="the source 'mine' cannot be opened: there are no rec"):
        opened(tmp_path, "llava", "empty.json")
