"""Many answers at a time are those of one at a time, whoever enters, leaves or is cut short."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visavis
from tests.fakes import picture, tiny_model
from visavis.generate import engine, prefix_cache
from visavis.generate.engine import CHUNK, Engine
from visavis.generate.prefix_cache import PrefixCache
from visavis.inputs import Prompt
from visavis.model.kv_cache import KVCache

ITEMS: list[Any] = [
    "what?",
    {"image": picture(1), "text": "what is this?"},
    "a longer question, with many more words in it than the others have",
    {"image": [picture(2), picture(3)], "text": "which one?"},
    {"image": picture(1), "text": "what is that?"},
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
    ],
]


@pytest.fixture(scope="module")
def singles() -> list[str]:
    model = tiny_model()
    model.prefixes = None
    return [model.chat_many([item], max_new_tokens=9)[0].text for item in ITEMS]


@settings(deadline=None, max_examples=25)
@given(
    chosen=st.lists(st.integers(0, len(ITEMS) - 1), min_size=1, max_size=9),
    max_sequences=st.integers(1, 5),
    shared=st.booleans(),
)
def test_any_batch_gives_what_singles_give(
    singles: list[str], chosen: list[int], max_sequences: int, shared: bool
) -> None:
    model = tiny_model()
    model.prefixes = PrefixCache() if shared else None
    prompts = [ITEMS[i] for i in chosen]
    replies = model.chat_many(prompts, max_new_tokens=9, max_sequences=max_sequences)
    assert [reply.text for reply in replies] == [singles[i] for i in chosen]


def test_chat_is_one_of_many(singles: list[str]) -> None:
    model = tiny_model()
    assert model.chat("what is this?", [picture(1)], max_new_tokens=9).text == singles[1]


def test_a_waiting_sequence_enters_when_another_leaves() -> None:
    model = tiny_model()
    answers = [model.ask(Prompt.of(f"question {n}"), max_new_tokens=2 + n) for n in range(4)]
    engine = Engine(model.vlm, model.image_encoder, max_sequences=2)
    most = 0
    for _ in engine.run([answer.sequence for answer in answers]):
        most = max(most, len(engine.active))
    assert most == 2
    lengths = [len(answer.sequence.tokens) for answer in answers]
    ended = [n for n, length in enumerate(lengths) if length < 2 + n]
    assert all(length == 2 + n or n in ended for n, length in enumerate(lengths))


def test_leaving_early_returns_the_memory() -> None:
    model = tiny_model()
    answers = [model.ask(Prompt.of(text), max_new_tokens=30) for text in ("one", "two")]
    sequences = [answer.sequence for answer in answers]
    engine = Engine(model.vlm, model.image_encoder)
    for count, _ in enumerate(engine.run(sequences)):
        if count == 6:
            break
    del _
    assert not engine.busy or not engine.active
    assert all(sequence.cache is None for sequence in sequences)


def test_one_of_many_can_be_cancelled(singles: list[str]) -> None:
    model = tiny_model()
    model.prefixes = None
    kept = model.ask(Prompt.of(ITEMS[2]), max_new_tokens=9)
    gone = model.ask(Prompt.of(ITEMS[0]), max_new_tokens=9)
    for _ in Engine(model.vlm, model.image_encoder).run([kept.sequence, gone.sequence]):
        kept.update()
        if len(gone.sequence.tokens) == 2:
            gone.sequence.stop()
    assert kept.reply.text == singles[2]
    assert len(gone.sequence.tokens) == 2 and gone.sequence.cache is None


def test_a_repeated_prompt_reads_only_its_last_chunk() -> None:
    model = tiny_model()
    model.prefixes = PrefixCache()
    first = model.chat("what is this thing here?", [picture(1)], max_new_tokens=5)
    assert first.usage.cached_tokens == 0
    history = [
        {"role": "user", "content": [{"type": "text", "text": "never seen " * 20}]},
        {"role": "assistant", "content": "yes"},
    ]
    fresh = model.chat("more?", history=history, max_new_tokens=5)
    again = model.chat("more?", history=history, max_new_tokens=5)
    assert again.usage.prompt_tokens > 3 * CHUNK
    assert again.usage.cached_tokens == (again.usage.prompt_tokens - 1) // CHUNK * CHUNK
    assert again.text == fresh.text


def test_another_picture_is_another_beginning() -> None:
    model = tiny_model()
    model.prefixes = PrefixCache()
    question = "what is it that we see? " * 4
    one = model.chat(question, [picture(1)], max_new_tokens=8)
    other = model.chat(question, [picture(2)], max_new_tokens=8)
    assert other.usage.cached_tokens == 0
    model.prefixes = None
    assert model.chat(question, [picture(2)], max_new_tokens=8).text == other.text
    assert one.usage.cached_tokens == 0


def test_the_prefix_cache_stays_within_its_bytes() -> None:
    model = tiny_model()
    model.prefixes = PrefixCache(max_bytes=40_000)
    for number in range(6):
        model.chat(f"{number} is a number, is it not? " * 3, max_new_tokens=2)
    assert 0 < model.prefixes.num_bytes <= 40_000 or not model.prefixes.entries


@pytest.mark.slow
@pytest.mark.network
def test_real_weights_answer_the_same_in_any_company() -> None:
    model = visavis.load("nano")
    questions = ["Name a colour.", "Count to five.", "What is the capital of France?", "Hello!"]
    alone = [model.chat(text, max_new_tokens=24).text for text in questions]
    assert [r.text for r in model.chat_many(questions, max_new_tokens=24)] == alone


def test_scores_do_not_depend_on_how_much_was_known() -> None:
    model = tiny_model()
    answer = model.ask(Prompt.of("what do we know about all of this? " * 4), max_new_tokens=1)
    scores: list[torch.Tensor] = []
    answer.sequence.sample = lambda row: (scores.append(row.clone()), 0)[1]
    prefixes = PrefixCache()
    for _ in range(2):
        answer.sequence.tokens, answer.sequence.done = [], False
        for _ in Engine(model.vlm, model.image_encoder, prefixes=prefixes).run([answer.sequence]):
            pass
    assert answer.sequence.num_reused > CHUNK
    assert torch.equal(scores[0], scores[1])


def test_a_stream_may_end_while_prompts_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.prefixes = PrefixCache()
    question = "what is this, and why? " * 4
    expected = model.chat(question, max_new_tokens=5).text
    questions = [f"{number} is a number and no more than that " * 2 for number in range(4)]
    streams = [iter(model.chat(text, max_new_tokens=9, stream=True)) for text in questions]
    assert all(next(stream) for stream in streams)
    compare = prefix_cache.common

    def common(*given: Any) -> int:
        if streams:
            streams.pop()  # nobody reads on: its prompt is kept here and now
        return compare(*given)

    monkeypatch.setattr(prefix_cache, "common", common)
    for _ in range(3):
        assert model.chat(question, max_new_tokens=5).text == expected
    assert not streams and len(model.prefixes.entries) == 5


def test_a_stream_that_is_left_returns_its_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_model(), []
    model.prefixes = None

    class Watched(KVCache):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            made.append(weakref.ref(self))

    monkeypatch.setattr(engine, "KVCache", Watched)
    reply = model.chat("go on", max_new_tokens=9, stream=True)
    for _ in reply:
        assert made[0]() is not None
        break
    assert [cache() for cache in made] == [None]
    assert list(reply) == []
