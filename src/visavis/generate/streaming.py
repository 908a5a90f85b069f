"""Incremental detokenization: the text of an answer while its tokens are generated."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from visavis.generate.engine import GeneratedSequence
from visavis.processing.tokenizer_check import no_panic

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 4  # tokens before new ones that are decoded with them


@dataclass(frozen=True)
class Usage:
    """Tokens read and written; image tokens count as prompt tokens. `cached_tokens` of them were
    read for an earlier prompt that began the same way."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds from the call to the first token, and from there to the last."""

    prefill_s: float
    decode_s: float


@dataclass
class Reply:
    """An answer. Iterating yields its text piece by piece; the other fields are whole afterwards.
    Leaving the iteration ends the answer and returns its memory.

    `finish_reason` is "stop" when the model ended its turn or said a stop text, "length" when the
    limit did.
    """

    pieces: Generator[str] = field(repr=False)
    text: str = ""
    usage: Usage = Usage(0, 0)
    timings: Timings = Timings(0.0, 0.0)
    finish_reason: str = ""

    def __iter__(self) -> Iterator[str]:
        with closing(self.pieces):
            yield from self.pieces


class Answer:
    """One reply in the making: what its sequence says, as text."""

    def __init__(
        self,
        sequence: GeneratedSequence,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        *,
        started: float,
    ) -> None:
        self.sequence, self.tokenizer, self.stops = sequence, tokenizer, stops
        self.reply = Reply(pieces=_nothing())
        self.started = started  # of time.perf_counter, when the question came
        self.first = 0.0  # when the first token came
        self.seen = 0  # tokens looked at
        self.shown = 0  # tokens whose text is in the reply
        parts = (stop[:length] for stop in stops for length in range(1, len(stop)))
        self.unfinished = ("\ufffd", *parts)

    def update(self) -> str:
        """Return the text that has become certain since the last call; end the sequence at a stop
        text; fill in the reply's other fields when it has ended."""
        sequence, found = self.sequence, ""
        while self.seen < len(sequence.tokens):
            self.seen += 1
            self.first = self.first or time.perf_counter()
            piece = self._text(sequence.tokens[: self.seen])
            places = [piece.index(stop) for stop in self.stops if stop in piece]
            if places:
                del sequence.tokens[self.seen :]
                sequence.stop()
                return found + self._end(piece[: min(places)], "stop")
            if piece and not piece.endswith(self.unfinished):
                self.shown = self.seen
                found += piece
                self.reply.text += piece
        if not sequence.done:
            return found
        limited = len(sequence.tokens) >= sequence.max_new_tokens
        return found + self._end(self._text(sequence.tokens), "length" if limited else "stop")

    def _end(self, piece: str, reason: str) -> str:
        sequence, ended = self.sequence, time.perf_counter()
        self.first = self.first or ended
        self.shown = len(sequence.tokens)
        self.reply.text += piece
        self.reply.usage = Usage(
            sequence.num_prompt_tokens, len(sequence.tokens), sequence.num_reused
        )
        self.reply.timings = Timings(self.first - self.started, ended - self.first)
        self.reply.finish_reason = reason
        return piece

    def _text(self, ids: list[int]) -> str:
        """Return the text that tokens after those shown add to what precedes them.

        A few tokens before are decoded too, because a token's text may depend on its neighbours.
        """
        start = max(0, self.shown - CONTEXT)
        with no_panic("decoding an answer"):
            before = self.tokenizer.decode(ids[start : self.shown], skip_special_tokens=True)
            return self.tokenizer.decode(ids[start:], skip_special_tokens=True)[len(before) :]


def _nothing() -> Generator[str]:
    yield from ()
