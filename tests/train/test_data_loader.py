"""Conversations become ids: too long ones are errors, or lose their end where a recipe says so."""

from __future__ import annotations

import pytest

from tests.fakes import picture, tiny_model
from visavis.data.examples import Conversation
from visavis.errors import TrainError
from visavis.inputs import Image, Message, Prompt, Text
from visavis.train.data_loader import DataLoader


def talk(answer: str) -> Conversation:
    question = Message("user", (Image(picture(0)), Text("what is it?")))
    return Conversation("long one", Prompt((question, Message("assistant", (Text(answer),)))))


def test_too_long_is_an_error_that_names_the_sample() -> None:
    with pytest.raises(TrainError, match=r"'long one' has \d+ tokens, expected at most 64"):
        DataLoader(tiny_model().encoder, max_tokens=64).chat(talk("a" * 100))


@pytest.mark.parametrize("max_tokens", [64, None])
def test_long_conversations_lose_their_end(max_tokens: int | None) -> None:
    """Beyond the model's context too, which is 512."""
    encoder = tiny_model().encoder
    length = max_tokens or encoder.context_length - 1
    found = DataLoader(encoder, max_tokens=max_tokens, cut=True).chat(talk("a" * 600))
    whole = DataLoader(encoder).chat(talk("a"))
    assert len(found.token_ids) == len(found.loss_mask) == length
    assert found.image_slots == whole.image_slots and found.loss_mask[-1]


def test_pictures_are_not_cut() -> None:
    with pytest.raises(TrainError, match="an image cannot be cut"):
        DataLoader(tiny_model().encoder, max_tokens=8, cut=True).chat(talk("a"))
