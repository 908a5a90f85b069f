"""Many encoded sequences become one packed stream, within a token budget.

Knows token ids and slots; opens no image and runs no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from visavis.model.batch import PackedBatch

if TYPE_CHECKING:
    from visavis.processing.chat_template import Encoded


def pack(items: Sequence[Encoded], *, start: int = 0) -> PackedBatch:
    """Lay sequences end to end; pixels, features or image tokens are set by the caller.

    Args:
        start: position of each sequence's first token (tokens before it are cached).
    """
    lengths = tuple(len(item.token_ids) for item in items)
    image_positions: list[int] = []
    offset = 0
    for item, length in zip(items, lengths, strict=True):
        for first, count in item.image_slots:
            image_positions += range(offset + first, offset + first + count)
        offset += length
    return PackedBatch(
        token_ids=torch.tensor([token for item in items for token in item.token_ids]),
        positions=_positions(items, start),
        lengths=lengths,
        image_positions=torch.tensor(image_positions) if image_positions else None,
    )


def _positions(items: Sequence[Encoded], start: int) -> torch.Tensor:
    """Return positions within each sequence, [T], or [3, T] if any counts along three axes."""
    rows = [
        torch.arange(start, start + len(item.token_ids))
        if item.positions is None
        else item.positions + start
        for item in items
    ]
    if any(row.dim() == 2 for row in rows):
        rows = [row.expand(3, -1) for row in rows]
    return torch.cat(rows, -1)


def next_token_labels(items: Sequence[Encoded]) -> torch.Tensor:
    """Return int64 [T]: the token each position should predict, -100 where the mask is off."""
    labels: list[int] = []
    for item in items:
        following = zip(item.token_ids[1:], item.loss_mask[1:], strict=True)
        labels += [token if kept else -100 for token, kept in following] + [-100]
    return torch.tensor(labels)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield groups of indices, longest sequences first, each within `budget` tokens.

    A sequence longer than the budget gets a group of its own. Longest first: what will not fit
    in memory fails at once.
    """
    group: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and used + lengths[index] > budget:
            yield group
            group, used = [], 0
        group.append(index)
        used += lengths[index]
    if group:
        yield group
