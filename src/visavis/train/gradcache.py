"""Exact gradients of a loss over a batch that does not fit in memory (GradCache, Gao et al. 2021).

    1. encode chunk by chunk without gradients, keeping each chunk's random state
    2. the loss over all vectors, and its gradient with respect to them
    3. encode each chunk again with that random state, and backpropagate its share of the gradient

If `encode` reads images from disk, at most one chunk of them is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from visavis.memory import give_back

Chunk = TypeVar("Chunk")

TRIM_EVERY = 2  # chunks; to touch the memory anew takes time


def cached_backward(
    chunks: Sequence[Chunk],
    encode: Callable[[Chunk], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    *,
    backward: Callable[[Tensor, Tensor | None], None] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
    sync_last: bool = True,
    factor: float = 1.0,
) -> Tensor:
    """Add the gradients of `loss_of(all vectors)` to the parameters; return the loss, detached.

    Args:
        encode: a chunk's vectors [n, D], the same every time but for random numbers.
        loss_of: a scalar of the vectors of all chunks [N, D], in their order.
        backward: goes back from a loss, or from vectors with the gradient that a loss gave them.
        no_sync: entered around every backward pass but the last, so that devices exchange
            gradients once; around the last too without `sync_last`.
        factor: what gradients are multiplied by (where devices average what should be summed).
    """
    states, parts = [], []
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            states.append(RandomState())
            parts.append(encode(chunk))
            _give_back(number)
    lengths = [len(part) for part in parts]
    vectors = torch.cat(parts).requires_grad_()
    parts.clear()
    loss = loss_of(vectors)
    backward(loss, None)
    assert vectors.grad is not None
    gradients = (vectors.grad * factor).split(lengths)
    loss = loss.detach()
    del vectors
    after = RandomState()
    for number, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True)):
        state.restore()
        last = sync_last and number == len(chunks) - 1
        with nullcontext() if last else no_sync():
            backward(encode(chunk), gradient)
        _give_back(number)
    after.restore()
    return loss


def token_chunks(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return indices in order, cut into chunks of at most `budget` tokens (at least one item)."""
    chunks: list[list[int]] = []
    used = budget + 1
    for index, length in enumerate(lengths):
        if used + length > budget:
            chunks.append([])
            used = 0
        chunks[-1].append(index)
        used += length
    return chunks


def _give_back(number: int) -> None:
    """Return freed memory to the system after every few chunks; glibc would keep what lies between
    the little that each leaves behind, more with every one."""
    if number % TRIM_EVERY == TRIM_EVERY - 1:
        give_back()


class RandomState:
    """The random numbers that dropout would draw next, on every device in use."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Draw the same numbers again from here on."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
