"""Loss masks of conversations that a jinja chat template renders.

A template that marks its answers with `{% generation %}` is taken at its word. For any other, the
messages are rendered up to each answer, with the generation prompt and with the answer, and the
texts are compared. The mask follows the named chat formats: the answer and the token that ends the
turn are learned; white space between the generation prompt and the answer is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from visavis.errors import InputError
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.tokenizer import SpecialTokens

Messages = Sequence[dict[str, Any]]


class Render(Protocol):
    """Renders messages; `marks` are written around each `{% generation %}` block."""

    def __call__(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        marks: tuple[str, str] = ("", ""),
    ) -> str: ...


class AnswerMaskError(InputError):
    """A chat template from which the loss mask of a conversation cannot be found."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(
            "the model's own chat template does not show which tokens belong to the answer in "
            f"message {number + 1}: {reason}. Set `chat_template` in `model` of the recipe (or in "
            "the stage) to the named format that the model was trained with, one of: "
            f"{', '.join(sorted(CHAT_FORMATS))}"
        )


def turn_ends(tokenizer: Tokenizer, specials: SpecialTokens) -> re.Pattern[str]:
    """Return a pattern for the texts of the tokens that end a turn; matches nothing if none."""
    texts = [tokenizer.id_to_token(number) or "" for number in specials.eot_ids]
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def answer_mask(
    render: Render, messages: Messages, ends: re.Pattern[str], marks: tuple[str, str]
) -> list[bool]:
    """Return for each character of the rendered messages whether it is learned.

    Args:
        render: renders the chat template.
        messages: without the generation prompt; at least one.
        ends: the texts of the tokens that end a turn.
        marks: two texts that occur in no message.

    Raises:
        AnswerMaskError: the template renders an answer differently alone and in the conversation,
            or its generation prompt is no prefix of the answered turn.
        InputError: the template refuses the messages.
    """
    whole = render(messages, False)
    spans = _generation_spans(render, messages, whole, marks)
    if spans is None:
        spans = [
            _answer_span(render, messages, number, whole, ends)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    mask = [False] * len(whole)
    for start, end in spans:
        mask[start:end] = [True] * (end - start)
    return mask


def _generation_spans(
    render: Render, messages: Messages, whole: str, marks: tuple[str, str]
) -> list[tuple[int, int]] | None:
    """Return the `{% generation %}` blocks of a text; None if they cannot be located."""
    pieces = re.split("|".join(map(re.escape, marks)), render(messages, False, marks))
    if len(pieces) < 3 or "".join(pieces) != whole:
        return None
    spans, at = [], 0
    for number, piece in enumerate(pieces):
        if number % 2:  # blocks do not nest
            spans.append((at, at + len(piece)))
        at += len(piece)
    return spans


def _answer_span(
    render: Render, messages: Messages, number: int, whole: str, ends: re.Pattern[str]
) -> tuple[int, int]:
    """Return the first character of an answer and the character after its end token."""
    try:
        asked = render(messages[:number], True)
        without_prompt = render(messages[:number], False)
        answered = render(messages[: number + 1], False)
    except InputError as error:
        raise AnswerMaskError(number, f"it does not render the turns up to it ({error})") from error
    if not answered.startswith(asked):
        raise AnswerMaskError(
            number, "the turn with the answer does not start with its generation prompt"
        )
    if not whole.startswith(asked):
        raise AnswerMaskError(number, "later messages change the turns before it")
    start, turn = len(asked), answered[len(asked) :]
    end = ends.search(turn)
    if end is None:
        stop = len(answered)
        alike = whole.startswith(turn, start)
    else:  # a template may leave the reasoning out of earlier answers, and end them differently
        found = ends.search(whole, start)
        stop = found.end() if found else start
        kept = whole[start : found.start()] if found else ""
        alike = found is not None and (
            kept == turn[: end.start()] or (bool(kept) and turn[: end.start()].endswith(kept))
        )
    if not alike:
        raise AnswerMaskError(number, "it renders the answer differently once messages follow")
    no_prompt = asked == without_prompt
    return start + _before_answer(messages[number], whole[start:stop], no_prompt, number), stop


def _before_answer(message: dict[str, Any], turn: str, no_prompt: bool, number: int) -> int:
    """Return how many characters of a turn come before what is learned: white space, and for
    templates without a generation prompt all that stands before the answer."""
    content = message["content"]
    if not isinstance(content, str):
        content = next((part["text"] for part in content if part["type"] == "text"), "")
    for text in (content, content.strip()):
        at = turn.find(text)
        if at >= 0 and (no_prompt or not turn[:at].strip()):
            return at
    if not turn:
        raise AnswerMaskError(number, "it leaves the answer out")
    if no_prompt:
        raise AnswerMaskError(
            number, "it has no generation prompt, and the answer is not rendered as it is"
        )
    return 0
