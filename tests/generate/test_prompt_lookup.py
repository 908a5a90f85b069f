"""Guesses change how fast an answer comes, never what it says."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import visavis
from tests.fakes import tiny_model
from visavis.api import Model
from visavis.generate.engine import Engine
from visavis.generate.prompt_lookup import PromptLookup
from visavis.inputs import Prompt
from visavis.model.cpu_decode import FusedDecodeStep
from visavis.model.decoder import Decoder
from visavis.model.kv_cache import KVCache
from visavis.model.quantized_linear import QuantizedLinear


class RowByRow(QuantizedLinear):
    """A float32 product that, as packed ones do, gives each row what it gives it alone."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.plain, self.low = weight, None

    def product(self):  # type: ignore[no-untyped-def]
        return lambda x: torch.cat([row @ self.plain.T for row in x.split(1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.product()(x)


def guessing(model: Model) -> Model:
    """Return the model with products by which guesses can be checked."""
    model = copy.copy(model)
    model.vlm = copy.deepcopy(model.vlm)
    decoder = model.vlm.decoder
    for block in (*decoder.blocks, decoder):
        for name in ("qkv", "out", "up", "down") if block is not decoder else ("head",):
            setattr(block, name, RowByRow(getattr(block, name).weight))
    assert isinstance(decoder, Decoder) and Engine(model.vlm, model.image_encoder).guesses
    return model


def answer(model: Model, text: str, guess: bool, **settings: object) -> tuple[list[int], int]:
    """Return an answer's tokens and how many passes they took."""
    sequence = model.ask(Prompt.of(text), **settings).sequence  # type: ignore[arg-type]
    engine = Engine(model.vlm, model.image_encoder)
    engine.guesses = guess
    steps = sum(1 for _ in engine.run([sequence]))
    assert sequence.cache is None
    return sequence.tokens, steps


def test_a_guess_is_what_followed_the_last_time() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 1, 2, 9, 7, 1])
    assert lookup.draft() == []
    lookup.say(2)  # after 7 1, which never stood together
    assert lookup.draft() == []
    lookup.say(9)  # as the last time after 1 2
    assert lookup.draft() == [7, 1, 2]
    lookup.say(8)
    assert lookup.draft() == []


@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.1}])
def test_guesses_change_no_token(drawn: dict[str, float]) -> None:
    model, saved = guessing(tiny_model()), 0
    for seed in range(12):
        some = random.Random(seed)
        text = "".join(some.choices("ab c", k=5)) * some.randint(1, 12)
        limit = some.randint(1, 60)
        bias = {some.randrange(250): 9.0 for _ in range(3)}  # a small vocabulary repeats itself
        settings = {"max_new_tokens": limit, "logit_bias": bias, **drawn}
        plain, many = answer(model, text, False, **settings)
        guessed, fewer = answer(model, text, True, **settings)
        assert guessed == plain
        saved += many - fewer
    assert saved > 0


def test_a_stop_text_inside_a_guess_ends_the_answer_there() -> None:
    model = guessing(tiny_model())
    settings = {"max_new_tokens": 40, "logit_bias": {65: 30.0, 66: 29.0}}
    whole = model.chat("what?", **settings)  # type: ignore[arg-type]
    cut = model.chat("what?", stop=whole.text[20:23], **settings)  # type: ignore[arg-type]
    assert cut.text == whole.text[: whole.text.index(whole.text[20:23])]
    assert cut.usage.completion_tokens <= 23


def test_a_grammar_is_followed_through_guesses() -> None:
    model = guessing(tiny_model())
    reply = model.chat("when?", regex=r"(ab){12}[0-9]", max_new_tokens=60)
    assert reply.text[:24] == "ab" * 12 and reply.text[24:].isdigit()


@pytest.mark.slow
@pytest.mark.network
def test_real_weights_say_the_same_in_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = visavis.load("nano"), []
    several = FusedDecodeStep.several
    monkeypatch.setattr(
        FusedDecodeStep, "several", lambda self, ids: passes.append(len(ids)) or several(self, ids)
    )
    text = "Repeat this text: the quick brown fox jumps over the lazy dog and runs away."
    for drawn in ({}, {"temperature": 0.3, "seed": 1}):
        plain, _ = answer(model, text, False, max_new_tokens=32, **drawn)
        passes.clear()
        guessed, _ = answer(model, text, True, max_new_tokens=32, **drawn)
        assert guessed == plain
    assert max(passes) == 4


@pytest.mark.slow
@pytest.mark.network
def test_real_scores_are_bitwise_those_of_one_at_a_time() -> None:
    decoder = visavis.load("nano").vlm.decoder
    alone, together = (
        FusedDecodeStep(decoder, KVCache(decoder.config, dtype=decoder.dtype)) for _ in range(2)
    )
    ids = torch.randint(49_000, (240,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for four in ids.view(-1, 4).tolist():
            assert torch.equal(together.several(four), torch.stack([alone(one) for one in four]))
