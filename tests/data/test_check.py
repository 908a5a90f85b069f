"""Checking data: every kind of fault found and named, what is sound counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.data.data_files import picture_bytes, spec, write_lines, write_pictures, write_tar
from tests.fakes import tiny_model
from visavis.data.check import CheckedSource, Findings, check, guess_format
from visavis.errors import TrainError


def chat(
    id: Any, answer: str = "A cat.", image: str = "", question: str = "Who?"
) -> dict[str, Any]:
    marker = {"image": image} if image else {}
    text = f"<image>\n{question}" if image else question
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": id, **marker, "conversations": turns}


def entry(folder: Path, name: str, *rows: dict[str, Any], **settings: Any) -> CheckedSource:
    write_lines(folder / f"{name}.jsonl", rows)
    format = "pairs" if "query" in rows[0] else "llava"
    recipe = {"negatives": settings.pop("negatives", "")}
    return CheckedSource(name, spec(format, f"{name}.jsonl", **recipe), folder, **settings)


def kinds(findings: Findings) -> list[tuple[str, str]]:
    return [(problem.kind, problem.id) for problem in findings.problems]


def test_sound_data_is_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png", "b.png")
    rows = [chat(0, image="a.png"), chat(1, image="b.png"), chat(2, "x" * 400)]
    pairs = {"id": 0, "query": "q", "positives": [{"image": "b.png"}], "negatives": ["n", "m"]}
    first, second = check([entry(tmp_path, "chats", *rows), entry(tmp_path, "pairs", pairs)])
    assert (first.samples, first.pictures, first.problems) == (3, 2, [])
    assert (second.samples, second.pictures, second.negatives) == (1, 1, 2)
    assert len(first.lengths) == 3 and first.quantile(1.0) > 100 > first.quantile(0.5)
    assert [(edge, count) for edge, count in first.histogram()] == [(16, 2), (128, 1)]
    assert first.copies == second.copies == []


def test_pictures_that_are_missing_or_broken_are_named_by_record(tmp_path: Path) -> None:
    write_pictures(tmp_path, "good.png")
    (tmp_path / "cut.jpg").write_bytes(picture_bytes(1, "JPEG")[:-40])
    (tmp_path / "text.png").write_bytes(b"<html>")
    names = ("good.png", "gone.png", "cut.jpg", "text.png", "good.png", "gone.png")
    rows = [chat(number, str(number), name) for number, name in enumerate(names)]
    (found,) = check([entry(tmp_path, "chats", *rows)])
    assert kinds(found) == [("picture", "1"), ("picture", "2"), ("picture", "3"), ("picture", "5")]
    texts = [problem.text for problem in found.problems]
    assert "gone.png' does not exist" in texts[0] and "cut.jpg" in texts[1]
    assert "web page" in texts[2]


def test_records_that_cannot_be_used_are_all_listed(tmp_path: Path) -> None:
    rows = [chat(0), {"id": "x"}, chat(2, image="../a.png"), chat(3)]
    (found,) = check([entry(tmp_path, "chats", *rows)])
    assert kinds(found) == [("record", "x"), ("record", "2")]
    assert found.samples == 2
    assert "it has no 'conversations'" in found.problems[0].text
    (tmp_path / "chats.jsonl").write_text('{"id": 1\n')
    (found,) = check([CheckedSource("chats", spec("llava", "chats.jsonl"), tmp_path)])
    assert kinds(found) == [("record", "chats:0")]


def test_a_source_that_cannot_be_opened_does_not_hide_the_others(tmp_path: Path) -> None:
    gone = CheckedSource("gone", spec("llava", "gone.json"), tmp_path)
    first, second = check([gone, entry(tmp_path, "chats", chat(0))])
    assert kinds(first) == [("source", "gone")] and second.samples == 1


def test_conversations_of_which_nothing_is_learned(tmp_path: Path) -> None:
    rows = [chat(0, " \n"), chat(1)]
    for encoder in (None, tiny_model().encoder):
        (found,) = check([entry(tmp_path, "chats", *rows, encoder=encoder)])
        assert kinds(found) == [("masked", "0")]


def test_a_template_that_cannot_mark_answers_is_found(tmp_path: Path) -> None:
    encoder = tiny_model().encoder
    jinja = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    profile = dataclasses.replace(encoder.profile, chat_template="", jinja=jinja)
    encoder = dataclasses.replace(encoder, profile=profile)
    (found,) = check([entry(tmp_path, "chats", chat(0), encoder=encoder)])
    assert kinds(found) == [("record", "0")]
    assert "chat_template" in found.problems[0].text


def test_tokens_are_the_models_own(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    encoder = tiny_model().encoder
    row = chat(0, "A cat.", "a.png")
    (found,) = check([entry(tmp_path, "chats", row, encoder=encoder)])
    expected = encoder.chat
    from visavis.data.sources import open_data_source

    sample: Any = open_data_source(spec("llava", "chats.jsonl"), tmp_path, name="x")[0]
    ids = expected(sample.prompt, add_generation_prompt=False).token_ids
    assert list(found.lengths) == [len(ids)]
    pair = {"id": 0, "query": "q" * 10, "positives": [{"image": "a.png"}], "negatives": ["n" * 7]}
    (found,) = check([entry(tmp_path, "pairs", pair, encoder=encoder)])
    assert list(found.lengths) == [10, 4, 7]


def test_sequences_that_are_too_long(tmp_path: Path) -> None:
    rows = [chat(0), chat(1, "x" * 100), chat(2, "x" * 600)]
    encoder = tiny_model().encoder
    (found,) = check([entry(tmp_path, "chats", *rows, encoder=encoder, limit=80)])
    assert kinds(found) == [("long", "1"), ("long", "2")]
    assert "expected at most 80" in found.problems[0].text  # the recipe's
    assert "reads at most" in found.problems[1].text  # the model's


def test_copies_within_and_between_sources(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows = [chat(0, image="a.png"), chat(1, "else", "a.png"), chat(2, image="same.png"), chat(0)]
    other = [chat("other", image="a.png"), chat("own")]
    first, second = check([entry(tmp_path, "one", *rows), entry(tmp_path, "two", *other)])
    assert first.copies == [("2", "one: 0")] and first.repeated_ids == ["0"]
    assert second.copies == [("other", "one: 0"), ("own", "one: 0")]
    assert first.problems == second.problems == []


def test_what_is_trained_and_tested_on(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png", "b.png")
    held = [chat("t0", image="a.png"), chat("t1", "other", "a.png"), chat("t2", image="b.png")]
    tested = entry(tmp_path, "held", *held, test=True)
    trained = entry(tmp_path, "train", chat(0, image="a.png"))
    first, second = check([tested, trained])  # whichever is named first
    assert kinds(first) == [("leak", "t0")]
    assert first.problems[0].text == "it is the training sample train: 0"
    assert first.seen_pictures == [("t0", "train: 0"), ("t1", "train: 0")]
    assert second.problems == [] and second.copies == []


def test_mined_negatives_of_nobody_are_counted(tmp_path: Path) -> None:
    mined = [{"id": "0", "negatives": ["n"]}, {"id": "7", "negatives": ["n"]}]
    write_lines(tmp_path / "mined.jsonl", mined)
    pair = {"id": 0, "query": "q", "positives": ["a", "b"]}
    (found,) = check([entry(tmp_path, "pairs", pair, negatives="mined.jsonl")])
    assert (found.samples, found.negatives, found.unused) == (2, 2, 1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(0), "llava"),
        ({"query": "q", "positives": []}, "pairs"),
        ({"qry": "q", "pos_text": "t"}, "mmeb"),
        ({"query": "q", "answer": "a", "image": "i", "source": "s"}, "vidore"),
        ({"query": "q", "source": "s", "image": "i"}, "visrag"),
    ],
)
def test_formats_are_told_from_the_first_record(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    assert guess_format(write_lines(tmp_path / "a.jsonl", [row])) == expected
    assert guess_format(write_tar(tmp_path / "a.tar", {"x.json": row})) == expected
    assert guess_format(tmp_path) == expected


def test_other_things_to_check(tmp_path: Path) -> None:
    write_pictures(tmp_path / "classes", "owl/a.png")
    assert guess_format(tmp_path / "classes") == "images"
    assert guess_format(Path("vqa-rad")) == "records"
    with pytest.raises(TrainError, match="records of a; expected those of one of llava"):
        guess_format(write_lines(tmp_path / "a.jsonl", [{"a": 1}]))
    with pytest.raises(TrainError, match="is no file"):
        guess_format(tmp_path / "gone.json")
