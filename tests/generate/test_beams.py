"""Beams through chat: a likelier answer than the likeliest token each time, alone or among many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fakes import picture, tiny_model
from visavis.api import Model
from visavis.errors import InputError
from visavis.generate.beam_search import BeamSearch, BeamSettings


def likelihood(model: Model, question: str, reply: str) -> float:
    """Return the mean log-probability of an answer's bytes."""
    asked = [int(token) for token in model.trace(question).token_ids]
    said = model.tokenizer.encode(reply, add_special_tokens=False).ids
    chances = torch.from_numpy(model.trace(asked + said).logits).log_softmax(-1)
    rows = chances[len(asked) - 1 : -1]
    return float(rows[range(len(said)), said].mean())


def test_beams_find_what_is_likelier() -> None:
    model = tiny_model()
    greedy = model.chat("red", max_new_tokens=4)
    found = model.chat("red", max_new_tokens=4, beams=4)
    assert found.usage.prompt_tokens == greedy.usage.prompt_tokens
    ended = found.usage.completion_tokens < 4
    assert found.finish_reason == ("stop" if ended else "length") and list(found) == []
    assert found.text != greedy.text
    assert "\ufffd" not in found.text + greedy.text  # or the texts are not those of their tokens
    scores = [likelihood(model, "red", one.text) for one in (found, greedy)]
    assert scores[0] > scores[1]


def test_one_beam_is_no_search() -> None:
    model = tiny_model()
    plain = model.chat("what?", [picture(1)], max_new_tokens=8)
    assert model.chat("what?", [picture(1)], max_new_tokens=8, beams=1).text == plain.text


def test_one_of_many_may_be_searched_for() -> None:
    model = tiny_model()
    items = ["what?", {"image": picture(1), "text": "what is this?"}]
    many = model.chat_many(items, max_new_tokens=7, beams=3)
    alone = [model.chat_many([item], max_new_tokens=7, beams=3)[0] for item in items]
    assert [reply.text for reply in many] == [reply.text for reply in alone]
    assert (
        model.chat("what is this?", [picture(1)], max_new_tokens=7, beams=3).text == alone[1].text
    )


def test_a_longer_answer_costs_less_with_a_penalty_on_length() -> None:
    scores = torch.full((1, 8), -20.0)
    scores[0, 1], scores[0, 7] = 0.0, 0.3  # going on, or ending at once
    lengths = []
    for penalty in (-2.0, 3.0):
        search = BeamSearch(BeamSettings(2, penalty), max_new_tokens=6, stop_ids=frozenset({7}))
        rows = scores
        while parents := search.take(rows):
            rows = scores.expand(len(parents), -1)
        lengths.append(len(search.best))
    assert lengths == [0, 5]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"beams": 2, "stream": True}, "stream"),
        ({"beams": 2, "temperature": 0.5}, "temperature"),
        ({"beams": 2, "seed": 3}, "seed"),
        ({"beams": 2, "logit_bias": {3: 1.0}}, "bias"),
        ({"beams": 2, "regex": "[0-9]"}, "regex"),
    ],
)
def test_what_does_not_go_with_beams_is_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        tiny_model().chat("what?", max_new_tokens=4, **settings)
