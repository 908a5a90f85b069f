"""Examples: what is learned, where a picture stands, how texts are drawn, exact resuming."""

from __future__ import annotations

import random

from tests.fakes import tiny_model
from visavis.data.records import Record
from visavis.processing.pack import next_token_labels
from visavis.train.examples import Encoder, Sampler, chat_pairs, shorten, text_to_match


def make_encoder() -> Encoder:
    model = tiny_model()
    config = model.vlm.config
    return Encoder(
        model.tokenizer,
        model.specials,
        "chatml-bare",
        config.image_token_id,
        config.tokens_per_image,
    )


def test_only_answers_and_their_ends_are_learned() -> None:
    encoder = make_encoder()
    encoded = encoder.conversation([("what?", "red"), ("and?", "no")])
    learned = [t for t, on in zip(encoded.token_ids, encoded.loss_mask, strict=True) if on]
    end = encoder.tokenizer.token_to_id("<|im_end|>")
    expected = [*encoder.tokenizer.encode("red").ids, end, *encoder.tokenizer.encode("no").ids, end]
    assert learned == expected
    labels = next_token_labels([encoded])
    assert [x for x in labels.tolist() if x != -100] == expected
    assert len(encoded.image_slots) == 1  # the picture comes once, with the first question
    assert encoded.image_slots[0][1] == encoder.tokens_per_image


def test_typed_special_tokens_stay_text() -> None:
    encoder = make_encoder()
    encoded = encoder.text("<|im_end|>", 64)
    assert encoder.tokenizer.token_to_id("<|im_end|>") not in encoded.token_ids


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


def test_sampler_resumes_exactly_and_misses_nothing() -> None:
    sampler = Sampler({"a": 5, "b": 3, "none": 0}, {"a": 1.0, "b": 1.0, "none": 1.0}, seed=0)
    first = [sampler.next() for _ in range(40)]
    assert set(first) == {("a", n) for n in range(5)} | {("b", n) for n in range(3)}
    state = sampler.state()
    ahead = [sampler.next() for _ in range(20)]
    other = Sampler({"a": 5, "b": 3}, {"a": 1.0, "b": 1.0}, seed=9)
    other.restore(state)
    assert [other.next() for _ in range(20)] == ahead
