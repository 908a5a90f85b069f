"""Guesses at what comes next, from what was read and said (prompt lookup decoding, Saxena 2023).

What followed the last two tokens when they last stood together may follow again: in answers that
quote, correct or sum up their prompt it mostly does. Knows tokens only; the engine reads a guess
in one pass with the last token and keeps what its sampler says too.
"""

from __future__ import annotations

from collections.abc import Iterable

LAST = 2  # tokens that are looked up
DRAFT = 3  # tokens of a guess: with the last token four rows, what the packed kernels take at once


class PromptLookup:
    """The tokens of one sequence, and where pairs of them stood last.

    Args:
        read: the prompt's tokens.
    """

    def __init__(self, read: Iterable[int]) -> None:
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # of some tokens, where what followed stands
        self.right = False  # whether the last guess was, were it used or not
        for token in read:
            self._add(token)

    def say(self, token: int) -> None:
        """Note the answer's next token."""
        if guess := self._guess():
            self.right = guess[0] == token
        self._add(token)

    def draft(self) -> list[int]:
        """Return draft tokens; none unless the last draft was right."""
        return self._guess() if self.right else []

    def _add(self, token: int) -> None:
        if len(self.tokens) >= LAST:
            self.after[tuple(self.tokens[-LAST:])] = len(self.tokens)
        self.tokens.append(token)

    def _guess(self) -> list[int]:
        start = self.after.get(tuple(self.tokens[-LAST:]), len(self.tokens))
        return self.tokens[start : start + DRAFT]
