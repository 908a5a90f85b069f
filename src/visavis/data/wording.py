"""How records are put into words: questions about a picture, and texts that it should be found by.

Knows wording and drawing order; no tokens and no files.
"""

from __future__ import annotations

import random
import re

from visavis.data.records import Record

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
    if chance < 0.6 or len(parts) <= 1:
        return record.caption
    start = draw.randrange(len(parts))
    return " ".join(parts[start : start + draw.randint(1, 2)])
