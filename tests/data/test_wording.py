"""Records in words: every question once, captions cut at sentences, texts drawn from the record."""

from __future__ import annotations

import random

from visavis.data.datasets import Record, chat_pairs, shorten, text_to_match


def test_every_question_is_asked_once() -> None:
    questions = tuple((f"q{n}", f"a{n}") for n in range(7))
    record = Record("k", b"", questions=questions)
    groups = chat_pairs(record, random.Random(0), questions_per_example=3, max_caption_words=9)
    assert sorted(pair for group in groups for pair in group) == sorted(questions)
    assert [len(group) for group in groups] == [3, 3, 1]


def test_captions_are_cut_at_sentences() -> None:
    text = "A cat sits. A dog runs away from it. Both are small."
    assert shorten(text, 8) == "A cat sits."
    assert shorten(text, 9) == "A cat sits. A dog runs away from it."
    assert shorten("one two three four", 3) == "one two three"


def test_texts_to_match_come_from_the_record() -> None:
    record = Record("k", b"", caption="A cat sits. A dog runs. Rain falls.", also=("pets",))
    draw = random.Random(0)
    drawn = {text_to_match(record, draw) for _ in range(200)}
    assert {"pets", record.caption, "A cat sits.", "A dog runs. Rain falls."} <= drawn
    assert all(text == "pets" or text in record.caption for text in drawn)
