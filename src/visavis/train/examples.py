"""From records to what a training step reads: conversations, captions, texts to match.

Conversations are encoded by the same function as at inference, so ids and masks agree by
construction. Knows prompts' wording and drawing order; runs no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from visavis.data.records import Record
from visavis.processing.templates import Encoded, encode_plain, encode_turns
from visavis.processing.tokenizer import SpecialTokens
from visavis.processing.turns import TURNS
from visavis.prompt import Image, Message, Prompt, Text

ASK_SHORT = (
    "What is in this picture?",
    "What is this?",
    "What does the image show?",
    "What do you see?",
    "Name what is in the picture.",
    "Give this image a short title.",
)
ASK_LONG = (
    "Describe this picture.",
    "Describe the image.",
    "What does this picture show? Describe it.",
    "Write a description of this image.",
    "Describe what you see in the picture.",
)
LONG_WORDS = 9  # captions of more words answer ASK_LONG
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=[A-Z0-9(“\"])")


@dataclass(frozen=True)
class Example:
    """One encoded sequence about one picture (`row` of the feature store), or about none."""

    encoded: Encoded
    row: int | None


@dataclass(frozen=True)
class Encoder:
    """Everything that turns words into ids."""

    tokenizer: Tokenizer
    specials: SpecialTokens
    turns: str
    image_token_id: int
    tokens_per_image: int

    def conversation(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
        """Encode questions and answers about one picture, which stands before the first."""
        messages = []
        for number, (question, answer) in enumerate(pairs):
            parts = (Image(b""), Text(question)) if number == 0 else (Text(question),)
            messages += [Message("user", parts), Message("assistant", (Text(answer),))]
        return encode_turns(
            Prompt(tuple(messages)),
            TURNS[self.turns],
            self.tokenizer,
            self.specials,
            add_generation_prompt=False,
            **self._image(1),
        )

    def picture(self) -> Encoded:
        """Encode a picture alone, as it is embedded."""
        return self._plain(Image(b""))

    def text(self, text: str, max_tokens: int) -> Encoded:
        """Encode a text alone, as it is embedded, cut to `max_tokens`."""
        encoded = self._plain(text)
        return Encoded(
            encoded.token_ids[:max_tokens], encoded.image_slots, encoded.loss_mask[:max_tokens]
        )

    def _plain(self, item: Any) -> Encoded:
        prompt = Prompt.of(item)
        return encode_plain(
            prompt, self.tokenizer, self.specials, **self._image(len(prompt.images))
        )

    def _image(self, count: int) -> dict[str, Any]:
        return {
            "image_token_id": self.image_token_id,
            "tokens_per_image": [self.tokens_per_image] * count,
        }


def sentences(text: str) -> list[str]:
    """Return the sentences of a text."""
    return [piece.strip() for piece in _SENTENCE_END.split(text) if piece.strip()]


def shorten(text: str, max_words: int) -> str:
    """Return the first sentences that fit, at least one, itself cut at a word if need be."""
    kept: list[str] = []
    for sentence in sentences(text):
        if kept and len(" ".join([*kept, sentence]).split()) > max_words:
            break
        kept.append(sentence)
    words = " ".join(kept).split()
    return " ".join(words[:max_words])


def chat_pairs(
    record: Record, draw: random.Random, *, questions_per_example: int, max_caption_words: int
) -> list[list[tuple[str, str]]]:
    """Return the conversations a record gives: its questions in random groups, its caption.

    A group never asks for what an earlier answer of it gives away more than needed: order is
    random, so each question also comes first, where only the picture can answer it.
    """
    groups = []
    questions = list(record.questions)
    draw.shuffle(questions)
    for start in range(0, len(questions), questions_per_example):
        groups.append(questions[start : start + questions_per_example])
    if record.label:
        groups.append([(draw.choice(ASK_SHORT), record.label)])
    elif record.caption:
        answer = shorten(record.caption, max_caption_words)
        asked = ASK_LONG if len(answer.split()) > LONG_WORDS else ASK_SHORT
        groups.append([(draw.choice(asked), answer)])
    return groups


def text_to_match(record: Record, draw: random.Random) -> str:
    """Return one text of a record: mostly its caption or a part of it, sometimes another."""
    chance = draw.random()
    if record.also and (chance < 0.2 or not record.caption):
        return draw.choice(record.also)
    parts = sentences(record.caption)
    if chance < 0.6 or len(parts) == 1:
        return record.caption
    start = draw.randrange(len(parts))
    return " ".join(parts[start : start + draw.randint(1, 2)])


class Sampler:
    """Draws items of several pools by weight; each pool is shuffled anew when it is used up.

    `state()` is all there is to resume from.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        self.sizes = {name: size for name, size in sizes.items() if size}
        self.weights = [weights[name] for name in self.sizes]
        self.draw = random.Random(seed)
        self.orders: dict[str, list[int]] = {name: [] for name in self.sizes}

    def next(self) -> tuple[str, int]:
        """Return the pool and the number of the next item."""
        name = self.draw.choices(list(self.sizes), self.weights)[0]
        if not self.orders[name]:
            self.orders[name] = list(range(self.sizes[name]))
            self.draw.shuffle(self.orders[name])
        return name, self.orders[name].pop()

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on exactly here."""
        return {
            "draw": self.draw.getstate(),
            "orders": {k: list(v) for k, v in self.orders.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.draw.setstate(state["draw"])
        self.orders = {name: list(order) for name, order in state["orders"].items()}
