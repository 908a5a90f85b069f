"""Beam search: several beginnings of an answer grow side by side, and the likeliest whole one wins.

    scores of each beam ──► the best continuations of all ──► those that ended, kept by their score
                                                        └──► the beams of the next step

The formulas, the order and what is compared with what are those of transformers' `generate`. Keeps
the books only: the engine reads tokens and moves caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visavis.errors import InputError


@dataclass(frozen=True)
class BeamSettings:
    """Settings of beam search, with the meaning they have in transformers' `generate`.

    Args:
        number: beams; 1: no beam search.
        length_penalty: an answer's score is the sum of its tokens' log-probabilities over its
            length to this power: above 0 prefers longer answers, below 0 shorter ones.
        early_stopping: end as soon as `number` answers are complete; False: when the best beam is
            now worse than the worst of them; "never": when it cannot become better.

    Raises:
        InputError: a number is out of its range.
    """

    number: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.number < 1:
            raise InputError(f"beams is {self.number}, expected 1 (no search) or more.")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(
                f"early_stopping is {self.early_stopping!r}, expected True, False or 'never'."
            )


class BeamSearch:
    """One answer's beams.

    Attributes:
        tokens: what each beam says, the likeliest first.
        ended: whole answers and their scores, the best first.
    """

    def __init__(
        self, beams: BeamSettings, *, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> None:
        self.beams, self.limit, self.stop_ids = beams, max_new_tokens, stop_ids
        self.tokens: list[list[int]] = [[]]
        self.totals = torch.zeros(1)
        self.ended: list[tuple[float, list[int]]] = []

    @property
    def best(self) -> list[int]:
        return self.ended[0][1]

    def take(self, scores: Tensor) -> list[int]:
        """Let each beam grow by a token; return which beam each new one continues, empty when the
        search is over.

        Args:
            scores: of the next token of each beam, [n, vocab].
        """
        number, length = self.beams.number, len(self.tokens[0]) + 1
        chances = scores.float().log_softmax(-1) + self.totals.to(scores.device)[:, None]
        kept = number * max(2, 1 + len(self.stop_ids))  # enough to go on if every beam ended
        totals, places = chances.flatten().topk(min(kept, chances.numel()))
        totals, vocab = totals.cpu(), chances.shape[1]
        found = [(place // vocab, place % vocab) for place in places.tolist()]
        ends = [token in self.stop_ids or length == self.limit for _, token in found]
        for rank, (beam, token) in enumerate(found[:number]):
            if ends[rank]:
                said = self.tokens[beam] + ([token] if token not in self.stop_ids else [])
                self.ended.append((float(totals[rank] / self._weight(length)), said))
        self.ended = sorted(self.ended, key=lambda one: -one[0])[:number]
        going = [rank for rank, end in enumerate(ends) if not end][:number]
        if not going or self._is_over(float(totals[going[0]]), length):
            return []
        self.tokens = [[*self.tokens[found[rank][0]], found[rank][1]] for rank in going]
        self.totals = totals[going]
        return [found[rank][0] for rank in going]

    def _is_over(self, best: float, length: int) -> bool:
        """Return whether no beam can improve on the complete answers."""
        if len(self.ended) < self.beams.number:
            return False
        early = self.beams.early_stopping
        hoped = self.limit if early == "never" and self.beams.length_penalty > 0 else length
        return early is True or best / self._weight(hoped) <= self.ended[-1][0]

    def _weight(self, length: int) -> float:
        return float(length**self.beams.length_penalty)
