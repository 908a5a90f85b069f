"""The options of an answer: what is unknown, out of range or contradictory is an error."""

from __future__ import annotations

import pytest

from tests.fakes import tiny_model
from visavis.errors import InputError
from visavis.generate.beam_search import BeamSettings
from visavis.generate.config import GenerationConfig
from visavis.generate.sampling import Sampling


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"option 'max_tokens': did you mean 'max_new_tokens'"):
        tiny_model().chat("hello", max_tokens=3)
    with pytest.raises(InputError, match="'temprature': did you mean 'temperature'"):
        tiny_model().chat_many(["hello"], temprature=0.5)


def test_options_become_settings() -> None:
    config = GenerationConfig.from_kwargs(temperature=0.5, top_k=3, seed=1, stop="end")
    assert config.sampling == Sampling(temperature=0.5, top_k=3, seed=1)
    assert config.stop == ("end",) and not config.is_structured
    config = GenerationConfig.from_kwargs(beams=3, early_stopping=True, stop=["", "a", "b"])
    assert config.beam_search == BeamSettings(3, 1.0, True) and config.stop == ("a", "b")
    assert GenerationConfig.from_kwargs() == GenerationConfig()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"beams": 0}, "beams is 0"),
        ({"beams": 2, "temperature": 0.5}, "beams is 2: .* no temperature"),
        ({"beams": 2, "regex": "a"}, "beams is 2: .* regex"),
    ],
)
def test_what_does_not_fit_is_an_error(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        GenerationConfig.from_kwargs(**options)
