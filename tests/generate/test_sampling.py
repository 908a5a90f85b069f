"""Filters against transformers' own, draws by seed, answers that keep to a grammar."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.fakes import tiny_model
from visavis.errors import InputError
from visavis.generate.sampling import Sampler, Sampling


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(60, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Sampling(1.0, top_k=5), "TopKLogitsWarper(5)"),
        (Sampling(1.0, top_k=500), "TopKLogitsWarper(60)"),
        (Sampling(1.0, top_p=0.7), "TopPLogitsWarper(0.7)"),
        (Sampling(1.0, top_p=0.01), "TopPLogitsWarper(0.01)"),
        (Sampling(1.0, min_p=0.1), "MinPLogitsWarper(0.1)"),
    ],
)
def test_cuts_are_the_peers(ours: Sampling, theirs: str) -> None:
    from transformers.generation import logits_process

    name, _, number = theirs.rstrip(")").partition("(")
    warper = getattr(logits_process, name)(float(number) if "." in number else int(number))
    for seed in range(5):
        expected = warper(torch.zeros(1, 1, dtype=torch.long), scores(seed)[None])[0]
        assert torch.equal(Sampler(ours).cut(scores(seed)), expected)


@pytest.mark.parity
def test_the_penalty_is_the_peers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    read = [3, 3, 8, 59]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([read]), scores()[None])[0]
    sampler = Sampler(Sampling(repetition_penalty=1.3), read=read)
    torch.testing.assert_close(sampler.adjusted(scores()), expected)


def test_draws_follow_the_seed_and_the_chances() -> None:
    rows = [scores(0)] * 400
    first, second = (list(map(Sampler(Sampling(1.0, seed=7)), rows)) for _ in range(2))
    assert first == second
    assert first != list(map(Sampler(Sampling(1.0, seed=8)), rows))
    likely = scores(0).softmax(-1)
    share = first.count(int(likely.argmax())) / len(first)
    assert abs(share - float(likely.max())) < 0.1


def test_a_bias_forces_and_forbids() -> None:
    best = int(scores().argmax())
    assert Sampler(Sampling(logit_bias={best: -100.0}))(scores()) != best
    assert Sampler(Sampling(logit_bias={7: 100.0}))(scores()) == 7
    with pytest.raises(InputError, match="names the token 60"):
        Sampler(Sampling(logit_bias={60: 1.0}))(scores())


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_numbers_out_of_range_are_named(settings: dict[str, float]) -> None:
    name = next(iter(settings))
    with pytest.raises(InputError, match=f"{name} is"):
        Sampling(**settings)  # type: ignore[arg-type]


def test_an_answer_by_regular_expression() -> None:
    reply = tiny_model().chat("when?", regex=r"[0-9]{4}-[0-9]{2}", max_new_tokens=20)
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", reply.text)
    assert reply.finish_reason == "stop"


def test_an_answer_by_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "count": {"type": "integer", "maximum": 9},
        },
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    settings = {"temperature": 1.0, "seed": 3, "max_new_tokens": 120}
    found = json.loads(tiny_model().chat("what?", schema=schema, **settings).text)  # type: ignore[arg-type]
    assert found["kind"] in ("cat", "dog") and isinstance(found["count"], int)


def test_a_grammar_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match="cannot be used"):
        tiny_model().chat("when?", regex="(")


def test_stop_texts_end_an_answer_and_are_not_part_of_it() -> None:
    model = tiny_model()
    whole = model.chat("what?", max_new_tokens=12).text
    stop = whole[4:6]
    cut = model.chat("what?", max_new_tokens=12, stop=[stop, "never said"])
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
