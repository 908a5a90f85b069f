"""Sampling: choose the next token from logits.

Logits pass, in this order: the repetition penalty, the caller's bias, the constraint of a grammar,
the temperature, then top-k, top-p and min-p. The order and the formulas are transformers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from visavis.errors import InputError


class Constraint(Protocol):
    """A constraint on the next token (see `structured_output.py`)."""

    def forbid(self, scores: Tensor) -> Tensor:
        """Return scores [vocab] with tokens that may not come at minus infinity."""
        ...

    def accept(self, token: int) -> None:
        """Note what has been said."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: 0 picks the highest score; otherwise scores are divided by it and a token is
            drawn from their softmax.
        top_k: of the k likeliest tokens only; 0: of all.
        top_p: of the likeliest tokens that together reach this share (nucleus sampling).
        min_p: of tokens at least this share as likely as the likeliest.
        repetition_penalty: scores of tokens that were read or said are divided by it (negative
            ones multiplied), CTRL's (Keskar et al. 2019); 1: none.
        logit_bias: added to the scores of these tokens.
        seed: makes draws repeatable; None draws anew each time.

    Raises:
        InputError: a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        hint = "0 for the likeliest answer, about 0.7 for variety"
        for name, value, fits, expected in (
            (
                "temperature",
                self.temperature,
                0 <= self.temperature < math.inf,
                f"0 or more: {hint}",
            ),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "above 0; 1 changes nothing",
            ),
        ):
            if not fits:
                raise InputError(f"{name} is {value}, expected {expected}.")


class Sampler:
    """Draws one sequence's tokens.

    Args:
        read: ids of the prompt, for the penalty.
        constraint: what may be said; None: anything.
    """

    def __init__(
        self,
        settings: Sampling,
        *,
        read: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.settings, self.constraint = settings, constraint
        self.seen = set(read) if settings.repetition_penalty != 1 else set()
        self.plain = (
            settings.repetition_penalty == 1 and not settings.logit_bias and constraint is None
        )
        self.generator = torch.Generator()
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)

    def __call__(self, scores: Tensor) -> int:
        """Return the next token of scores [vocab]."""
        if not self.plain:
            scores = self.adjusted(scores)
        if self.settings.temperature == 0:
            token = int(scores.argmax())
        else:
            chances = self.cut(scores.float().cpu() / self.settings.temperature).softmax(-1)
            token = int(torch.multinomial(chances, 1, generator=self.generator))
        if self.constraint is not None:
            self.constraint.accept(token)
        if self.settings.repetition_penalty != 1:
            self.seen.add(token)
        return token

    def adjusted(self, scores: Tensor) -> Tensor:
        """Return scores after the penalty, the bias and the constraint."""
        settings, scores = self.settings, scores.float().clone()
        if self.seen:
            ids = torch.tensor(sorted(self.seen), device=scores.device)
            said, penalty = scores[ids], settings.repetition_penalty
            scores[ids] = torch.where(said < 0, said * penalty, said / penalty)
        for token, bias in settings.logit_bias.items():
            if not 0 <= token < len(scores):
                raise InputError(
                    f"logit_bias names the token {token}, but this model's ids go from 0 to "
                    f"{len(scores) - 1}."
                )
            if math.isnan(bias) or bias == math.inf:
                raise InputError(
                    f"logit_bias of the token {token} is {bias}, expected a finite number, or "
                    "minus infinity to forbid the token."
                )
            scores[token] += bias
        return scores if self.constraint is None else self.constraint.forbid(scores)

    def cut(self, scores: Tensor) -> Tensor:
        """Return scores with the unlikely ones at minus infinity."""
        settings = self.settings
        if 0 < settings.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(settings.top_k)[0][-1], -torch.inf)
        if settings.top_p < 1:
            ordered, order = scores.sort()
            unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - settings.top_p
            unlikely[-1] = False
            scores = scores.masked_fill(
                torch.empty_like(unlikely).scatter(0, order, unlikely), -torch.inf
            )
        if settings.min_p > 0:
            chances = scores.softmax(-1)
            scores = scores.masked_fill(chances < settings.min_p * chances.max(), -torch.inf)
        return scores
