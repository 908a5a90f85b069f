"""Choosing the next token from scores. Knows nothing of models, caches or text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visavis.errors import InputError


def make_sampler(temperature: float, seed: int | None) -> Callable[[Tensor], int]:
    """Return a function from scores [vocab] to a token id.

    Args:
        temperature: 0 picks the highest score; otherwise scores are divided by it and a token is
            drawn from their softmax.
        seed: makes draws repeatable; None draws anew each time.

    Raises:
        InputError: the temperature is negative or not a number.
    """
    if not 0 <= temperature < float("inf"):
        raise InputError(
            f"temperature is {temperature}, expected a number of at least 0: 0 for the likeliest "
            "answer, about 0.7 for variety."
        )
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def sample(logits: Tensor) -> int:
        chances = (logits.float().cpu() / temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=generator))

    return sample
